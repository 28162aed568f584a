"""The network of a finished run: what export, predict and stability work on."""

from collections.abc import Mapping
import json
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from ft_jax import models
from ft_jax.data.pipeline import short_side, Transform
from ft_jax.models.network import Network, network_variables, OPTIONS
from ft_jax.training.finished_runs import load_variables
from ft_jax.workdir import read_config
from selection import storage


class Trained(NamedTuple):
  """The best checkpoint of a run.

  Attributes:
    path: the run's workdir.
    config: the run's; one of an older version may lack fields.
    results: what its results.json holds.
    head: 'target', or 'source' of a pre-training; '' of one without labels.
    class_names: of the logits of the head, in order.
    model: the network with that head alone, or without one.
    variables: `{'params', 'batch_stats'}` of the network, numpy arrays.
    transform: how images were prepared for the evaluation.
  """
  path: epath.Path
  config: ConfigDict
  results: dict[str, Any]
  head: str
  class_names: tuple[str, ...]
  model: Network
  variables: dict[str, Any]
  transform: Transform

  def summary(self) -> str:
    """The network, its run, and how good it is, in one line."""
    split = 'test' if self.results['test'] else 'val'
    return (f'{self.config.model.name} of {self.path}, {len(self.class_names)} classes, checkpoint of step '
            f'{self.results["best_step"]} ({split} top-1 {self.results[split]["top1"]:.1%})')


def load(workdir: str, field: str = 'config.workdir', classifier: bool = True) -> Trained:
  """Loads the best checkpoint of the run in a workdir.

  Args:
    workdir: of a fine-tuning or a pre-training.
    field: the field of the config that names it, for messages.
    classifier: whether it must have one, which a pre-training without labels does not.

  Raises:
    ValueError: no run, one that is not finished, one of a job that trains no network of its own, or one without the
      classifier that is needed.
  """
  if not workdir:
    raise ValueError(f'{field} is empty; give the workdir of a finished run, such as --{field}=runs/pets')
  path = storage.located(workdir)
  stored = read_config(path)
  if stored is None:
    raise ValueError(f'{field}: {workdir} holds no run (no config.json of one); give the workdir of a finished '
                     'fine-tuning')
  if str(stored['job']) not in HEADS:
    # Earlier versions had the runs of a comparison beside its own files.
    inside = [run for folder in (path / 'cells', path) if folder.is_dir() for run in sorted(folder.iterdir())
              if stored['job'] == 'compare' and read_config(run)]
    raise ValueError(f'{field}: {workdir} is of job {stored["job"]}; give that of a fine-tuning'
                     + (f', such as {inside[0]} ({len(inside)} are inside)' if inside else ''))
  if not (path / 'results.json').exists():
    raise ValueError(f'{field}: the run in {workdir} is not finished (no results.json); run its command again to '
                     'resume it')
  try:
    run = _read(path, ConfigDict(stored), json.loads((path / 'results.json').read_text()))
    run.summary()
  except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:  # another program's, or edited
    raise ValueError(f'{field}: config.json and results.json of {workdir} are not those of a finished run '
                     f'({type(error).__name__}: {error})') from error
  if classifier and not run.head:
    method = run.results['methods'][0]
    raise ValueError(f'{field}: {workdir} is a pre-training without labels (methods.{method}), which has no '
                     'classifier; use it as the weights of a fine-tuning (config.model.weights)')
  return run._replace(variables=_with_head(load_variables(path), run.head))


def _read(path: epath.Path, config: ConfigDict, results: dict[str, Any]) -> Trained:
  """The run without its variables."""
  head = '' if results.get('methods') else HEADS[config.job]
  class_names = tuple(str(row['name']) for row in results['val']['per_class'])
  heads = {head: len(class_names)} if head else {}
  options = {name: config.model.get(name, default) for name, default in OPTIONS.items()}
  model = models.build(
      config.model.name, heads, size=config.image_size, dtype=models.DTYPES[config.model.dtype],
      precision=config.model.get('precision', 'default'), **options)
  transform = Transform(config.image_size, short_side=short_side(config.image_size, config.augment))
  return Trained(path, config, results, head, class_names, model, {}, transform)


def output_folder(workdir: epath.PathLike) -> epath.Path:
  """Makes the folder that a job writes to; files of the same names are replaced one by one.

  Raises:
    ValueError: it is a file.
    OSError: it cannot be made.
  """
  folder = storage.located(workdir)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'--workdir={workdir} is a file; give a folder to write to')
  return storage.make_folder(folder)


def _with_head(variables: Mapping[str, Any], head: str) -> dict[str, Any]:
  """The variables of the network without the other heads; '' leaves none."""
  params = {**variables['params']}
  heads = params.pop('heads', {})
  if head:
    params['heads'] = {head: heads[head]}
  return network_variables({**variables, 'params': params})


# The head that each job trains for.
HEADS = {'finetune': 'target', 'pretrain': 'source'}
