"""Checkpoints of a training: the newest and the best on val are kept, and restored when the run resumes."""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import errno
import functools
import logging
import os
import shutil
import sys
from typing import Any, TypeVar

from etils import epath
import jax
from orbax import checkpoint as ocp

from ft_jax import parallel
from ft_jax.names import short
from ft_jax.training import checkpoint_files
from ft_jax.training.checkpoint_files import (
  check_digest,
  check_metrics,
  Damaged,
  differing,
  digest,
  read_about,
  read_shapes,
)
from ft_jax.workdir import cannot_write, check_name, saved_steps
from selection import storage

T = TypeVar('T')

FORMAT_VERSION = 3


class Checkpoints:
  """The folder `checkpoints/` of a workdir. Saving continues in the background; a checkpoint is whole or not there.

  Attributes:
    devices: the number of devices of the run as (from step, number) pairs; it is saved with each checkpoint.
  """

  def __init__(self, workdir: epath.PathLike, made_from: Mapping[str, str] | None = None, read_only: bool = False,
               keep: Collection[int] = (), formerly: Mapping[str, str] | None = None):
    """Opens the folder, or makes it.

    Args:
      workdir: the run's.
      made_from: fingerprints of what the run depends on besides its config, by name; saved with each checkpoint.
      read_only: changes nothing, as the folder may be another process's; nothing can be saved then.
      keep: steps whose checkpoints are kept, besides the newest and the best.
      formerly: fingerprints that older versions gave to some of `made_from`; checkpoints with them are resumed too.
    """
    self._formerly = dict(formerly or {})
    self._made_from = dict(made_from or {})
    self._folder = folder = storage.absolute(workdir) / 'checkpoints'
    check_name(folder.parent)
    self._keep = frozenset(keep)
    self._saving: int | None = None
    self.devices: list[list[int]] = [[0, jax.device_count()]]
    parallel.agreed(lambda: check_metrics(folder, read_only))
    _quieten()
    with contextlib.nullcontext() if read_only else self._written(folder):
      self._manager = _Manager(folder, item_names=('state', 'about'), options=_options(keep, read_only))

  def save(self, step: int, state: Any, metrics: dict[str, float] | None) -> None:
    """Saves a state (on the host) after `step` steps, with val's `score` (highest is best) and `loss`, if evaluated.

    A step that is saved already gets its metrics, where it has none yet, and is not saved again.

    Raises:
      OSError: this checkpoint or the one before, which was written in the background, could not be written; earlier
        ones are unchanged.
    """
    self.wait()  # a checkpoint that is being written cannot be looked at
    with self._written(self._folder / str(step)):
      parallel.agreed(self._check_folder)
      if step in self._manager.all_steps():
        if metrics is not None and not self.evaluated(step):
          self._add_metrics(step, metrics)
        return
      self._saving = step
      about = {'format_version': FORMAT_VERSION, 'made_from': self._made_from, 'step': step, 'devices': self.devices,
               'digest': digest(state)}
      self._manager.save(step, metrics=metrics, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)))

  def _check_folder(self) -> None:
    """Raises OSError where a checkpoint certainly cannot be written: in the background that shows an evaluation later.
    """
    if storage.is_url(self._folder):
      return
    if not self._folder.exists():  # orbax would make it again, with a run without its beginning
      raise FileNotFoundError(errno.ENOENT, 'there is no such folder any more', str(self._folder))
    if steps := saved_steps(self._folder.parent):
      last = sum(os.path.getsize(os.path.join(folder, name))
                 for folder, _, names in os.walk(self._folder / str(steps[-1])) for name in names)
      # A checkpoint is about as large as the one before, which is removed when the new one is whole.
      if shutil.disk_usage(self._folder).free < 0.9 * last:
        raise OSError(errno.ENOSPC, 'less room than the last checkpoint takes', str(self._folder))

  def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
    """Adds metrics to a checkpoint without any; it stays there all the while, as it may be the only one."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler(filename='metrics')) as writer:
      writer.save(self._path(step) / 'metrics', metrics)
    self._manager.reload()

  def tidy(self) -> None:
    """Removes checkpoints that are neither the newest nor the best nor to be kept, and that `save` left.

    A run that is killed while one is removed leaves half of it.
    """
    self.wait()
    for step in parallel.agreed(sorted({*self._manager.all_steps()} - {self.latest_step, self.best_step, *self._keep})):
      self._manager.delete(step)

  def evaluated(self, step: int) -> bool:
    """Whether the checkpoint of a step has metrics; the same on every process."""
    return parallel.agreed(lambda: bool(self._manager.metrics(step)))

  @property
  def latest_step(self) -> int | None:
    """The newest step, or None; the same on every process."""
    return parallel.agreed(self._manager.latest_step)

  @property
  def best_step(self) -> int | None:
    """The best step on val: highest score, then lowest loss, then latest; None where none was evaluated."""

    def best() -> int | None:
      metrics = {step: found for step in self.all_steps() if (found := self.metrics(step))}
      return max(metrics, key=lambda step: (*_rank(metrics[step]), step), default=None)

    return parallel.agreed(best)

  def restore(self, step: int, like: Any) -> Any:
    """The state saved at `step`, in the structure, shapes and types of `like`.

    Raises:
      ValueError: it has another format version, or was made from other data, by name.
      Damaged: it cannot be read, or holds other numbers than were saved.
      OSError: this process may not read it, or has too many open files.
    """
    folder = self._path(step)
    saved = self.structure(step)
    # First its record: a state of another version has another structure.
    about = _together(lambda: read_about(self._manager, step))
    self._check_about(about)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)

    def read() -> Any:
      try:
        state = self._restore(step, ocp.args.StandardRestore(abstract))
      except (ValueError, OSError, RuntimeError) as error:
        if _shapes(saved) != _shapes(abstract):  # it is whole, but not what was asked for
          raise
        raise Damaged(f'the checkpoint {folder} cannot be read ({short(error)})') from error
      check_digest(folder, state, about)
      return state

    state = _together(read)
    self.devices = about.get('devices') or self.devices  # older versions did not save it
    if self.devices[-1][1] != jax.device_count():
      self.devices = [*self.devices, [step, jax.device_count()]]
    return state

  def _check_about(self, about: Mapping[str, Any]) -> None:
    """Raises ValueError for the record of a checkpoint that this run cannot resume from."""
    if about['format_version'] != FORMAT_VERSION:
      raise ValueError(f'{self._folder} has format version {about["format_version"]}; this program resumes from '
                       f'{FORMAT_VERSION}. Give another --workdir; as model.weights it can still be used')
    before = about['made_from']
    changed = [name for name in differing(before, self._made_from) if before[name] != self._formerly.get(name)]
    if changed:
      raise ValueError(f'{self._folder} is of a run on other data: changed since then: {", ".join(changed)}; bring it '
                       'back, or give another --workdir')
    self._made_from = before  # all checkpoints of a run have the same record

  def set_aside(self, step: int, why: str) -> None:
    """Moves a damaged checkpoint to `damaged/` beside this folder, and logs it; the others are unchanged.

    Raises:
      Damaged: there is no other one to resume from; it stays where it is.
    """
    parallel.agreed(lambda: checkpoint_files.set_aside(self._path(step), why))
    self._manager.reload()

  def structure(self, step: int) -> dict[str, Any]:
    """Shapes and types of the state saved at `step`, as nested dicts.

    Raises:
      Damaged: it cannot be read, on any process.
    """
    return _together(lambda: read_shapes(self._path(step)))

  def all_steps(self) -> list[int]:
    """The steps of all checkpoints, in order."""
    return sorted(self._manager.all_steps())

  def metrics(self, step: int) -> dict[str, float] | None:
    """Val's `score` and `loss` of a checkpoint; None where it was not evaluated."""
    return self._manager.metrics(step)

  def about(self, step: int) -> dict[str, Any]:
    """What a checkpoint records of itself; raises Damaged where it cannot be read."""
    return read_about(self._manager, step)

  def load(self, step: int) -> dict[str, Any]:
    """The state saved at `step` as nested dicts of arrays, whatever version saved it; raises Damaged as of `restore`.
    """
    folder = self._path(step)
    read_shapes(folder)
    about = self.about(step)
    try:
      state = self._restore(step, ocp.args.StandardRestore())
    except (ValueError, OSError, RuntimeError) as error:
      raise Damaged(f'the checkpoint {folder} cannot be read ({short(error)})') from error
    check_digest(folder, state, about)
    return state

  def wait(self) -> None:
    """Waits until everything is written; raises OSError as of `save`."""
    with self._written(self._path(self._saving)):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until everything is written, and ends the threads; raises OSError as of `save`."""
    with self._written(self._path(self._saving)):
      self._manager.close()

  def _restore(self, step: int, how: ocp.args.StandardRestore) -> Any:
    return self._manager.restore(step, args=ocp.args.Composite(state=how))['state']

  def _path(self, step: int | None) -> epath.Path:
    return self._folder if step is None else self._folder / str(step)

  @contextlib.contextmanager
  def _written(self, path: epath.Path) -> Iterator[None]:
    """Makes one OSError, of one line, of the many that orbax, tensorstore and clients of object storage raise."""
    try:
      yield
    except Exception as error:
      raise cannot_write(path, error) from error


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, which does not ask jax's preemption service: `stopping` does, and that counts questions."""

  def reached_preemption(self, step: int) -> bool:
    """Saving does not depend on it."""
    del step
    return False


def _options(keep: Collection[int], read_only: bool) -> ocp.CheckpointManagerOptions:
  policies = ocp.checkpoint_managers
  best = policies.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False)
  policy = policies.AnyPreservationPolicy([policies.LatestN(1), best, policies.CustomSteps(keep)])
  # Where folders were made in the background and could not be, orbax's other threads would wait ten minutes for them.
  own_threads = ocp.AsyncOptions(create_directories_asynchronously=False)
  return ocp.CheckpointManagerOptions(best_fn=_rank, preservation_policy=policy, create=not read_only,
                                      cleanup_tmp_directories=not read_only, async_options=own_threads)


def _together(read: Callable[[], T]) -> T:
  """The result of `read`; where it raises Damaged or OSError on one process, as one host's disk may, it raises on all.
  """
  result: list[T] = []
  problem: Exception | None = None
  try:
    result.append(read())
  except (Damaged, OSError) as error:
    problem = error
  for message in parallel.everyone(None if problem is None else (isinstance(problem, Damaged), str(problem))):
    if message is not None:
      damaged, text = message
      raise (Damaged if damaged else OSError)(text) from problem
  return result[0]


@functools.cache
def _quieten() -> None:
  """Silences what the threads of orbax and tensorstore print, at length, of errors that `save` or `wait` raises."""
  logging.getLogger('absl').addFilter(
      lambda record: record.levelno < logging.ERROR or '/orbax/' not in record.pathname)
  show = sys.unraisablehook

  def show_others(raised: Any) -> None:
    # Where one array of a checkpoint could not be written, nobody waits for the others any more, and tensorstore
    # complains; and gcsfs leaves a view of what it could not write, of which Python 3.13 complains.
    if str(raised.exc_value) not in ('Event loop is closed', 'Existing exports of data: object cannot be re-sized'):
      show(raised)

  sys.unraisablehook = show_others


def _shapes(tree: Any) -> list[str]:
  return sorted(f'{leaf.dtype} {leaf.shape}' for leaf in jax.tree.leaves(tree))


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
  # On a small val split many steps have the same score.
  return metrics['score'], -metrics['loss']
