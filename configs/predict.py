"""What a trained network sees in images: a table and a picture.

    python main.py --config=configs/predict.py --config.workdir=runs/pets --config.predict.images=FOLDER

The workdir is that of a finished fine-tuning (or pre-training), whose best checkpoint and preprocessing are used; the images are a
folder with all that is below it, one image, or a text file of paths, one a line. Writes runs/pets/predict/predictions.csv and
contact_sheet.png, over those of the last time; --workdir=... writes elsewhere. --config.data.on_error=skip goes on behind images
that cannot be read and says in the table what is wrong with them.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.job = 'predict'
  return config
