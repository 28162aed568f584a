"""The demo: real handwritten digits, no download, under two minutes on two CPU cores.

    python main.py --config=configs/digits.py

The source has digits of nine writers (10 classes) and patches of two photographs (16 classes). The target has 80
digits of two other writers, inverted and upside down; val and test are from three more writers. A small ResNet is
pre-trained on the source, ten classes are selected (they should be the digits), and the network is fine-tuned on both
together.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.target.name = 'digits:target'
  config.target.val = 'val'
  config.source.name = 'digits:pool'
  config.image_size = 32
  config.augment.short_side = 32  # an 8x8 image has no border to crop
  config.augment.scale = (0.6, 1.0)
  config.augment.flip = False  # a mirrored digit is a different one
  config.model.name = 'resnet18'
  config.model.width = 16
  config.model.weights = 'pretrain'
  config.selection.size = 10

  config.pretrain.batch_size = 32
  config.pretrain.epochs = 24.0
  config.pretrain.learning_rate = 0.05
  config.pretrain.learning_rate_groups = (('.*', 1.0),)
  config.pretrain.schedule = 'cosine'
  config.pretrain.warmup = 0.1
  config.pretrain.eval_every = 200

  config.train.batch_size = 32
  config.train.steps = 300
  config.train.learning_rate = 0.03
  config.train.schedule = 'cosine'
  config.train.warmup = 0.05
  config.train.eval_every = 50
  return config
