"""Runs of main.py that are killed at a chosen moment, and what tells them from a run that nobody disturbed.

As a program it is that run: `python tests/killed.py '{"folder": ..., ...}' --config=... --workdir=...`, see `Moment`.
  It kills itself from
within, where it knows exactly what it is about to do: SIGKILL leaves no more behind than one that comes from outside.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What a file operation belongs to, by parts of the path below the workdir; the first one that fits.
KINDS = (('checkpoints', 'checkpoint'), ('damaged', 'checkpoint'), ('results.json', 'results'),
         ('predictions.json', 'results'), ('report.html', 'report'), ('selection.json', 'selection'),
         ('embeddings', 'embeddings'), ('unfinished', 'embeddings'),
         ('metrics.jsonl', 'metrics'), ('config.json', 'config'), ('study.', 'results'), ('parts', 'results'),
         ('', 'other'))
# Fields of metrics.jsonl that depend on the clock, and of results.json that say how, where and how fast it was run.
CLOCK, COMMAND = ('images_per_second', 'waiting_share'), ('command', 'commit', 'cost')


@dataclasses.dataclass(frozen=True)
class Moment:
  """When a run is disturbed, and how.

  Attributes:
    signal: SIGKILL, SIGTERM or SIGINT.
    kind: it comes before the `count`-th file operation of that kind (of KINDS, or 'any'): opening for writing,
      renaming, making a folder, removing; '' for so many seconds after the run first looked into its workdir.
    count: from 1.
    seconds: see `kind`; with a file operation, so long after it, which goes on meanwhile (what C++ writes is no
      operation of Python's).
    again: seconds until the same signal comes once more; 0 for never.
  """
  signal: int = signal.SIGKILL
  kind: str = ''
  count: int = 1
  seconds: float = 0.0
  again: float = 0.0


class Disturbed:
  """The audit hook of a run: counts its file operations below a folder, and sends the signal."""

  def __init__(self, folder: str, log: str, moment: Moment | None):
    self._folder, self._moment = os.path.realpath(folder) + os.sep, moment
    self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    self._left, self._timed, self._busy = moment.count if moment else 0, False, False

  def __call__(self, event: str, args: tuple[Any, ...]) -> None:
    if event not in ('open', 'os.rename', 'os.mkdir', 'os.remove', 'os.rmdir') or self._busy:
      return
    # what is written whole has a name of its own until it is renamed
    path = args[1] if event == 'os.rename' else args[0]
    if not isinstance(path, (str, bytes, os.PathLike)):
      return
    path = os.path.abspath(os.path.join(_within(event, args), os.fsdecode(path)))
    if not (path + os.sep).startswith(self._folder):
      return
    moment = self._moment
    if moment and not moment.kind and not self._timed:
      self._timed = True
      self._later(moment.seconds)
    if event == 'open' and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
      return
    kind = kind_of(path[len(self._folder):])
    os.write(self._log, f'{kind} {event} {path[len(self._folder):]}\n'.encode())
    if moment and moment.kind in (kind, 'any') and self._left:
      self._left -= 1
      if not self._left:
        self._later(moment.seconds) if moment.seconds else self._send(f'{event} {path[len(self._folder):]}', kind)

  def _later(self, seconds: float) -> None:
    import threading

    self._busy = True  # a thread of ours is no operation of the run's
    threading.Timer(seconds, self._send).start()
    self._busy = False

  def _send(self, what: str = '', kind: str = '') -> None:
    moment = self._moment
    os.write(self._log, f'!{phase(kind, self._folder)}|{what}|{time.time()}\n'.encode())
    os.kill(os.getpid(), moment.signal)
    if moment.again:
      time.sleep(moment.again)
      os.kill(os.getpid(), moment.signal)


def _within(event: str, args: tuple[Any, ...]) -> str:
  """The folder that a path is relative to; trees are removed from one open folder to the next (Linux says which that
  is)."""
  number = {'os.rename': 3, 'os.mkdir': 2, 'os.remove': 1, 'os.rmdir': 1}.get(event)
  if number is None or len(args) <= number or args[number] < 0:
    return ''
  try:
    return os.readlink(f'/proc/self/fd/{args[number]}')
  except OSError:
    return ''


def kind_of(path: str) -> str:
  """What an operation on a path below the workdir belongs to."""
  return next(kind for part, kind in KINDS if any(part in name for name in path.split(os.sep)))


# Functions by which the main thread is known to be in a phase: file, name, phase. The first one that it is in counts.
PHASES = (('ft_jax/pages/report.py', 'write', 'results and report'),
          ('ft_jax/workdir.py', 'write_results', 'results and report'),
          ('ft_jax/pages/study.py', 'write', 'results and report'),
          ('ft_jax/training/checkpoints.py', 'save', 'checkpoint being written'),
          ('ft_jax/training/checkpoints.py', 'wait', 'checkpoint being written'),
          ('ft_jax/training/loop.py', 'evaluate_split', 'evaluation'), ('ft_jax/embedding.py', 'embed', 'embedding'),
          ('selection/select.py', 'select', 'selection'))
# The training itself, and the job that tells pre-training from fine-tuning.
LOOP, PRETRAIN = ('ft_jax/training/loop.py', 'train'), ('ft_jax/jobs/pretrain.py', 'run')


def phase(kind: str, folder: str) -> str:
  """What the run is at: from the kind of the file operation, unfinished checkpoints, and what the main thread is in."""
  if kind in ('results', 'report'):
    return 'results and report'
  # `walk` does not mind folders that go meanwhile: an error in an audit hook would be the run's own.
  if kind == 'checkpoint' or any(
      'tmp' in name for path, names, _ in os.walk(folder) if os.path.basename(path) == 'checkpoints' for name in names):
    return 'checkpoint being written'
  within = list(_calls(sys._current_frames()[_main_thread()]))
  for file, function, name in PHASES:
    if any(path.endswith(file) and function == called for path, called in within):
      return name
  if any(path.endswith(LOOP[0]) and called == LOOP[1] for path, called in within):
    return 'pre-training' if any(path.endswith(PRETRAIN[0]) for path, _ in within) else 'joint fine-tuning'
  return 'selection' if kind == 'selection' else 'embedding' if kind == 'embeddings' else 'start and in between'


def _main_thread() -> int:
  import threading

  return threading.main_thread().ident


def _calls(frame: FrameType | None) -> Iterator[tuple[str, str]]:
  while frame is not None:
    yield frame.f_code.co_filename, frame.f_code.co_name
    frame = frame.f_back


@dataclasses.dataclass(frozen=True)
class Done:
  """A run that ended.

  Attributes:
    code: its exit code.
    printed: all of it.
    seconds: that it took.
    operations: the kind of each of its file operations.
    met: the phase in which the signal met it, '' where it ended before.
    what: the file operation before which that was, '' for none.
    leaving: seconds from the signal to the end.
  """
  code: int
  printed: str
  seconds: float
  operations: tuple[str, ...]
  met: str = ''
  what: str = ''
  leaving: float = 0.0


def run(workdir: pathlib.Path, flags: Sequence[str], moment: Moment | None = None, *, devices: int = 1,
        cache: pathlib.Path | None = None,
        timeout: float = 1800.0) -> Done:
  """Runs main.py in a process of its own, disturbed at a moment; `cache` keeps what is compiled, and only undisturbed
  runs add to it.

  (A process that is killed while it adds a program leaves half of it there.)
  """
  log = workdir.parent / f'{workdir.name}.operations'
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
         'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  if cache is not None:
    env |= {'JAX_COMPILATION_CACHE_DIR': str(cache),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1e9' if moment else '0.1',
            'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0'}
  told = json.dumps({'folder': str(workdir), 'log': str(log), 'moment': dataclasses.asdict(moment) if moment else None})
  began = time.monotonic()
  # To a file: what a killed run's own processes still hold open must not keep us waiting.
  with (workdir.parent / f'{workdir.name}.printed').open('w+') as printed:
    process = subprocess.Popen([sys.executable, str(pathlib.Path(__file__).resolve()), told, *flags,
                                f'--workdir={workdir}'], cwd=ROOT,
                               env=env, stdout=printed, stderr=printed)
    try:
      code = process.wait(timeout)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      code = -999
    printed.seek(0)
    text = printed.read()
  ended = time.time()
  lines = log.read_text().splitlines() if log.exists() else []
  met = next((line[1:].split('|') for line in lines if line.startswith('!')), ['', '', ended])
  return Done(code, text, time.monotonic() - began,
              tuple(line.split(' ')[0] for line in lines if not line.startswith('!')), met[0], met[1],
              ended - float(met[2]))


def broken(workdir: pathlib.Path) -> list[str]:
  """Files that no reader may ever see as they are: not whole."""
  found = []
  for path in workdir.rglob('*'):
    inside = path.relative_to(workdir).parts
    if path.name.startswith('.') or not path.is_file() or any('tmp' in part or part == 'checkpoints'
                                                              for part in inside):
      continue
    try:
      if path.suffix == '.json':
        json.loads(path.read_text())
      elif path.name == 'metrics.jsonl':
        _steps(path)
      elif path.suffix == '.html' and not path.read_text().rstrip().endswith('</html>'):
        raise ValueError('no end')
      elif path.suffix == '.npz':
        _arrays(path)
    except (ValueError, OSError, EOFError, KeyError) as error:
      found.append(f'{"/".join(inside)} is not whole: {error}')
  return found


def _steps(path: pathlib.Path) -> None:
  """Every line but a last one that was cut short is whole."""
  *lines, _ = path.read_text().split('\n')
  for line in lines:
    json.loads(line)


def _arrays(path: pathlib.Path) -> None:
  import zipfile

  with zipfile.ZipFile(path) as archive:
    if archive.testzip():
      raise ValueError('a damaged array')


def differences(found: pathlib.Path, expected: pathlib.Path, stopped: bool = False) -> list[str]:
  """In what a finished run, and the runs in folders of its own, differ from undisturbed ones; [] where in nothing.

  Args:
    found, expected: workdirs.
    stopped: it was asked to stop (SIGTERM, Ctrl-C), which ends a window of metrics early: means over training batches
      may be over others.
  """
  runs = lambda folder: sorted(str(path.parent.relative_to(folder)) for path in folder.rglob('config.json'))
  if runs(found) != runs(expected):
    return [f'there are other runs: {runs(found)} and not {runs(expected)}']
  return [f'{name}: {line}' for name in runs(expected) for line in _different(found / name, expected / name, stopped)]


def _different(found: pathlib.Path, expected: pathlib.Path, stopped: bool) -> Iterator[str]:
  for name in ('config.json', 'selection.json', 'predictions.json'):
    if _bytes(found / name) != _bytes(expected / name):
      yield f'{name} differs'
  results = [_json(folder / 'results.json') for folder in (found, expected)]
  if results[0] != results[1]:
    if None in results or not all(isinstance(each, dict) for each in results):
      yield f'results.json is there only in one: {[each is not None for each in results]}'
    else:
      one, other = results
      yield from (f'results.json: {key} differs' for key in sorted({*one, *other}) if one.get(key) != other.get(key))
  yield from _different_lines(*(_lines(folder / 'metrics.jsonl') for folder in (found, expected)), stopped)
  if not (expected / 'checkpoints').exists():
    return
  kept = [sorted(path.name for path in (folder / 'checkpoints').iterdir()) for folder in (found, expected)]
  if kept[0] != kept[1]:
    yield f'checkpoints/ has {kept[0]} and not {kept[1]}'
    return
  for step in kept[1]:
    ours, theirs = (leaves(folder, int(step)) for folder in (found, expected))
    if ours.keys() != theirs.keys():
      yield f'the checkpoint of step {step} has other leaves'
    elif wrong := [name for name, value in theirs.items() if ours[name] != value]:
      yield f'{len(wrong)} of {len(theirs)} leaves of the checkpoint of step {step} differ, such as {wrong[0]}'


def _different_lines(found: list[dict], expected: list[dict], stopped: bool) -> Iterator[str]:
  steps = [line['step'] for line in found]
  if steps != sorted(set(steps)):
    yield f'metrics.jsonl has the steps {steps}, not each once'
  if not stopped:
    if found != expected:
      wrong = next((one['step'] for one, other in zip(found, expected) if one != other), 'the end')
      yield f'metrics.jsonl differs from step {wrong} on ({len(found)} lines and not {len(expected)})'
    return
  if missing := {line['step'] for line in expected} - set(steps):
    yield f'metrics.jsonl lacks the steps {sorted(missing)}'
  evaluated = lambda lines: [{k: v for k, v in line.items() if not k.startswith('train/')} for line in lines
                             if 'val/loss' in line]
  if evaluated(found) != evaluated(expected):
    yield 'metrics.jsonl differs in evaluations'


def leaves(workdir: pathlib.Path, step: int) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
  """Type, shape and bytes of every array of a checkpoint's state, by its path."""
  import jax
  import numpy as np
  from orbax import checkpoint as ocp

  with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(workdir.resolve() / 'checkpoints' / str(step) / 'state')
  arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
  return {path: (str(array.dtype), array.shape, array.tobytes()) for path, array in arrays.items()}


def litter(workdir: pathlib.Path) -> list[str]:
  """What killed runs left behind beside what belongs there."""
  return sorted(str(path.relative_to(workdir)) for path in workdir.rglob('*')
                if 'tmp' in path.name or path.name.startswith('.') and path.is_file())


def _bytes(path: pathlib.Path) -> bytes | None:
  return path.read_bytes() if path.exists() else None


def _json(path: pathlib.Path) -> Any:
  """results.json without how it was run; None where there is none. Folders within the run are named from there."""
  if not path.exists():
    return None
  text = path.read_text().replace(str(path.parent), '.').replace(str(path.parent.parent), '..')
  return {key: value for key, value in json.loads(text).items() if key not in COMMAND}


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def _launch() -> None:
  """Becomes main.py with the rest of the arguments."""
  import runpy

  told = json.loads(sys.argv[1])
  sys.addaudithook(Disturbed(told['folder'], told['log'], Moment(**told['moment']) if told['moment'] else None))
  sys.argv = [str(ROOT / 'main.py'), *sys.argv[2:]]
  sys.path[0] = str(ROOT)
  from selection import journal

  journal.SECONDS = 0.0  # what is embedded so far is kept after each batch, not each minute
  runpy.run_path('main.py', run_name='__main__')


if __name__ == '__main__':
  _launch()
