"""The paper's experiment in miniature, for 2 CPU cores: 64-pixel images, a half-width ResNet-18.

    python main.py --config=configs/miniature.py:pretrain --config.data_dir=DATA --workdir=runs/miniature/pretrain
    python main.py --config=configs/miniature.py --config.data_dir=DATA --config.target.name=folder:pets --workdir=runs/miniature/pets

DATA holds folders of <split>/<class>/<image>: tiny_imagenet (the pool), pets, caltech101. The settings are ours.
The README has the table that comes of it; it says how the methods compare here and nothing about the paper's numbers.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(job: str = 'compare') -> ConfigDict:
  """`compare` fine-tunes with each method and seed, `finetune` once; `pretrain` makes the weights first."""
  config = default.get_config()
  config.job = job
  config.source.name = 'folder:tiny_imagenet'
  config.image_size = 64
  config.augment.short_side = 64  # the images have 64 pixels: nothing is cut off
  config.augment.scale = (0.3, 1.0)
  config.augment.antialias = True  # small images: the time is the network's
  config.model.name = 'resnet18'
  config.model.width = 32
  if job == 'pretrain':
    config.train.batch_size = 128
    config.train.epochs = 12.0
    config.train.learning_rate = 0.1
    config.train.learning_rate_groups = (('.*', 1.0),)
    config.train.schedule = 'cosine'
    config.train.warmup = 0.05
    config.train.weight_decay = 5e-4
    return config
  config.model.weights = 'runs/miniature/pretrain'
  config.target.name = 'folder:pets'
  config.selection.size = 20
  config.source_weight = 1.0
  config.train.batch_size = 64
  config.train.steps = 400
  config.train.learning_rate = 0.01
  config.train.schedule = 'cosine'
  config.train.warmup = 0.05
  return config
