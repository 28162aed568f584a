"""The paper's experiment in miniature, for 2 CPU cores: 64-pixel images, a half-width ResNet-18.

    python main.py --config=configs/miniature.py:pretrain --config.data_dir=DATA --workdir=runs/miniature/pretrain
    python main.py --config=configs/miniature.py --config.data_dir=DATA --config.target.name=folder:pets \
        --workdir=runs/miniature/pets

and the study of which checkpoint to start from, with a quarter-width network whose pre-training keeps its
checkpoints:

    python main.py --config=configs/miniature.py:history --config.data_dir=DATA --workdir=runs/miniature/history
    python main.py --config=configs/miniature.py:study --config.data_dir=DATA --workdir=runs/miniature/study

DATA holds folders of <split>/<class>/<image>: tiny_imagenet (the source), pets, caltech101, cub50. The settings are
ours. docs/ has the resulting tables; they compare the methods at this scale and say nothing about the papers'
numbers.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(job: str = 'compare') -> ConfigDict:
  """`compare` and `finetune` start from the weights of `pretrain`, `study` from those of `history`."""
  config = default.get_config()
  config.job = 'pretrain' if job == 'history' else job
  config.source.name = 'folder:tiny_imagenet'
  config.image_size = 64
  config.augment.short_side = 64  # the images have 64 pixels: no crop
  config.augment.scale = (0.3, 1.0)
  config.augment.antialias = True  # images are small: decoding is not the bottleneck
  config.model.name = 'resnet18'
  config.model.width = 16 if job in ('history', 'study') else 32
  if config.job == 'pretrain':
    config.train.batch_size = 128
    config.train.epochs = 20.0 if job == 'history' else 12.0
    config.train.keep_epochs = (1, 2, 3, 5, 8, 11, 14, 17, 20) if job == 'history' else ()
    config.train.learning_rate = 0.1
    config.train.learning_rate_groups = (('.*', 1.0),)
    config.train.schedule = 'cosine'
    config.train.warmup = 0.05
    config.train.weight_decay = 5e-4
    return config
  config.target.name = 'folder:pets'
  config.train.batch_size = 64
  config.train.steps = 150 if job == 'study' else 400
  config.train.learning_rate = 0.01
  config.train.schedule = 'cosine'
  config.train.warmup = 0.05
  if job == 'study':
    config.source.name = ''
    config.selection.method = 'none'
    config.checkpoints = 'runs/miniature/history'
    config.study.targets = ('folder:caltech101', 'folder:cub50')
    config.train.eval_every = 50
    return config
  config.model.weights = 'runs/miniature/pretrain'
  config.selection.size = 20
  config.source_weight = 1.0
  return config
