"""Describable Textures: 47 textures, 3,760 training (train and val of the first partition) and 1,880 test images.

    python -m ft_jax.data.prepare tfds:dtd --data_dir=DATA
    python -m ft_jax.data.prepare tfds:imagenet2012 --data_dir=DATA
    python main.py --config=configs/dtd.py --config.data_dir=DATA             # ResNet-18, supervised weights
    python main.py --config=configs/dtd.py:mocov2 --config.data_dir=DATA      # ResNet-50, MoCo-v2 weights

The hyper-parameters are CUB's; the paper's for this data set were not found (see configs/liu2022.py).
"""

from ml_collections import ConfigDict

from configs import liu2022


def get_config(recipe: str = 'supervised') -> ConfigDict:
  config = liu2022.get_config(recipe)
  config.target.name = 'tfds:dtd'
  config.target.train = 'train+validation'
  config.target.test = 'test'
  config.target.metric = 'top1'
  return config
