"""Pre-training on an image set; its workdir can then be used as `model.weights`.

    python main.py --config=configs/pretrain.py --config.source.name=folder:/data/photos

learns the labels. The recipe is ours, not a paper's: SGD with a cosine schedule, like torchvision's for ResNets but
with fewer epochs. Without labels, by the published recipes of MoCo-v2 (for 256 images a step; at least 200 epochs) and
BYOL (for 4,096; scaled down here as published):

    python main.py --config=configs/pretrain.py:moco --config.source.name=folder:/data/photos
    python main.py --config=configs/pretrain.py:byol --config.source.name=folder:/data/photos

docs/weights.md describes them.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(kind: str = '') -> ConfigDict:
  """`moco` and `byol` use no labels; the default does."""
  if kind not in RECIPES:
    raise ValueError(f'configs/pretrain.py:{kind} is not known; known: {", ".join(RECIPES)}')
  config = default.get_config()
  config.job = 'pretrain'
  config.source.test = ''  # val, split off train, is enough to monitor it
  config.train.batch_size = 256
  config.train.learning_rate_groups = (('.*', 1.0),)  # all layers are new: the head needs no higher rate
  config.train.schedule = 'cosine'
  RECIPES[kind](config)
  return config


def supervised(config: ConfigDict) -> None:
  config.train.epochs = 90.0
  config.train.learning_rate = 0.1
  config.train.warmup = 0.05
  config.train.weight_decay = 1e-4
  config.train.keep_epochs = (1, 2, 3, 5, 8, 13, 21, 34, 55)  # configs/study.py compares these


def moco(config: ConfigDict) -> None:
  config.methods.moco.queue = 65536
  config.augment.scale = (0.2, 1.0)
  config.augment.jitter = (0.4, 0.4, 0.4, 0.1)
  config.augment.grey = 0.2
  config.augment.blur = 0.5
  config.train.epochs = 200.0
  config.train.learning_rate = 0.03
  config.train.weight_decay = 1e-4
  config.train.nesterov = False


def byol(config: ConfigDict) -> None:
  config.methods.byol.enabled = True
  config.augment.jitter = (0.4, 0.4, 0.2, 0.1)
  config.augment.grey = 0.2
  config.augment.blur = 1.0  # of the first view; the second one's recipe is the method's
  config.train.epochs = 1000.0
  config.train.optimizer = 'lars'
  config.train.learning_rate = 0.2  # published: times batch / 256
  config.train.warmup = 0.01
  config.train.weight_decay = 1.5e-6
  config.train.weight_decay_groups = (('.*/(bias|scale)', 0.0), ('.*', 1.0))
  config.train.nesterov = False


RECIPES = {'': supervised, 'moco': moco, 'byol': byol}
