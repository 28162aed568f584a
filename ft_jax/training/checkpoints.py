"""Checkpoints of a run: the newest and the best on val; the only file that imports orbax."""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
import sys
from typing import Any, NamedTuple, TypeVar

from etils import epath
import jax
import numpy as np
from orbax import checkpoint as ocp
import tensorstore

from ft_jax import parallel
from ft_jax.names import short
from ft_jax.progress import log
from ft_jax.workdir import cannot_write, check_name, saved_steps
from selection import storage

T = TypeVar('T')

FORMAT_VERSION = 3
# Errors of the system that say nothing about what is in a file.
_NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Damaged(ValueError):
  """A checkpoint that is there and not whole, or not what was saved."""


class Checkpoints:
  """The folder `checkpoints/` of a workdir. Saving goes on in the background; a checkpoint is whole or not there."""

  def __init__(self, workdir: epath.PathLike, made_from: Mapping[str, str] | None = None, read_only: bool = False,
               keep: Collection[int] = (), formerly: Mapping[str, str] | None = None):
    """Takes up what is there.

    With each checkpoint goes how many devices the run had, from which step on: `devices`.

    Args:
      workdir: the run's.
      made_from: what the run depends on beside its config, as fingerprints by name; kept with each checkpoint.
      read_only: leave everything as it is, it may be another process's; nothing is saved then.
      keep: steps whose checkpoints stay, beside the newest and the best.
      formerly: fingerprints that earlier versions gave some of `made_from`; checkpoints that carry them are resumed too.
    """
    self._formerly = dict(formerly or {})
    self._about = {'format_version': FORMAT_VERSION, 'made_from': dict(made_from or {})}
    self._folder = folder = storage.absolute(workdir) / 'checkpoints'
    check_name(folder.parent)
    self._keep = frozenset(keep)
    self._saving: int | None = None
    self.devices: list[list[int]] = [[0, jax.device_count()]]
    parallel.agreed(lambda: _check_metrics(folder, read_only))
    _quieten()
    policies = ocp.checkpoint_managers
    policy = policies.AnyPreservationPolicy([
        policies.LatestN(1), policies.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False), policies.CustomSteps(keep)])
    # Where folders were made in the background and could not be, orbax's other threads would wait for them for ten minutes.
    own_threads = ocp.AsyncOptions(create_directories_asynchronously=False)
    with contextlib.nullcontext() if read_only else self._written(folder):
      self._manager = _Manager(
          folder, item_names=('state', 'about'),
          options=ocp.CheckpointManagerOptions(best_fn=_rank, preservation_policy=policy, create=not read_only,
                                               cleanup_tmp_directories=not read_only, async_options=own_threads))

  def save(self, step: int, state: Any, metrics: dict[str, float] | None) -> None:
    """Saves a state (on the host) after `step` steps, with val's `score` (best is highest) and `loss` where it was evaluated.

    A step that is there already was evaluated later than it was saved, or else needs no saving.

    Raises:
      OSError: this one or the one before, which was written in the background, could not be written; those before it are as they were.
    """
    self.wait()  # what is being written cannot be looked at
    with self._written(self._folder / str(step)):
      parallel.agreed(self._check_folder)
      if step in self._manager.all_steps():
        if metrics is not None and not self.evaluated(step):
          self._add_metrics(step, metrics)
        return
      self._saving = step
      about = {**self._about, 'step': step, 'devices': self.devices, 'digest': _digest(state)}
      self._manager.save(step, metrics=metrics, args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)))

  def _check_folder(self) -> None:
    """Raises OSError where it can be foreseen that a checkpoint cannot be written: in the background it is noticed an evaluation later."""
    if storage.is_url(self._folder):
      return
    if not self._folder.exists():  # orbax would make it anew, and in it a run without its beginning
      raise FileNotFoundError(errno.ENOENT, 'there is no such folder any more', str(self._folder))
    if steps := saved_steps(self._folder.parent):
      last = sum(os.path.getsize(os.path.join(folder, name))
                 for folder, _, names in os.walk(self._folder / str(steps[-1])) for name in names)
      if shutil.disk_usage(self._folder).free < 0.9 * last:  # it is about as large as the one before, which goes when it is whole
        raise OSError(errno.ENOSPC, 'less room than the last checkpoint takes', str(self._folder))

  def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
    """To a step that has none: it is there all the while, and may be all there is to go on from."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler(filename='metrics')) as writer:
      writer.save(epath.Path(self._manager.directory) / str(step) / 'metrics', metrics)
    self._manager.reload()

  def tidy(self) -> None:
    """Removes what is neither the newest nor the best nor to be kept, as far as no `save` did: killed within, one leaves half of it."""
    self.wait()
    for step in parallel.agreed(sorted({*self._manager.all_steps()} - {self.latest_step, self.best_step, *self._keep})):
      self._manager.delete(step)

  def evaluated(self, step: int) -> bool:
    """Whether the checkpoint of a step has metrics."""
    return parallel.agreed(lambda: bool(self._manager.metrics(step)))

  @property
  def latest_step(self) -> int | None:
    """The newest step there is, or None."""
    return parallel.agreed(self._manager.latest_step)

  @property
  def best_step(self) -> int | None:
    """The step that is best on val: highest score, then lowest loss, then latest; None where none was evaluated."""
    def best() -> int | None:
      metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
      return max((step for step in metrics if metrics[step]), key=lambda step: (*_rank(metrics[step]), step), default=None)

    return parallel.agreed(best)

  def restore(self, step: int, like: Any) -> Any:
    """The state saved at `step`, in the structure, shapes and types of `like`.

    Raises:
      ValueError: it has another format version, or was made from something else, by name.
      Damaged: it cannot be read, or holds other numbers than were saved.
      OSError: it may not be read by this process, or there are too many open files.
    """
    folder = epath.Path(self._manager.directory) / str(step)
    saved = _together(lambda: _check_whole(folder))
    # First what it says of itself: a state of another version has another structure.
    about = _together(lambda: _about(self._manager, step))
    if about['format_version'] != FORMAT_VERSION:
      raise ValueError(f'{self._manager.directory} has format version {about["format_version"]}; this program goes on from '
                       f'{FORMAT_VERSION}. Give another --workdir; as model.weights it can still be used')
    before, now = about['made_from'], self._about['made_from']
    if changed := [name for name in differing(before, now) if before[name] != self._formerly.get(name)]:
      raise ValueError(f'{self._manager.directory} goes on from other data: changed since then: {", ".join(changed)}; '
                       'bring it back, or give another --workdir')
    self._about['made_from'] = before  # all checkpoints of a run say the same of it
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)

    def read() -> Any:
      try:
        state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))['state']
      except (ValueError, OSError, RuntimeError) as error:
        if _shapes(saved) != _shapes(abstract):  # it is whole, but not what is wanted
          raise
        raise Damaged(f'the checkpoint {folder} cannot be read ({short(error)})') from error
      _check_same(folder, state, about)
      return state

    state = _together(read)
    self.devices = about.get('devices') or self.devices  # checkpoints of before do not say
    if self.devices[-1][1] != jax.device_count():
      self.devices = [*self.devices, [step, jax.device_count()]]
    return state

  def set_aside(self, step: int, why: str) -> None:
    """Moves a damaged checkpoint to `damaged/` beside this folder, and says so; those that are left are as before.

    Raises:
      Damaged: there is no other one to go on from; it stays where it is.
    """
    parallel.agreed(lambda: _set_aside(epath.Path(self._manager.directory) / str(step), why))
    self._manager.reload()

  def structure(self, step: int) -> dict[str, Any]:
    """Shapes and types of the state saved at `step`, as nested dicts.

    Raises:
      Damaged: it cannot be read, on any process.
    """
    return _together(lambda: _check_whole(epath.Path(self._manager.directory) / str(step)))

  def wait(self) -> None:
    """Waits until everything is written; raises OSError as of `save`."""
    with self._written(self._at(self._saving)):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until everything is written, and ends; raises OSError as of `save`."""
    with self._written(self._at(self._saving)):
      self._manager.close()

  def _at(self, step: int | None) -> epath.Path:
    return self._folder if step is None else self._folder / str(step)

  @contextlib.contextmanager
  def _written(self, path: epath.Path) -> Iterator[None]:
    """Whatever keeps `path` from being written is an OSError of one line; orbax, tensorstore and clients of object storage have many."""
    try:
      yield
    except Exception as error:
      raise cannot_write(path, error) from error


class _Manager(ocp.CheckpointManager):
  """Orbax's, which leaves it to `stopping` to ask jax's preemption service: that counts questions, and two who ask would confuse it."""

  def reached_preemption(self, step: int) -> bool:
    """Saving goes on as always."""
    del step
    return False


class Kept(NamedTuple):
  """A checkpoint of a run: its step, val's `score` and `loss` (None where it was not evaluated), and what it was made from."""
  step: int
  metrics: dict[str, float] | None
  made_from: dict[str, str]


def history(workdir: epath.PathLike) -> list[Kept]:
  """The checkpoints of a run, in order; [] where there are none."""
  if not (storage.absolute(workdir) / 'checkpoints').exists():
    return []
  checkpoints = Checkpoints(workdir, read_only=True)
  manager = checkpoints._manager
  kept = [Kept(step, manager.metrics(step), _about(manager, step)['made_from']) for step in sorted(manager.all_steps())]
  checkpoints.close()
  return kept


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
  """The names, in order, of what two states were made from that is not the same.

  What only one of them names is not compared: the versions that wrote them recorded different things.
  """
  return sorted(name for name in one.keys() & other.keys() if one[name] != other[name])


def load_variables(workdir: epath.PathLike, step: int | None = None) -> dict[str, Any]:
  """`{'params', 'batch_stats'}` of a checkpoint of a run, as numpy arrays: the moving averages where it kept them.

  Args:
    workdir: the run's.
    step: None is the best checkpoint, or the newest where none was evaluated.

  Raises:
    ValueError: a folder without checkpoints or without that one, or a checkpoint that cannot be read.
  """
  state = _load_state(workdir, step)
  kept = state.get('average') or state
  network = {key: value for key, value in kept['params'].items() if key != 'methods'}
  return jax.device_get({'params': network, 'batch_stats': kept['batch_stats']})


def load_start(workdir: epath.PathLike, step: int | None = None) -> dict[str, Any] | None:
  """What the training of a checkpoint began with (`TrainState.start`), as numpy arrays; None where no method kept it.

  Arguments and errors as of `load_variables`.
  """
  return jax.device_get(_load_state(workdir, step).get('start')) or None


def _load_state(workdir: epath.PathLike, step: int | None) -> dict[str, Any]:
  """See `load_variables`."""
  folder = storage.absolute(workdir) / 'checkpoints'  # what orbax is given must not begin somewhere
  if not folder.exists():
    raise ValueError(f'{workdir} holds no checkpoints; give the workdir of a finished run, such as runs/pretrain')
  checkpoints = Checkpoints(workdir, read_only=True)
  steps = checkpoints._manager.all_steps()
  if not steps:
    raise ValueError(f'{folder} holds no finished checkpoint; let the run go on to its first evaluation')
  if step is None:
    step = checkpoints.best_step if checkpoints.best_step is not None else checkpoints.latest_step
  if step not in steps:
    raise ValueError(f'{folder} holds no checkpoint of step {step}; there are {", ".join(map(str, sorted(steps)))}')
  _check_whole(folder / str(step))
  about = _about(checkpoints._manager, step)
  try:
    state = checkpoints._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))['state']
  except (ValueError, OSError, RuntimeError) as error:
    raise Damaged(f'the checkpoint {folder / str(step)} cannot be read ({short(error)})') from error
  checkpoints.close()
  _check_same(folder / str(step), state, about)
  return state


def _about(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """What a checkpoint says of itself."""
  folder = manager.directory / str(step)
  try:
    about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
  except (ValueError, OSError) as error:
    raise Damaged(f'the checkpoint {folder} cannot be read ({short(error)})') from error
  if not {'format_version', 'made_from'} <= set(about):
    raise Damaged(f'the checkpoint {folder} does not say what it is')
  return about


def _check_metrics(folder: epath.Path, read_only: bool) -> None:
  """Sets aside checkpoints whose metrics cannot be read, which the manager reads at once; raises Damaged where it may not."""
  for step in (folder / str(step) for step in saved_steps(folder.parent)):
    metrics = step / 'metrics' / 'metrics'
    try:
      if metrics.exists() and not {'score', 'loss'} <= set(json.loads(metrics.read_text())):
        raise ValueError('no score and loss')
    except (ValueError, TypeError) as error:
      why = f'the metrics of the checkpoint {step} cannot be read ({short(error)})'
      if read_only:
        raise Damaged(f'{why}; run the command of {folder.parent} again, which moves it to {folder.parent / "damaged"}') from error
      _set_aside(step, why)


def _together(read: Callable[[], T]) -> T:
  """What `read` gives; where it raises Damaged or OSError on one process, as a disk may do to one host alone, it does so on all of them."""
  found, problem = None, None
  try:
    found = read()
  except (Damaged, OSError) as error:
    problem = error
  for said in parallel.everyone(None if problem is None else (isinstance(problem, Damaged), str(problem))):
    if said is not None:
      damaged, text = said
      raise (Damaged if damaged else OSError)(text) from problem
  return found


def _set_aside(checkpoint: epath.Path, why: str) -> None:
  """See `Checkpoints.set_aside`; on process 0."""
  folder = checkpoint.parent
  if len(saved_steps(folder.parent)) < 2:
    raise Damaged(f'{why}. There is no other checkpoint in {folder}, so it stays there: restore it from a copy, or give another '
                  '--workdir to start anew')
  names = itertools.chain([checkpoint.name], (f'{checkpoint.name}-{n}' for n in itertools.count(2)))  # replaces nothing
  aside = next(path for name in names if not (path := folder.parent / 'damaged' / name).exists())
  _move(checkpoint, aside)
  log.warning('warning: %s. It is set aside in %s', why, aside)


def _move(folder: epath.Path, to: epath.Path) -> None:
  """Moves a folder; on object storage one object after the other, and nothing is removed before all are there."""
  if not storage.is_url(folder):
    to.parent.mkdir(exist_ok=True)
    folder.rename(to)
    return
  for source in _objects(folder):
    (to / source.relative_to(folder)).write_bytes(source.read_bytes())
  folder.rmtree()


def _objects(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    if path.is_dir():
      yield from _objects(path)
    elif path.exists():  # some clients list a folder in itself
      yield path


@functools.cache
def _quieten() -> None:
  """Keeps the pages back that orbax's and tensorstore's threads write of errors that `save` or `wait` raises."""
  logging.getLogger('absl').addFilter(lambda record: record.levelno < logging.ERROR or '/orbax/' not in record.pathname)
  show = sys.unraisablehook

  def show_others(raised: Any) -> None:
    # Where one part of a checkpoint could not be written, nobody waits for the others any more, which tensorstore then tells; and gcsfs
    # leaves a view of what it could not write, which Python 3.13 tells.
    if str(raised.exc_value) not in ('Event loop is closed', 'Existing exports of data: object cannot be re-sized'):
      show(raised)

  sys.unraisablehook = show_others


def _check_whole(folder: epath.Path) -> dict[str, Any]:
  """Reads all there is of a checkpoint's state, one after the other; returns its shapes and types, as nested dicts.

  Orbax reads everything at once, and where files are missing or cut short, its threads print tracebacks beside the error.
  """
  state = folder / 'state'
  try:
    if not (state / '_METADATA').exists():
      raise FileNotFoundError(state / '_METADATA')
    store = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': _kvstore(storage.absolute(state))}).result()
    keys = store.list().result()
    if not keys:
      raise FileNotFoundError('its arrays are missing')
    for key in keys:
      store.read(key).result()
    # Not the manager, which knows no structure before it has restored something.
    saved = ocp.StandardCheckpointHandler().metadata(state).tree
  except (KeyError, ValueError, OSError, RuntimeError) as error:
    if (number := storage.error_number(error)) in _NOT_DAMAGE:
      raise OSError(f'the checkpoint {folder} cannot be read here ({os.strerror(number)}), which does not mean that it is damaged; it is '
                    'left as it is. Fix that and start again') from error
    raise Damaged(f'the checkpoint {folder} cannot be read; it is not whole ({short(error)})') from error
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)


def _kvstore(folder: epath.Path) -> dict[str, str]:
  """Tensorstore's description of a folder: in a URL, a name with `#`, `?`, `%` or `|` would mean something else."""
  if not storage.is_url(folder):
    return {'driver': 'file', 'path': f'{folder}/'}
  bucket, _, path = os.fspath(folder).partition('://')[2].partition('/')
  return {'driver': 'gcs', 'bucket': bucket, 'path': f'{path}/'}


def _shapes(tree: Any) -> list[str]:
  return sorted(f'{leaf.dtype} {leaf.shape}' for leaf in jax.tree.leaves(tree))


def _digest(state: Any) -> str:
  """Sixteen hexadecimal digits that depend on every number, and not on what the parts are called: a restored tree has other containers."""
  leaves = (np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state)))
  each = sorted(hashlib.sha256(f'{leaf.dtype} {leaf.shape} '.encode() + np.ascontiguousarray(leaf).tobytes()).digest() for leaf in leaves)
  return hashlib.sha256(b''.join(each)).hexdigest()[:16]


def _check_same(folder: epath.Path, state: Any, about: Mapping[str, Any]) -> None:
  """Raises Damaged for numbers other than those that were saved; checkpoints of before have no digest."""
  if about.get('digest') not in (None, _digest(state)):
    raise Damaged(f'the checkpoint {folder} holds other numbers than were saved')


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
  # On a small val split many steps have the same score.
  return metrics['score'], -metrics['loss']
