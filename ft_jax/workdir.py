"""The folder of a run: its files, and how they are written: whole or not at all."""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import fcntl
import json
import os
import re
import time
import types
from typing import Any
import weakref

from etils import epath

from ft_jax import parallel, settings
from ft_jax.progress import log
from selection import storage

# Seconds to wait for another process to leave, as one that was asked to stop does.
PATIENCE = 60.0
# What a workdir's path may have at most: Linux takes 4096 bytes with the last zero, what orbax writes is 118 bytes
# further down at a step of six digits (measured), and runs of a study or a comparison lie in folders of their own.
_MOST_BYTES = 4096 - 240
# A checkpoint on object storage is whole when this is in it: orbax writes it last, as nothing can be renamed there.
_COMMITTED = 'commit_success.txt'


class Workdir:
  """A run's files: config.json, duplicates.json, selection.json, embeddings/, metrics.jsonl, tensorboard/,
  checkpoints/<step>/, predictions.json, results.json, report.html.
  """

  def __init__(self, path: epath.PathLike, config: Mapping[str, Any], shared: bool = False):
    """Makes the folder, or opens the run in it.

    A run that has no checkpoint yet has nothing to lose: it takes the new config, and selects again. Fields of the
      config
    that the version which wrote the run did not have are at their defaults; see `as_now`.

    Args:
      path: of the folder.
      config: of the run.
      shared: whether several processes may work in the folder at once, on runs that are in folders of their own. It
        takes a new config of the same job.

    Raises:
      ValueError: it belongs to a run with another config (names the fields that differ), or of a newer version, or to
        something else; or another process does not see the same folder; or no checkpoint can be written there because
        of a name (`check_name`).
      OSError: it cannot be made, written to or reached; or another process is at work in it and does not leave.
    """
    self.path = storage.located(path)
    check_name(storage.absolute(self.path))
    if storage.is_url(self.path):
      storage.make_folder(self.path)
    parallel.agreed(lambda: self._open(json.loads(json.dumps(config)), shared))
    parallel.check_shared(self.path, '--workdir')

  def _open(self, wanted: dict[str, Any], shared: bool) -> None:
    """See `__init__`; on process 0."""
    if not storage.is_url(self.path):
      storage.make_folder(self.path)
    if not shared and not storage.is_url(self.path):
      self._owned = own(self.path)  # before anything is read that another process may be about to write
      _tidy(self.path)
    try:
      before = _stored(self.path)
    except OSError as error:  # nobody may even look
      raise storage.Unwritable(self.path, error) from error
    if before is None:
      if self.path.exists() and not all(storage.is_leftover(entry.name) for entry in self.path.iterdir()):
        raise ValueError(f'workdir {self.path} is not empty and holds no run (no config.json of one); give another '
                         '--workdir')
    else:
      if before == wanted:
        return
      _check_version(self.path, before, wanted)
      differing = differences(run_fields(as_now(before)), run_fields(as_now(wanted)))
      if shared and before['job'] == wanted['job']:
        differing = []
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
  predictions_json = property(lambda self: self.path / 'predictions.json')  # of the best checkpoint
  diverged_json = property(lambda self: self.path / 'diverged.json')
  predicted_json = property(lambda self: self.path / 'predicted.json')  # label noise from a network
  report_html = property(lambda self: self.path / 'report.html')
  embeddings = property(lambda self: self.path / 'embeddings')
  unfinished = property(lambda self: self.path / 'unfinished')  # embeddings; gone when all are there

  def has_checkpoint(self) -> bool:
    """Whether there is a state to resume from."""
    return bool(saved_steps(self.path))

  def results(self) -> dict[str, Any] | None:
    """What results.json holds, or None where the run is not finished."""
    return read_json(self.results_json) if self.results_json.exists() else None

  def metrics(self) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return read_metrics(self.path)


def check_name(folder: epath.Path) -> None:
  """Raises ValueError where orbax and tensorstore could not keep checkpoints below a folder because of its path.

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
    raise ValueError(f'{path} is damaged ({error}); restore it from a copy, or move it aside and '
                     'start again') from error


def read_metrics(folder: epath.Path) -> list[dict[str, float]]:
  """The lines of the metrics.jsonl in a workdir; [] if there is none."""
  path = folder / 'metrics.jsonl'
  if not path.exists():
    return []
  return [metrics_line(path, line) for line in path.read_text().splitlines()]


def metrics_line(path: epath.Path, text: str) -> dict[str, float]:
  """A line of metrics.jsonl; raises ValueError where it is damaged."""
  try:
    line = json.loads(text)
    line['step'] + 0
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} has a damaged line, {text.strip()[:60]!r}; fix or remove that line, and '
                     'start again') from error
  return line


class _Owned:
  """Keeps other processes out of a folder, on a disk that has locks, as long as this object and its process live."""

  def __init__(self, folder: epath.Path):
    """Waits for another process to leave; raises OSError where it does not."""
    self._handle: int | None = None
    try:
      self._handle = os.open(folder, os.O_RDONLY)
    except OSError as error:  # nobody may even look
      raise storage.Unwritable(folder, error) from error
    until, logged = time.monotonic() + PATIENCE, False
    while not self._locked():
      if time.monotonic() > until:
        raise OSError(f'another process is at work in {folder}: two at once would corrupt it. Stop that one first, '
                      'or give another --workdir')
      if not logged:
        log.info('waiting for another process that is at work in %s', folder)
      logged = True
      time.sleep(0.5)

  def _locked(self) -> bool:
    assert self._handle is not None
    try:
      fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return False
    except OSError:  # some network disks have no locks
      pass
    return True

  def __del__(self) -> None:
    if self._handle is not None:
      os.close(self._handle)


# By folder: a process may open its own run once more.
_OWNED: weakref.WeakValueDictionary[str, _Owned] = weakref.WeakValueDictionary()


def own(folder: epath.Path) -> _Owned | None:
  """Keeps other processes out of a folder while the returned object lives; not on object storage.

  Raises:
    OSError: another process is there and does not leave.
  """
  if storage.is_url(folder):
    return None
  name = os.path.realpath(folder)
  return _OWNED.get(name) or _OWNED.setdefault(name, _Owned(folder))


def run_fields(config: Mapping[str, Any], prefix: str = '',
               may_change: Collection[str] = settings.MAY_CHANGE) -> dict[str, Any]:
  """The fields of a config that must stay the same while a run resumes."""
  return {name: run_fields(value, f'{prefix}{name}.', may_change) if isinstance(value, Mapping) else value
          for name, value in config.items() if f'{prefix}{name}' not in may_change}


def _tidy(folder: epath.Path) -> None:
  """Removes files that were being written when a process was killed; no other process is at work here."""
  for part in (folder, folder / 'embeddings'):
    for path in part.iterdir() if part.is_dir() else ():
      if storage.is_leftover(path.name) or path.name.startswith(parallel.MARK):
        path.unlink(missing_ok=True)


def read_config(path: epath.PathLike) -> dict[str, Any] | None:
  """The config of the run in a folder as of `as_now`, or None where there is no run.

  Raises:
    ValueError: a newer version wrote it.
  """
  stored = _stored(path)
  if stored is None:
    return None
  _check_version(path, stored)
  return as_now(stored)


def as_now(config: Mapping[str, Any]) -> dict[str, Any]:
  """A config that any version wrote, with the fields of this one.

  Renamed fields have their new names (`settings.RENAMED`), removed ones that had no effect are dropped
  (`settings.REMOVED`), and fields that are missing have their defaults.
  """
  known, removed = settings.defaults(), settings.REMOVED
  fields = {settings.RENAMED.get(name, name): value for name, value in settings.flat(config).items()}
  without_effect = lambda name, value: name not in known and name in removed and removed[name] == value
  return settings.nested(known | {name: value for name, value in fields.items() if not without_effect(name, value)})


def _check_version(path: epath.PathLike, stored: Mapping[str, Any],
                   wanted: Mapping[str, Any] = types.MappingProxyType({})) -> None:
  """Raises ValueError for a config with fields that no version up to this one has, nor a config that is `wanted`."""
  known = {*settings.defaults(), *settings.RENAMED, *settings.REMOVED, *settings.MAY_CHANGE, *settings.ADDED,
           *settings.flat(wanted)}
  unknown = {name: value for name, value in settings.flat(stored).items() if name not in known}
  if unknown:
    fields = ', '.join(f'config.{name} ({value!r})' for name, value in list(unknown.items())[:5])
    raise ValueError(f'{path} was written by a newer version of this program: this one does not know {fields}. Update '
                     'the program, or give another folder')


def _stored(path: epath.PathLike) -> dict[str, Any] | None:
  """config.json of a run as it is; None as of `read_config`."""
  try:
    config = json.loads((epath.Path(path) / 'config.json').read_text())
    found = isinstance(config, dict) and {'job', 'seed', 'train'} <= set(config)
    if found:
      settings.flat(config)  # raises for one that is nested without end, which is not ours
  except (FileNotFoundError, NotADirectoryError, RecursionError, ValueError):
    return None
  return config if found else None


def saved_steps(path: epath.PathLike) -> list[int]:
  """The steps of the complete checkpoints of a run, in order, as far as names tell; [] where there are none."""
  try:
    found = [folder for folder in (epath.Path(path) / 'checkpoints').iterdir() if folder.name.isdigit()]
  except (FileNotFoundError, NotADirectoryError):
    return []
  return sorted(int(folder.name) for folder in found if not storage.is_url(folder) or (folder / _COMMITTED).exists())


def write_results(workdir: Workdir, results: Mapping[str, Any]) -> None:
  """Writes results.json, with which the run is finished."""
  write_text(workdir.results_json, json.dumps(results, indent=1, allow_nan=False) + '\n')


def write_text(path: epath.Path, text: str) -> None:
  """Writes a file whole or not at all; of several processes, the first one writes.

  Bytes of a file name that are not UTF-8 are escaped, as `caf\\udce9.jpg`: pages and JSON files must be UTF-8.
  """
  write_bytes(path, text.encode(errors='backslashreplace'))


def write_bytes(path: epath.Path, data: bytes) -> None:
  """Likewise."""
  if parallel.is_main():
    with resumable(path):
      storage.write_whole(path, data)


@contextlib.contextmanager
def resumable(path: epath.Path) -> Iterator[None]:
  """Where a file of a run cannot be written, the error also says from where the run resumes once that is fixed."""
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
  return storage.Unwritable(path, error, 'the same command resumes', before)


def differences(before: Any, now: Any, name: str = 'config') -> list[str]:
  """The fields in which two configs differ, as `config.seed is 0 there and 1 here`."""
  if isinstance(before, dict) and isinstance(now, dict):
    return [line for key in sorted({*before, *now})
            for line in differences(before.get(key, 'not known'), now.get(key, 'not known'), f'{name}.{key}')]
  return [] if before == now else [f'{name} is {before!r} there and {now!r} here']
