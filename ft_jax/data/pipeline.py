"""Batches of images. The order is a function of (seed, step): a run that starts again at a step gets the same batches.

A batch is `{'image': uint8 [b, h, w, 3], 'label': int32 [b], 'index': int32 [b], 'mask': bool [b]}`, where `index` is the
example's row in the source and `mask` is False for padding. Each host makes its own share.
"""

from collections.abc import Iterator
import dataclasses
import os
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

  def train(self, example: Example, rng: np.random.Generator) -> np.ndarray:
    """A random crop, mirrored half of the time; uint8 `[size, size, 3]`."""
    image = augment.decode(example.image, example.id)
    image = augment.random_resized_crop(image, self.size, self.scale, self.ratio, rng, self.antialias)
    return augment.mirror(image) if self.flip and rng.random() < 0.5 else image

  def evaluate(self, example: Example) -> np.ndarray:
    """The middle of the image; uint8 `[size, size, 3]`."""
    return augment.center_crop(augment.decode(example.image, example.id), self.size, self.short_side)


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

  def load(row: int, rng: np.random.Generator) -> Batch:
    example = source[row]
    return _element(row, example, transform.train(example, rng))

  # The random numbers of an example follow from its place in the global order, so they come before the split over hosts.
  order = grain.MapDataset.range(len(source)).seed(zlib.crc32(f'{stream}/{seed}'.encode())).shuffle().repeat()
  local = order.random_map(load).slice(slice(host, None, hosts)).batch(batch_size // hosts)
  # A batch is made by one thread: as many under way as there are cores, and no more than the device will take soon.
  threads = max(1, min(16, os.cpu_count() or 1))
  batches = iter(local.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)))
  batches.set_state({'next_index': start})
  return batches


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
    size = self._transform.size
    padding = _element(0, Example(b'', 0, ''), np.zeros((size, size, 3), np.uint8), mask=False)

    def load(row: int) -> Batch:
      if row >= len(self._source):
        return padding
      example = self._source[row]
      return _element(row, example, self._transform.evaluate(example))

    padded = grain.MapDataset.range(self._steps * self._batch_size * hosts)
    local = padded.slice(slice(host, None, hosts)).map(load).batch(self._batch_size)
    threads = max(1, min(16, os.cpu_count() or 1))
    return iter(local.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)))


def _element(row: int, example: Example, image: np.ndarray, mask: bool = True) -> Batch:
  return {'image': np.ascontiguousarray(image), 'label': np.int32(example.label), 'index': np.int32(row), 'mask': np.bool_(mask)}
