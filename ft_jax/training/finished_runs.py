"""Checkpoints of runs that are read and not trained on: their list, their weights, and what they started with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath
import jax

from ft_jax.methods import METHODS
from ft_jax.training.checkpoints import Checkpoints
from selection import storage


class CheckpointInfo(NamedTuple):
  """A checkpoint of a run.

  Attributes:
    step: number of updates.
    metrics: val's `score` and `loss`; None where it was not evaluated.
    made_from: fingerprints of the data and weights that the run depends on, by name.
  """
  step: int
  metrics: dict[str, float] | None
  made_from: dict[str, str]


def history(workdir: epath.PathLike) -> list[CheckpointInfo]:
  """The checkpoints of a run, in order; [] where there are none."""
  if not (storage.absolute(workdir) / 'checkpoints').exists():
    return []
  checkpoints = Checkpoints(workdir, read_only=True)
  infos = [CheckpointInfo(step, checkpoints.metrics(step), checkpoints.about(step)['made_from'])
           for step in checkpoints.all_steps()]
  checkpoints.close()
  return infos


def load_variables(workdir: epath.PathLike, step: int | None = None) -> dict[str, Any]:
  """`{'params', 'batch_stats'}` of a checkpoint of a run, as numpy arrays: the moving averages where it has them.

  A pre-training without labels has its projection head, too, as 'projection'; see `models.weights.project`.

  Args:
    workdir: the run's.
    step: None is the best checkpoint, or the newest where none was evaluated.

  Raises:
    ValueError: a folder without checkpoints or without that one, or a checkpoint that cannot be read.
  """
  state = _load_state(workdir, step)
  variables: Mapping[str, Any] = state.get('average') or state
  network = {name: value for name, value in variables['params'].items() if name != 'methods'}
  loaded = jax.device_get({'params': network, 'batch_stats': variables.get('batch_stats', {})})
  projection = _projection_head(state)
  return loaded if projection is None else {**loaded, 'projection': projection}


def _projection_head(state: Mapping[str, Any]) -> dict[str, Any] | None:
  """The projection head of a state; None where its methods, if there are any, leave none."""
  own = state['params'].get('methods', {})
  heads = [METHODS[name]().projection_head(*jax.device_get((params, state['methods'].get(name, {}))))
           for name, params in own.items() if name in METHODS]
  return next((head for head in heads if head is not None), None)


def load_start(workdir: epath.PathLike, step: int | None = None) -> dict[str, Any] | None:
  """What the training of a checkpoint started with (`TrainState.start`), as numpy arrays; None where no method needed
  it.

  Arguments and errors as of `load_variables`.
  """
  return jax.device_get(_load_state(workdir, step).get('start')) or None


def _load_state(workdir: epath.PathLike, step: int | None) -> dict[str, Any]:
  """See `load_variables`."""
  folder = storage.absolute(workdir) / 'checkpoints'
  if not folder.exists():
    raise ValueError(f'{workdir} holds no checkpoints; give the workdir of a finished run, such as runs/pretrain')
  checkpoints = Checkpoints(workdir, read_only=True)
  steps = checkpoints.all_steps()
  if not steps:
    raise ValueError(f'{folder} holds no finished checkpoint; let the run continue to its first evaluation')
  if step is None:
    step = checkpoints.best_step if checkpoints.best_step is not None else checkpoints.latest_step
  if step is None or step not in steps:
    raise ValueError(f'{folder} holds no checkpoint of step {step}; there are {", ".join(map(str, steps))}')
  state = checkpoints.load(step)
  checkpoints.close()
  return state
