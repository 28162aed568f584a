"""Batches of images. The order is a function of (seed, step): a run that starts again at a step gets the same batches.

A batch is `{'image': uint8 [b, h, w, 3], 'label': int32 [b], 'index': int32 [b], 'mask': bool [b]}`, where `index` is the
example's row in the source and `mask` is False for padding. Each host makes its own share.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import os
import sys
import zlib

import grain
import jax
import numpy as np

from ft_jax.data import augment
from ft_jax.data.sources import Example, Source

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Transform:
  """What images go through.

  Attributes:
    size: pixels a side of the result.
    scale, ratio: of the random crop (training).
    flip: whether half of the training images are mirrored.
    antialias: whether training crops are averaged wherever they shrink; else only where they shrink by more than two.
    short_side: pixels of the short side before the middle is cut out (evaluation).
  """
  size: int
  scale: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: bool = True
  antialias: bool = False
  short_side: int = 256

  def train(self, example: Example, rng: np.random.Generator, out: np.ndarray | None = None) -> np.ndarray:
    """A random crop, mirrored half of the time; uint8 `[size, size, 3]`, in `out` where that is given."""
    # The crop is a copy, so the whole image may lie where the next one will.
    image = augment.decode(example.image, example.id, scratch=True)
    image = augment.random_resized_crop(image, self.size, self.scale, self.ratio, rng, self.antialias, out)
    return augment.mirror(image) if self.flip and rng.random() < 0.5 else image

  def evaluate(self, example: Example) -> np.ndarray:
    """The middle of the image; uint8 `[size, size, 3]`."""
    return augment.center_crop(augment.decode(example.image, example.id, scratch=True), self.size, self.short_side)


def train_batches(source: Source, transform: Transform, batch_size: int, *, stream: str, seed: int, start: int) -> Iterator[Batch]:
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
  """
  hosts, host = jax.process_count(), jax.process_index()
  key = zlib.crc32(f'{stream}/{seed}'.encode())

  @functools.lru_cache(4)
  def order(turn: int) -> np.ndarray:
    # Not grain's shuffle: that takes 0.1 ms an example, which is half of what reading a cached one takes.
    return np.random.default_rng((key, turn)).permutation(len(source))

  def make(step: int) -> Batch:
    # The random numbers of an example follow from its place in the global order, not from the host that reads it.
    places = range(step * batch_size + host, (step + 1) * batch_size, hosts)
    rows = [int(order(place // len(source))[place % len(source)]) for place in places]
    bits = np.random.Philox(key=key)
    rng, state = np.random.Generator(bits), bits.state

    def load(i: int, example: Example, out: np.ndarray) -> None:
      state['state']['counter'][3] = places[i]
      bits.state = state  # a third of the time that a new generator takes
      transform.train(example, rng, out)

    return _batch(source, rows, load, transform.size)

  return _prefetched(grain.MapDataset.range(sys.maxsize).map(make), start)


class EvalBatches:
  """Every example once, in order, in batches of one size; the last ones padded and masked so that all hosts make as many."""

  def __init__(self, source: Source, transform: Transform, batch_size: int):
    """`batch_size` is that of all hosts together."""
    self._source, self._transform = source, transform
    self._batch_size = batch_size // jax.process_count()
    self._steps = -(-len(source) // batch_size)

  def __len__(self) -> int:
    return self._steps

  def __iter__(self) -> Iterator[Batch]:
    hosts, host = jax.process_count(), jax.process_index()

    def load(i: int, example: Example, out: np.ndarray) -> None:
      out[:] = self._transform.evaluate(example)

    def make(step: int) -> Batch:
      first = step * self._batch_size * hosts + host
      rows = np.arange(first, min(first + self._batch_size * hosts, len(self._source)), hosts)
      batch = _batch(self._source, rows, load, self._transform.size)
      missing = self._batch_size - len(rows)
      return {key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) if missing else value for key, value in batch.items()}

    return _prefetched(grain.MapDataset.range(self._steps).map(make), 0)


def _batch(source: Source, rows: Sequence[int], load: Callable[[int, Example, np.ndarray], None], size: int) -> Batch:
  """The examples of some rows; `load` gets each one's place in the batch, the example, and where its image goes."""
  images = np.empty((len(rows), size, size, 3), np.uint8)
  labels = np.empty(len(rows), np.int32)
  for i, row in enumerate(rows):
    example = source[row]
    load(i, example, images[i])
    labels[i] = example.label
  return {'image': images, 'label': labels, 'index': np.asarray(rows, np.int32), 'mask': np.ones(len(rows), bool)}


def _prefetched(batches: grain.MapDataset, start: int) -> Iterator[Batch]:
  """The batches from `start` on, made ahead by threads."""
  # A batch is made by one thread: as many under way as there are cores, and no more than the device will take soon.
  threads = max(1, min(16, os.cpu_count() or 1))
  iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)))
  iterator.set_state({'next_index': start})
  return iterator
