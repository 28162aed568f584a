"""Where training starts from: pre-trained variables from the Hugging Face Hub, a file, or an earlier run."""

from collections.abc import Mapping, Sequence
import hashlib
from typing import Any, NamedTuple

from etils import epath
import flax
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from ft_jax import parallel
from ft_jax.models import build, hub, NETWORKS, torch_pickle
from ft_jax.models.network import head_of, Network, network_variables, OPTIONS
from ft_jax.models.weights import check_numbers, LoadedWeights, merge, read
from ft_jax.names import listed
from ft_jax.progress import log
from ft_jax.training.finished_runs import load_variables
from ft_jax.workdir import read_json
import selection
from selection import storage


class Weights(NamedTuple):
  """Pre-trained variables, with the heads and the projection that were asked for; what results.json says of them."""
  variables: dict[str, Any]
  about: dict[str, str | None]


def check_weights(config: ConfigDict) -> None:
  """Raises ValueError for fields of `config.model` that cannot be right, before anything is loaded or downloaded."""
  if config.source_head not in SOURCE_HEADS:
    raise ValueError(f'model.source_head is {config.source_head!r}; known: {", ".join(SOURCE_HEADS)}')
  for field in ('source_head', 'batch_norm'):
    if config[field] in ('pretrained', 'frozen') and not config.weights:
      raise ValueError(f'model.{field} is {config[field]!r} and model.weights is empty; give the weights that it is to '
                       'come from')
  if not config.weights or config.weights == 'pretrain':
    return
  if (repo := hub.parse(config.weights)) is None:
    _check_path(config.weights)
  elif repo.name.startswith('timm/'):
    _check_timm(*repo.name.removeprefix('timm/').split('.', 1), config=config)


def _check_path(name: str) -> None:
  path = storage.located(name)
  if not path.exists():
    raise ValueError(f'model.weights: there is no file or folder {name}; expected one, or timm:<name>, or '
                     'hf:<owner>/<name>')
  if not _is_run(path) and not storage.is_url(file := _weights_file(path)):
    torch_pickle.check(file)


def _is_run(path: epath.Path) -> bool:
  """Whether a path is the workdir of a run, or a checkpoint in one."""
  return path.is_dir() and ((path / 'checkpoints').is_dir() or path.parent.name == 'checkpoints')


def _weights_file(path: epath.Path) -> epath.Path:
  """The file itself; of a folder laid out as a repository of the Hugging Face Hub its weights.

  Raises:
    ValueError: the folder holds none, or several.
  """
  if not path.is_dir():
    return path
  inside = sorted(entry.name for entry in path.iterdir())
  if (chosen := hub.weights_in(inside)) is not None:
    return path / chosen
  near = [name for name in inside if name.lower().endswith(torch_pickle.ENDINGS)]
  advice = f'give one of its files: {listed(near)}' if near else 'give such a folder, or a file'
  raise ValueError(f'model.weights: {path} is not the workdir of a run (it has no folder checkpoints/), and has no '
                   f'{" or ".join(hub.WEIGHTS)}; {advice}')


def _check_timm(network: str, tag: str = '', *, config: ConfigDict) -> None:
  """Many networks of timm differ from torchvision's in stem, pooling or blocks, which their names say."""
  if network not in NETWORKS:
    raise ValueError(f'model.weights is {config.weights!r}, a {network}, which is another network than '
                     f'{", ".join(NETWORKS)}')
  if tag.startswith('ra4_'):  # as timm 1.0 has it; all others of these networks have ImageNet's mean
    raise ValueError(f'model.weights is {config.weights!r}, which was trained on images with a mean of 0.5; the '
                     'networks here take out the '
                     'mean of ImageNet')
  published = {'name': network, **build(network, {}, stages=config.get('stages', 0)).options}
  if published != {name: config.get(name, OPTIONS.get(name)) for name in published}:
    flags = ' '.join(f'--config.model.{name}={value}' for name, value in published.items())
    raise ValueError(f'model.weights is {config.weights!r}; set {flags}')


def load_weights(name: str, network: Network, *, classes: int | None = None, class_names: Sequence[str] | None = None,
                 classifier: bool = False, projection: bool = False) -> Weights:
  """Reads pre-trained variables; says what was used and what was dropped.

  Args:
    name: as `config.model.weights`: a name of the Hugging Face Hub, a file, a workdir or a checkpoint in one.
    network: whose weights they are; its heads do not matter.
    classes: how many the classifier must have, which then is head 'source'; None drops every head.
    class_names: their names, in order; compared with those of the run that the weights come from.
    classifier: whether the classifier is wanted as head 'pretrained', whatever its classes.
    projection: whether the projection head of a pre-training without labels is wanted too.

  Raises:
    ValueError: no such weights, weights that cannot be read, or without what is asked for.
  """
  repo = hub.parse(name)
  if repo is None:
    _check_path(name)
  path, commit = hub.fetch(repo) if repo else (storage.located(name), None)
  own = _is_run(path)
  variables, dropped, notes = _read_run(path, network) if own else read_file(_weights_file(path), network)
  heads = variables['params'].pop('heads', {})
  kept = {}
  if classifier:
    if 'source' not in heads:
      instead = f', but head {", ".join(sorted(heads))}' if heads else ''
      raise ValueError(f'methods.co_tuning and methods.lwf need the classifier of the pre-training, and {name} has '
                       f'none{instead}; give '
                       'weights with the classifier that they were trained with, or leave these methods out')
    _check_reads(heads['source'], network, name, 'methods.co_tuning and methods.lwf need the classifier')
    kept['pretrained'] = heads['source']
  if classes is not None:
    if 'source' not in heads:
      raise ValueError(f"model.source_head is 'pretrained', but {name} has no classifier; use "
                       "--config.model.source_head=fresh")
    if (found := len(heads['source']['bias'])) != classes:
      raise ValueError(f"model.source_head is 'pretrained', but the classifier of {name} has {found} classes and the "
                       "source data "
                       f'{classes}; use --config.model.source_head=fresh')
    _check_reads(heads['source'], network, name, 'model.source_head is \'pretrained\'')
    if class_names is not None:
      _check_same_classes(name, _source_classes(path) if own else None, class_names)
    kept['source'] = heads['source']
  if projection and 'projection' not in variables:
    raise ValueError(f"selection.features is 'projection', but {name} has no projection head (MoCo-v2's file has one, "
                     'and a run of configs/pretrain.py:moco or :byol); use --config.selection.features=pooled')
  if projection:
    _check_reads(variables['projection']['0'], network, name, "selection.features is 'projection'")
  if kept:
    variables['params']['heads'] = kept
    heads = {head: value for head, value in heads.items() if head != 'source'}
  if heads:
    dropped['old classifier'] = [f'heads/{head}' for head in sorted(heads)] if own else \
        [network.torch_name(f'params/heads/source/{leaf}') for leaf in ('kernel', 'bias')]
  if not projection and variables.pop('projection', None):
    dropped['projection head'] = ['projection/0', 'projection/2'] if own else ['fc.0', 'fc.2']
  check_numbers(network, variables, name)
  says = '; '.join(f'{listed(names)} ({why})' for why, names in dropped.items())
  says = (f'; dropped: {says}' if says else '') + ''.join(f'; {note}' for note in notes)
  log.info('weights: %s%s: %d tensors used%s', name, f' at {commit}' if commit else '', len(jax.tree.leaves(variables)),
           says)
  fingerprint = weights_fingerprint(network_variables(variables))
  return Weights(variables, {'name': name, 'revision': commit, 'fingerprint': fingerprint})


def read_file(path: epath.PathLike, network: Network) -> LoadedWeights:
  """Weights in a file, or in an object on object storage; raises ValueError as of `models.weights.read`."""
  with storage.on_disk(path) as file:
    return _without_later_stages(read(file, network), network)


def _without_later_stages(loaded: LoadedWeights, network: Network) -> LoadedWeights:
  """Less the variables of stages that the network ends before."""
  flat = flax.traverse_util.flatten_dict(loaded.variables, sep='/', keep_empty_nodes=True)
  later = [path for path in flat if network.is_beyond(path.partition('/')[2])]
  if not later:
    return loaded
  rest = {path: value for path, value in flat.items() if path not in later}
  dropped = {**loaded.dropped, f'after stage {len(network.stage_names)}': [network.torch_name(path) for path in later]}
  return LoadedWeights(flax.traverse_util.unflatten_dict(rest, sep='/'), dropped, loaded.notes)


def _check_reads(head: Mapping[str, np.ndarray], network: Network, name: str, wish: str) -> None:
  """Raises ValueError for a classifier or projection head that reads later stages than the network has."""
  stages = network.options.get('stages')
  if stages and (found := len(head['kernel'])) != network.features_dim:
    raise ValueError(f'{wish}, but the head in {name} reads {found} features and the network has '
                     f'{network.features_dim} (model.stages {stages})')


def _read_run(folder: epath.Path, network: Network) -> LoadedWeights:
  """A workdir, or one of its checkpoints."""
  is_run = (folder / 'checkpoints').is_dir()  # whatever it and the folder above it are called
  step = int(folder.name) if not is_run and folder.parent.name == 'checkpoints' and folder.name.isdigit() else None
  workdir = folder if step is None else folder.parent.parent
  loaded = LoadedWeights(load_variables(workdir, step), {'of that training': ['optimizer']})
  return _without_later_stages(loaded, network)


def _check_same_classes(name: str, known: Sequence[str] | None, wanted: Sequence[str]) -> None:
  """Raises ValueError for a classifier of other classes than the source data, or in another order; warns if unknown."""
  if known is None:
    log.warning("warning: model.source_head is 'pretrained' and the names of the classes of %s are not known; they "
                "must be "
                'those of the source data, in the same order', name)
  elif tuple(known) != tuple(wanted):
    first = next(k for k, pair in enumerate(zip(known, wanted)) if pair[0] != pair[1])
    raise ValueError(f"model.source_head is 'pretrained', but the classifier of {name} has other classes than the "
                     "source "
                     f'data, or another order: class {first} is {known[first]!r} there and {wanted[first]!r} in the '
                     'source '
                     'data; use --config.model.source_head=fresh, or the source data that it was trained on')


def _source_classes(path: epath.Path) -> tuple[str, ...] | None:
  """The classes of head 'source' of a run, by its workdir or one of its checkpoints; None where it does not say.

  A pre-training has them in results.json; a fine-tuning in selection.json, where it chose whole classes.
  """
  folder = path if (path / 'checkpoints').is_dir() else path.parent.parent
  results, chosen = folder / 'results.json', folder / 'selection.json'
  try:
    if results.exists() and (told := read_json(results))['job'] == 'pretrain':
      return tuple(str(row['name']) for row in told['val']['per_class'])
    if chosen.exists() and (loaded := selection.Selection.load(chosen)).by == 'class':
      return tuple(loaded.names)
  except (KeyError, TypeError, ValueError) as error:  # of another program, or changed by hand
    log.debug('%s: %s', folder, error)
  return None


def init_variables(model: Network, seed: int, weights: Mapping[str, Any] | None) -> dict[str, Any]:
  """Fresh variables of a network; those that `weights` have come from there, heads included."""
  if weights is not None and not model.heads:  # nothing is fresh, so shapes are enough: init takes seconds to compile
    return merge(model, model.shapes(), weights)
  example = jnp.zeros(model.example().shape, model.example().dtype)
  initial = jax.device_get(jax.jit(model.init)(jax.random.key(seed), example))
  variables = network_variables(parallel.same_arrays(initial))
  return variables if weights is None else merge(model, variables, weights)


def weights_fingerprint(variables: Mapping[str, Any]) -> str:
  """Sixteen hexadecimal digits that depend on every number of the backbone."""
  state = hashlib.sha256()
  for path, value in sorted(flax.traverse_util.flatten_dict(dict(variables), sep='/').items()):
    if not head_of(path.removeprefix('params/')):
      state.update(path.encode() + np.ascontiguousarray(value).tobytes())
  return state.hexdigest()[:16]


def drawn(seed: int) -> str:
  """Says which random weights a network of some config starts with: their last bits depend on the processor and the
  compiler.
  """
  return f'drawn with seed {seed}'


SOURCE_HEADS = ('fresh', 'pretrained')
