"""Images that two sets have in common, under whatever names: the same bytes, the same pixels, or nearly the same picture.

Nearly the same is told by a perceptual hash of 128 bits, as of pHash (Zauner 2010) and PDQ (Facebook 2019): the signs of the lowest
frequencies (a discrete cosine transform) of the image at 32 x 32 grey pixels. Recompressing and resizing turn few of the signs over;
mirroring turns those of odd horizontal frequency over, all of them, so that mirrored copies need no hash of their own. A second hash, of
the middle of the image, finds copies whose borders were cut off. What it finds and what it takes for a copy by mistake is measured by
benchmarks/duplicates.py; the numbers are in docs/data.md.
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
# Bits of 128 in which the hashes of one picture may differ; see docs/data.md.
THRESHOLD = 20
# Smaller images (in pixels of their short side) have no perceptual hash: at 8 x 8 pixels different things look the same.
LEAST_SIDE = 32
# Nor have images that say little, such as plain backgrounds: of the 128 frequencies so many must be stronger than what recompressing
# adds, in grey levels.
LEAST_FREQUENCIES, _NOISE = 64, 2.0
# Part of the area that the second hash sees.
_MIDDLE = 0.9
# Changes with everything here that a kept hash depends on.
_VERSION = '1'
_SIDE, _BITS = 32, 128


def _frequencies() -> tuple[np.ndarray, np.ndarray]:
  """Vertical and horizontal frequency of each bit, the lowest first, without the mean."""
  pairs = sorted(((y, x) for y, x in itertools.product(range(_SIDE), repeat=2) if y + x), key=lambda pair: (sum(pair), pair))
  return tuple(np.array(pairs[:_BITS]).T)


def _cosines() -> np.ndarray:
  """Rows of the cosine transform `[frequencies, _SIDE]` as whole numbers: in float64 every machine gets the same sums of them."""
  angles = np.pi * np.outer(np.arange(1 + max(_ROWS.max(), _COLUMNS.max())), np.arange(_SIDE) + 0.5) / _SIDE
  return np.round(_UNIT * np.cos(angles))


_UNIT = 1 << 14
_ROWS, _COLUMNS = _frequencies()
_COSINES = _cosines()
# What mirroring does to a hash.
_MIRROR = np.packbits(_COLUMNS % 2 == 1).view(np.uint64)


class Hashes(NamedTuple):
  """Of the images of a source, in its order.

  Attributes:
    contents: `[n]` of type `contents.HASH`, of the bytes (of an array: of the pixels); empty where they cannot be read.
    pixels: the same, of the decoded image; empty where it cannot be decoded.
    pictures: uint64 `[n, 2, 2]`, perceptual hashes of the whole image and of its middle, of two words each.
    told: bool `[n]`, whether the image says enough for its perceptual hashes to mean something.
  """
  contents: np.ndarray
  pixels: np.ndarray
  pictures: np.ndarray
  told: np.ndarray

  def subset(self, rows: np.ndarray | slice) -> 'Hashes':
    """Those of some rows."""
    return Hashes(*(part[rows] for part in self))


class Match(NamedTuple):
  """An image that is in another set too: its row, the row of the other one, one of KINDS, and the bits in which the hashes differ."""
  row: int
  other: int
  kind: str
  distance: int


def hashes(sources: Sequence[ImageSet], what: str) -> list[Hashes]:
  """Hashes of each source. Every different image is decoded once; the result is kept in the user's cache folder.

  Images that cannot be read have no hash of their pixels; nothing is raised for them.
  """
  known = [_contents(source) for source in sources]
  unique, first = np.unique(np.concatenate(known), return_index=True)
  owner = np.repeat(np.arange(len(sources)), [len(source) for source in sources])
  starts = np.cumsum([0, *(len(source) for source in sources)])
  places = [(sources[owner[at]], int(at - starts[owner[at]])) for at in first.tolist()]
  # Another version of a decoder may give other pixels.
  versions = [importlib.metadata.version(name) for name in ('pillow', 'simplejpeg')]
  key = digest(_VERSION, *versions, cv2.__version__, unique.tobytes())
  found = disk_cache.load('hashes', key)
  if found is None:
    found, whole = _hashed(places, what)
    if whole:  # else a disk did not answer: the next run asks again
      disk_cache.save('hashes', key, found)
  if len(unique) and unique[0] == b'':  # files that could not be read, which have nothing in common
    found['pixels'][0], found['told'][0] = b'', False
  return [Hashes(part, *(found[name][rows] for name in ('pixels', 'pictures', 'told')))
          for part in known for rows in [np.searchsorted(unique, part)]]


def _contents(source: ImageSet) -> np.ndarray:
  if source.contents is not None:
    return source.contents
  images = (source.read(int(row)) for row in source.rows)
  return np.array([contents.of_array(image) if isinstance(image, np.ndarray) else contents.of_bytes(image) for image in images],
                  contents.HASH)


def _hashed(places: Sequence[tuple[ImageSet, int]], what: str, chunk: int = 512) -> tuple[dict[str, np.ndarray], bool]:
  """What is kept of images, by their source and place in it; and whether the bytes of all of them could be read."""
  if len(places) > 20_000:  # a minute or more, once
    progress.log.info('hashing the pixels of %s images of %s to find duplicates, once: later runs find the hashes in the cache',
                      f'{len(places):,d}', what)
  found: list[tuple[bytes, np.ndarray, bool] | None] = []
  starts = range(0, len(places), chunk)
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in progress.bar(starts, f'hashing the images of {what}', len(starts), f'x {chunk} images'):
      found += pool.map(lambda place: _hash(*place), places[start:start + chunk])
  pixels, pictures, told = zip(*(each or _UNREADABLE for each in found)) if found else ((), (), ())
  return {'pixels': np.array(pixels, contents.HASH), 'pictures': np.array(pictures, np.uint64).reshape(-1, 2, 2),
          'told': np.array(told, bool)}, None not in found


_UNREADABLE = (b'', np.zeros((2, 2), np.uint64), False)


def _hash(source: ImageSet, i: int) -> tuple[bytes, np.ndarray, bool] | None:
  """Of pixels, of the picture, and whether that says enough; None where the bytes cannot be had."""
  try:
    example = source[i]
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
    uint64 `[2, 2]`, and whether they mean something: see LEAST_SIDE and LEAST_FREQUENCIES.
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
  # Averaged before it shrinks to a size that bilinear interpolation would leave pixels out at.
  small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float64)
  spectrum = _COSINES @ small @ _COSINES.T
  return spectrum[_ROWS, _COLUMNS] * (2 / _SIDE / _UNIT**2)


def matches(some: Hashes, others: Hashes, near: bool = True, threshold: int = THRESHOLD) -> list[Match]:
  """Each of `some` that is one of `others` too, with the likest of these; in the order of the rows.

  Args:
    some: `[n]`.
    others: `[m]`.
    near: whether perceptual hashes are compared too, which takes n * m steps.
    threshold: bits of 128 in which they may differ.
  """
  found: dict[int, Match] = {}
  # What cannot be decoded is no image, and whoever comes to it says so.
  readable = lambda of, values: np.where(of.pixels == b'', b'', values)
  for kind, ones, twos in (('exact', readable(some, some.contents), readable(others, others.contents)),
                           ('pixel', some.pixels, others.pixels)):
    places = {value: row for row, value in reversed(list(enumerate(twos.tolist()))) if value}
    for row, value in enumerate(ones.tolist()):
      if row not in found and value in places:
        found[row] = Match(row, places[value], kind, 0)
  if near:
    rows, columns = np.flatnonzero(some.told), np.flatnonzero(others.told)
    for row, other, distance in _nearest(some.pictures[rows], others.pictures[columns], threshold):
      found.setdefault(int(rows[row]), Match(int(rows[row]), int(columns[other]), 'near', distance))
  return [found[row] for row in sorted(found)]


def _nearest(some: np.ndarray, others: np.ndarray, threshold: int, pairs: int = 4_000_000) -> Iterator[tuple[int, int, int]]:
  """(row, the nearest of the others, bits in which they differ) of each row that has one within `threshold`; hashes `[n, 2, 2]`."""
  if not len(some) or not len(others):
    return
  block = max(1, min(256, pairs // len(others)))  # a few numbers for each pair are in memory, once a core
  # The middle of an image may be all of another; the middles of both say nothing that both images do not.
  views = [(mine, others[:, its] ^ mirror) for mine, its in ((0, 0), (0, 1), (1, 0)) for mirror in (np.uint64(0), _MIRROR)]

  def nearest(start: int) -> tuple[np.ndarray, np.ndarray]:
    part = some[start:start + block]
    best, which = np.full(len(part), threshold + 1), np.zeros(len(part), np.int64)
    for mine, theirs in views:
      # The higher frequencies tell almost all pairs apart; of the lower ones many pictures have the same.
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
