"""Writes TFDS sets as ArrayRecord, which is read without TensorFlow; the command is in __main__.py, see docs/data.md.

The files of a set are downloaded (download.py) or found in a folder of the user's (originals.py), unpacked
(archives.py), and written by TFDS's builder of the set, or one of builders/ (write.py).
"""

from ft_jax.data.prepare.write import prepare

__all__ = ['prepare']
