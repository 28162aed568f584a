"""Supervised pre-training on an image set; its workdir can then be used as `model.weights`.

    python main.py --config=configs/pretrain.py --config.source.name=folder:/data/photos

The recipe is ours, not a paper's: SGD with a cosine schedule, like torchvision's for ResNets but with fewer epochs.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.job = 'pretrain'
  config.source.test = ''  # val, split off train, is enough to monitor it
  config.train.batch_size = 256
  config.train.epochs = 90.0
  config.train.learning_rate = 0.1
  config.train.learning_rate_groups = (('.*', 1.0),)  # all layers are new: the head needs no higher rate
  config.train.schedule = 'cosine'
  config.train.warmup = 0.05
  config.train.weight_decay = 1e-4
  config.train.keep_epochs = (1, 2, 3, 5, 8, 13, 21, 34, 55)  # configs/study.py compares these
  return config
