"""Pre-trained weights: state dicts of torch to variables of a network, by its own names; and a strict merge."""

from collections.abc import Collection, Mapping, Sequence
import os
import re
from typing import Any, NamedTuple

import flax
import jax
import numpy as np

from ft_jax.models import build, NETWORKS, torch_pickle
from ft_jax.models.network import head_of, Network, network_variables
from ft_jax.names import listed
from ft_jax.progress import log

# What torch puts into names at any place where it wraps a module: torch.compile, FSDP, activation checkpoints.
_WRAPPERS = re.compile(r'(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
# Of two networks in a state dict the first one is read: MoCo's query encoder; DINO's teacher, which its authors
# publish.
_PAIRS = (('encoder_q.', 'encoder_k.'), ('teacher.', 'student.'))
# Moving averages of a network are not read where the network itself is there too.
_AVERAGES = re.compile(r'(.*[._])?(ema|swa|momentum|avg|averaged?|target)[._].*')
_MOCO_REST = re.compile(r'.*encoder_k\..+|(.+\.)?(queue|queue_ptr)')
# MoCo-v2's projection head, in the place of a ResNet's classifier, and where its tensors are kept.
_PROJECTION = {'fc.0.weight': 'projection/0/kernel', 'fc.0.bias': 'projection/0/bias',
               'fc.2.weight': 'projection/2/kernel', 'fc.2.bias': 'projection/2/bias'}


class LoadedWeights(NamedTuple):
  """Variables that were read, what was left on purpose ({why: names}), and notes on how the file was understood."""
  variables: dict[str, Any]
  dropped: dict[str, list[str]]
  notes: tuple[str, ...] = ()


def read(path: str | os.PathLike[str], network: Network) -> LoadedWeights:
  """Reads a state dict from a file of safetensors or torch, whatever its name ends in.

  Prefixes of the network's names (`module.`, `_orig_mod.`, `model.`, `backbone.`, ..., in any order) are removed.

  Args:
    path: a file with the network's names in torch, or MoCo's checkpoint, whose query encoder is taken.
    network: of the family that the weights are of; how large it is, and its heads, do not matter.

  Returns:
    `{'params', 'batch_stats'}` of float32 numpy arrays; a classifier becomes the head 'source'. MoCo-v2's projection
    head (`fc.0`, `fc.2`) is `{'projection': {'0', '2'}}` beside them; see `project`.

  Raises:
    ValueError: a file that cannot be read (see `torch_pickle.read`), a tensor that the family does not have, by name,
      several networks that no rule decides between, or no running statistics of a network that has BatchNorm.
  """
  state = torch_pickle.read(path)
  tensors = _unwrapped(state.tensors)
  prefix, others = _find_network(tensors, network, path)
  moco = prefix.endswith('encoder_q.')
  flat: dict[str, np.ndarray] = {}
  dropped: dict[str, list[str]] = {}
  unknown = []
  classifier = {network.torch_name(f'params/heads/source/{leaf}') for leaf in ('kernel', 'bias')}
  inner = tuple(other for other in others if len(other) > len(prefix))
  for name, value in tensors.items():
    bare = name.removeprefix(prefix) if name.startswith(prefix) and not name.startswith(inner) else ''
    if bare.endswith('num_batches_tracked'):
      dropped.setdefault("BatchNorm's counters", []).append(name)
    elif moco and not bare and _MOCO_REST.fullmatch(name):
      dropped.setdefault("MoCo's key encoder and queue", []).append(name)
    elif not bare:
      dropped.setdefault(f'beside {prefix.removesuffix(".") or "the network"}', []).append(name)
    elif moco and bare in classifier:
      dropped.setdefault("MoCo-v1's projection", []).append(name)
    elif (place := _PROJECTION.get(bare) if moco and bare in _PROJECTION else network.torch_path(bare)) is not None:
      flat[place] = _convert(bare, place, value, path)
    else:
      unknown.append(name)
  if unknown:
    raise ValueError(f'{path} holds none of {", ".join(NETWORKS)}: they have no {listed(unknown)}')
  for head in ({name: network.torch_path(name) for name in classifier}, _PROJECTION):
    here = {name for name, place in head.items() if place in flat}
    if here and here != set(head):
      raise ValueError(f'{path} holds {listed(sorted(here))} and lacks {listed(sorted(set(head) - here))}')
  if network.has_batch_norm and not any(key.startswith('batch_stats/') for key in flat):
    raise ValueError(f'{path} has no running statistics of BatchNorm (bn1.running_mean, bn1.running_var, ...), only '
                     'parameters; save model.state_dict(), which has them (networks with GroupNorm or others in its '
                     'place are '
                     'not supported)')
  if state.beside:
    dropped.setdefault('beside the network', []).extend(state.beside)
  variables = flax.traverse_util.unflatten_dict(flat, sep='/')
  return LoadedWeights({**variables, **network_variables(variables)}, dropped,
                (*state.notes, *_notes(state.tensors, tensors, prefix, others)))


def _unwrapped(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
  """The tensors by names without what torch's wrappers insert; unchanged where two names would become one."""
  short = {_WRAPPERS.sub('', name): value for name, value in tensors.items()}
  return short if len(short) == len(tensors) else tensors


def _find_network(names: Collection[str], network: Network, path: str | os.PathLike[str]) -> tuple[str, list[str]]:
  """The prefix of the names of the network that is read ('' for none), and those of other networks in the same file.

  Raises:
    ValueError: there is no network, or there are several and no rule decides between them.
  """
  anchor, inner = network.torch_anchors
  found = [name.removesuffix(anchor) for name in names if _within(name, network) == anchor]
  whole = [prefix for prefix in found if f'{prefix}{inner}' in names] or found
  taken = whole
  for first, second in _PAIRS:
    if any(first in prefix for prefix in whole) and any(second in prefix for prefix in whole):
      taken = [prefix for prefix in whole if first in prefix]
  if len(taken) > 1:
    taken = [prefix for prefix in taken if not _AVERAGES.fullmatch(prefix)]
  if not found:
    is_known = lambda name: network.torch_path(name) is not None or name.endswith('num_batches_tracked')
    strange = sorted(names, key=is_known)
    raise ValueError(f'{path} holds none of {", ".join(NETWORKS)}: there is no {anchor} among '
                     f'{listed(strange)}')
  if len(taken) != 1:
    raise ValueError(f'{path} holds {len(whole)} networks, with the prefixes {listed(map(repr, whole))}, and no rule '
                     'says '
                     f'which one is meant; to read one of them {_keep_alone(whole[0])}')
  return taken[0], [prefix for prefix in whole if prefix != taken[0]]


def _within(name: str, network: Network) -> str | None:
  """The longest end of a tensor's name that is one of the network's; None where none is."""
  parts = name.split('.')
  ends = ('.'.join(parts[i:]) for i in range(len(parts)))
  return next((end for end in ends if network.torch_path(end) is not None), None)


def _keep_alone(prefix: str) -> str:
  """What to do to read another network of a file."""
  return (f'save it alone: {{name.removeprefix({prefix!r}): value for name, value in state_dict.items() if '
          f'name.startswith({prefix!r})}}')


def _notes(before: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray], prefix: str,
           others: Sequence[str]) -> list[str]:
  """How the names and numbers of a file were understood."""
  wrappers = sorted({found[0] for name in before if name not in tensors for found in _WRAPPERS.finditer(name)})
  notes = [f'removed from names: {listed(wrappers + [prefix] * bool(prefix))}'] if wrappers or prefix else []
  if others and not prefix.endswith('encoder_q.'):
    notes.append(f'not read: another network with the prefix {listed(map(repr, others))}; to read it '
                 f'{_keep_alone(others[0])}')
  kinds = sorted({str(value.dtype) for value in tensors.values() if value.dtype.kind not in 'iub'} - {'float32'})
  return notes + ([f'{listed(kinds)} converted to float32'] if kinds else [])


def check_numbers(network: Network, variables: Mapping[str, Any], name: str) -> None:
  """Raises ValueError for numbers that no trained network has, by tensor; warns where running variances are zero.

  Args:
    network: whose variables they are.
    variables: `{'params', 'batch_stats'}` and whatever else is used.
    name: of the weights, for messages.
  """
  flat = flax.traverse_util.flatten_dict(dict(variables), sep='/')
  for key, value in flat.items():
    value = np.asarray(value)
    if wrong := int(np.sum(~np.isfinite(value))):
      raise ValueError(f'{name} has numbers that are not finite in {_both(network, key)} ({wrong:,d} of '
                       f'{value.size:,d} are NaN or '
                       'infinity): its training diverged, or it is damaged; use an earlier checkpoint, or download it '
                       'again')
    if _is_variance(key) and (value < 0).any():
      raise ValueError(f'{name} has negative running variances in {_both(network, key)}, down to {value.min():g}, '
                       'which BatchNorm '
                       'never computes: it is damaged; use an earlier checkpoint, or download it again')
  if zero := [key for key, value in flat.items() if _is_variance(key) and not np.any(value)]:
    log.warning('warning: %s: the running variance is zero in every channel of %s', name, listed(zero))


def merge(network: Network, variables: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
  """Fresh variables with the backbone replaced by the loaded one, and every head that the weights have under the same
  name.

  Raises:
    ValueError: a tensor that is missing, left over or of another shape, by name; and which network the weights are of.
  """
  fresh = flax.traverse_util.flatten_dict(dict(variables), sep='/')
  given = flax.traverse_util.flatten_dict(network_variables(loaded), sep='/')
  given = {key: value for key, value in given.items() if key in fresh or not _of_head(key)}
  if problems := _problems({key: value for key, value in fresh.items() if key in given or not _of_head(key)}, given):
    fields = ', '.join(f'model.{name}' for name in ('name', *network.options))
    raise ValueError(f'the weights do not fit the model ({fields}). {_nearest(network, given)}. {". ".join(problems)}')
  merged = {key: np.asarray(given[key], np.float32) if key in given else value for key, value in fresh.items()}
  return network_variables(flax.traverse_util.unflatten_dict(merged, sep='/'))


def _of_head(key: str) -> bool:
  return key.startswith('params/') and head_of(key.removeprefix('params/')) is not None


def _is_variance(key: str) -> bool:
  return key.startswith('batch_stats/') and key.endswith('/var')


def _both(network: Network, key: str) -> str:
  """A path here and the tensor's name in a file of torch: `params/conv1/kernel (conv1.weight)`."""
  return f'{key} ({network.torch_name(key)})' if key.startswith(('params/', 'batch_stats/')) else key


def project(projection: Mapping[str, Any], features: jax.Array) -> jax.Array:
  """MoCo-v2's projection head: features `[b, 2048]` to `[b, 128]`, not normalised (Chen et al., 2020: linear, ReLU,
  linear).
  """
  hidden = jax.nn.relu(features @ projection['0']['kernel'] + projection['0']['bias'])
  return hidden @ projection['2']['kernel'] + projection['2']['bias']


def _problems(expected: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
  """What differs between two flat trees of arrays or their shapes."""
  missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
  shapes = [f'{key} {given[key].shape} in the weights, {expected[key].shape} in the model'
            for key in sorted(expected.keys() & given.keys(), key=_params_first)
            if given[key].shape != expected[key].shape]
  problems = []
  if missing:
    problems.append(f'Missing in the weights: {listed(sorted(missing, key=_params_first))}')
  if extra:
    problems.append(f'Not in the model: {listed(sorted(extra, key=_params_first))}')
  if shapes:
    more = f' and {len(shapes) - 3} more' if len(shapes) > 3 else ''
    problems.append(f'Other shapes: {"; ".join(shapes[:3])}{more}')
  return problems


def _nearest(network: Network, given: Mapping[str, Any]) -> str:
  """The network of the table that loaded variables are of, or are most like."""
  given = {key: value for key, value in given.items() if not _of_head(key)}
  fits: dict[str, tuple[int, int]] = {}
  options: dict[str, dict[str, Any]] = {}
  for name in NETWORKS:
    options[name] = build(name, {}).options_like(given)
    shapes = flax.traverse_util.flatten_dict(build(name, {}, size=network.size, **options[name]).shapes(), sep='/')
    alike = sum(key in given and given[key].shape == value.shape for key, value in shapes.items())
    if alike:
      fits[name] = alike - len(given), alike - len(shapes)  # zeros: nothing is left over, nothing missing
  known = ', '.join(NETWORKS)
  if not fits:
    return f'They are of none of {known}'
  best = max(fits, key=lambda name: sum(fits[name]))
  if fits[best] == (0, 0):
    fields = {'name': best, **options[best]}
    return f'They are of {best}: set {" ".join(f"--config.model.{name}={value}" for name, value in fields.items())}'
  of_width = f' of width {options[best]["width"]}' if 'width' in options[best] else ''
  return (f'They are of none of {known}; the nearest is {best}{of_width}, which has {len(given) + fits[best][0]} of '
          'their '
          f'{len(given)} tensors')


def _params_first(name: str) -> tuple[bool, str]:
  return not name.startswith('params/'), name


def _convert(name: str, place: str, value: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
  """A torch tensor as it is kept here, in float32: kernels have torch's axes in another order (see `export`)."""
  if value.dtype.kind in 'iub':
    raise ValueError(f'{path}: {name} is {value.dtype}; expected floating-point numbers')
  with np.errstate(over='ignore'):  # what is too large becomes infinite, which `check_numbers` names
    value = np.asarray(value, np.float32)
  if place.endswith('/kernel') and value.ndim == 4:
    return value.transpose(2, 3, 1, 0)
  return value.T if place.endswith('/kernel') and value.ndim == 2 else value
