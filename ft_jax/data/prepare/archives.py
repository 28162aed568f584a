"""The files in archives, and in folders that replace an archive; damaged archives are named."""

from collections.abc import Iterator
import contextlib
import lzma
import os
import pathlib
import tarfile
from typing import Any, BinaryIO
import zipfile
import zlib

import tensorflow_datasets as tfds

from ft_jax import progress

# What the unpackers raise for a damaged archive; gzip raises OSError.
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError)


class LazyFile:
  """A file that is opened when it is read: builders may go through all names first."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def read(self) -> bytes:
    """Everything in it."""
    return self._path.read_bytes()


def iter_folder(folder: pathlib.Path) -> Iterator[tuple[str, LazyFile]]:
  """The files below a folder by their relative paths, sorted."""
  for root, folders, files in os.walk(folder, followlinks=True):
    folders.sort()
    for name in sorted(files):
      path = pathlib.Path(root, name)
      yield path.relative_to(folder).as_posix(), LazyFile(path)


def iter_archive(archive: pathlib.Path, stream: BinaryIO, method: Any) -> Iterator[tuple[str, BinaryIO]]:
  """The files in an archive, read by TFDS, which leaves out absolute paths and `..`; opened without TensorFlow.

  Raises:
    ValueError: the archive is damaged.
  """
  with naming_damage(archive):
    yield from tfds.download.iter_archive(stream, method)


@contextlib.contextmanager
def naming_damage(archive: pathlib.Path) -> Iterator[None]:
  """Turns what the unpackers raise for a damaged archive into a ValueError that names it."""
  try:
    yield
  except (*DAMAGED, OSError) as error:
    if isinstance(error, OSError) and error.errno is not None:
      raise  # the disk is at fault, not the archive
    # tarfile has a line for every compression that it tried.
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(':')
    size = archive.stat().st_size
    raise ValueError(f'{archive} is damaged or cut short ({reason}; {size:,d} bytes): get it again') from error


def check_archive(archive: pathlib.Path, published: int | None) -> None:
  """Logs what was found, and refuses an archive that is not complete.

  Args:
    archive: the file.
    published: the bytes of the published file, None if that is not known. Another size is only warned of.

  Raises:
    ValueError: it is empty, or a plain tar that is cut short, which Python may read to its end without an error.
  """
  size = archive.stat().st_size
  if not size:
    raise ValueError(f'{archive} is empty (0 bytes): get it again')
  progress.log.info('found: %s (%s)', archive, in_bytes(size))
  if published and size != published:
    progress.log.warning('it has %s bytes, the published file %s; it is used as it is', f'{size:,d}', f'{published:,d}')
  with open(archive, 'rb') as stream:
    stream.seek(257)
    is_plain_tar = stream.read(5) == b'ustar'
  if is_plain_tar:
    with naming_damage(archive), tarfile.open(archive, 'r:') as tar:
      last = tar.getmembers()[-1]  # reads only the headers
    if size < last.offset_data + last.size + 1024:
      raise ValueError(f'{archive} is cut short: it does not end with the two empty blocks of a tar file, at {size:,d} '
                       'bytes; get it again')


def in_bytes(size: float) -> str:
  """A size for people: `792 MB`, `1.2 GB`."""
  for unit, one in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if size >= one:
      return f'{size / one:.1f} {unit}' if size < 10 * one else f'{size / one:,.0f} {unit}'
  return f'{size:.0f} bytes'
