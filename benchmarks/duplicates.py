"""What the perceptual hash finds of copies, what it takes for a copy by mistake, and how long both passes take.

    python benchmarks/duplicates.py DATA

DATA holds folders of <split>/<class>/<image>: sets with no image in common, such as tiny_imagenet (the pool, which
comes first), caltech101, pets and cub50. Copies of some images of each set are made by what people do to images;
"found" is the fraction of them within so many bits of the image that they were made of. "By mistake" are the images of
the pool within so many bits of any image of another set (look at them before believing it: a set may hold copies). Flat
images, which have no hash, count as not found.
"""

import argparse
from collections.abc import Callable
import io
import math
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import PIL.Image

from ft_jax.data import decode, duplicates, open_set
from ft_jax.data.image_set import ImageSet

THRESHOLDS = (8, 12, 16, 20, 24, 28)


def recompressed(image: np.ndarray, quality: int) -> np.ndarray:
  """As a JPEG file has it."""
  stream = io.BytesIO()
  PIL.Image.fromarray(image).save(stream, 'JPEG', quality=quality)
  return np.asarray(PIL.Image.open(stream))


def resized(image: np.ndarray, factor: float) -> np.ndarray:
  """By Pillow's bicubic filter, and at least as large as an image must be to have a hash."""
  size = [max(duplicates.LEAST_SIDE, round(factor * side)) for side in image.shape[1::-1]]
  return np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BICUBIC))


def cropped(image: np.ndarray, area: float, rng: np.random.Generator) -> np.ndarray:
  """A part of the image of the same shape, anywhere in it."""
  height, width = (int(side * math.sqrt(area)) for side in image.shape[:2])
  y, x = rng.integers(image.shape[0] - height + 1), rng.integers(image.shape[1] - width + 1)
  return np.ascontiguousarray(image[y:y + height, x:x + width])


def copies(rng: np.random.Generator) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
  """What is done to an image, by name."""
  return {
      'JPEG, quality 90': lambda image: recompressed(image, 90),
      'JPEG, quality 50': lambda image: recompressed(image, 50),
      'half the size': lambda image: resized(image, 0.5),
      'twice the size': lambda image: resized(image, 2.0),
      '0.7 of the size, quality 70': lambda image: recompressed(resized(image, 0.7), 70),
      'mirrored, quality 75': lambda image: recompressed(np.ascontiguousarray(image[:, ::-1]), 75),
      '98 % of the area': lambda image: cropped(image, 0.98, rng),
      '95 % of the area': lambda image: cropped(image, 0.95, rng),
      '90 % of the area': lambda image: cropped(image, 0.9, rng),
      '80 % of the area': lambda image: cropped(image, 0.8, rng),
  }


def hashed(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Perceptual hashes, uint64 `[n, 2, 2]`, and whether they mean something."""
  pictures, told = zip(*map(duplicates.picture_hash, images))
  return np.stack(pictures), np.array(told)


def distances(copy: tuple[np.ndarray, np.ndarray], original: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
  """Bits between each copy and its own original; 128 where either has no hash."""
  far = np.full(len(copy[0]), 128)
  for i in np.flatnonzero(copy[1] & original[1]):
    for _, _, distance in duplicates._nearest(copy[0][i:i + 1], original[0][i:i + 1], max(THRESHOLDS)):
      far[i] = distance
  return far


def on_one_core(function: Callable[[], Any]) -> tuple[float, Any]:
  """Seconds of processor time of all threads, and the result."""
  start = time.process_time()
  result = function()
  return time.process_time() - start, result


def shares(values: np.ndarray) -> str:
  """The part of values within each threshold, as columns of a Markdown table."""
  return ' | '.join(f'{100 * np.mean(values <= threshold):.1f} %' for threshold in THRESHOLDS)


def sample(source: ImageSet, count: int) -> list[np.ndarray]:
  """Decoded images drawn at random."""
  rows = np.random.default_rng(0).permutation(len(source))[:count]
  return [decode.decode(example.image, example.id) for example in (source[int(row)] for row in rows)]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('data', nargs='?', help='a folder of image sets')
  parser.add_argument('--sets', default='tiny_imagenet,caltech101,pets,cub50', help='the pool first')
  parser.add_argument('--images', type=int, default=1000, help='of each set that copies are made of')
  parser.add_argument('--rows', type=int, nargs=2, default=(60_000, 5_000),
                      help='hashes that are compared for the time that it takes')
  args = parser.parse_args()
  if not args.data:
    print('give a folder of image sets; see --help')
    return
  os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp()  # every pass is the first one
  sources = {name: open_set(f'folder:{args.data}/{name}', 'train+test') for name in args.sets.split(',')}
  head = ' | '.join(f'{threshold} bits' for threshold in THRESHOLDS)

  print(f'| found | {head} |\n|---|{"---|" * len(THRESHOLDS)}')
  samples = {name: sample(source, args.images) for name, source in sources.items()}
  originals = {name: hashed(images) for name, images in samples.items()}
  for what, make in copies(np.random.default_rng(0)).items():
    far = np.concatenate([distances(hashed([make(image) for image in images]), originals[name])
                          for name, images in samples.items()])
    print(f'| {what} | {shares(far)} |')

  times = {name: on_one_core(lambda source=source: duplicates.hashes([source], source.name)[0])
           for name, source in sources.items()}
  (pool, (_, of_pool)), *others = times.items()
  print(f'\n| images of {pool} taken for one of another set by mistake | {head} |\n|---|{"---|" * len(THRESHOLDS)}')
  for name, (_, of_other) in others:
    matches = duplicates.matches(of_pool, of_other, threshold=max(THRESHOLDS))
    near = np.array([match.distance for match in matches if match.kind == 'near'])
    same = len(matches) - len(near)
    print(f'| {name}, {len(of_pool.distinctive):,d} x {len(of_other.distinctive):,d} '
          f'images{f" ({same} are the same)" if same else ""} | '
          + ' | '.join(f'{np.count_nonzero(near <= threshold):,d}' for threshold in THRESHOLDS) + ' |')

  print()
  for name, (seconds, of) in times.items():
    print(f'hashing {name}: {len(of.distinctive) / seconds:,.0f} images/s on each core; '
          f'{np.count_nonzero(~of.distinctive):,d} of {len(of.distinctive):,d} '
          'say too little')
  many, few = (duplicates.Hashes(*(np.resize(part, (count, *part.shape[1:])) for part in of_pool))
               for count in args.rows)
  few = few._replace(pictures=np.random.default_rng(0).permuted(few.pictures, axis=0))  # not the same images
  seconds, _ = on_one_core(lambda: duplicates.matches(many, few))
  print(f'comparing {args.rows[0]:,d} with {args.rows[1]:,d}: {seconds:.1f} s on one core, less on several')


if __name__ == '__main__':
  main()
