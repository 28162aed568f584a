"""The folder of a run: what lies where, and how it is written. Every file is written whole or not at all."""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import fcntl
import json
import os
import re
import socket
import struct
import time
from typing import Any
import weakref

from etils import epath
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from ft_jax import parallel, settings
from ft_jax.progress import log
from selection import storage

# Fields that may change between two starts of one run. What they do to its images, the checkpoints notice.
FREE = ('compile_cache', 'data.cache', 'data.on_error', 'data.timeout', 'train.skip_diverged', 'pretrain.skip_diverged',
        # Removed from the config: runs of older versions still have them.
        'train.nonfinite_steps', 'pretrain.nonfinite_steps')
# Fields that were removed, by path, each with the value that had no effect: a run that had it resumes, one that had another is refused.
REMOVED: dict[str, Any] = {}
# Where nothing can be added to, a growing file is written again so often at most, in seconds.
EVERY = 10.0
# Seconds to wait for another process to leave, as one that was asked to stop does.
PATIENCE = 60.0
# What a workdir's path may have at most: Linux takes 4096 bytes with the last zero, what orbax writes is 118 bytes further down at a step
# of six digits (measured), and runs of a study or a comparison lie in folders of their own.
_MOST_BYTES = 4096 - 240
# A checkpoint on object storage is whole when this is in it: orbax writes it last, as nothing can be renamed there.
_COMMITTED = 'commit_success.txt'


class Workdir:
  """config.json, duplicates.json, selection.json, embeddings/, metrics.jsonl, tensorboard/, checkpoints/<step>/, results.json,
  report.html.
  """

  def __init__(self, path: epath.PathLike, config: Mapping[str, Any]):
    """Makes the folder, or takes up the run that is there.

    A run that has no checkpoint yet has nothing to lose: it takes the new config, and selects again. Fields of the config that the
    version which wrote the run did not have count as their defaults; see `as_now`.

    Raises:
      ValueError: it belongs to a run with another config, and names the fields that differ; or to something else; or another process
        does not see the same folder; or no checkpoint can be written there because of a name (`check_name`).
      OSError: it cannot be made, written to or reached; or another process is at work in it and does not leave.
    """
    self.path = storage.located(path)
    check_name(storage.absolute(self.path))
    if storage.is_url(self.path):
      storage.make_folder(self.path)
    parallel.agreed(lambda: self._take_up(json.loads(json.dumps(config))))
    parallel.check_shared(self.path, '--workdir')

  def _take_up(self, wanted: dict[str, Any]) -> None:
    """See `__init__`; on process 0."""
    if not storage.is_url(self.path):
      storage.make_folder(self.path)
      self._owned = own(self.path)  # before anything is read that another process may be about to write
      _tidy(self.path)
    try:
      before = _stored(self.path)
    except OSError as error:  # nobody may even look
      raise storage.Unwritable(self.path, error) from error
    if before is None:
      if self.path.exists() and not all(storage.is_leftover(entry.name) for entry in self.path.iterdir()):
        raise ValueError(f'workdir {self.path} is not empty and holds no run (no config.json of one); give another --workdir')
    else:
      if before == wanted:
        return
      differing = _differences(run_fields(as_now(before)), run_fields(as_now(wanted)))
      if differing and (self.results_json.exists() or self.has_checkpoint()):
        raise ValueError(f'workdir {self.path} belongs to a run with another config ({"; ".join(differing[:5])}); '
                         'give another --workdir')
      if differing:
        self.selection_json.unlink(missing_ok=True)
        self.diverged_json.unlink(missing_ok=True)
    write_text(self.config_json, json.dumps(wanted, indent=2) + '\n')

  config_json = property(lambda self: self.path / 'config.json')
  selection_json = property(lambda self: self.path / 'selection.json')
  duplicates_json = property(lambda self: self.path / 'duplicates.json')
  metrics_jsonl = property(lambda self: self.path / 'metrics.jsonl')
  results_json = property(lambda self: self.path / 'results.json')
  diverged_json = property(lambda self: self.path / 'diverged.json')
  predicted_json = property(lambda self: self.path / 'predicted.json')  # label noise from a model: what it sees in each image
  report_html = property(lambda self: self.path / 'report.html')
  embeddings = property(lambda self: self.path / 'embeddings')
  unfinished = property(lambda self: self.path / 'unfinished')  # embeddings; gone when all are there

  def has_checkpoint(self) -> bool:
    """Whether there is a state to go on from."""
    return bool(saved_steps(self.path))

  def results(self) -> dict[str, Any] | None:
    """What results.json holds, or None where the run has not come to its end."""
    return read_json(self.results_json) if self.results_json.exists() else None

  def metrics(self) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return read_metrics(self.path)


def check_name(folder: epath.Path) -> None:
  """Raises ValueError, in one line, where orbax and tensorstore could not keep checkpoints below a folder because of its path.

  Args:
    folder: from the root on; a symbolic link is not followed, here or by them.
  """
  if problem := _url_problem(folder) if storage.is_url(folder) else _name_problem(folder):
    link = '' if storage.is_url(folder) else ', or use a path through a symbolic link'
    raise ValueError(f'no checkpoint can be kept in {os.fspath(folder)!r}: {problem}. Give another folder{link}')


def _url_problem(folder: epath.Path) -> str:
  for name in folder.parts:
    if found := re.search('[#?]|gs:$', name):
      return f'{name!r} has {found[0]!r}, which orbax reads as part of a URL'
  return ''


def _name_problem(folder: epath.Path) -> str:
  for name in folder.parts:
    if '\\' in name:
      return f'{name!r} has a backslash, which tensorstore reads as a slash'
    if name.endswith('gs:'):
      return f"{name!r} ends in 'gs:', which orbax reads as the beginning of a URL"
    if name.encode(errors='replace').decode() != name:
      return f'{name!r} has bytes that are not UTF-8, which tensorstore refuses'
  size = len(os.fsencode(folder))
  return f'the path has {size:,d} bytes; expected {_MOST_BYTES:,d} at most' if size > _MOST_BYTES else ''


def read_json(path: epath.Path) -> Any:
  """What a JSON file of a run holds; raises ValueError, with its name, where it is none."""
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error}); restore it from a copy, or move it aside and start again') from error


def read_metrics(folder: epath.Path) -> list[dict[str, float]]:
  """The lines of the metrics.jsonl in a workdir; [] if there is none."""
  path = folder / 'metrics.jsonl'
  if not path.exists():
    return []
  return [_line(path, line) for line in path.read_text().splitlines()]


def _line(path: epath.Path, text: str) -> dict[str, float]:
  try:
    line = json.loads(text)
    line['step'] + 0
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} has a damaged line, {text.strip()[:60]!r}; fix or remove that line, and start again') from error
  return line


class _Owned:
  """A folder that other processes are kept out of, on a disk that can do so, as long as this object lives; none outlives its process."""

  def __init__(self, folder: epath.Path):
    """Waits for a process that is there; raises OSError where it does not leave."""
    self._handle = None
    try:
      self._handle = os.open(folder, os.O_RDONLY)
    except OSError as error:  # nobody may even look
      raise storage.Unwritable(folder, error) from error
    until, told = time.monotonic() + PATIENCE, False
    while not self._locked():
      if time.monotonic() > until:
        raise OSError(f'another process is at work in {folder}: two at once would spoil it. Stop that one first, or give another --workdir')
      if not told:
        log.info('waiting for another process that is at work in %s', folder)
      told = True
      time.sleep(0.5)

  def _locked(self) -> bool:
    try:
      fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return False
    except OSError:  # some network disks have no locks
      pass
    return True

  def __del__(self):
    if self._handle is not None:
      os.close(self._handle)


# By folder: a process may take up its own run once more.
_OWNED: weakref.WeakValueDictionary[str, _Owned] = weakref.WeakValueDictionary()


def own(folder: epath.Path) -> _Owned | None:
  """Keeps other processes out of a folder while the result lives; on object storage nothing does.

  Raises:
    OSError: another process is there and does not leave.
  """
  if storage.is_url(folder):
    return None
  name = os.path.realpath(folder)
  return _OWNED.get(name) or _OWNED.setdefault(name, _Owned(folder))


def run_fields(config: Mapping[str, Any], prefix: str = '', free: Collection[str] = FREE) -> dict[str, Any]:
  """The fields of a config that a run keeps."""
  return {name: run_fields(value, f'{prefix}{name}.', free) if isinstance(value, Mapping) else value for name, value in config.items()
          if f'{prefix}{name}' not in free}


def _tidy(folder: epath.Path) -> None:
  """Removes what was being written when a process was killed; nobody else is at work here."""
  for part in (folder, folder / 'embeddings'):
    for path in part.iterdir() if part.is_dir() else ():
      if storage.is_leftover(path.name) or path.name.startswith(parallel.MARK):
        path.unlink(missing_ok=True)


def read_config(path: epath.PathLike) -> dict[str, Any] | None:
  """The config of the run in a folder as of `as_now`, or None where there is no run; other programs have files of that name too."""
  stored = _stored(path)
  return None if stored is None else as_now(stored)


def as_now(config: Mapping[str, Any]) -> dict[str, Any]:
  """A config that any version wrote, with the fields of this one.

  Renamed fields have their new names (`settings.RENAMED`), removed ones that had no effect are dropped (`REMOVED`), and fields that are missing
  have their defaults. Other fields that this version does not know are kept.
  """
  known = settings.defaults()
  fields = {settings.RENAMED.get(name, name): value for name, value in settings.flat(config).items()}
  kept = {name: value for name, value in fields.items() if name in known or name not in REMOVED or REMOVED[name] != value}
  return settings.nested(known | kept)


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
  """Fields of a stored config, by path, that no version up to this one has had: a newer version wrote it."""
  known = {*settings.defaults(), *settings.RENAMED, *REMOVED, *FREE, 'source.without'}  # the last one of a run's own pre-training
  return [path for path in settings.flat(config) if path not in known]


def _stored(path: epath.PathLike) -> dict[str, Any] | None:
  """config.json of a run as it is; None as of `read_config`."""
  try:
    config = json.loads((epath.Path(path) / 'config.json').read_text())
    found = isinstance(config, dict) and {'job', 'seed', 'train'} <= set(config) and settings.flat(config)  # not nested without end
  except (FileNotFoundError, NotADirectoryError, RecursionError, ValueError):
    return None
  return config if found else None


def saved_steps(path: epath.PathLike) -> list[int]:
  """The steps of the whole checkpoints of a run, in order, as far as names tell; [] where there are none."""
  try:
    found = [folder for folder in (epath.Path(path) / 'checkpoints').iterdir() if folder.name.isdigit()]
  except (FileNotFoundError, NotADirectoryError):
    return []
  return sorted(int(folder.name) for folder in found if not storage.is_url(folder) or (folder / _COMMITTED).exists())


class MetricsWriter:
  """metrics.jsonl, one JSON object a line with its `step`, and the same as TensorBoard events; process 0 writes."""

  def __init__(self, workdir: Workdir, start: int):
    """Takes up at `start`: lines of later steps, which are about to be run again, go.

    Raises:
      OSError: as of every other function here, where something cannot be written.
    """
    self._lines = self._events = None
    self._begun: dict[str, float] = parallel.agreed(lambda: self._take_up(workdir, start))

  def _take_up(self, workdir: Workdir, start: int) -> dict[str, float]:
    """See `__init__`; on process 0; returns the line of the step `start`, where there is one."""
    path = workdir.metrics_jsonl
    text = path.read_text() if path.exists() else ''
    # A line that was cut short has no newline at its end.
    whole = [line for line in text.splitlines(keepends=True) if line.endswith('\n')]
    lines = [line for line in whole if _line(path, line)['step'] <= start]
    self._lines = _Growing(path, ''.join(lines).encode())
    name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}'
    begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._events = _Growing(workdir.path / 'tensorboard' / name, _record(event_pb2.Event(file_version='brain.Event:2')) + _record(
        event_pb2.Event(step=start + 1, session_log=begin)))  # what follows replaces what an earlier start wrote of these steps
    last = json.loads(lines[-1]) if lines else {}
    self._before = ''.join(lines[:-1])
    return last if last.get('step') == start else {}

  def write(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    """Adds the metrics of one step, to those that it has where it is the one to go on from; returns them all."""
    before = self._begun if self._begun.get('step') == step else {}
    line = {'step': step, **before, **metrics}
    if self._lines is None:
      return line
    text = json.dumps(line) + '\n'
    if before:
      self._lines.replace((self._before + text).encode())
    else:
      self._lines.add(text.encode())
    self._events.add(b''.join(_record(event_pb2.Event(step=step, summary=scalar(key, value))) for key, value in metrics.items()))
    return line

  def flush(self) -> None:
    """Writes what is kept back, on object storage; called before each checkpoint, behind which no line may be missing."""
    if self._lines is not None:
      self._lines.flush()
      self._events.flush()

  def close(self) -> None:
    """Likewise, at the end."""
    self.flush()


class _Growing:
  """A file that is added to; on object storage it is kept in memory, and written again as a whole from time to time."""

  def __init__(self, path: epath.Path, begin: bytes):
    """Begins with `begin`, whatever is there."""
    self._path, self._url = path, storage.is_url(path)
    with resumable(path):
      if not self._url:
        path.parent.mkdir(exist_ok=True)
      same = path.exists() and path.read_bytes() == begin
    self._data, self._behind, self._written = bytearray(begin), False, time.monotonic()
    if not same:
      self.replace(begin)

  def replace(self, data: bytes) -> None:
    """Puts this in the place of all that is there."""
    self._data, self._behind = bytearray(data), True
    self.flush()

  def add(self, data: bytes) -> None:
    """Adds to it."""
    if self._url:
      self._data += data
      self._behind = True
      if time.monotonic() - self._written > EVERY:
        self.flush()
      return
    with resumable(self._path):
      storage.append(self._path, data)

  def flush(self) -> None:
    """Writes what is in memory alone: here, or of the system, which a power cut would lose."""
    with resumable(self._path):
      if self._behind:
        storage.write_whole(self._path, bytes(self._data))
        self._behind, self._written = False, time.monotonic()
      elif not self._url:
        with self._path.open('rb') as stream:
          os.fsync(stream.fileno())


def _record(event: event_pb2.Event) -> bytes:
  """An event as TensorBoard's files hold it: its length, the data, and a checksum of each.

  Written here, and not by tensorboardX's own writer: a full disk ends its thread, and what comes next waits for that thread for ever.
  """
  event.wall_time = time.time()
  data = event.SerializeToString()
  length = struct.pack('<Q', len(data))
  return length + struct.pack('<I', masked_crc32c(length)) + data + struct.pack('<I', masked_crc32c(data))


def write_results(workdir: Workdir, results: Mapping[str, Any]) -> None:
  """Writes results.json, which also says that the run is finished."""
  write_text(workdir.results_json, json.dumps(results, indent=1, allow_nan=False) + '\n')


def write_text(path: epath.Path, text: str) -> None:
  """Writes a file whole or not at all; of several processes, the first one writes.

  Bytes of a file name that are no UTF-8 are spelt out, as `caf\\udce9.jpg`: pages and JSON files have to be UTF-8.
  """
  write_bytes(path, text.encode(errors='backslashreplace'))


def write_bytes(path: epath.Path, data: bytes) -> None:
  """Likewise."""
  if parallel.is_main():
    with resumable(path):
      storage.write_whole(path, data)


@contextlib.contextmanager
def resumable(path: epath.Path) -> Iterator[None]:
  """Where a file of a run cannot be written, the error also says from where the run goes on once that is mended."""
  try:
    yield
  except OSError as error:
    raise cannot_write(path, error) from error


def cannot_write(path: epath.Path, error: BaseException) -> storage.Unwritable:
  """The error that says that `path`, a file of a run, cannot be written; see `resumable`."""
  try:
    run = next((folder for folder in path.parents if saved_steps(folder)), None)
    newest = run / 'checkpoints' / str(saved_steps(run)[-1]) if run else None
  except OSError:  # the disk is gone
    newest = None
  before = f'What was written before stays as it was, the newest whole checkpoint is {newest}' if newest else ''
  return storage.Unwritable(path, error, 'the same command goes on', before)


def _differences(before: Any, now: Any, name: str = 'config') -> list[str]:
  """The fields that differ, as `config.seed is 0 there and 1 here`."""
  if isinstance(before, dict) and isinstance(now, dict):
    return [line for key in sorted({*before, *now})
            for line in _differences(before.get(key, 'not known'), now.get(key, 'not known'), f'{name}.{key}')]
  return [] if before == now else [f'{name} is {before!r} there and {now!r} here']
