"""CUB-200-2011: 200 birds, 5,994 training and 5,794 test images.

    python -m ft_jax.data.prepare tfds:caltech_birds2011 --data_dir=DATA
    python -m ft_jax.data.prepare tfds:imagenet2012 --data_dir=DATA
    python main.py --config=configs/cub.py --config.data_dir=DATA             # ResNet-18, supervised weights
    python main.py --config=configs/cub.py:mocov2 --config.data_dir=DATA      # ResNet-50, MoCo-v2 weights

The hyper-parameters are the published ones (see configs/liu2022.py).
"""

from ml_collections import ConfigDict

from configs import liu2022


def get_config(recipe: str = 'supervised') -> ConfigDict:
  config = liu2022.get_config(recipe)
  config.target.name = 'tfds:caltech_birds2011'
  config.target.train = 'train'
  config.target.test = 'test'
  config.target.metric = 'top1'
  return config
