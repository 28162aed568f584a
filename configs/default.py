"""Every field and its default: see ft_jax/config.py, where they are defined.

The other files in this folder call `get_config()` and change some of its values; a file of your own does the same.
"""

from ft_jax.config import get_config, train_config

__all__ = ['get_config', 'train_config']
