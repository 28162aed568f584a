"""Exports a trained network: a state dict for torch, and a function that runs wherever jax does.

    python main.py --config=configs/export.py --config.workdir=runs/pets

The workdir is that of a finished fine-tuning (or pre-training); its best checkpoint is exported to runs/pets/export:
model.safetensors (torchvision's names), model.stablehlo (uint8 images to probabilities, weights included), model.json
and classes.txt (classes and preprocessing) and example.py, which needs jax, flatbuffers and Pillow.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.job = 'export'
  return config
