"""Networks: one family a file, each an implementation of `ft_jax.models.network`. The table of them is at the foot."""

from collections.abc import Callable, Mapping
import functools
import inspect
import re
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from ft_jax import parallel
from ft_jax.models.network import BATCH_NORMS, FROZEN, Network, OPTIONS
from ft_jax.models.precision import PRECISIONS
from ft_jax.models.resnet import BasicBlock, Bottleneck, ResNet

__all__ = ['DTYPES', 'NETWORKS', 'build', 'from_config']


def build(name: str, heads: Mapping[str, int], *, size: int = 224, dtype: Any = jnp.float32, precision: str = 'default',
          frozen: str = '', batch_norm: str = 'train', axis_name: str | None = None, **options: Any) -> Network:
  """A network of the table below.

  Args:
    name: of `NETWORKS`.
    heads, size, dtype, precision, batch_norm, axis_name: see `Network`.
    frozen: a pattern of paths, or a name of `FROZEN`.
    **options: of `OPTIONS`; those that the family does not have must be at their defaults.

  Raises:
    ValueError: an unknown name, an option or BatchNorm setting that the family does not have or whose value is wrong, a
      wrong pattern.
  """
  if name not in NETWORKS:
    raise ValueError(f'model.name is {name!r}; known: {", ".join(NETWORKS)}')
  if precision not in PRECISIONS:
    raise ValueError(f'model.precision is {precision!r}; known: {", ".join(PRECISIONS)}')
  if batch_norm not in BATCH_NORMS:
    raise ValueError(f'model.batch_norm is {batch_norm!r}; known: {", ".join(BATCH_NORMS)}')
  known = inspect.signature(NETWORKS[name]).parameters
  for option, value in options.items():
    if option not in known and value != OPTIONS[option]:
      raise ValueError(f'model.{option} is {value!r}, but {name} has no such option; leave it at {OPTIONS[option]!r}')
  network = NETWORKS[name](
      heads=dict(heads), size=size, dtype=dtype, precision=precision, frozen=_pattern(frozen), batch_norm=batch_norm,
      axis_name=axis_name,
      **{option: value for option, value in options.items() if option in known})
  if not network.has_batch_norm and (batch_norm != 'train' or axis_name):
    field = f'model.batch_norm is {batch_norm!r}' if batch_norm != 'train' else 'model.sync_batch_norm is True'
    raise ValueError(f'{field}, but {name} has no BatchNorm; leave it at its default')
  return network


def from_config(config: ConfigDict, heads: Mapping[str, int], size: int, freeze: str = '') -> Network:
  """The network of `config.model`.

  Args:
    config: `config.model`; one of an older version may lack options.
    heads: number of classes of each head, by name.
    size: `config.image_size`.
    freeze: `config.train.freeze`.
  """
  if config.dtype not in DTYPES:
    raise ValueError(f'model.dtype is {config.dtype!r}; known: {", ".join(DTYPES)}')
  options = {name: config.get(name, default) for name, default in OPTIONS.items()}
  return build(config.name, heads, size=size, dtype=DTYPES[config.dtype], precision=config.precision, frozen=freeze,
               batch_norm=config.batch_norm, axis_name=parallel.AXIS if config.sync_batch_norm else None, **options)


def _pattern(frozen: str) -> str:
  pattern = FROZEN.get(frozen, frozen)
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(f'train.freeze is {frozen!r}; expected {", ".join(FROZEN)}, or a regular expression of paths of '
                     f'parameters ({error})'
                     ) from error
  return pattern


# Of the computation; parameters are always float32.
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}

NETWORKS: dict[str, Callable[..., Network]] = {
    'resnet18': functools.partial(ResNet, (2, 2, 2, 2), BasicBlock),
    'resnet34': functools.partial(ResNet, (3, 4, 6, 3), BasicBlock),
    'resnet50': functools.partial(ResNet, (3, 4, 6, 3), Bottleneck),
    'resnet101': functools.partial(ResNet, (3, 4, 23, 3), Bottleneck),
}
