"""Files on disk and objects in object storage (`gs://bucket/...`): one way to name and write both.

An object appears whole or not at all, but objects cannot be renamed or appended to, and there are no folders. A file is
written to a temporary file beside its path and then renamed, which has the same effect.
"""

from collections.abc import Iterator
import contextlib
import errno
import fnmatch
import importlib.util
import io
import logging
import os
import re
import shutil
import tempfile
from typing import Any, BinaryIO
import uuid

from etils import epath

# The package with which etils and orbax access each kind of object storage.
PACKAGES = {'gs': 'gcsfs'}

_PathBase: Any = type(epath.Path())


class Unwritable(OSError):
  """A file could not be written: the message has the path, the reason and the free space, in one line.

  Attributes:
    problem: the first half of the message: what happened.
    fix: what to do before trying again; '' if unknown.
  """
  problem: str
  fix: str

  def __init__(self, path: epath.PathLike, error: BaseException, then: str = 'start again', before: str = ''):
    """Makes the message from an error of the system or of a library.

    Args:
      path: the file, or its folder.
      error: the original error.
      then: what to do after the fix.
      before: what the message says about data that was written before.
    """
    number, text = error_number(error), ' '.join(str(error).split())[:300]
    if isinstance(error, Unwritable):
      self.problem, self.fix = error.problem, error.fix
    elif is_url(path):
      if isinstance(error, FileNotFoundError):  # only the bucket can be missing: there are no folders
        text = f'there is no bucket {_bucket(path)}, or it cannot be accessed from here'
      self.problem, self.fix = f'{os.fspath(path)} cannot be written: {text}', ''
    else:
      what, self.fix = _REASONS.get(number, (text, ''))
      self.problem = f'{os.fspath(path)} cannot be written: {what}{_free_space(path) if number in _NO_SPACE else ""}'
    self.fix = self.fix.format(user=_user())
    super().__init__(f'{self.problem}. {before or "What was written before is unchanged"}; '
                     + (f'{self.fix}, and {then}' if self.fix else then))
    self.errno = number


class _Path(_PathBase):
  """A path whose `glob` takes the path itself literally.

  etils treats special characters in the path as part of the pattern, so that orbax would find other checkpoints.
  """

  def glob(self, pattern: str) -> Iterator['_Path']:
    """The paths in this folder that match a pattern with `*`, `?` and `[]`; none if there is no such folder."""
    here, _, below = pattern.partition('/')
    try:
      found = [path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, here)]
    except (FileNotFoundError, NotADirectoryError):
      return
    for path in found:
      if below:
        yield from path.glob(below)
      else:
        yield path


def is_url(path: epath.PathLike) -> bool:
  """Whether the path names an object, not a file."""
  return '://' in os.fspath(path)


def located(path: epath.PathLike) -> epath.Path:
  """The path of a file or an object, with `~` expanded to the home directory.

  Raises:
    ValueError: the kind of object storage is unknown, or its package is not installed; or there is no home directory.
  """
  kind, separator, rest = os.fspath(path).partition(':')
  if separator and kind in PACKAGES and not re.match('//[^/]', rest):
    raise ValueError(f'{os.fspath(path)!r} is not a valid object storage URL; expected {kind}://bucket/folder (for a '
                     'local folder of that name, give its absolute path)')
  if not is_url(path):
    found = _Path(path).expanduser()
    if found.parts[:1] == ('~',):
      raise ValueError(f'{os.fspath(path)}: there is no home directory to expand ~; give the absolute path')
    return _local(found)
  kind = os.fspath(path).partition('://')[0]
  if kind not in PACKAGES:
    raise ValueError(f'{os.fspath(path)}: object storage of the kind {kind}:// is not supported; supported: '
                     f'{", ".join(f"{known}://" for known in PACKAGES)}')
  if importlib.util.find_spec(PACKAGES[kind]) is None:
    raise ValueError(f'{os.fspath(path)} is on object storage, which needs the package {PACKAGES[kind]}: '
                     f'pip install {PACKAGES[kind]}')
  _prepare(kind)
  return _Path(path)


def absolute(path: epath.PathLike) -> epath.Path:
  """The absolute path; URLs of objects are unchanged."""
  path = located(path)
  return path if is_url(path) else _local(path.resolve())


def _local(path: _Path) -> _Path:
  """The path; raises ValueError for local folders that etils takes for object storage: `/gs`, `/s3`, `/az`, `/hf`."""
  if is_url(path):
    kind = os.fspath(path).partition('://')[0]
    raise ValueError(f'the folder /{kind} cannot be used: the library that opens files reads it as {kind}://. Rename '
                     'or mount it under another name, or use a path through a symbolic link')
  return path


def make_folder(path: epath.PathLike) -> epath.Path:
  """Creates a folder and its parents unless they exist; for object storage it checks that the bucket can be accessed.

  Raises:
    ValueError: the path is a file.
    OSError: the bucket does not exist or cannot be accessed; `Unwritable` if the folder cannot be created.
  """
  path = located(path)
  if not is_url(path):
    try:
      path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
      raise ValueError(f'{path} is a file; give a folder') from error
    except OSError as error:
      raise Unwritable(path, error) from error
    return path
  try:
    path.exists()
  except Exception as error:  # the client, the network and the login have their own error types
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
    raise OSError(f'{path} cannot be reached ({reason}); is there a bucket {_bucket(path)}, and may this machine use '
                  'it (gcloud auth application-default login)?') from error
  return path


def write_whole(path: epath.PathLike, data: bytes) -> None:
  """Writes a file or an object whole or not at all; the folder must exist.

  Raises:
    Unwritable: it cannot be written; an older file at the path is unchanged.
  """
  with whole_file(path) as stream:
    stream.write(data)


def write_text(path: epath.PathLike, text: str) -> None:
  """Writes a UTF-8 text file whole or not at all, and creates its folder; undecodable file names keep their bytes."""
  make_folder(located(path).parent)
  write_whole(path, text.encode('utf-8', 'surrogateescape'))


@contextlib.contextmanager
def whole_file(path: epath.PathLike) -> Iterator[BinaryIO]:
  """A stream whose contents replace the file when the block ends, or are dropped if it ends with an error.

  For object storage they are collected in memory. Raises the errors of `write_whole`.
  """
  path = located(path)
  if is_url(path):
    contents = io.BytesIO()
    yield contents
    try:
      path.write_bytes(contents.getvalue())  # in one piece: a stream that is closed halfway would leave half an object
    except Exception as error:  # see `make_folder`
      raise Unwritable(path, error) from error
    return
  temporary = path.parent / f'.{uuid.uuid4().hex}.tmp'  # without the name, which may have the maximal length already
  try:
    try:
      with open(temporary, 'wb') as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())  # otherwise the renamed file may be empty after a power cut
      os.replace(temporary, path)
    except BaseException:
      with contextlib.suppress(OSError):
        os.unlink(temporary)
      raise
  except OSError as error:
    raise Unwritable(path, error) from error


@contextlib.contextmanager
def on_disk(path: epath.PathLike) -> Iterator[epath.Path]:
  """A local file for libraries that read no URLs: the file itself, or a temporary copy of an object."""
  path = located(path)
  if not is_url(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = epath.Path(folder) / path.name
    with path.open('rb') as source, copy.open('wb') as target:
      shutil.copyfileobj(source, target, 1 << 24)
    yield copy


def is_leftover(name: str) -> bool:
  """Whether a file of this name is left over from a process that was killed while writing."""
  return bool(re.fullmatch(r'\.(.*\.)?[0-9a-f]{32}\.tmp', name, re.DOTALL))  # earlier versions included the file's name


def append(path: epath.PathLike, data: bytes, sync: bool = False) -> None:
  """Appends to an existing file, all of the data or nothing; not for objects.

  Args:
    path: the file.
    data: what to append.
    sync: whether to flush to disk, so that the data survives a power cut.

  Raises:
    Unwritable: the file cannot be written, or does not exist any more.
  """
  try:
    file = os.open(path, os.O_WRONLY | os.O_APPEND)  # never created: a file that vanished had earlier contents
    try:
      before = os.fstat(file).st_size
      try:
        rest = memoryview(data)
        while rest:
          rest = rest[os.write(file, rest):]
        if sync:
          os.fsync(file)
      except OSError:
        with contextlib.suppress(OSError):
          os.ftruncate(file, before)
        raise
    finally:
      os.close(file)
  except OSError as error:
    raise Unwritable(path, error) from error


def error_number(error: BaseException | None) -> int | None:
  """The errno of an error, or None; tensorstore's errors have it in their text."""
  if error is None:
    return None
  if isinstance(error, OSError) and error.errno is not None:
    return error.errno
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return int(found[1]) if found else error_number(error.__cause__)


def _bucket(path: epath.PathLike) -> str:
  return os.fspath(path).split('/')[2]


def _free_space(path: epath.PathLike) -> str:
  folder = os.path.abspath(path)
  while not os.path.isdir(folder) and folder != os.path.dirname(folder):
    folder = os.path.dirname(folder)
  try:
    free = shutil.disk_usage(folder).free
  except OSError:
    return ''
  for unit, name in ((1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')):
    if free >= unit:
      return f' ({free / unit:.1f} {name} are free)'
  return f' ({free} bytes are free)'


def _user() -> str:
  try:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name
  except (ImportError, KeyError):  # on Windows; or a user id without a name, as in some containers
    return 'this user'


def _prepare(kind: str) -> None:
  """Turns off fsspec's cache of listings, which misses what other processes write, and tracebacks in its log."""
  import fsspec

  logging.getLogger(PACKAGES[kind]).addFilter(_drop_traceback)
  for protocol in (kind, PACKAGES[kind].removesuffix('fs')):
    fsspec.config.conf.setdefault(protocol, {}).setdefault('use_listings_cache', False)


def _drop_traceback(record: logging.LogRecord) -> bool:
  record.exc_info = record.exc_text = None  # the error is raised as well
  return True


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_GONE = ('its folder does not exist any more', 'restore it')
# errno -> (what happened, what to do).
_REASONS: dict[Any, tuple[str, str]] = {
    errno.ENOSPC: ('the disk is full', 'free some space there'),
    errno.EDQUOT: ('the quota is used up', 'free some space there'),
    errno.EFBIG: ('files may not become that large (ulimit -f)', 'allow larger ones'),
    errno.EROFS: ('the disk is read-only', 'make it writable'),
    errno.EACCES: ('permission denied', 'let {user} write there'),
    errno.EPERM: ('permission denied', 'let {user} write there'),
    errno.ENOENT: _GONE,
    errno.ENOTDIR: _GONE,
    errno.ESTALE: _GONE,
}
