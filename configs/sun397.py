"""SUN397: 397 scenes, the first official partition: 50 training and 50 test images per class.

    python -m ft_jax.data.prepare tfds:sun397/standard-part1-120k --data_dir=DATA --from=FOLDER  # its link is dead
    python -m ft_jax.data.prepare tfds:imagenet2012 --data_dir=DATA
    python main.py --config=configs/sun397.py --config.data_dir=DATA             # ResNet-18, supervised weights
    python main.py --config=configs/sun397.py:mocov2 --config.data_dir=DATA      # ResNet-50, MoCo-v2 weights

The hyper-parameters are CUB's; the paper's for this data set, and which of the ten partitions it used, were not found
(see configs/liu2022.py). TFDS stores these images with at most 120,000 pixels.
"""

from ml_collections import ConfigDict

from configs import liu2022


def get_config(recipe: str = 'supervised') -> ConfigDict:
  config = liu2022.get_config(recipe)
  config.target.name = 'tfds:sun397/standard-part1-120k'
  config.target.train = 'train'
  config.target.test = 'test'
  config.target.metric = 'top1'
  return config
