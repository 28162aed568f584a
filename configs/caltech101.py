"""Caltech-101: 101 classes without the background, 30 training images per class, sampled by
`config.seed`; all others are test images.

    python -m ft_jax.data.prepare tfds:caltech101 --data_dir=DATA
    python -m ft_jax.data.prepare tfds:imagenet2012 --data_dir=DATA
    python main.py --config=configs/caltech101.py --config.data_dir=DATA             # ResNet-18, supervised weights
    python main.py --config=configs/caltech101.py:mocov2 --config.data_dir=DATA      # ResNet-50, MoCo-v2 weights

The hyper-parameters are CUB's; the paper's for this data set were not found (see configs/liu2022.py). That all other
images are used for testing is our choice.
"""

from ml_collections import ConfigDict

from configs import liu2022


def get_config(recipe: str = 'supervised') -> ConfigDict:
  config = liu2022.get_config(recipe)
  config.target.name = 'tfds:caltech101'
  config.target.train = 'train+test'
  config.target.train_per_class = 30
  config.target.without = ('background_google',)
  config.target.test = 'rest'
  config.target.metric = 'mean_per_class'
  return config
