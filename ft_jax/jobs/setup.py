"""What the jobs share at their start: a config's fields turned into data sets, a model and its weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ft_jax import parallel
from ft_jax.models import resnet
from ft_jax.models.weights import merge

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def build_model(config: ConfigDict, heads: Mapping[str, int], freeze: str = '') -> resnet.ResNet:
  """The network of `config.model` with the given heads, and what `train.freeze` says of it."""
  if config.dtype not in DTYPES:
    raise ValueError(f'model.dtype is {config.dtype!r}; known: {", ".join(DTYPES)}')
  return resnet.build(config.name, heads, width=config.width, stem=config.stem, dtype=DTYPES[config.dtype], precision=config.precision,
                      axis_name=parallel.AXIS if config.sync_batch_norm else None, batch_norm=config.batch_norm, frozen=freeze)


def init_variables(model: resnet.ResNet, image_size: int, seed: int, weights: Mapping[str, Any] | None) -> dict[str, Any]:
  """Fresh variables of a model, with the backbone of `weights`, and the heads that they have too, where there are any."""
  images = jnp.zeros((1, image_size, image_size, 3), jnp.uint8)
  if weights is not None and not model.heads:  # nothing is fresh, so shapes are enough; compiling init takes many seconds
    return merge(jax.eval_shape(model.init, jax.random.key(seed), images), weights)
  variables = parallel.same_arrays(jax.device_get(jax.jit(model.init)(jax.random.key(seed), images)))
  return variables if weights is None else merge(variables, weights)
