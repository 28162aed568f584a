"""Hashes of what image files hold: the identity of an image, the same on every machine and under every name."""

from collections.abc import Sequence
from concurrent import futures
import hashlib
import os
import time
from typing import NamedTuple

import numpy as np

from ft_jax import progress
from ft_jax.data import disk_cache

# Of arrays of hashes: 32 hexadecimal digits each; an empty one is not known.
HASH = np.dtype('S32')
# A file may change again within the resolution of its times, so one that has just been written is not remembered.
FRESH_NS = 2_000_000_000
# From so many bytes on, a person should know why nothing else happens.
_MANY_BYTES = 2_000_000_000
_CHUNK = 512


class Files(NamedTuple):
  """Of some files: hashes `[n]` of type HASH, empty for a file that cannot be read, and sizes in bytes, 0 for one that is not there."""
  hashes: np.ndarray
  sizes: list[int]


def of_bytes(data: bytes) -> bytes:
  """The hash of some bytes: the first 128 bits of SHA-256, as hexadecimal digits."""
  return hashlib.sha256(data).hexdigest()[:32].encode()


def of_array(image: np.ndarray) -> bytes:
  """The hash of an array of pixels: of its shape and its values."""
  state = hashlib.sha256(repr((image.shape, image.dtype.str)).encode())
  state.update(np.ascontiguousarray(image))
  return state.hexdigest()[:32].encode()


def of_files(paths: Sequence[str | os.PathLike[str]], root: str, what: str, most_bytes: int) -> Files:
  """The hash and the size of each file.

  A file is read once. Its hash is kept in the user's cache folder by path, size, times and inode, so the next call costs a stat for
  each file.

  Args:
    paths: of the files.
    root: the folder or list that they belong to; their hashes are kept together.
    what: a name for messages.
    most_bytes: larger files are no images: they are not read, and get a hash of their size.
  """
  # Not relative to the folder that this process happens to be in.
  absolute, place = [os.path.abspath(path) for path in paths], of_bytes(os.fsencode(os.path.abspath(root))).decode()
  now, stats = time.time_ns(), [_stat(path) for path in absolute]
  keys = [stat_key(path, stat) if stat else b'' for path, stat in zip(absolute, stats)]
  before = disk_cache.load('contents', place)
  known = dict(zip(before['keys'].tolist(), before['hashes'].tolist())) if before else {}
  todo = [i for i, key in enumerate(keys) if key and key not in known]
  if todo:
    found = _read(absolute, stats, todo, what, most_bytes)
    for i, content in zip(todo, found):
      if content and now - max(stats[i].st_mtime_ns, stats[i].st_ctime_ns) > FRESH_NS:
        known[keys[i]] = content
    disk_cache.save('contents', place, {'keys': np.array(list(known), HASH), 'hashes': np.array(list(known.values()), HASH)})
    known |= {keys[i]: content for i, content in zip(todo, found)}
  return Files(np.array([known[key] if key else b'' for key in keys], HASH), [stat.st_size if stat else 0 for stat in stats])


def stat_key(path: str, stat: os.stat_result) -> bytes:
  """Changes when a file is written, moved or replaced, whatever its name, size and time of modification are made to be."""
  return of_bytes(b'%s %d %d %d %d' % (os.fsencode(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


def _stat(path: str) -> os.stat_result | None:
  try:
    return os.stat(path)
  except OSError:
    return None


def _read(paths: Sequence[str], stats: Sequence[os.stat_result], rows: Sequence[int], what: str, most_bytes: int) -> list[bytes]:
  """The hashes of some of the files, which are read on all cores."""
  def read(i: int) -> bytes:
    if stats[i].st_size > most_bytes:
      return of_bytes(b'%d bytes' % stats[i].st_size)
    try:
      with open(paths[i], 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()[:32].encode()
    except OSError:
      return b''

  size = sum(stats[i].st_size for i in rows if stats[i].st_size <= most_bytes)
  if size > _MANY_BYTES:
    progress.log.info('hashing the contents of %s files of %s (%.1f GB), once: later runs find the hashes in the cache',
                      f'{len(rows):,d}', what, size / 1e9)
  found, starts = [], range(0, len(rows), _CHUNK)
  with futures.ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:  # more than cores: a network disk answers late
    for start in progress.bar(starts, f'hashing {what}', len(starts), f'x {_CHUNK} files'):
      found += pool.map(read, rows[start:start + _CHUNK])
  return found
