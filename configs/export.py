"""A trained network for other programs: a state dict for torch, and a function that runs wherever jax does.

    python main.py --config=configs/export.py --config.workdir=runs/pets

The workdir is that of a finished fine-tuning (or pre-training); its best checkpoint is written to runs/pets/export as
model.safetensors (torchvision's names), model.stablehlo (uint8 images to probabilities, with the weights inside), model.json and
classes.txt (what they are and how images are prepared) and example.py, which needs jax, flatbuffers and Pillow.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.job = 'export'
  return config
