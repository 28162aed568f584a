"""Images that cannot be read, found before training and left out of it (`config.data.on_error = 'skip'`)."""

from concurrent import futures
import importlib.metadata
import os

import jax
import numpy as np

from ft_jax import parallel, progress
from ft_jax.data.decode import decode, MAX_PIXELS
from ft_jax.data.disk_cache import cached_arrays
from ft_jax.data.image_set import digest, ImageSet

_CHUNK = 512


def drop(images: ImageSet, what: str, every_class: bool) -> tuple[ImageSet, list[str]]:
  """The examples whose images can be read, and the ids of the others.

  Every image is decoded once; the result is cached in the user's cache folder for later runs.

  Args:
    images: the examples.
    what: a name for messages, such as `target train`.
    every_class: whether each class must keep an image, as it must where something is learnt from them.

  Raises:
    ValueError: no image of such a class can be read, or no image at all.
  """
  unreadable = _unreadable(images, what)
  if not unreadable:
    return images, []
  rest = images.subset(np.flatnonzero(~np.isin(images.ids, unreadable)))
  lost = np.setdiff1d(images.labels, rest.labels)
  if len(lost) and (every_class or not len(rest)):
    names = ', '.join(images.class_names[k] for k in lost[:5].tolist())
    raise ValueError(f'{what}: no image of class {names} can be read, such as {unreadable[0]}; fix the files, '
                     'or remove the class')
  first = ', '.join(unreadable[:3]) + (', ...' if len(unreadable) > 3 else '')
  progress.log.warning('warning: %s: %s of %s images cannot be read and are skipped: %s', what, f'{len(unreadable):,d}',
                       f'{len(images):,d}', first)
  return rest, unreadable


def _unreadable(images: ImageSet, what: str) -> list[str]:
  """The ids of the images that cannot be decoded, in the order of the set; each host tries its share."""
  # Another version of a decoder may read what this one does not.
  versions = [importlib.metadata.version(name) for name in ('pillow', 'simplejpeg')]
  hosts, host = jax.process_count(), jax.process_index()
  start, stop = len(images) * host // hosts, len(images) * (host + 1) // hosts
  share = [f'{start} to {stop}'] if hosts > 1 else []
  key = digest(images.fingerprint, *versions, str(MAX_PIXELS), *share)

  def find() -> dict[str, np.ndarray]:
    ids: list[str] = []
    chunks = range(start, stop, _CHUNK)
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      for first in progress.bar(chunks, f'trying the images of {what}', len(chunks), f'x {_CHUNK} images'):
        rows = range(first, min(first + _CHUNK, stop))
        readable = pool.map(lambda i: _is_readable(images, i), rows)
        ids += [str(images.ids[i]) for i, ok in zip(rows, readable) if not ok]
    return {'ids': np.asarray(ids, str)}

  own = cached_arrays('damaged', key, find)['ids'].tolist()
  return [name for ids in parallel.everyone(own) for name in ids]


def _is_readable(images: ImageSet, i: int) -> bool:
  try:
    example = images[i]
    decode(example.image, example.id, scratch=True)
  except ValueError:
    return False
  return True
