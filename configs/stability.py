"""Measures how flat the minimum is that a run found, and how far it is from the starting point.

    python main.py --config=configs/stability.py --config.workdir=runs/pets

The workdir is that of a finished fine-tuning (or pre-training); its best checkpoint is measured on images of its test
split: the increase of the loss under noise on the weights, the distance of each weight from its initial value, and
the trace of the Hessian of the loss. Writes runs/pets/stability/stability.html, stability.csv and stability.json. An
interrupted job resumes, and more draws or random vectors (--config.stability.probes=200) are added to the existing
ones.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.job = 'stability'
  return config
