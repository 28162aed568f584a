"""Files on a disk, and objects on object storage (`gs://bucket/...`): one way to name and to write both.

An object appears whole or not at all, but nothing can be renamed there or added to, and there are no folders. A file is written beside its
place and moved there, which comes to the same.
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

# What etils and orbax reach them with.
PACKAGES = {'gs': 'gcsfs'}


class Unwritable(OSError):
  """A file that could not be written: which, why, and how much room there is, in one line.

  Attributes:
    problem: the first half of that line: what happened.
    mend: what has to be done before it is tried again; '' where that is not known.
  """

  def __init__(self, path: epath.PathLike, error: BaseException, then: str = 'start again', before: str = ''):
    """Says it of an error of the system or of a library.

    Args:
      path: what was written, or the folder of it.
      error: what came of it.
      then: what to do when it is mended.
      before: what is to be said of what was written before.
    """
    number, text = error_number(error), ' '.join(str(error).split())[:300]
    if isinstance(error, Unwritable):
      self.problem, self.mend = error.problem, error.mend
    elif is_url(path):  # nobody misses a folder there
      missing = f'there is no bucket {_bucket(path)}, or it may not be seen from here'
      self.problem, self.mend = f'{os.fspath(path)} cannot be written: {missing if isinstance(error, FileNotFoundError) else text}', ''
    else:
      what, self.mend = _REASONS.get(number, (text, ''))
      self.problem = f'{os.fspath(path)} cannot be written: {what}{_room(path) if number in _OF_ROOM else ""}'
    self.mend = self.mend.format(user=_user())
    super().__init__(f'{self.problem}. {before or "What was written before stays as it was"}; '
                     + (f'{self.mend}, and {then}' if self.mend else then))
    self.errno = number


class _Path(type(epath.Path())):
  """A path whose own name `glob` takes literally; etils takes it for a part of the pattern, by which orbax finds other checkpoints."""

  def glob(self, pattern: str) -> Iterator['_Path']:
    """What is in this folder by a pattern with `*`, `?` and `[]`; nothing where there is no such folder."""
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
  """Whether it names an object, not a file."""
  return '://' in os.fspath(path)


def located(path: epath.PathLike) -> epath.Path:
  """The path of a file or an object, with `~` for the home.

  Raises:
    ValueError: object storage of an unknown kind, or a package that it needs is not installed; or there is no home for `~`.
  """
  kind, separator, rest = os.fspath(path).partition(':')
  if separator and kind in PACKAGES and not re.match('//[^/]', rest):
    raise ValueError(f'{os.fspath(path)!r} is no place on object storage; expected {kind}://bucket/folder (a folder of that name is given '
                     'by its path from the root on)')
  if not is_url(path):
    found = _Path(path).expanduser()
    if found.parts[:1] == ('~',):
      raise ValueError(f'{os.fspath(path)}: there is no home directory to put in the place of ~; give the path from the root on')
    return _local(found)
  kind = os.fspath(path).partition('://')[0]
  if kind not in PACKAGES:
    raise ValueError(f'{os.fspath(path)}: object storage of the kind {kind}:// is not known here; known: '
                     f'{", ".join(f"{known}://" for known in PACKAGES)}')
  if importlib.util.find_spec(PACKAGES[kind]) is None:
    raise ValueError(f'{os.fspath(path)} is on object storage, which needs the package {PACKAGES[kind]}: pip install {PACKAGES[kind]}')
  _prepare(kind)
  return _Path(path)


def absolute(path: epath.PathLike) -> epath.Path:
  """The path from the root on; that of an object is one."""
  path = located(path)
  return path if is_url(path) else _local(path.resolve())


def _local(path: _Path) -> _Path:
  """The path; raises ValueError for the few folders of a disk that etils takes for object storage: `/gs`, `/s3`, `/az`, `/hf`."""
  if is_url(path):
    kind = os.fspath(path).partition('://')[0]
    raise ValueError(f'the folder /{kind} cannot be used: the library that opens files reads it as {kind}://. Rename or mount it under '
                     f'another name, or use a path through a symbolic link')
  return path


def make_folder(path: epath.PathLike) -> epath.Path:
  """Makes a folder with those above it, or finds it; an object needs none, but its bucket must be there.

  Raises:
    Unwritable: it cannot be made; nobody may look into the bucket; or there is none.
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
  except Exception as error:  # its client, the network and the login have errors of their own
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
    raise OSError(f'{path} cannot be reached ({reason}); is there a bucket {_bucket(path)}, and may this machine use it '
                  '(gcloud auth application-default login)?') from error
  return path


def write_whole(path: epath.PathLike, data: bytes) -> None:
  """Writes a file or an object whole or not at all, in a folder that is there.

  Raises:
    Unwritable: it cannot be written; what was there before is there still.
  """
  with whole_file(path) as stream:
    stream.write(data)


def write_text(path: epath.PathLike, text: str) -> None:
  """Writes a text file whole or not at all, and creates its folder; names of files are written as the file system has them."""
  make_folder(located(path).parent)
  write_whole(path, text.encode('utf-8', 'surrogateescape'))


@contextlib.contextmanager
def whole_file(path: epath.PathLike) -> Iterator[BinaryIO]:
  """A stream whose contents are in the file when the block ends, and not before; nothing is, where it ends with an error.

  On object storage they are put together in memory. Raises as `write_whole`.
  """
  path = located(path)
  if is_url(path):
    stream = io.BytesIO()
    yield stream
    try:
      path.write_bytes(stream.getvalue())  # in one piece: a stream that is closed half way would leave half an object
    except Exception as error:  # see `make_folder`
      raise Unwritable(path, error) from error
    return
  temporary = path.parent / f'.{uuid.uuid4().hex}.tmp'  # without the name, which may be as long as a name can be
  try:
    try:
      with open(temporary, 'wb') as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())  # else it may be empty in its place after a power cut
      os.replace(temporary, path)
    except BaseException:
      with contextlib.suppress(OSError):
        os.unlink(temporary)
      raise
  except OSError as error:
    raise Unwritable(path, error) from error


@contextlib.contextmanager
def on_disk(path: epath.PathLike) -> Iterator[epath.Path]:
  """A file on the disk with what the path holds, for libraries that read no other: itself, or a copy of an object while the block lasts."""
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
  """Whether a file of this name was being written when its process was killed."""
  return bool(re.fullmatch(r'\.(.*\.)?[0-9a-f]{32}\.tmp', name, re.DOTALL))  # earlier versions put the file's name into it


def append(path: epath.PathLike, data: bytes, sync: bool = False) -> None:
  """Adds to a file that is there, wholly or not at all; not to an object.

  Args:
    path: the file.
    data: what is added.
    sync: whether it is there after a power cut too.

  Raises:
    Unwritable: it cannot be written, or is not there any more.
  """
  try:
    file = os.open(path, os.O_WRONLY | os.O_APPEND)  # never made anew: a file that vanished had more in it
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
  """The system's number for an error; tensorstore's errors have it in their text. None where it has none."""
  if error is None:
    return None
  if isinstance(error, OSError) and error.errno is not None:
    return error.errno
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return int(found[1]) if found else error_number(error.__cause__)


def _bucket(path: epath.PathLike) -> str:
  return os.fspath(path).split('/')[2]


def _room(path: epath.PathLike) -> str:
  folder = os.path.abspath(path)
  while not os.path.isdir(folder) and folder != os.path.dirname(folder):
    folder = os.path.dirname(folder)
  try:
    free = shutil.disk_usage(folder).free
  except OSError:
    return ''
  unit, name = next((unit, name) for unit, name in ((1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB'), (1, 'bytes')) if free >= unit or unit == 1)
  return f' ({free / unit:.1f} {name} are free)' if unit > 1 else f' ({free} bytes are free)'


def _user() -> str:
  try:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name
  except (ImportError, KeyError):  # on Windows; one without a name, as in some containers
    return 'this user'


def _prepare(kind: str) -> None:
  """Makes fsspec look each time, as it would not see what other processes and libraries write, and tells its errors without tracebacks."""
  import fsspec

  logging.getLogger(PACKAGES[kind]).addFilter(_in_a_line)
  for protocol in (kind, PACKAGES[kind].removesuffix('fs')):
    fsspec.config.conf.setdefault(protocol, {}).setdefault('use_listings_cache', False)


def _in_a_line(record: logging.LogRecord) -> bool:
  record.exc_info = record.exc_text = None  # the error itself comes too
  return True


_OF_ROOM = (errno.ENOSPC, errno.EDQUOT)
_GONE = ('its folder is not there any more', 'bring it back')
# What happened, and what has to be done.
_REASONS: dict[Any, tuple[str, str]] = {
    errno.ENOSPC: ('the disk is full', 'make room there'),
    errno.EDQUOT: ('the quota is used up', 'make room there'),
    errno.EFBIG: ('files may not become that large (ulimit -f)', 'allow larger ones'),
    errno.EROFS: ('the disk is read-only', 'make it writable'),
    errno.EACCES: ('permission denied', 'let {user} write there'),
    errno.EPERM: ('permission denied', 'let {user} write there'),
    errno.ENOENT: _GONE,
    errno.ENOTDIR: _GONE,
    errno.ESTALE: _GONE,
}
