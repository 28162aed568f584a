"""Batches of images. The order is a function of (seed, step): a run that starts again at a step gets the same batches.

A batch is `{'input': uint8 [b, h, w, 3], 'label': int32 [b], 'row': int32 [b], 'mask': bool [b]}`, where `index` is the
example's row in the source and `mask` is False for padding; further views of the images are like `image`. Each host makes its own share.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import os
import sys
import threading
import time
import zlib

import grain
import jax
from ml_collections import ConfigDict
import numpy as np

from ft_jax.data import crop
from ft_jax.data.decode import decode
from ft_jax.data.image_set import Example, ImageSet
from ft_jax.data.randaugment import cutout, randaugment
from ft_jax.progress import log

Batch = dict[str, np.ndarray]
# Seconds: how long images may take (see `train_batches`), and after which it is told what is being read.
TIMEOUT, SLOW = 600.0, 30.0


class Stalled(OSError):
  """No images came for a long time."""


@dataclasses.dataclass(frozen=True)
class Transform:
  """What images go through.

  Attributes:
    size: pixels a side of the result.
    scale, ratio: of the random crop (training).
    flip: whether half of the training images are mirrored.
    antialias: whether training crops are scaled exactly as Pillow and torchvision do, or faster; see `crop.random_resized_crop`.
    short_side: pixels of the short side before the middle is cut out (evaluation).
    randaugment: random operations drawn for a training crop; 0 for none.
    magnitude: of them, 2 to 10.
    cutout: side of a grey square on each training crop, as a part of the crop's; 0 for none.
  """
  size: int
  scale: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: bool = True
  antialias: bool = False
  short_side: int = 256
  randaugment: int = 0
  magnitude: int = 10
  cutout: float = 0.0

  def train(self, example: Example, rng: np.random.Generator, out: np.ndarray | None = None) -> np.ndarray:
    """A random crop, mirrored half of the time, and what is done to it then; uint8 `[size, size, 3]`, in `out` where that is given."""
    # The crop is a copy, so the whole image may lie where the next one will.
    image = decode(example.image, example.id, scratch=True)
    image = crop.random_resized_crop(image, self.size, self.scale, self.ratio, rng, self.antialias, out)
    if self.flip and rng.random() < 0.5:
      image = crop.mirror(image)
    if self.randaugment:
      image = randaugment(image, self.randaugment, self.magnitude, rng)
    return cutout(image, self.cutout, rng) if self.cutout else image

  def evaluate(self, example: Example) -> np.ndarray:
    """The middle of the image; uint8 `[size, size, 3]`."""
    return crop.center_crop(decode(example.image, example.id, scratch=True), self.size, self.short_side)


def make_transform(image_size: int, augment: ConfigDict) -> Transform:
  """The transform of `config.image_size` and `config.augment`; raises ValueError where they do not fit."""
  side = short_side(image_size, augment)
  if side < image_size:
    raise ValueError(f'augment.short_side is {side}, less than image_size {image_size}')
  return Transform(image_size, tuple(augment.scale), tuple(augment.ratio), augment.flip, augment.antialias, side,
                   augment.randaugment, augment.magnitude, augment.cutout)


def short_side(image_size: int, augment: ConfigDict) -> int:
  """Pixels of an image's short side before the center crop of evaluation."""
  return augment.short_side or round(image_size * 256 / 224)


def train_batches(source: ImageSet, transform: Transform, batch_size: int, *, stream: str, seed: int, start: int,
                  views: Mapping[str, Transform] | None = None, balanced: bool = False, skip: Sequence[int] = (),
                  timeout: float = TIMEOUT, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
  """Endless training batches from step `start` on.

  The order is one permutation of the source after another, each with its own shuffle, cut into batches: every example
  comes once a pass, also where the batch does not divide the set or is larger than it.

  Args:
    source: the examples.
    transform: what happens to them.
    batch_size: of all hosts together.
    stream: a name that keeps the orders of two streams of one run apart.
    seed: of the run.
    start: the first step wanted.
    views: further views of each image, by their name in the batch, each with random numbers of its own.
    balanced: every class comes once a turn of all classes, and its examples one permutation after another: each class equally often.
    skip: places of batches in the order that are left out; see `place_of`.
    timeout: seconds that a batch may take; 0 for any.
    cancelled: asked while a batch takes long; the batches end where it says so.

  Raises:
    Stalled: a batch took longer; says what was being read.
  """
  hosts, host = jax.process_count(), jax.process_index()
  key = zlib.crc32(f'{stream}/{seed}'.encode())
  order = (_balanced_order if balanced else _order)(source, key)
  transforms = {'input': transform, **(views or {})}
  reading = _Reading(source)

  def make(step: int) -> Batch:
    # The random numbers of an example follow from its place in the global order, not from the host that reads it.
    places = _share(place_of(step, skip) * batch_size, batch_size, host, hosts)
    bits = np.random.Philox(key=key)
    rng, state = np.random.Generator(bits), bits.state

    def load(i: int, example: Example, out: Mapping[str, np.ndarray]) -> None:
      if views:  # decoded once for all
        example = example._replace(image=decode(example.image, example.id, scratch=True))
      for view, (name, transform) in enumerate(transforms.items()):
        state['state']['counter'][2:] = view, places[i]
        bits.state = state  # a third of the time that a new generator takes
        transform.train(example, rng, out[name])

    return _batch(reading, [order(place) for place in places], load, transform.size, tuple(transforms))

  return _watched(_prefetched(grain.MapDataset.range(sys.maxsize).map(make), start), reading, timeout, cancelled)


def place_of(step: int, skip: Sequence[int]) -> int:
  """The place in the order of the batch of a step (both counted from 0), where the batches at the places `skip` are left out."""
  for place in sorted(skip):
    step += place <= step
  return step


def rows_at(source: ImageSet, place: int, batch_size: int, *, stream: str, seed: int, balanced: bool = False) -> list[int]:
  """The rows of the batch at a place in the order, over all hosts; arguments as of `train_batches`."""
  order = (_balanced_order if balanced else _order)(source, zlib.crc32(f'{stream}/{seed}'.encode()))
  return [order(example) for example in range(place * batch_size, (place + 1) * batch_size)]


def _share(first: int, size: int, host: int, hosts: int) -> range:
  """The places of a host in the batch of all, which begins at `first`: neighbours, as they lie on its devices."""
  each = size // hosts
  return range(first + host * each, first + (host + 1) * each)


def _order(source: ImageSet, key: int) -> Callable[[int], int]:
  """The row at each place of an endless order: one permutation after another."""

  @functools.lru_cache(4)
  def permutation(turn: int) -> np.ndarray:
    # Not grain's shuffle: that takes 0.1 ms an example, which is half of what reading a cached one takes.
    return np.random.default_rng((key, turn)).permutation(len(source))

  return lambda place: int(permutation(place // len(source))[place % len(source)])


def _balanced_order(source: ImageSet, key: int) -> Callable[[int], int]:
  """Likewise: one permutation of the classes after another, and in the n-th of them the n-th example of each class."""
  classes = np.unique(source.labels)
  rows = {k: np.flatnonzero(source.labels == k) for k in classes.tolist()}

  @functools.lru_cache(4)
  def permutation(turn: int) -> np.ndarray:
    return np.random.default_rng((key, turn)).permutation(classes)

  @functools.lru_cache(4 * len(classes))
  def of_class(k: int, turn: int) -> np.ndarray:
    return np.random.default_rng((key, turn, k)).permutation(rows[k])

  def row(place: int) -> int:
    turn, at = divmod(place, len(classes))
    k = int(permutation(turn)[at])
    return int(of_class(k, turn // len(rows[k]))[turn % len(rows[k])])

  return row


class EvalBatches:
  """Every example once, in order, in batches of one size; the last ones padded and masked so that all hosts make as many."""

  def __init__(self, source: ImageSet, transform: Transform, batch_size: int, timeout: float = TIMEOUT, start: int = 0):
    """From batch `start` on; `batch_size` is that of all hosts together. One that takes longer than `timeout` seconds raises Stalled."""
    self._source, self._transform, self._batch_size, self._timeout = source, transform, batch_size, timeout
    self._start, self._stop = start, -(-len(source) // batch_size)

  def __len__(self) -> int:
    return self._stop - self._start

  def __iter__(self) -> Iterator[Batch]:
    hosts, host = jax.process_count(), jax.process_index()
    reading = _Reading(self._source)

    def load(i: int, example: Example, out: Mapping[str, np.ndarray]) -> None:
      out['input'][:] = self._transform.evaluate(example)

    def make(step: int) -> Batch:
      share = _share(step * self._batch_size, self._batch_size, host, hosts)
      rows = np.arange(share.start, max(share.start, min(share.stop, len(self._source))))
      batch = _batch(reading, rows, load, self._transform.size, ('input',))
      missing = len(share) - len(rows)
      return {key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) if missing else value for key, value in batch.items()}

    return _watched(_prefetched(grain.MapDataset.range(self._stop).map(make), self._start), reading, self._timeout)


class _Reading:
  """A source, and which of its examples are being read, by thread."""

  def __init__(self, source: ImageSet):
    self.source = source
    self.now: dict[int, tuple[int, float]] = {}

  def __str__(self) -> str:
    # A copy: threads go on changing it.
    slow = sorted(self.now.copy().values(), key=lambda row_since: row_since[1])
    return ', '.join(f'{self.source.ids[row]} for {time.monotonic() - since:.0f} s' for row, since in slow[:3]) or 'nothing'


def _batch(reading: _Reading, rows: Sequence[int], load: Callable[[int, Example, Mapping[str, np.ndarray]], None], size: int,
           views: Sequence[str]) -> Batch:
  """The examples of some rows; `load` gets each one's place in the batch, the example, and where its views go."""
  source, thread = reading.source, threading.get_ident()
  images = {view: np.empty((len(rows), size, size, 3), np.uint8) for view in views}
  labels = np.empty(len(rows), np.int32)
  for i, row in enumerate(rows):
    reading.now[thread] = row, time.monotonic()
    example = source[row]
    load(i, example, {view: images[view][i] for view in views})
    labels[i] = example.label
  reading.now.pop(thread, None)
  return {**images, 'label': labels, 'row': np.asarray(rows, np.int32), 'mask': np.ones(len(rows), bool)}


def _prefetched(batches: grain.MapDataset, start: int) -> Iterator[Batch]:
  """The batches from `start` on, made ahead by threads."""
  # A batch is made by one thread: as many under way as there are cores, and no more than the device will take soon.
  threads = max(1, min(16, os.cpu_count() or 1))
  iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)))
  iterator.set_state({'next_index': start})
  return iterator


def _watched(batches: Iterator[Batch], reading: _Reading, timeout: float, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
  """The batches, taken by a thread, so that a file system that hangs does not hang the program; see `train_batches`."""
  pool = concurrent.futures.ThreadPoolExecutor(1, 'batches')
  try:
    while True:
      future, began, told = pool.submit(next, batches, None), time.monotonic(), SLOW
      while not concurrent.futures.wait([future], 1.0).done:
        waited = time.monotonic() - began
        if cancelled():
          return
        if timeout and waited > timeout:
          raise Stalled(f'no images of {reading.source.name} came for {waited:.0f} seconds (config.data.timeout); being read: {reading}')
        if waited > told:
          log.warning('warning: waiting for images of %s for %.0f s; being read: %s', reading.source.name, waited, reading)
          told *= 2
      batch = future.result()
      if batch is None:
        return
      yield batch
  finally:
    pool.shutdown(wait=False)
