"""Checkpoints of a run: the newest and the best on val; the only file that imports orbax."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from etils import epath
import jax
from orbax import checkpoint as ocp
import tensorstore

FORMAT_VERSION = 3


class Checkpoints:
  """The folder `checkpoints/` of a workdir. Saving goes on in the background; a checkpoint is whole or not there."""

  def __init__(self, workdir: epath.PathLike, made_from: Mapping[str, str] | None = None, read_only: bool = False,
               keep: Collection[int] = ()):
    """Takes up what is there.

    Args:
      workdir: the run's.
      made_from: what the run depends on beside its config, as fingerprints by name; kept with each checkpoint.
      read_only: leave everything as it is, it may be another process's; nothing is saved then.
      keep: steps whose checkpoints stay, beside the newest and the best.
    """
    self._about = {'format_version': FORMAT_VERSION, 'made_from': dict(made_from or {})}
    policies = ocp.checkpoint_managers
    policy = policies.AnyPreservationPolicy([
        policies.LatestN(1), policies.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False), policies.CustomSteps(keep)])
    self._manager = ocp.CheckpointManager(
        epath.Path(workdir).resolve() / 'checkpoints', item_names=('state', 'about'),
        options=ocp.CheckpointManagerOptions(best_fn=_rank, preservation_policy=policy, create=not read_only,
                                             cleanup_tmp_directories=not read_only))

  def save(self, step: int, state: Any, metrics: dict[str, float] | None) -> None:
    """Saves a state (on the host) after `step` steps, with val's `score` (best is highest) and `loss` where it was evaluated."""
    self._manager.save(step, metrics=metrics, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), about=ocp.args.JsonSave({**self._about, 'step': step})))

  @property
  def latest_step(self) -> int | None:
    """The newest step there is, or None."""
    return self._manager.latest_step()

  @property
  def best_step(self) -> int | None:
    """The step that is best on val: highest score, then lowest loss, then latest; None where none was evaluated."""
    metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
    return max((step for step in metrics if metrics[step]), key=lambda step: (*_rank(metrics[step]), step), default=None)

  def restore(self, step: int, like: Any) -> Any:
    """The state saved at `step`, in the structure, shapes and types of `like`.

    Raises:
      ValueError: it has another format version, or was made from something else, by name; or it cannot be read.
    """
    _check_whole(epath.Path(self._manager.directory) / str(step))
    # First what it says of itself: a state of another version has another structure.
    about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
    if about['format_version'] != FORMAT_VERSION:
      raise ValueError(f'{self._manager.directory} has format version {about["format_version"]}; this program goes on from '
                       f'{FORMAT_VERSION}. Give another --workdir; as model.weights it can still be used')
    before, now = about['made_from'], self._about['made_from']
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
      raise ValueError(f'{self._manager.directory} goes on from other data: changed since then: {", ".join(changed)}; '
                       'bring it back, or give another --workdir')
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))['state']

  def structure(self, step: int) -> dict[str, Any]:
    """Shapes and types of the state saved at `step`, as nested dicts.

    Raises:
      ValueError: it cannot be read.
    """
    _check_whole(epath.Path(self._manager.directory) / str(step))
    # Not the manager, which knows no structure before it has restored something.
    saved = ocp.StandardCheckpointHandler().metadata(epath.Path(self._manager.directory) / str(step) / 'state').tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)

  def wait(self) -> None:
    """Waits until everything is written."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until everything is written, and ends."""
    self._manager.close()


class Kept(NamedTuple):
  """A checkpoint of a run: its step, val's `score` and `loss` (None where it was not evaluated), and what it was made from."""
  step: int
  metrics: dict[str, float] | None
  made_from: dict[str, str]


def history(workdir: epath.PathLike) -> list[Kept]:
  """The checkpoints of a run, in order; [] where there are none."""
  if not (epath.Path(workdir).resolve() / 'checkpoints').exists():
    return []
  checkpoints = Checkpoints(workdir, read_only=True)
  manager = checkpoints._manager
  restore = lambda step: manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
  kept = [Kept(step, manager.metrics(step), restore(step)['made_from']) for step in sorted(manager.all_steps())]
  checkpoints.close()
  return kept


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
  folder = epath.Path(workdir).resolve() / 'checkpoints'  # as a URL it must not begin somewhere
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
  state = checkpoints._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))['state']
  checkpoints.close()
  return state


def _check_whole(folder: epath.Path) -> None:
  """Reads all there is of a checkpoint's state, one after the other.

  Orbax reads everything at once, and where files are missing or cut short, its threads print tracebacks beside the error.
  """
  state = folder / 'state'
  try:
    if not (state / '_METADATA').exists():
      raise FileNotFoundError(state / '_METADATA')
    base = state.resolve().as_posix()
    store = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': f'{base if "://" in base else f"file://{base}"}/'}).result()
    for key in store.list().result():
      store.read(key).result()
  except (ValueError, OSError, RuntimeError) as error:
    raise ValueError(f'the checkpoint {folder} cannot be read; it is not whole ({" ".join(str(error).split())[:300]})') from error


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
  # On a small val split many steps have the same score.
  return metrics['score'], -metrics['loss']
