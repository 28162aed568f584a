"""Pre-trained weights: torchvision's and MoCo's files to variables of `resnet`, without torch; and a strict merge."""

from collections.abc import Mapping
import os
import pathlib
import pickle
import re
from typing import Any
import zipfile

import flax
import numpy as np

# What a name in a state dict may start with: bare (torchvision), wrapped by DataParallel, the query encoder of MoCo.
_PREFIXES = ('module.encoder_q.', 'module.', '')


def load_torch(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads a ResNet's state dict from `.safetensors`, `.pth` or `.pth.tar`.

  Args:
    path: a file with torchvision's names, or MoCo-v2's checkpoint, whose query encoder is taken.

  Returns:
    `{'params', 'batch_stats'}` of numpy arrays; a classifier `fc` becomes the head 'source'. MoCo's projection head (`fc.0`,
    `fc.2`) is left out.

  Raises:
    ValueError: no such file, not one of these formats, or names that are no ResNet's.
  """
  path = pathlib.Path(os.path.expanduser(path))
  if not path.is_file():
    raise ValueError(f'model.weights: there is no file {path}')
  state = _read_safetensors(path) if path.suffix == '.safetensors' else _read_pth(path)
  prefix = next((p for p in _PREFIXES if f'{p}conv1.weight' in state), None)
  if prefix is None:
    raise ValueError(f'{path} holds no ResNet: no conv1.weight among {", ".join(list(state)[:5])}, ...')
  flat: dict[str, dict[str, np.ndarray]] = {'params': {}, 'batch_stats': {}}
  for name, value in state.items():
    if name.startswith(prefix) and not re.search(r'num_batches_tracked$|(^|\.)fc\.\d+\.', name):
      collection, key, array = _convert(name.removeprefix(prefix), value)
      flat[collection][key] = array
  return {key: flax.traverse_util.unflatten_dict(value, sep='/') for key, value in flat.items()}


def merge(variables: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
  """Fresh variables with the backbone replaced by the loaded one; heads stay fresh.

  Raises:
    ValueError: a backbone tensor that is missing, left over or of another shape, by name.
  """
  fresh = flax.traverse_util.flatten_dict(dict(variables), sep='/')
  given = flax.traverse_util.flatten_dict(dict(loaded), sep='/')
  backbone = {key for key in fresh if not key.startswith('params/heads/')}
  given_backbone = {key for key in given if not key.startswith('params/heads/')}
  problems = ([f'missing in the weights: {_listed(backbone - given_backbone)}'] if backbone - given_backbone else []) + \
      ([f'not in the model: {_listed(given_backbone - backbone)}'] if given_backbone - backbone else [])
  shapes = [f'{key} {given[key].shape} in the weights, {fresh[key].shape} in the model'
            for key in sorted(backbone & given_backbone, key=_params_first) if given[key].shape != fresh[key].shape]
  if shapes:
    problems.append(f'other shapes: {"; ".join(shapes[:3])}' + (f' and {len(shapes) - 3} more' if len(shapes) > 3 else ''))
  if problems:
    raise ValueError('the weights do not fit the model (model.name, model.width, model.stem): ' + '. '.join(problems))
  merged = {key: np.asarray(given[key], np.float32) if key in backbone else value for key, value in fresh.items()}
  return flax.traverse_util.unflatten_dict(merged, sep='/')


def _listed(names: set[str]) -> str:
  first = sorted(names, key=_params_first)[:4]
  return ', '.join(first) + (f' and {len(names) - len(first)} more' if len(names) > len(first) else '')


def _params_first(name: str) -> tuple[bool, str]:
  return not name.startswith('params/'), name


def _convert(name: str, value: np.ndarray) -> tuple[str, str, np.ndarray]:
  """A torch tensor's collection, path and value here: `layer1.0.conv1.weight` -> params, layer1/0/conv1/kernel."""
  module, _, leaf = name.replace('.', '/').rpartition('/')
  module = 'heads/source' if module == 'fc' else module
  if leaf in ('running_mean', 'running_var'):
    return 'batch_stats', f'{module}/{leaf.removeprefix("running_")}', value
  if leaf == 'weight' and value.ndim == 4:
    return 'params', f'{module}/kernel', value.transpose(2, 3, 1, 0)
  if leaf == 'weight' and value.ndim == 2:
    return 'params', f'{module}/kernel', value.T
  return 'params', f'{module}/{"scale" if leaf == "weight" else leaf}', value


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  from safetensors import numpy as safetensors
  from safetensors import SafetensorError

  try:
    return safetensors.load_file(path)
  except SafetensorError as error:
    raise ValueError(f'{path} is no safetensors file that can be read ({error})') from error


def _read_pth(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a torch zip file. Its pickle can name nothing but what a state dict is made of, so it runs no code."""
  if not zipfile.is_zipfile(path):
    raise ValueError(f'{path} is no zip file of torch 1.6 or newer; where torch is installed, convert it with: '
                     f'python -c "import torch; torch.save(torch.load(\'{path}\', map_location=\'cpu\'), \'{path}.new.pth\')"')
  with zipfile.ZipFile(path) as archive:
    pickles = [name for name in archive.namelist() if name.endswith('data.pkl')]
    if len(pickles) != 1:
      raise ValueError(f'{path} holds no data.pkl; expected a file that torch.save wrote')
    root = pickles[0].removesuffix('data.pkl')
    with archive.open(pickles[0]) as stream:
      try:
        content = _TensorUnpickler(stream, archive, root).load()
      except (pickle.UnpicklingError, KeyError, EOFError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f'{path} cannot be read as a state dict ({error})') from error
  if isinstance(content, dict) and isinstance(content.get('state_dict'), dict):
    content = content['state_dict']
  if not isinstance(content, dict):
    raise ValueError(f'{path} holds a {type(content).__name__}; expected a state dict')
  return {str(name): value for name, value in content.items() if isinstance(value, np.ndarray)}


class _TensorUnpickler(pickle.Unpickler):
  """Reads tensors as numpy arrays and refuses every other class."""

  _TYPES = {'FloatStorage': np.float32, 'HalfStorage': np.float16, 'DoubleStorage': np.float64, 'LongStorage': np.int64,
            'IntStorage': np.int32}

  def __init__(self, stream: Any, archive: zipfile.ZipFile, root: str):
    super().__init__(stream)
    self._archive, self._root = archive, root

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ('collections', 'OrderedDict'):
      import collections
      return collections.OrderedDict
    if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
      return _rebuild_tensor
    if module == 'torch' and name in self._TYPES:
      return self._TYPES[name]
    raise pickle.UnpicklingError(f'it asks for {module}.{name}, which is no part of a state dict')

  def persistent_load(self, key: Any) -> np.ndarray:
    _, dtype, name, _, _ = key
    return np.frombuffer(self._archive.read(f'{self._root}data/{name}'), dtype)


def _rebuild_tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
  size = storage.itemsize
  if offset < 0 or offset + sum((n - 1) * s for n, s in zip(shape, stride)) >= max(len(storage), 1):
    raise pickle.UnpicklingError('a tensor reaches beyond its storage')
  return np.lib.stride_tricks.as_strided(storage[offset:], shape, [s * size for s in stride]).copy()
