"""Images that cannot be read, found before a training and left out of it (`config.data.on_error = 'skip'`)."""

from concurrent import futures
import importlib.metadata
import os

import jax
import numpy as np

from ft_jax import parallel, progress
from ft_jax.data import augment
from ft_jax.data.disk_cache import kept
from ft_jax.data.image_set import digest, ImageSet


def without_damaged(source: ImageSet, what: str, every_class: bool) -> tuple[ImageSet, list[str]]:
  """The examples whose images can be read, and the ids of the others.

  Every image is decoded once; what comes of it is kept in the user's cache folder, so that the next run has it at once.

  Args:
    source: the examples.
    what: a name for messages, such as `target train`.
    every_class: whether each class must keep an image, as it must where something is learnt from them.

  Raises:
    ValueError: no image of such a class can be read, or none at all.
  """
  damaged = _damaged(source, what)
  if not damaged:
    return source, []
  rest = source.subset(np.flatnonzero(~np.isin(source.ids, damaged)))
  lost = np.setdiff1d(source.labels, rest.labels)
  if len(lost) and (every_class or not len(rest)):
    names = ', '.join(source.class_names[k] for k in lost[:5].tolist())
    raise ValueError(f'{what}: no image of class {names} can be read, such as {damaged[0]}; mend the files, or remove the class')
  progress.log.warning('warning: %s: %s of %s images cannot be read and are skipped: %s%s', what, f'{len(damaged):,d}',
                       f'{len(source):,d}', ', '.join(damaged[:3]), ', ...' if len(damaged) > 3 else '')
  return rest, damaged


def _damaged(source: ImageSet, what: str) -> list[str]:
  """The ids of the images that cannot be decoded, in the order of the source; each host tries its share."""
  # Another version of a decoder may read what this one does not.
  versions = [importlib.metadata.version(name) for name in ('pillow', 'simplejpeg')]
  hosts, host = jax.process_count(), jax.process_index()
  first, end = len(source) * host // hosts, len(source) * (host + 1) // hosts
  part = [f'{first} to {end}'] if hosts > 1 else []
  key = digest(source.fingerprint, *versions, str(augment.MOST_PIXELS), *part)

  def find() -> dict[str, np.ndarray]:
    damaged, starts = [], range(first, end, 512)
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      for start in progress.bar(starts, f'trying the images of {what}', len(starts), 'x 512 images'):
        rows = range(start, min(start + 512, end))
        damaged += [str(source.ids[i]) for i, readable in zip(rows, pool.map(lambda i: _readable(source, i), rows)) if not readable]
    return {'ids': np.asarray(damaged, str)}

  return [name for found in parallel.everyone(kept('damaged', key, find)['ids'].tolist()) for name in found]


def _readable(source: ImageSet, i: int) -> bool:
  try:
    example = source[i]
    augment.decode(example.image, example.id, scratch=True)
  except ValueError:
    return False
  return True
