"""Supervised pre-training on an image set; the workdir is then a `model.weights`.

    python main.py --config=configs/pretrain.py --config.source.name=folder:/data/photos

Ours, not a paper's: SGD with a cosine schedule, the recipe of torchvision's ResNets in fewer epochs.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.job = 'pretrain'
  config.source.test = ''  # the held-out part of train is enough to watch it
  config.train.batch_size = 256
  config.train.epochs = 90.0
  config.train.learning_rate = 0.1
  config.train.learning_rate_groups = (('.*', 1.0),)  # everything is new: no faster head
  config.train.schedule = 'cosine'
  config.train.warmup = 0.05
  config.train.weight_decay = 1e-4
  config.train.keep_epochs = (1, 2, 3, 5, 8, 13, 21, 34, 55)  # for configs/study.py: which of them to start from
  return config
