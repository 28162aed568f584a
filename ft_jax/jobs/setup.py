"""What the jobs share at their start: a config's fields turned into data sets, a model and its weights."""

from collections.abc import Mapping
import hashlib
import os
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from ft_jax.checkpoints import load_variables
from ft_jax.data.pipeline import Transform
from ft_jax.data.sources import carve, class_difference, draw, open_source, Source
from ft_jax.models import pretrained, resnet
from ft_jax.parallel import AXIS

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


class Splits(NamedTuple):
  """The splits of a data set that is trained on; `test` is None where there is none."""
  train: Source
  val: Source
  test: Source | None


def open_splits(config: ConfigDict, data_dir: str, seed: int) -> Splits:
  """Opens train, val (carved out of train where it has no name) and test of `config.target` or `config.source`.

  Raises:
    ValueError: a set, split or folder that is not there, or splits of different classes or with images in common.
  """
  # The pre-training data has neither field.
  per_class, left_out = config.get('train_per_class', 0), config.get('without', ())
  opened = lambda split: open_source(config.name, split, data_dir).without(left_out)
  train, rest = draw(opened(config.train), per_class, seed) if per_class else (opened(config.train), None)
  if config.val:
    val = opened(config.val)
  else:
    train, val = carve(train, config.val_fraction, seed)
  test = rest if config.test == 'rest' and per_class else opened(config.test) if config.test else None
  if test is not None and not len(test):
    raise ValueError(f'{train.name}: train_per_class {per_class} leaves no image for test')
  for other in (val, test):
    if other is not None and other.class_names != train.class_names:
      raise ValueError(f'{train.name} and {other.name} have different classes: '
                       + class_difference(train.name, train.class_names, other.name, other.class_names))
  for one, other in ((train, val), (train, test), (val, test)):
    if other is not None and (shared := set(one.ids.tolist()) & set(other.ids.tolist())):
      raise ValueError(f'{one.name} and {other.name} share {len(shared):,d} images, such as {min(shared)}; what is measured on images '
                       'that were trained on means nothing. Give slices that do not overlap, such as train[:80%] and train[80%:]')
  return Splits(train, val, test)


def make_transform(config: ConfigDict) -> Transform:
  """What images go through."""
  if config.image_size < 8:
    raise ValueError(f'image_size is {config.image_size}; expected 8 or more')
  augment = config.augment
  if short_side(config) < config.image_size:
    raise ValueError(f'augment.short_side is {short_side(config)}, less than image_size {config.image_size}')
  return Transform(config.image_size, tuple(augment.scale), tuple(augment.ratio), augment.flip, augment.antialias, short_side(config))


def short_side(config: ConfigDict) -> int:
  """Pixels of an image's short side before the middle is cut out for evaluation."""
  return config.augment.short_side or round(config.image_size * 256 / 224)


def build_model(config: ConfigDict, heads: Mapping[str, int]) -> resnet.ResNet:
  """The network of `config.model` with the given heads."""
  if config.dtype not in DTYPES:
    raise ValueError(f'model.dtype is {config.dtype!r}; known: {", ".join(DTYPES)}')
  return resnet.build(config.name, heads, width=config.width, stem=config.stem, dtype=DTYPES[config.dtype],
                      axis_name=AXIS if config.sync_batch_norm else None)


def init_variables(model: resnet.ResNet, image_size: int, seed: int, weights: Mapping[str, Any] | None) -> dict[str, Any]:
  """Fresh variables of a model, with the backbone of `weights` where there are any."""
  images = jnp.zeros((1, image_size, image_size, 3), jnp.uint8)
  if weights is not None and not model.heads:  # nothing is fresh, so shapes are enough; compiling init takes many seconds
    return pretrained.merge(jax.eval_shape(model.init, jax.random.key(seed), images), weights)
  variables = jax.device_get(jax.jit(model.init)(jax.random.key(seed), images))
  return variables if weights is None else pretrained.merge(variables, weights)


def check_weights(path: str) -> None:
  """Raises ValueError where there is neither a file nor a folder."""
  if not os.path.exists(os.path.expanduser(path)):
    raise ValueError(f'model.weights: there is no file or folder {path}')


def load_weights(path: str) -> dict[str, Any]:
  """Pre-trained variables from a workdir or a file."""
  check_weights(path)
  expanded = os.path.expanduser(path)
  return load_variables(expanded) if os.path.isdir(expanded) else pretrained.load_torch(expanded)


def weights_fingerprint(variables: Mapping[str, Any]) -> str:
  """Sixteen hexadecimal digits that depend on every number of the backbone."""
  state = hashlib.sha256()
  for path, value in sorted(flax.traverse_util.flatten_dict(dict(variables), sep='/').items()):
    if not path.startswith('params/heads/'):
      state.update(path.encode() + np.ascontiguousarray(value).tobytes())
  return state.hexdigest()[:16]
