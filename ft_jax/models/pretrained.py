"""Pre-trained weights: state dicts with torchvision's or MoCo's names to variables of `resnet`; and a strict merge."""

from collections.abc import Iterable, Mapping
import os
import re
from typing import Any, NamedTuple

import flax
import jax
import numpy as np

from ft_jax.models import resnet, torch_files

# What names in a state dict may start with: the query encoder of MoCo (wrapped by DistributedDataParallel, or not), a wrapped
# network, and bare as in torchvision.
_PREFIXES = ('module.encoder_q.', 'encoder_q.', 'module.', '')
_MOCO_REST = re.compile(r'(module\.)?(encoder_k\..+|queue|queue_ptr)')
_BACKBONE = re.compile(r'(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))\.(weight|bias|running_mean|running_var)')
_CLASSIFIER = {'fc.weight', 'fc.bias'}
_PROJECTION = {'fc.0.weight', 'fc.0.bias', 'fc.2.weight', 'fc.2.bias'}


class Loaded(NamedTuple):
  """Variables that were read, and what of the file was left on purpose: {why: names}."""
  variables: dict[str, Any]
  dropped: dict[str, list[str]]


def load_torch(path: str | os.PathLike[str]) -> dict[str, Any]:
  """The variables of `read`."""
  return read(path).variables


def read(path: str | os.PathLike[str]) -> Loaded:
  """Reads a ResNet's state dict from `.safetensors`, `.pth` or `.pth.tar`.

  Args:
    path: a file with torchvision's names, or MoCo's checkpoint, whose query encoder is taken.

  Returns:
    `{'params', 'batch_stats'}` of float32 numpy arrays; a classifier `fc` becomes the head 'source'. MoCo-v2's projection head
    (`fc.0`, `fc.2`) is `{'projection': {'0', '2'}}` beside them; see `project`.

  Raises:
    ValueError: a file that cannot be read (see `torch_files.read`), or a tensor that is no ResNet's, by name.
  """
  state = torch_files.read(path)
  prefix = next((p for p in _PREFIXES if f'{p}conv1.weight' in state.tensors), None)
  if prefix is None:
    strange = sorted(state.tensors, key=lambda name: bool(_BACKBONE.fullmatch(name)) or name.endswith('num_batches_tracked'))
    raise ValueError(f'{path} holds none of {", ".join(resnet.NETWORKS)}: there is no conv1.weight among {listed(strange)}')
  moco = prefix.endswith('encoder_q.')
  flat: dict[str, np.ndarray] = {}
  dropped: dict[str, list[str]] = {}
  unknown = []
  for name, value in state.tensors.items():
    bare = name.removeprefix(prefix) if name.startswith(prefix) else ''
    if bare.endswith('num_batches_tracked'):
      dropped.setdefault("BatchNorm's counters", []).append(name)
    elif moco and not bare and _MOCO_REST.fullmatch(name):
      dropped.setdefault("MoCo's key encoder and queue", []).append(name)
    elif moco and bare in _CLASSIFIER:
      dropped.setdefault("MoCo-v1's projection", []).append(name)
    elif _BACKBONE.fullmatch(bare) or bare in _CLASSIFIER or moco and bare in _PROJECTION:
      flat.update([_convert(bare, value, path)])
    else:
      unknown.append(name)
  if unknown:
    raise ValueError(f'{path} holds none of {", ".join(resnet.NETWORKS)}: they have no {listed(unknown)}')
  for head in (_CLASSIFIER, _PROJECTION):
    here = {name for name in head if _key(name) in flat}
    if here and here != head:
      raise ValueError(f'{path} holds {listed(sorted(here))} and lacks {listed(sorted(head - here))}')
  if state.beside:
    dropped['beside the network'] = list(state.beside)
  return Loaded(flax.traverse_util.unflatten_dict(flat, sep='/'), dropped)


def merge(variables: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
  """Fresh variables with the backbone replaced by the loaded one, and every head that the weights have under the same name.

  Raises:
    ValueError: a tensor that is missing, left over or of another shape, by name; and which network the weights are of.
  """
  fresh = flax.traverse_util.flatten_dict(dict(variables), sep='/')
  given = flax.traverse_util.flatten_dict({key: loaded.get(key, {}) for key in ('params', 'batch_stats')}, sep='/')
  given = {key: value for key, value in given.items() if key in fresh or not key.startswith('params/heads/')}
  if problems := _problems({key: value for key, value in fresh.items() if key in given or not key.startswith('params/heads/')}, given):
    raise ValueError(f'the weights do not fit the model (model.name, model.width, model.stem). {_nearest(given)}. {". ".join(problems)}')
  merged = {key: np.asarray(given[key], np.float32) if key in given else value for key, value in fresh.items()}
  return flax.traverse_util.unflatten_dict(merged, sep='/')


def project(projection: Mapping[str, Any], features: jax.Array) -> jax.Array:
  """MoCo-v2's projection head: features `[b, 2048]` to `[b, 128]`, not normalised (Chen et al., 2020: linear, ReLU, linear)."""
  hidden = jax.nn.relu(features @ projection['0']['kernel'] + projection['0']['bias'])
  return hidden @ projection['2']['kernel'] + projection['2']['bias']


def _problems(expected: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
  """What differs between two flat trees of arrays or their shapes."""
  missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
  shapes = [f'{key} {given[key].shape} in the weights, {expected[key].shape} in the model'
            for key in sorted(expected.keys() & given.keys(), key=_params_first) if given[key].shape != expected[key].shape]
  return [*([f'Missing in the weights: {listed(sorted(missing, key=_params_first))}'] if missing else []),
          *([f'Not in the model: {listed(sorted(extra, key=_params_first))}'] if extra else []),
          *([f'Other shapes: {"; ".join(shapes[:3])}' + (f' and {len(shapes) - 3} more' if len(shapes) > 3 else '')] if shapes else [])]


def _nearest(given: Mapping[str, Any]) -> str:
  """The network that loaded variables are of, or are most like."""
  given = {key: value for key, value in given.items() if not key.startswith('params/heads/')}
  kernel = given['params/conv1/kernel'] if 'params/conv1/kernel' in given else np.zeros((7, 7, 3, 64))
  stem, width = f'{kernel.shape[0]}x{kernel.shape[1]}', kernel.shape[-1]
  known = ', '.join(resnet.NETWORKS)
  if stem not in resnet.STEMS:
    return f'They are of none of {known}'
  fits = {}
  for name in resnet.NETWORKS:
    model = resnet.build(name, {}, width=width, stem=stem)
    shapes = flax.traverse_util.flatten_dict(
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)), sep='/')
    alike = sum(key in given and given[key].shape == value.shape for key, value in shapes.items())
    fits[name] = alike - len(given), alike - len(shapes)  # zeros: nothing is left over, nothing missing
  best = max(fits, key=lambda name: sum(fits[name]))
  if fits[best] == (0, 0):
    return f'They are of {best}: set --config.model.name={best} --config.model.width={width} --config.model.stem={stem}'
  return (f'They are of none of {known}; the nearest is {best} of width {width}, which has {len(given) + fits[best][0]} of their '
          f'{len(given)} tensors')


def listed(names: Iterable[str], most: int = 4) -> str:
  """The first few names, and how many more there are."""
  names = list(names)
  return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def _params_first(name: str) -> tuple[bool, str]:
  return not name.startswith('params/'), name


def _convert(name: str, value: np.ndarray, path: str | os.PathLike[str]) -> tuple[str, np.ndarray]:
  """A torch tensor's place and value here."""
  if value.dtype.kind in 'iub':
    raise ValueError(f'{path}: {name} is {value.dtype}; expected floating-point numbers')
  value = np.asarray(value, np.float32)
  if name.endswith('weight') and value.ndim == 4:
    value = value.transpose(2, 3, 1, 0)
  elif name.endswith('weight') and value.ndim == 2:
    value = value.T
  return _key(name), value


def _key(name: str) -> str:
  """The path here of a tensor of torchvision or MoCo-v2: `layer1.0.conv1.weight` is params/layer1/0/conv1/kernel."""
  module, _, leaf = name.replace('.', '/').rpartition('/')
  if name in _PROJECTION:
    return f'projection/{module.removeprefix("fc/")}/{"kernel" if leaf == "weight" else leaf}'
  if leaf in ('running_mean', 'running_var'):
    return f'batch_stats/{module}/{leaf.removeprefix("running_")}'
  module = 'heads/source' if module == 'fc' else module
  normalisation = re.fullmatch(r'(.*/)?(bn\d|downsample/1)', module)
  return f'params/{module}/{leaf if leaf == "bias" else "scale" if normalisation else "kernel"}'
