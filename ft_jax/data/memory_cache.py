"""Decoded images in memory: for sets that are small enough, only the first pass over them decodes."""

from collections.abc import Mapping
import dataclasses
import pathlib

import numpy as np
import psutil

from ft_jax import progress
from ft_jax.data import augment
from ft_jax.data.image_set import ImageSet

# Part of the free memory: batches on their way, and the buffers of the computation, need some too.
_MOST = 0.8


def cached(sources: Mapping[str, ImageSet]) -> dict[str, ImageSet]:
  """Sources that keep each image, decoded, from its first use on. The images that come out of a pipeline stay the same.

  Their size is known and logged before an image is decoded. Each process has a cache of its own, shared by its threads.

  Args:
    sources: by a name for messages, such as `target train`.

  Raises:
    ValueError: they do not fit into the memory that is free; or an image that cannot be read, named.
  """
  needed = sum(_decoded_bytes(source, name) for name, source in sources.items())
  free = free_memory()
  images = sum(len(source) for source in sources.values())
  if needed > _MOST * free:
    raise ValueError(f'config.data.cache=true: {images:,d} images ({", ".join(sources)}) are {_gigabytes(needed)} decoded, '
                     f'and {_gigabytes(free)} of memory are free, of which {_MOST:.0%} may be taken; use --config.data.cache=false')
  progress.log.info('keeping %s decoded images in memory (%s): %s of the %s that are free', f'{images:,d}', ', '.join(sources),
                    _gigabytes(needed), _gigabytes(free))
  return {name: _Cache(source).source for name, source in sources.items()}


class _Cache:
  """The decoded images of one source, by their row in the store."""

  def __init__(self, source: ImageSet):
    self._read = source.read
    self._images: dict[int, np.ndarray] = {}
    self._ids = dict(zip(source.rows.tolist(), source.ids.tolist()))
    self.source = dataclasses.replace(source, read=self.read)

  def read(self, row: int) -> np.ndarray:
    image = self._images.get(row)
    if image is None:  # two threads that meet here do the same work twice, and no harm
      image = augment.decode(self._read(row), self._ids[row])
      image.flags.writeable = False  # it is handed out again and again
      self._images[row] = image
    return image


def free_memory() -> int:
  """Bytes that this process may still take: of the machine, and of the container that it is in."""
  free = psutil.virtual_memory().available
  group = pathlib.Path('/sys/fs/cgroup')
  try:
    limit, used = int((group / 'memory.max').read_text()), int((group / 'memory.current').read_text())
    # Files that the kernel keeps in memory are counted as used and given up when asked for.
    files = dict(line.split() for line in (group / 'memory.stat').read_text().splitlines()).get('inactive_file', 0)
    return min(free, limit - used + int(files))
  except (OSError, ValueError):  # not in a container, or one without a limit
    return free


def _decoded_bytes(source: ImageSet, name: str) -> int:
  examples = progress.bar((source[i] for i in range(len(source))), f'sizes of {name}', len(source), 'image')
  return sum(3 * height * width for height, width in (augment.dimensions(example.image, example.id) for example in examples))


def _gigabytes(size: int) -> str:
  return f'{size / 1e9:.2f} GB' if size >= 1e7 else f'{size / 1e6:.2f} MB'
