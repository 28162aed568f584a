"""Classifies images with the network in this folder: python example.py IMAGE ... (pip install jax flatbuffers
pillow)."""

import io
import json
import pathlib
import sys

from jax import export
import numpy as np
from PIL import Image, ImageOps

HERE = pathlib.Path(__file__).parent
about = json.loads((HERE / 'model.json').read_text(encoding='utf-8'))
model = export.deserialize(bytearray((HERE / 'model.stablehlo').read_bytes()))


def prepare(path: str) -> np.ndarray:
  """The center crop of an image, uint8 [size, size, 3]."""
  size, short_side = about['preprocessing']['image_size'], about['preprocessing']['short_side']
  image = ImageOps.exif_transpose(Image.open(path))
  if image.mode.startswith('I;16'):  # 16 bits: convert('RGB') would clip all values above 255
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.has_transparency_data:
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
  width, height = (int(short_side * side / min(image.size)) for side in image.size)
  x, y = round((width - size) / 2), round((height - size) / 2)
  return np.asarray(image.convert('RGB').resize((width, height),
                                                Image.Resampling.BILINEAR).crop((x, y, x + size, y + size)))


if __name__ == '__main__':
  paths = sys.argv[1:] or sys.exit(__doc__)
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')  # a file name may hold any bytes
  probabilities = np.asarray(model.call(np.stack([prepare(path) for path in paths]))['probabilities'])
  for path, row in zip(paths, probabilities):
    best = np.argsort(-row)[:3]
    print(path + ': ' + ', '.join(f'{about["classes"][k]} {row[k]:.1%}' for k in best))
