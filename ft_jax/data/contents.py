"""The contents of image files: reading them, and hashes that identify an image under any name and on any machine."""

from collections.abc import Sequence
from concurrent import futures
import hashlib
import os
import pathlib
import time
from typing import NamedTuple

import numpy as np

from ft_jax import progress
from ft_jax.data import disk_cache

# The dtype of hashes: 32 hexadecimal digits each. An empty one means that the contents are not known.
HASH = np.dtype('S32')
# No larger file is read. Enough for decode.MAX_PIXELS without compression, four channels of 16 bits, and metadata.
MAX_FILE_BYTES = 2_000_000_000
# A file may change again within the resolution of its times: the hash of one just written is not cached.
_FRESH_NS = 2_000_000_000
# From this many bytes on the log says what takes so long.
_LOGGED_BYTES = 2_000_000_000
_CHUNK = 512


class Files(NamedTuple):
  """Hashes of files, `[n]` of dtype HASH (empty if they cannot be read), and their sizes in bytes (0 if missing)."""
  hashes: np.ndarray
  sizes: list[int]


def read_file(path: pathlib.Path) -> bytes:
  """The bytes of an image file.

  Raises:
    ValueError: a link to a file that does not exist, or a file that is too large for an image: a link, or a file of
      nothing but holes, may be endless.
  """
  if path.is_symlink() and not path.exists():
    raise ValueError(f'{path} is a link to {os.readlink(path)}, which does not exist; restore that file, '
                     'or remove the link')
  if (size := path.stat().st_size) > MAX_FILE_BYTES:
    raise ValueError(f'{path} has {size:,d} bytes; expected an image of at most {MAX_FILE_BYTES:,d}. Scale it down '
                     'or move it')
  return path.read_bytes()


def of_bytes(data: bytes) -> bytes:
  """The hash of some bytes: the first 128 bits of SHA-256, as hexadecimal digits."""
  return hashlib.sha256(data).hexdigest()[:32].encode()


def of_array(image: np.ndarray) -> bytes:
  """The hash of an array of pixels: of its shape and its values."""
  state = hashlib.sha256(repr((image.shape, image.dtype.str)).encode())
  state.update(np.ascontiguousarray(image).data)
  return state.hexdigest()[:32].encode()


def of_image(image: bytes | np.ndarray) -> bytes:
  """The hash of an image: of the bytes of its file, or of its pixels."""
  return of_bytes(image) if isinstance(image, bytes) else of_array(image)


def of_files(paths: Sequence[str | os.PathLike[str]], root: str, what: str) -> Files:
  """The hash and the size of each file.

  A file is read once. Its hash is cached in the user's cache folder by path, size, times and inode, so the next call
  costs a stat per file.

  Args:
    paths: of the files.
    root: the folder or list that they belong to; their hashes are cached together.
    what: a name for messages.
  """
  # The cache must not depend on the folder that this process happens to be in.
  absolute = [os.path.abspath(path) for path in paths]
  cache_key = of_bytes(os.fsencode(os.path.abspath(root))).decode()
  now, stats = time.time_ns(), [_stat(path) for path in absolute]
  keys = [stat_key(path, stat) if stat else b'' for path, stat in zip(absolute, stats)]
  cached = disk_cache.load('contents', cache_key)
  known = dict(zip(cached['keys'].tolist(), cached['hashes'].tolist())) if cached else {}
  unknown = {i: stat for i, stat in enumerate(stats) if stat and keys[i] not in known}
  if unknown:
    hashes = _hash_files(absolute, {i: stat.st_size for i, stat in unknown.items()}, what)
    for i, stat in unknown.items():
      if hashes[i] and now - max(stat.st_mtime_ns, stat.st_ctime_ns) > _FRESH_NS:
        known[keys[i]] = hashes[i]
    disk_cache.save('contents', cache_key, {'keys': np.array(list(known), HASH),
                                            'hashes': np.array(list(known.values()), HASH)})
    known |= {keys[i]: content for i, content in hashes.items()}
  return Files(np.array([known[key] if key else b'' for key in keys], HASH),
               [stat.st_size if stat else 0 for stat in stats])


def stat_key(path: str, stat: os.stat_result) -> bytes:
  """Changes when a file is written, moved or replaced, even if its size and modification time are set back."""
  numbers = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
  return of_bytes(b'%s %d %d %d %d' % (os.fsencode(path), *numbers))


def _stat(path: str) -> os.stat_result | None:
  try:
    return os.stat(path)
  except OSError:
    return None


def _hash_files(paths: Sequence[str], sizes: dict[int, int], what: str) -> dict[int, bytes]:
  """Hashes by index for the paths that `sizes` has, read on all cores; empty for files that cannot be read."""
  def read(i: int) -> bytes:
    if sizes[i] > MAX_FILE_BYTES:  # not an image: only its size counts
      return of_bytes(b'%d bytes' % sizes[i])
    try:
      with open(paths[i], 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()[:32].encode()
    except OSError:
      return b''

  total = sum(size for size in sizes.values() if size <= MAX_FILE_BYTES)
  if total > _LOGGED_BYTES:
    progress.log.info('hashing the contents of %s files of %s (%.1f GB), once: later runs find the hashes in the cache',
                      f'{len(sizes):,d}', what, total / 1e9)
  indices, hashes = list(sizes), list[bytes]()
  starts = range(0, len(indices), _CHUNK)
  with futures.ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:  # more than cores: a network disk answers slowly
    for start in progress.bar(starts, f'hashing {what}', len(starts), f'x {_CHUNK} files'):
      hashes += pool.map(read, indices[start:start + _CHUNK])
  return dict(zip(indices, hashes))
