"""Decoded images in memory: if the sets are small enough, only the first pass over them decodes."""

from collections.abc import Mapping
import dataclasses
import pathlib

import numpy as np
import psutil

from ft_jax import progress
from ft_jax.data.decode import decode, dimensions
from ft_jax.data.image_set import ImageSet

# Fraction of the free memory that may be used: prefetched batches and the computation's buffers need some too.
_MAX_FRACTION = 0.8


def cached(image_sets: Mapping[str, ImageSet]) -> dict[str, ImageSet]:
  """The same sets, which keep each image, decoded, once it has been read. A pipeline gives the same images as without.

  Their size is known and logged before any image is decoded. Each process has its own cache, which its threads share.

  Args:
    image_sets: by a name for messages, such as `target train`.

  Raises:
    ValueError: they do not fit into the free memory; or an image cannot be read, which is named.
  """
  needed = sum(_decoded_bytes(images, name) for name, images in image_sets.items())
  free = free_memory()
  count = sum(len(images) for images in image_sets.values())
  if needed > _MAX_FRACTION * free:
    raise ValueError(f'config.data.cache=true: {count:,d} images ({", ".join(image_sets)}) take '
                     f'{_in_gigabytes(needed)} decoded, but {_in_gigabytes(free)} of memory are free, of which '
                     f'{_MAX_FRACTION:.0%} may be used; use --config.data.cache=false')
  progress.log.info('caching %s decoded images in memory (%s): %s of %s free', f'{count:,d}', ', '.join(image_sets),
                    _in_gigabytes(needed), _in_gigabytes(free))
  return {name: _Cache(images).image_set for name, images in image_sets.items()}


class _Cache:
  """The decoded images of one set, by their row in the store."""

  def __init__(self, images: ImageSet):
    self._read = images.read
    self._decoded: dict[int, np.ndarray] = {}
    self._ids = dict(zip(images.rows.tolist(), images.ids.tolist()))
    self.image_set = dataclasses.replace(images, read=self.read)

  def read(self, row: int) -> np.ndarray:
    """The decoded image in a row of the store."""
    image = self._decoded.get(row)
    if image is None:  # two threads may both decode it, which does no harm
      image = decode(self._read(row), self._ids[row])
      image.flags.writeable = False  # it is handed out again and again
      self._decoded[row] = image
    return image


def free_memory() -> int:
  """Bytes that this process may still allocate: of the machine, and of the container that it is in."""
  free = psutil.virtual_memory().available
  group = pathlib.Path('/sys/fs/cgroup')
  try:
    limit, used = int((group / 'memory.max').read_text()), int((group / 'memory.current').read_text())
    # Cached files count as used, but the kernel frees them when memory is needed.
    files = dict(line.split() for line in (group / 'memory.stat').read_text().splitlines()).get('inactive_file', 0)
    return min(free, limit - used + int(files))
  except (OSError, ValueError):  # not in a container, or one without a limit
    return free


def _decoded_bytes(images: ImageSet, name: str) -> int:
  examples = progress.bar((images[i] for i in range(len(images))), f'sizes of {name}', len(images), 'image')
  return sum(3 * height * width for height, width in (dimensions(example.image, example.id) for example in examples))


def _in_gigabytes(size: int) -> str:
  return f'{size / 1e9:.2f} GB' if size >= 1e7 else f'{size / 1e6:.2f} MB'
