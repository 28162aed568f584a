"""Variables of a network as a state dict with its names in torch: the way back from `weights.read`."""

from collections.abc import Mapping
from typing import Any

import flax
import numpy as np

from ft_jax.models.network import head_of, Network


def state_dict(network: Network, variables: Mapping[str, Any], head: str | None) -> dict[str, np.ndarray]:
  """What torch's network of the same shape loads with strict=True; where torch has none, names are those here.

  Args:
    network: whose variables they are.
    variables: `{'params', 'batch_stats'}`; gradients and the like are converted as well, and either may be missing.
    head: the classifier that is kept (`fc` in torchvision's ResNets); the others are left out. None leaves out all.

  Returns:
    Arrays by name, with torch's order of axes (`layer1.0.conv1.weight` `[out, in, h, w]`, `fc.weight` `[K, d]`),
    contiguous. `num_batches_tracked`, which torch counts and does not use, is 0.
  """
  state = {}
  for path, value in flax.traverse_util.flatten_dict(dict(variables), sep='/').items():
    name = network.torch_name(path)
    if head_of(path.partition('/')[2]) in (None, head):
      value = np.asarray(value)
      state[name] = np.ascontiguousarray(_axes(value) if path.endswith('/kernel') else value)
    if name.endswith('running_mean'):
      state[name.replace('running_mean', 'num_batches_tracked')] = np.zeros((), np.int64)
  return state


def _axes(value: np.ndarray) -> np.ndarray:
  """Kernels `[h, w, in, out]` to `[out, in, h, w]` and `[in, out]` to `[out, in]`."""
  return value.transpose({4: (3, 2, 0, 1), 2: (1, 0)}[value.ndim])
