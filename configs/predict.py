"""Predicts classes of images with a trained network: a CSV table and a contact sheet.

    python main.py --config=configs/predict.py --config.workdir=runs/pets --config.predict.images=FOLDER

The workdir is that of a finished fine-tuning (or pre-training), whose best checkpoint and preprocessing are used. The
images are a folder with its subfolders, one image, or a text file of paths, one per line. Writes
runs/pets/predict/predictions.csv and contact_sheet.png, replacing earlier ones; --workdir=... writes elsewhere.
--config.data.on_error=skip skips images that cannot be read and gives the reason in the table.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.job = 'predict'
  return config
