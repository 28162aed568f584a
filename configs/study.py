"""Which checkpoint of a pre-training to start from, for your images: on frozen features, and for fine-tuning.

    python main.py --config=configs/study.py --config.checkpoints=runs/pretrain --config.target.name=folder:/data/photos

The checkpoints are those of a pre-training that kept them (configs/pretrain.py), or files of another program in one folder with the epoch
in their names (epoch_3.pth, epoch_10.safetensors; then --config.model.name says which network they are). More targets go into
--config.study.targets="('folder:/data/birds',)". Writes runs/study/report.html, study.csv and study.json. A stopped study goes on where it
was; checkpoints, targets and seeds that are added later are added to what is there. The recipe of the fine-tuning is ours: short.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.job = 'study'
  config.selection.method = 'none'
  config.train.batch_size = 64
  config.train.epochs = 20.0
  config.train.learning_rate = 0.01
  config.train.schedule = 'cosine'
  config.train.warmup = 0.05
  return config
