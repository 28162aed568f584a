"""Oxford-IIIT Pets, fine-tuned together with the 100 ImageNet classes that optimal transport chooses (ResNet-50).

    python -m ft_jax.data.prepare tfds:oxford_iiit_pet --data_dir=DATA
    python -m ft_jax.data.prepare tfds:imagenet2012 --data_dir=DATA
    python main.py --config=configs/pets.py --config.data_dir=DATA --config.model.weights=moco_v2_800ep_pretrain.pth.tar

The published settings of the ResNet-50 experiment (Liu et al., NeurIPS 2022: MoCo-v2 weights; the repository has them for
CUB, and the paper's for Pets were not found). Ours: the val split (a tenth of train) that chooses the checkpoint.
Features are the 2048 pooled ones; the paper selected on the 128-dimensional output of MoCo's projection head.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.target.name = 'tfds:oxford_iiit_pet'
  config.target.metric = 'mean_per_class'
  config.source.name = 'tfds:imagenet2012'
  config.image_size = 224
  config.augment.antialias = True  # as Pillow does in the published code
  config.model.name = 'resnet50'
  config.model.weights = 'moco_v2_800ep_pretrain.pth.tar'
  config.selection.method = 'uot'
  config.selection.size = 100
  config.source_weight = 1.0
  config.source_ratio = 1.0
  config.train.batch_size = 256
  config.train.epochs = 100.0
  config.train.learning_rate = 0.01  # of the backbone; the heads have ten times as much
  config.train.schedule = 'milestones'  # x0.1 after epochs 60 and 80
  config.train.milestones = (0.6, 0.8)
  config.train.decay = 0.1
  config.train.weight_decay = 1e-4
  return config
