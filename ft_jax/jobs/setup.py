"""What the jobs share at their start: a config's fields turned into data sets, a model and its weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ft_jax import models, parallel
from ft_jax.models.network import Network, network_variables, OPTIONS
from ft_jax.models.weights import merge

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def build_model(config: ConfigDict, heads: Mapping[str, int], size: int, freeze: str = '') -> Network:
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
  return models.build(config.name, heads, size=size, dtype=DTYPES[config.dtype], precision=config.precision, batch_norm=config.batch_norm,
                      axis_name=parallel.AXIS if config.sync_batch_norm else None, frozen=freeze, **options)


def init_variables(model: Network, seed: int, weights: Mapping[str, Any] | None) -> dict[str, Any]:
  """Fresh variables of a model, with the backbone of `weights`, and the heads that they have too, where there are any."""
  if weights is not None and not model.heads:  # nothing is fresh, so shapes are enough; compiling init takes many seconds
    return merge(model, model.shapes(), weights)
  example = jnp.zeros(model.example().shape, model.example().dtype)
  variables = network_variables(parallel.same_arrays(jax.device_get(jax.jit(model.init)(jax.random.key(seed), example))))
  return variables if weights is None else merge(model, variables, weights)
