"""Images that two sets have in common under any names: the same bytes, the same pixels, or nearly the same picture.

Nearly the same is decided by a perceptual hash of 128 bits, as in pHash (Zauner 2010) and PDQ (Facebook 2019): the
signs of the lowest frequencies (discrete cosine transform) of the image at 32 x 32 grey pixels. Recompressing and
resizing flip few of the signs; mirroring flips exactly those of odd horizontal frequency, so mirrored copies need no
hash of their own. A second hash, of the middle of the image, finds copies whose borders were cut off. What it finds,
and what it mistakes for a copy, is measured by benchmarks/duplicates.py; the numbers are in docs/data.md.
"""

from collections.abc import Iterator, Sequence
from concurrent import futures
import importlib.metadata
import itertools
import math
import os
from typing import NamedTuple

import cv2
import numpy as np

from ft_jax import progress
from ft_jax.data import contents, disk_cache
from ft_jax.data.decode import decode
from ft_jax.data.image_set import digest, ImageSet

KINDS = {'exact': 'the same file', 'pixel': 'the same pixels', 'near': 'nearly the same picture'}
# The number of the 128 bits in which the hashes of one picture may differ; see docs/data.md.
THRESHOLD = 20
# Images with a shorter side (in pixels) have no perceptual hash: at 8 x 8 pixels different things look the same.
LEAST_SIDE = 32
# Nor do images with little in them, such as plain backgrounds: this many of the 128 frequencies must be stronger than
# what recompressing adds, in grey levels.
LEAST_FREQUENCIES, _NOISE = 64, 2.0
# The fraction of the area that the second hash covers.
_MIDDLE = 0.9
# Must change with everything in this file that a cached hash depends on.
_VERSION = '1'
_SIDE, _BITS = 32, 128


def _frequencies() -> tuple[np.ndarray, np.ndarray]:
  """Vertical and horizontal frequency of each bit, the lowest first, without the mean."""
  pairs = [(y, x) for y, x in itertools.product(range(_SIDE), repeat=2) if y + x]
  lowest = np.array(sorted(pairs, key=lambda pair: (sum(pair), pair))[:_BITS])
  return lowest[:, 0], lowest[:, 1]


def _cosines() -> np.ndarray:
  """Cosine transform `[frequencies, _SIDE]`, rounded to integers: their float64 sums are equal on every machine."""
  frequencies = np.arange(1 + max(_ROWS.max(), _COLUMNS.max()))
  angles = np.pi * np.outer(frequencies, np.arange(_SIDE) + 0.5) / _SIDE
  return np.round(_UNIT * np.cos(angles))


_UNIT = 1 << 14
_ROWS, _COLUMNS = _frequencies()
_COSINES = _cosines()
# The bits of a hash that mirroring flips.
_MIRROR = np.packbits(_COLUMNS % 2 == 1).view(np.uint64)


class Hashes(NamedTuple):
  """Hashes of the images of a set, in its order.

  Attributes:
    contents: `[n]` of dtype `contents.HASH`, of the bytes (of an array: of the pixels); empty if they cannot be read.
    pixels: the same of the decoded image; empty if it cannot be decoded.
    pictures: uint64 `[n, 2, 2]`, perceptual hashes of the whole image and of its middle, two words each.
    distinctive: bool `[n]`, whether there is enough in the image for its perceptual hashes to mean something.
  """
  contents: np.ndarray
  pixels: np.ndarray
  pictures: np.ndarray
  distinctive: np.ndarray

  def subset(self, rows: np.ndarray | slice) -> 'Hashes':
    """The hashes of some rows."""
    return Hashes(*(part[rows] for part in self))


class Match(NamedTuple):
  """An image that is also in another set: its row, the row there, one of KINDS, and the number of bits that differ."""
  row: int
  other: int
  kind: str
  distance: int


# --- hashing ---


def hashes(image_sets: Sequence[ImageSet], what: str) -> list[Hashes]:
  """The hashes of each set. Every distinct image is decoded once; the result is cached in the user's cache folder.

  Images that cannot be read have no hash of their pixels; nothing is raised for them.

  Args:
    image_sets: whose images are hashed.
    what: a name for messages.
  """
  known = [_content_hashes(images) for images in image_sets]
  unique, first = np.unique(np.concatenate(known), return_index=True)
  starts = np.cumsum([0, *(len(images) for images in image_sets)])
  owners = np.searchsorted(starts, first, side='right') - 1
  examples = [(image_sets[owner], int(i - starts[owner])) for owner, i in zip(owners, first.tolist())]
  # Another version of a decoder may give other pixels.
  versions = [importlib.metadata.version(name) for name in ('pillow', 'simplejpeg')]
  key = digest(_VERSION, *versions, cv2.__version__, unique.tobytes())
  found = disk_cache.load('hashes', key)
  if found is None:
    found, complete = _hash_all(examples, what)
    if complete:  # otherwise a disk did not answer, and the next run tries again
      disk_cache.save('hashes', key, found)
  if len(unique) and unique[0] == b'':  # files that could not be read have nothing in common
    found['pixels'][0], found['told'][0] = b'', False
  rows = [np.searchsorted(unique, part) for part in known]
  return [Hashes(part, found['pixels'][i], found['pictures'][i], found['told'][i]) for part, i in zip(known, rows)]


def _content_hashes(images: ImageSet) -> np.ndarray:
  if images.contents is not None:
    return images.contents
  read = (images.read(int(row)) for row in images.rows)
  return np.array([contents.of_image(image) for image in read], contents.HASH)


def _hash_all(examples: Sequence[tuple[ImageSet, int]], what: str,
              chunk: int = 512) -> tuple[dict[str, np.ndarray], bool]:
  """The arrays of Hashes that need decoding, of examples by set and position; and whether all bytes could be read.

  The array `distinctive` is called `told` here, as in the caches of earlier versions.
  """
  if len(examples) > 20_000:  # takes a minute or more
    progress.log.info('hashing the pixels of %s images of %s to find duplicates, once: later runs find the hashes '
                      'in the cache', f'{len(examples):,d}', what)
  found: list[tuple[bytes, np.ndarray, bool] | None] = []
  starts = range(0, len(examples), chunk)
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in progress.bar(starts, f'hashing the images of {what}', len(starts), f'x {chunk} images'):
      found += pool.map(lambda example: _hash_one(*example), examples[start:start + chunk])
  pixels, pictures, distinctive = zip(*(each or _UNREADABLE for each in found)) if found else ((), (), ())
  arrays = {'pixels': np.array(pixels, contents.HASH), 'pictures': np.array(pictures, np.uint64).reshape(-1, 2, 2),
            'told': np.array(distinctive, bool)}
  return arrays, None not in found


_UNREADABLE = (b'', np.zeros((2, 2), np.uint64), False)


def _hash_one(images: ImageSet, i: int) -> tuple[bytes, np.ndarray, bool] | None:
  """The hash of the pixels, and what `picture_hash` returns; None if the disk does not give the bytes."""
  try:
    example = images[i]
    image = decode(example.image, example.id, scratch=True)
  except OSError:
    return None
  except ValueError:
    return _UNREADABLE
  return contents.of_array(image), *picture_hash(image)


def picture_hash(image: np.ndarray) -> tuple[np.ndarray, bool]:
  """The perceptual hashes of an image: of all of it, and of its middle.

  Args:
    image: uint8 `[h, w, 3]`.

  Returns:
    uint64 `[2, 2]`, and whether they mean something; see LEAST_SIDE and LEAST_FREQUENCIES.
  """
  height, width = image.shape[:2]
  if min(height, width) < LEAST_SIDE:
    return np.zeros((2, 2), np.uint64), False
  grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
  margin = (1 - math.sqrt(_MIDDLE)) / 2
  y, x = round(margin * height), round(margin * width)
  strengths = np.stack([_strengths(grey), _strengths(grey[y:height - y, x:width - x])])
  enough = np.count_nonzero(np.abs(strengths) >= _NOISE, axis=1).min() >= LEAST_FREQUENCIES
  return np.packbits(strengths > 0, axis=1).view(np.uint64), bool(enough)


def _strengths(grey: np.ndarray) -> np.ndarray:
  """The lowest frequencies of a grey image, float64 `[_BITS]`, in grey levels of the orthonormal transform."""
  # The mean of all pixels; bilinear interpolation would leave most of them out.
  small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float64)
  spectrum = _COSINES @ small @ _COSINES.T
  return spectrum[_ROWS, _COLUMNS] * (2 / _SIDE / _UNIT**2)


# --- comparing ---


def matches(some: Hashes, others: Hashes, near: bool = True, threshold: int = THRESHOLD) -> list[Match]:
  """Each of `some` that is also one of `others`, with the most similar of these; in the order of the rows.

  Args:
    some: `[n]`.
    others: `[m]`.
    near: whether to compare perceptual hashes too, which takes n * m steps.
    threshold: the number of the 128 bits in which they may differ.
  """
  found: dict[int, Match] = {}
  for kind, values, other_values in (('exact', _readable_contents(some), _readable_contents(others)),
                                     ('pixel', some.pixels, others.pixels)):
    first_row = {value: row for row, value in reversed(list(enumerate(other_values.tolist()))) if value}
    for row, value in enumerate(values.tolist()):
      if row not in found and value in first_row:
        found[row] = Match(row, first_row[value], kind, 0)
  if near:
    rows, columns = np.flatnonzero(some.distinctive), np.flatnonzero(others.distinctive)
    for row, other, distance in _nearest(some.pictures[rows], others.pictures[columns], threshold):
      found.setdefault(int(rows[row]), Match(int(rows[row]), int(columns[other]), 'near', distance))
  return [found[row] for row in sorted(found)]


def _readable_contents(images: Hashes) -> np.ndarray:
  """The hashes of the bytes, empty for images that cannot be decoded: an error for them is raised elsewhere."""
  return np.where(images.pixels == b'', b'', images.contents)


def _nearest(some: np.ndarray, others: np.ndarray, threshold: int,
             pairs: int = 4_000_000) -> Iterator[tuple[int, int, int]]:
  """(row, the nearest of the others, bits that differ) for each row with one within `threshold`.

  Args:
    some, others: hashes, uint64 `[n, 2, 2]` and `[m, 2, 2]`.
    threshold: the largest number of bits that may differ.
    pairs: how many pairs are compared at a time on each core; a few numbers per pair are in memory.
  """
  if not len(some) or not len(others):
    return
  block = max(1, min(256, pairs // len(others)))
  # The middle of an image may be all of another; the two middles say nothing that the whole images do not.
  views = [(mine, others[:, its] ^ mirror) for mine, its in ((0, 0), (0, 1), (1, 0))
           for mirror in (np.uint64(0), _MIRROR)]

  def nearest(start: int) -> tuple[np.ndarray, np.ndarray]:
    part = some[start:start + block]
    best, which = np.full(len(part), threshold + 1), np.zeros(len(part), np.int64)
    for mine, theirs in views:
      # The higher frequencies tell almost all pairs apart; many pictures share the lower ones.
      higher = np.bitwise_count(part[:, mine, 1:] ^ theirs[:, 1])
      row, other = np.divmod(np.flatnonzero(higher <= threshold), len(theirs))
      distance = higher[row, other] + np.bitwise_count(part[row, mine, 0] ^ theirs[other, 0])
      for at in np.flatnonzero(distance <= threshold).tolist():
        if distance[at] < best[row[at]]:
          best[row[at]], which[row[at]] = distance[at], other[at]
    return best, which

  starts = range(0, len(some), block)
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    shown = progress.bar(pool.map(nearest, starts), 'comparing images', len(starts), f'x {block} images')
    for start, (best, which) in zip(starts, shown):
      for row in np.flatnonzero(best <= threshold).tolist():
        yield start + row, int(which[row]), int(best[row])
