"""How flat the minimum is that a run found, and how far from its start it lies.

    python main.py --config=configs/stability.py --config.workdir=runs/pets

The workdir is that of a finished fine-tuning (or pre-training), whose best checkpoint is measured on images of its test split: the rise
of the loss under noise on the weights, the distance of each weight from where it began, and the trace of the Hessian of the loss. Writes
runs/pets/stability/stability.html, stability.csv and stability.json. A stopped job goes on where it was, and more draws or random vectors
(--config.stability.probes=200) are added to what is there.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.job = 'stability'
  return config
