"""The input pipeline (decode, random-resized-crop 224, flip, batch) beside tf.data and torch's DataLoader with Pillow;
with Pillow's filter (augment.antialias), with RandAugment and Cutout; and its cache.

    pip install tensorflow torch && python benchmarks/pipeline.py

Photo-sized JPEG files (500 x 375) cut from scikit-learn's photographs; all make batches of 64. tf.data decodes the crop
alone (decode_and_crop_jpeg), as the usual ResNet input pipelines do. They take turns; printed are medians of images per
second and of the ratios within a round. A package that is missing is left out.
"""

import argparse
from collections.abc import Iterator
import io
import itertools
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import PIL.Image
from sklearn import datasets

from ft_jax.data import open_set
from ft_jax.data.image_set import ImageSet
from ft_jax.data.memory_cache import cached
from ft_jax.data.pipeline import train_batches, Transform

BATCH, SIZE = 64, 224
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
STRONG = dict(randaugment=2, cutout=0.5)  # FixMatch's strong view


def write_photos(folder: pathlib.Path, files: int) -> float:
  """Random parts of the two photographs at 500 x 375 as <class>/<n>.jpg; returns their mean size in bytes."""
  rng = np.random.default_rng(0)
  photos = [PIL.Image.fromarray(image) for image in datasets.load_sample_images().images]
  sizes = []
  for name in ('china', 'flower'):
    (folder / name).mkdir()
  for i in range(files):
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
    return len(self.paths) * 100  # one epoch outlasts the measurement

  def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
    path = self.paths[i % len(self.paths)]
    rng = np.random.default_rng(i)
    with PIL.Image.open(path) as file:
      image = file.convert('RGB')
    width, height = image.size
    for _ in range(10):
      area, aspect = width * height * rng.uniform(*SCALE), math.exp(rng.uniform(*map(math.log, RATIO)))
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


def ours(source: ImageSet, seed: int, **kwargs: Any) -> Iterator[Any]:
  return train_batches(source, Transform(SIZE, SCALE, RATIO, **kwargs), BATCH, stream='target', seed=seed, start=0)


def tf_data(folder: pathlib.Path, seed: int) -> Iterator[Any]:
  import tensorflow as tf

  def load(path: Any, label: Any) -> tuple[Any, Any]:
    data = tf.io.read_file(path)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(data), tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4]), min_object_covered=0.0,
        aspect_ratio_range=RATIO, area_range=SCALE, max_attempts=10, use_image_if_no_bounding_boxes=True)
    image = tf.io.decode_and_crop_jpeg(data, tf.concat([begin[:2], size[:2]], 0), channels=3)
    image = tf.image.random_flip_left_right(tf.image.resize(image, (SIZE, SIZE), method='bilinear'))
    return tf.cast(image, tf.uint8), label

  files = sorted(folder.glob('*/*.jpg'))
  rows = tf.data.Dataset.from_tensor_slices(([str(path) for path in files],
                                             [int(path.parent.name == 'flower') for path in files]))
  batches = rows.shuffle(len(files), seed=seed).repeat().map(load, num_parallel_calls=tf.data.AUTOTUNE)
  return iter(batches.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE))


def torch_loader(folder: pathlib.Path, seed: int) -> Iterator[Any]:
  import torch

  torch.manual_seed(seed)
  return iter(torch.utils.data.DataLoader(PillowCrops(folder), BATCH, num_workers=2, shuffle=True))


def rate(batches: Iterator[Any], skip: int, count: int) -> float:
  """Images a second over `count` batches, after `skip` of them."""
  for _ in itertools.islice(batches, skip):
    pass
  start = time.perf_counter()
  for _ in itertools.islice(batches, count):
    pass
  return count * BATCH / (time.perf_counter() - start)


def cache_rates(source: ImageSet, seed: int) -> tuple[float, float]:
  """Of one run: images a second in the first pass, which decodes, and in later ones."""
  batches = ours(cached({'photos': source})['photos'], seed)
  a_pass = len(source) // BATCH
  # Batches are made a few ahead: neither measurement may have images of the other's pass in it.
  first = rate(batches, 1, max(1, a_pass - 5))
  return first, rate(batches, 10, 3 * a_pass)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--files', type=int, default=1024,
                      help='384 or more, so that the first pass outlasts what is made ahead')
  parser.add_argument('--only-ours', action='store_true', help='without tf.data and torch')
  arguments = parser.parse_args()
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  warnings.filterwarnings('ignore', r'.*os\.fork\(\) was called', RuntimeWarning)  # torch's workers never touch jax
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    kilobytes = write_photos(folder, arguments.files) / 1000
    source = open_set(f'folder:{folder}', 'train')
    rivals = {'ours': lambda seed: ours(source, seed),
              'ours, antialias': lambda seed: ours(source, seed, antialias=True),
              'ours, RandAugment and Cutout': lambda seed: ours(source, seed, **STRONG)}
    others = (('tensorflow', 'tf.data', tf_data), ('torch', 'torch DataLoader, 2 workers', torch_loader))
    for module, what, make in () if arguments.only_ours else others:
      try:
        __import__(module)
        rivals[what] = lambda seed, make=make: make(folder, seed)
      except ImportError:
        print(f'{what} is left out: {module} is not installed')
    rates: dict[str, list[float]] = {name: [] for name in (*rivals, 'first pass', 'later passes')}
    for k in range(arguments.rounds):
      for name, make in rivals.items():
        # A new iterator each time, and the others gone: none works while another is measured.
        batches = make(k)
        rates[name].append(rate(batches, 6, 24))
        del batches
      first, later = cache_rates(source, k)
      rates['first pass'].append(first)
      rates['later passes'].append(later)
  medians = {name: statistics.median(values) for name, values in rates.items()}
  print(f'decode, random-resized-crop {SIZE}, flip, batch {BATCH}; JPEG files of {kilobytes:.0f} KB; {os.cpu_count()} '
        f'cores; '
        f'{arguments.rounds} rounds')
  for name in rivals:
    ratio = statistics.median(a / b for a, b in zip(rates['ours'], rates[name]))
    print(f'  {name:28s} {medians[name]:7.0f} images/s' +
          (f'   ours is {ratio:.2f} times as fast' if name != 'ours' else ''))
  ratio = statistics.median(b / a for a, b in zip(rates['first pass'], rates['later passes']))
  print(f'with config.data.cache: {medians["first pass"]:.0f} images/s in the first pass, '
        f'{medians["later passes"]:.0f} in later ones, '
        f'{ratio:.2f} times as fast')


if __name__ == '__main__':
  main()
