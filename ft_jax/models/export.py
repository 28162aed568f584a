"""Variables of `resnet` as a state dict with torchvision's names: the way back from `pretrained`."""

from collections.abc import Mapping
import re
from typing import Any

import flax
import numpy as np


def state_dict(variables: Mapping[str, Any], head: str | None) -> dict[str, np.ndarray]:
  """What torchvision's ResNet of the same shape loads with strict=True.

  Args:
    variables: `{'params', 'batch_stats'}`; gradients and the like are converted as well, and either may be missing.
    head: the classifier that becomes `fc`; the others are left out. None leaves out all.

  Returns:
    Arrays by name, with torch's order of axes (`layer1.0.conv1.weight` `[out, in, h, w]`, `fc.weight` `[K, d]`), contiguous.
    `num_batches_tracked`, which torch counts and does not use, is 0.
  """
  state = {}
  for path, value in flax.traverse_util.flatten_dict(dict(variables), sep='/').items():
    if not path.startswith('params/heads/') or path.startswith(f'params/heads/{head}/'):
      state[name(path)] = np.ascontiguousarray(_axes(np.asarray(value)))
    if path.startswith('batch_stats/') and path.endswith('/mean'):
      state[name(path).replace('running_mean', 'num_batches_tracked')] = np.zeros((), np.int64)
  return state


def name(path: str) -> str:
  """Torchvision's name: `params/layer1/0/conv1/kernel` is `layer1.0.conv1.weight`."""
  _, _, path = path.partition('/')
  module, _, leaf = re.sub(r'^heads/[^/]+', 'fc', path).rpartition('/')
  return f'{module.replace("/", ".")}.{_LEAVES[leaf]}'


def _axes(value: np.ndarray) -> np.ndarray:
  """`[h, w, in, out]` to `[out, in, h, w]`, `[in, out]` to `[out, in]`, vectors as they are."""
  return value.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim])


_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
