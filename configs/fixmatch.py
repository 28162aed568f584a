"""A source without labels: clusters selected by optimal transport, and FixMatch's pseudo-labels.

Liu et al., "Improved Fine-Tuning by Better Leveraging Pre-Training Data" (NeurIPS 2022), for self-supervised
pre-training: MoCo-v2's ResNet-50 (800 epochs), 500 of 2,000 clusters, soft pseudo-labels of the target's classes, a
weak and a strong view (RandAugment and Cutout) of each source image.

    python main.py --config=configs/fixmatch.py --config.data_dir=DATA              # CUB and ImageNet, as published
    python main.py --config=configs/fixmatch.py --config.data_dir=DATA --config.target.name=folder:photos \
        --config.source.name=folder:pool

DATA/pool may hold images without class folders. The hyper-parameters are those of the authors' scripts. That the
clusters are k-means clusters of the features is our reading, not published. One difference: val, a tenth of the
training images, chooses the checkpoint.
"""

from ml_collections import ConfigDict

from configs import cub


def get_config() -> ConfigDict:
  config = cub.get_config('mocov2')
  config.selection.by = 'cluster'
  config.selection.clusters = 2000
  config.selection.size = 500
  config.methods.fixmatch.weight = 1.0
  config.train.weight_decay = 1e-5
  return config
