"""Which checkpoint of a pre-training to start from, for your images: linear probes on frozen features, and fine-tuning.

    python main.py --config=configs/study.py --config.checkpoints=runs/pretrain --config.target.name=folder:/data/photos

The checkpoints are those of a pre-training that kept them (configs/pretrain.py), or files of another program in one
folder, with the epoch in their names (epoch_3.pth, epoch_10.safetensors; --config.model.name then says which network
they are). More targets are given by --config.study.targets="('folder:/data/birds',)". Writes runs/study/report.html,
study.csv and study.json. An interrupted study resumes; checkpoints, targets and seeds that are added later extend the
existing results. The fine-tuning recipe is ours: short.
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
