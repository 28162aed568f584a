"""Batches of images. Their order is a function of (seed, step): a run that resumes at a step gets the same batches.

Each host makes its own share of a batch. Threads decode ahead of the training; `_with_timeout` notices when the disk
stops answering.
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

from ft_jax.data import colors, crop
from ft_jax.data.decode import decode
from ft_jax.data.image_set import Example, ImageSet
from ft_jax.data.randaugment import cutout, randaugment
from ft_jax.progress import log

# The arrays of a batch of b examples by name: `input` uint8 `[b, h, w, 3]`, `label` int32 `[b]`, `row` int32 `[b]` (the
# position in the image set), `mask` bool `[b]` (False for padding). Further views of the images have their own names
# and are like `input`.
Batch = dict[str, np.ndarray]
# In seconds: how long a batch may take (see `train_batches`), and after which time the log says what is being read.
TIMEOUT, SLOW = 600.0, 30.0


class Stalled(OSError):
  """No images came for a long time."""


@dataclasses.dataclass(frozen=True)
class Transform:
  """What happens to an image between its file and a batch.

  Attributes:
    size: pixels per side of the result.
    scale, ratio: of the random crop (training); see `crop.random_resized_crop`.
    flip: whether half of the training images are flipped left to right.
    antialias: whether training crops are resized exactly as by Pillow and torchvision, or faster; see
      `crop.random_resized_crop`.
    short_side: pixels of the short side before the middle is cropped (evaluation).
    randaugment: number of random operations on a training crop; 0 for none.
    magnitude: of these operations, 2 to 10.
    cutout: side of a grey square on each training crop, as a fraction of the crop's side; 0 for none.
    jitter: strengths of brightness, contrast, saturation and hue of `colors.jitter`; () for none.
    jitter_probability: that a training crop is jittered.
    grey: probability that a training crop becomes grey.
    blur: probability that a training crop is blurred.
    blur_sigma: bounds of the sigma of the blur; see `colors.random_blur`.
    solarize: probability that a training crop is solarized.
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
  jitter: tuple[float, ...] = ()
  jitter_probability: float = 0.8
  grey: float = 0.0
  blur: float = 0.0
  blur_sigma: tuple[float, float] = (0.1, 2.0)
  solarize: float = 0.0

  def train(self, example: Example, rng: np.random.Generator, out: np.ndarray | None = None) -> np.ndarray:
    """A random crop with random augmentations; uint8 `[size, size, 3]`, written to `out` if that is given."""
    # The crop is a copy, so the decoded image may be in memory that the next one overwrites.
    image = decode(example.image, example.id, scratch=True)
    image = crop.random_resized_crop(image, self.size, self.scale, self.ratio, rng, self.antialias, out)
    if self.flip and rng.random() < 0.5:
      image = crop.mirror(image)
    if self.jitter or self.grey or self.blur or self.solarize:
      image[:] = self._recolored(image, rng)
    if self.randaugment:
      image = randaugment(image, self.randaugment, self.magnitude, rng)
    return cutout(image, self.cutout, rng) if self.cutout else image

  def _recolored(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The crop after random changes of colour and sharpness, in the order of BYOL."""
    for_jitter, for_grey, for_blur, for_solarize = rng.random(4).tolist()
    if self.jitter and for_jitter < self.jitter_probability:
      image = colors.jitter(image, self.jitter, rng)
    if for_grey < self.grey:
      image = colors.grey(image)
    if for_blur < self.blur:
      image = colors.random_blur(image, self.blur_sigma, rng)
    return colors.solarize(image) if for_solarize < self.solarize else image

  def evaluate(self, example: Example) -> np.ndarray:
    """The middle of the image; uint8 `[size, size, 3]`."""
    return crop.center_crop(decode(example.image, example.id, scratch=True), self.size, self.short_side)


def make_transform(image_size: int, augment: ConfigDict) -> Transform:
  """The transform of `config.image_size` and `config.augment`; raises ValueError where they do not fit."""
  side = short_side(image_size, augment)
  if side < image_size:
    raise ValueError(f'augment.short_side is {side}, less than image_size {image_size}')
  jitter = tuple(augment.jitter)
  if jitter and (len(jitter) != 4 or jitter[3] > 0.5):
    raise ValueError(f'augment.jitter is {jitter}; expected the strengths of brightness, contrast, saturation and hue '
                     '(at most 0.5), such as (0.4, 0.4, 0.4, 0.1), or () for none')
  return Transform(
      image_size, tuple(augment.scale), tuple(augment.ratio), augment.flip, augment.antialias, side,
      augment.randaugment, augment.magnitude, augment.cutout, jitter, augment.jitter_probability, augment.grey,
      augment.blur, tuple(augment.blur_sigma), augment.solarize)


def short_side(image_size: int, augment: ConfigDict) -> int:
  """Pixels of an image's short side before the center crop of evaluation."""
  return augment.short_side or round(image_size * 256 / 224)


# --- training ---


def train_batches(images: ImageSet, transform: Transform, batch_size: int, *, stream: str, seed: int, start: int,
                  first: int = 0, views: Mapping[str, Transform] | None = None, balanced: bool = False,
                  skip: Sequence[int] = (), timeout: float = TIMEOUT,
                  cancelled: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
  """Endless training batches, beginning with that of step `start`.

  The order is one permutation of the set after another, each shuffled differently, cut into batches: every example
  comes once per epoch, even if the batch does not divide the set or is larger than it.

  Args:
    images: the examples.
    transform: what happens to them.
    batch_size: of all hosts together.
    stream: a name that makes the orders of two streams of one run differ.
    seed: of the run.
    start: the first step that is wanted, from `first` on.
    first: the step of the run that gets the first batch of the order.
    views: further views of each image, by their name in the batch, each with its own random numbers.
    balanced: draw every class equally often: all classes take turns, and the examples of each come in one permutation
      after another.
    skip: positions of batches in the order that are left out; see `place_of`.
    timeout: seconds that a batch may take; 0 for any number.
    cancelled: asked while a batch takes long; the iterator ends if it returns True.

  Raises:
    Stalled: a batch took longer than `timeout`; the message says what was being read.
  """
  hosts, host = jax.process_count(), jax.process_index()
  key = _order_key(stream, seed)
  row_at = _row_order(images, key, balanced)
  transforms = {'input': transform, **(views or {})}
  reading = _Reading(images)

  def make(step: int) -> Batch:
    # The random numbers of an example depend on its position in the global order, not on the host that reads it.
    positions = _share((place_of(step, skip) - first) * batch_size, batch_size, host, hosts)
    bits = np.random.Philox(key=key)
    rng, state = np.random.Generator(bits), bits.state

    def fill(i: int, example: Example, out: Mapping[str, np.ndarray]) -> None:
      if views:  # decoded once for all views
        example = example._replace(image=decode(example.image, example.id, scratch=True))
      for view, (name, transform) in enumerate(transforms.items()):
        state['state']['counter'][2:] = view, positions[i]
        bits.state = state  # takes a third of the time of a new generator
        transform.train(example, rng, out[name])

    return _make_batch(reading, [row_at(position) for position in positions], fill, transform.size, tuple(transforms))

  return _with_timeout(_prefetched(grain.MapDataset.range(sys.maxsize).map(make), start), reading, timeout, cancelled)


def place_of(step: int, skip: Sequence[int]) -> int:
  """The position of the batch of a step in the order (both from 0), if the positions `skip` are left out."""
  for place in sorted(skip):
    step += place <= step
  return step


def rows_at(images: ImageSet, place: int, batch_size: int, *, stream: str, seed: int,
            balanced: bool = False) -> list[int]:
  """The rows of the batch at a position in the order, on all hosts; arguments as of `train_batches`."""
  row_at = _row_order(images, _order_key(stream, seed), balanced)
  return [row_at(position) for position in range(place * batch_size, (place + 1) * batch_size)]


def _order_key(stream: str, seed: int) -> int:
  return zlib.crc32(f'{stream}/{seed}'.encode())


def _share(first: int, size: int, host: int, hosts: int) -> range:
  """The positions of a host in a batch that begins at `first`: neighbours, in the order of its devices."""
  per_host = size // hosts
  return range(first + host * per_host, first + (host + 1) * per_host)


def _row_order(images: ImageSet, key: int, balanced: bool) -> Callable[[int], int]:
  """Maps a position in the endless order of examples to a row."""
  return _balanced_order(images, key) if balanced else _shuffled_order(images, key)


def _shuffled_order(images: ImageSet, key: int) -> Callable[[int], int]:
  """One permutation of the examples after another."""

  @functools.lru_cache(4)
  def permutation(epoch: int) -> np.ndarray:
    # Grain's shuffle takes 0.1 ms per example, half as long as reading a cached one.
    return np.random.default_rng((key, epoch)).permutation(len(images))

  return lambda position: int(permutation(position // len(images))[position % len(images)])


def _balanced_order(images: ImageSet, key: int) -> Callable[[int], int]:
  """One permutation of the classes after another, and in the n-th of them the n-th example of each class."""
  classes = np.unique(images.labels)
  rows = {k: np.flatnonzero(images.labels == k) for k in classes.tolist()}

  @functools.lru_cache(4)
  def class_permutation(turn: int) -> np.ndarray:
    return np.random.default_rng((key, turn)).permutation(classes)

  @functools.lru_cache(4 * len(classes))
  def permutation(k: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((key, epoch, k)).permutation(rows[k])

  def row(position: int) -> int:
    turn, i = divmod(position, len(classes))
    k = int(class_permutation(turn)[i])
    return int(permutation(k, turn // len(rows[k]))[turn % len(rows[k])])

  return row


# --- evaluation ---


class EvalBatches:
  """Every example once, in order, in batches of one size.

  The last ones are padded and masked, so that all hosts make equally many.
  """

  def __init__(self, images: ImageSet, transform: Transform, batch_size: int, timeout: float = TIMEOUT, start: int = 0):
    """Begins with batch `start`.

    Args:
      images: the examples.
      transform: what happens to them.
      batch_size: of all hosts together.
      timeout: seconds that a batch may take before Stalled is raised; 0 for any number.
      start: the first batch that is wanted.
    """
    self._images, self._transform, self._batch_size, self._timeout = images, transform, batch_size, timeout
    self._start, self._stop = start, -(-len(images) // batch_size)

  def __len__(self) -> int:
    return self._stop - self._start

  def __iter__(self) -> Iterator[Batch]:
    hosts, host = jax.process_count(), jax.process_index()
    reading = _Reading(self._images)

    def fill(i: int, example: Example, out: Mapping[str, np.ndarray]) -> None:
      out['input'][:] = self._transform.evaluate(example)

    def make(step: int) -> Batch:
      share = _share(step * self._batch_size, self._batch_size, host, hosts)
      rows = list(range(share.start, min(share.stop, len(self._images))))
      batch = _make_batch(reading, rows, fill, self._transform.size, ('input',))
      return _padded(batch, len(share))

    batches = grain.MapDataset.range(self._stop).map(make)
    return _with_timeout(_prefetched(batches, self._start), reading, self._timeout)


def _padded(batch: Batch, size: int) -> Batch:
  """The batch with zeros up to `size` examples; their mask is False."""
  missing = size - len(batch['mask'])
  if not missing:
    return batch
  return {name: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) for name, value in batch.items()}


# --- reading ---


class _Reading:
  """An image set, and which of its examples are being read now, by thread."""

  def __init__(self, images: ImageSet):
    self.images = images
    self.since: dict[int, tuple[int, float]] = {}  # by thread: the row, and when it was begun

  def __str__(self) -> str:
    # A copy, because the threads change it meanwhile.
    slowest = sorted(self.since.copy().values(), key=lambda row_and_time: row_and_time[1])[:3]
    now = time.monotonic()
    return ', '.join(f'{self.images.ids[row]} for {now - began:.0f} s' for row, began in slowest) or 'nothing'


def _make_batch(reading: _Reading, rows: Sequence[int], fill: Callable[[int, Example, Mapping[str, np.ndarray]], None],
                size: int, views: Sequence[str]) -> Batch:
  """A batch of some rows; `fill` gets a position in the batch, the example, and the arrays to write its views to."""
  images, thread = reading.images, threading.get_ident()
  arrays = {view: np.empty((len(rows), size, size, 3), np.uint8) for view in views}
  labels = np.empty(len(rows), np.int32)
  for i, row in enumerate(rows):
    reading.since[thread] = row, time.monotonic()
    example = images[row]
    fill(i, example, {view: array[i] for view, array in arrays.items()})
    labels[i] = example.label
  reading.since.pop(thread, None)
  return {**arrays, 'label': labels, 'row': np.asarray(rows, np.int32), 'mask': np.ones(len(rows), bool)}


def _prefetched(batches: grain.MapDataset, start: int) -> Iterator[Batch]:
  """The batches, beginning with number `start`, made ahead of time by threads."""
  # Each batch is made by one thread: as many at a time as there are cores, and not more than will be needed soon.
  threads = max(1, min(16, os.cpu_count() or 1))
  iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)))
  iterator.set_state({'next_index': start})
  return iterator


def _with_timeout(batches: Iterator[Batch], reading: _Reading, timeout: float,
                  cancelled: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
  """The same batches, fetched by a thread: a disk that hangs does not hang the program; see `train_batches`."""
  pool = concurrent.futures.ThreadPoolExecutor(1, 'batches')
  try:
    while True:
      future, began, log_after = pool.submit(next, batches, None), time.monotonic(), SLOW
      while not concurrent.futures.wait([future], 1.0).done:
        waited = time.monotonic() - began
        if cancelled():
          return
        if timeout and waited > timeout:
          raise Stalled(f'no images of {reading.images.name} came for {waited:.0f} seconds (config.data.timeout); '
                        f'being read: {reading}')
        if waited > log_after:
          log.warning('warning: waiting for images of %s for %.0f s; being read: %s', reading.images.name, waited,
                      reading)
          log_after *= 2
      batch = future.result()
      if batch is None:
        return
      yield batch
  finally:
    pool.shutdown(wait=False)
