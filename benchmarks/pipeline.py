"""The input pipeline (decode, random-resized-crop 224, flip, batch) against torch's DataLoader with Pillow and 2 workers.

    pip install torch && python benchmarks/pipeline.py

Photo-sized JPEG files (500 x 375) cut from scikit-learn's photographs; both make uint8 batches of 64. The two take turns;
the medians of images per second and their ratio are printed.
"""

import io
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import PIL.Image
from sklearn import datasets

from ft_jax.data.pipeline import train_batches, Transform
from ft_jax.data.sources import open_source

FILES, BATCH, BATCHES, ROUNDS, SIZE = 256, 64, 15, 7, 224


def write_photos(folder: pathlib.Path) -> float:
  """Random parts of the two photographs at 500 x 375 as <class>/<n>.jpg; returns their mean size in bytes."""
  rng = np.random.default_rng(0)
  photos = [PIL.Image.fromarray(image) for image in datasets.load_sample_images().images]
  sizes = []
  for name in ('china', 'flower'):
    (folder / name).mkdir()
  for i in range(FILES):
    picture, zoom = photos[i % 2], rng.uniform(0.7, 1.0)
    w, h = zoom * picture.width, zoom * picture.height
    x, y = rng.uniform(0, picture.width - w), rng.uniform(0, picture.height - h)
    stream = io.BytesIO()
    picture.resize((500, 375), PIL.Image.Resampling.BICUBIC, box=(x, y, x + w, y + h)).save(stream, 'JPEG', quality=92)
    (folder / ('china', 'flower')[i % 2] / f'{i}.jpg').write_bytes(stream.getvalue())
    sizes.append(len(stream.getvalue()))
  return float(np.mean(sizes))


class PillowCrops:
  """A torch data set: what torchvision's RandomResizedCrop and RandomHorizontalFlip do, with Pillow."""

  def __init__(self, folder: pathlib.Path):
    self.paths = sorted(folder.glob('*/*.jpg'))

  def __len__(self) -> int:
    return FILES * 100  # one epoch outlasts the measurement

  def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
    path = self.paths[i % FILES]
    rng = np.random.default_rng(i)
    with PIL.Image.open(path) as file:
      image = file.convert('RGB')
    width, height = image.size
    for _ in range(10):
      area, aspect = width * height * rng.uniform(0.08, 1.0), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
      w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if w <= width and h <= height:
        break
    else:
      w = h = min(width, height)
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    image = image.crop((x, y, x + w, y + h)).resize((SIZE, SIZE), PIL.Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
      image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image), int(path.parent.name == 'flower')


def rate(batches) -> float:
  """Images a second over the next batches."""
  start = time.perf_counter()
  for _ in range(BATCHES):
    next(batches)
  return BATCHES * BATCH / (time.perf_counter() - start)


def main() -> None:
  try:
    import torch
  except ImportError:
    sys.exit('this comparison needs torch: pip install torch')
  warnings.filterwarnings('ignore', r'os\.fork\(\) was called', RuntimeWarning)  # torch's workers never touch jax
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    kilobytes = write_photos(folder) / 1000
    source = open_source(f'folder:{folder}', 'train')
    rates: dict[str, list[float]] = {'ours': [], 'torch': []}
    for k in range(ROUNDS):
      # A new iterator each time, and the other one gone: neither works while the other is measured.
      ours = train_batches(source, Transform(SIZE), BATCH, stream='target', seed=k, start=0)
      next(ours)
      rates['ours'].append(rate(ours))
      del ours
      loader = iter(torch.utils.data.DataLoader(PillowCrops(folder), BATCH, num_workers=2, shuffle=True))
      next(loader)
      rates['torch'].append(rate(loader))
      del loader
  medians = {key: statistics.median(values) for key, values in rates.items()}
  print(f'decode, random-resized-crop {SIZE}, flip, batch {BATCH}; JPEG files of {kilobytes:.0f} KB; {os.cpu_count()} cores')
  for key, what in (('ours', 'ours'), ('torch', 'torch DataLoader, 2 workers')):
    print(f'  {what:28s} {medians[key]:7.0f} images/s   ours is {medians["ours"] / medians[key]:.2f} times as fast')


if __name__ == '__main__':
  main()
