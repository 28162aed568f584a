"""The contract of a network: all that training, methods, selection, studies and export know of an architecture.

A family of networks is a subclass of `Network` in a file of its own, and a row of `ft_jax.models.NETWORKS` for each
member. Nobody else reads meaning from the path of a parameter: they ask the network. Paths are joined by slashes, such
as `layer4/1/conv2/kernel`.
"""

from collections.abc import Callable, Mapping
import functools
import math
import re
from typing import Any, cast, ClassVar, NamedTuple

import flax
from flax import linen as nn
from flax.core import FrozenDict
import jax
import jax.numpy as jnp

from ft_jax.models.batch_norm import BatchNorm

# Per-channel mean and standard deviation of ImageNet in [0, 1]: what torchvision's weights were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The options of `config.model` that only some families have, at the values of the published networks.
OPTIONS: Mapping[str, Any] = {'width': 64, 'stem': '7x7', 'stages': 0}

BATCH_NORMS = ('train', 'frozen', 'per_stream')

# Names for patterns of what stays frozen.
FROZEN = {'backbone': r'(?!heads/|methods/).*'}


class Outputs(NamedTuple):
  """One forward pass: `features` [b, d]; `logits` {head: [b, K]}; `taps` {stage or layer: its output}."""
  features: jax.Array
  logits: dict[str, jax.Array]
  taps: dict[str, jax.Array]


class Input(NamedTuple):
  """What a network takes.

  Attributes:
    kind: 'image', 'vector' or 'tokens'.
    shape: of one example, such as `(224, 224, 3)`.
    dtype: as it comes from the data: images are uint8.
    mean: per channel, of images in [0, 1].
    std: likewise.
  """
  kind: str
  shape: tuple[int, ...]
  dtype: Any = jnp.uint8
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD

  def normalize(self, inputs: jax.Array) -> jax.Array:
    """uint8 images `[b, h, w, c]` to float32 with the mean subtracted, divided by the standard deviation; all else
    unchanged.
    """
    if inputs.dtype != jnp.uint8:
      return inputs
    return (inputs.astype(jnp.float32) / 255.0 - jnp.asarray(self.mean)) / jnp.asarray(self.std)


class Heads(nn.Module):
  """One linear classifier for each name, side by side on the same features, in float32.

  Weights start at N(0, 2/d), biases at zero (Liu et al., NeurIPS 2022, whose code has 2/2048 whatever d is).
  """
  classes: Mapping[str, int]
  precision: jax.lax.Precision | None = None

  @nn.compact
  def __call__(self, features: jax.Array) -> dict[str, jax.Array]:
    """Features `[b, d]` to logits `[b, K]` of every head."""
    std = (2.0 / features.shape[-1]) ** 0.5
    return {name: nn.Dense(size, kernel_init=nn.initializers.normal(std), precision=self.precision, name=name)(features)
            for name, size in self.classes.items()}


class Network(nn.Module, kw_only=True):
  """A backbone and any set of named heads.

  A family defines `__call__`, `features_dim` and `stage_names`, and puts `Heads(self.heads, ..., name='heads')` on its
  features. The other answers have defaults, which suit a network of modules named as `stage_names` says, with layers
  called `...norm...` where it normalises, and no counterpart in torch.

  Attributes:
    heads: number of classes of each head, by name.
    size: of the input: pixels of a side, or the length of a vector or of a sequence.
    dtype: of the computation; parameters and statistics are float32.
    precision: of the products of float32 numbers, forwards and backwards; a key of `PRECISIONS`.
    frozen: a pattern of paths of parameters that training leaves as they are; '' is none.
    portable: XLA's own operations instead of what is fastest on this machine: for an export to others.
    batch_norm: 'train'; 'frozen': the running statistics normalise in training too and do not change; or 'per_stream':
      see `ft_jax.training.forward`, which has a pass for each stream then.
    axis_name: the pmapped axis over which BatchNorm averages; None keeps the statistics of each device apart.
    norm: the layer in the place of BatchNorm, with its arguments.
  """
  heads: Mapping[str, int]
  size: int = 224
  dtype: Any = jnp.float32
  precision: str = 'default'
  frozen: str = ''
  portable: bool = False
  batch_norm: str = 'train'
  axis_name: str | None = None
  norm: Callable[..., nn.Module] = BatchNorm

  # Whether there is BatchNorm in it, and so running statistics: `batch_norm`, `axis_name` and `norm` then have a
  # meaning.
  has_batch_norm: ClassVar[bool] = False

  def __call__(self, inputs: jax.Array, train: bool = False) -> Outputs:
    """Runs the network.

    Args:
      inputs: `[b, *input.shape]`; uint8 images are normalised here (`self.input.normalize`), float ones are taken as
        normalised.
      train: whether layers behave as in training (BatchNorm uses the batch and updates its running statistics).
    """
    raise NotImplementedError

  @nn.nowrap
  def predict(self, variables: Any, inputs: jax.Array) -> Outputs:
    """The outputs in evaluation mode."""
    return cast(Outputs, self.apply(variables, inputs, train=False))

  @property
  def features_dim(self) -> int:
    """How many numbers the features of an example have."""
    raise NotImplementedError

  @property
  def input(self) -> Input:
    """What it takes."""
    return Input('image', (self.size, self.size, 3))

  @property
  def stage_names(self) -> tuple[str, ...]:
    """The modules that layer-wise methods tell apart, by path, from the input to the features."""
    raise NotImplementedError

  @property
  def stage_layers(self) -> tuple[str, ...]:
    """The layer of each stage, by path, whose output stands for the stage (DELTA)."""
    return self.stage_names

  @nn.nowrap
  def stage(self, path: str) -> int | None:
    """The stage of a parameter, counted from 1 at the input; None for those before the first stage and those of heads.
    """
    return next((i + 1 for i, stage in enumerate(self.stage_names) if path.startswith(f'{stage}/')), None)

  @nn.nowrap
  def depth(self, path: str) -> int:
    """How far a parameter is from the heads: 0 for theirs and those of methods, 1 for the last stage, ..., most for the
    stem.
    """
    if not is_backbone(path):
      return 0
    return len(self.stage_names) + 1 - (self.stage(path) or 0)

  @nn.nowrap
  def is_norm(self, path: str) -> bool:
    """Whether a parameter is of a normalisation layer."""
    module, _, _ = path.rpartition('/')
    return is_backbone(path) and 'norm' in module.rpartition('/')[2].lower()

  @nn.nowrap
  def is_shortcut(self, path: str) -> bool:
    """Whether a parameter is of the shortcut beside a block."""
    return False

  @nn.nowrap
  def torch_name(self, path: str) -> str:
    """The name in a state dict of a variable, given with its collection: `params/layer1/0/conv1/kernel` is
    `layer1.0.conv1.weight`.

    Of heads a state dict has one, whatever its name here.
    """
    _, _, rest = path.partition('/')
    return re.sub(r'^heads/[^/]+', 'head', rest).replace('/', '.')

  @nn.nowrap
  def torch_constructor(self, name: str, classes: int) -> str:
    """The expression that builds the same network in torch, where `name` is that of `NETWORKS`; '' where no library has
    it.
    """
    return ''

  @nn.nowrap
  def torch_path(self, name: str) -> str | None:
    """The way back from `torch_name`, with the head called 'source'; None where no network of this family has such a
    tensor.
    """
    return _own_names(self.clone(heads=flax.core.FrozenDict(source=1))).get(name)

  @property
  def torch_anchors(self) -> tuple[str, str]:
    """Names in a state dict of a tensor before the first stage and of one in it: they tell where the network begins in
    a larger model.
    """
    paths = list(flax.traverse_util.flatten_dict(self.shapes()['params'], sep='/'))
    return self.torch_name(f'params/{paths[0]}'), self.torch_name(f'params/{paths[-1]}')

  @nn.nowrap
  def is_beyond(self, path: str) -> bool:
    """Whether a parameter is of a stage that the family has and this network, which ends before it, does not."""
    return False

  @nn.nowrap
  def options_like(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The options (see `OPTIONS`) with which a network of this family has variables of these shapes, flat by path with
    collection.
    """
    return {}

  @property
  def options(self) -> dict[str, Any]:
    """Those of `OPTIONS` that this family has, with their values."""
    return {name: value for name, value in vars(self).items() if name in OPTIONS}

  @nn.nowrap
  def example(self, batch: int = 1) -> jax.ShapeDtypeStruct:
    """The shape and type of a batch of inputs."""
    return jax.ShapeDtypeStruct((batch, *self.input.shape), self.input.dtype)

  @nn.nowrap
  def shapes(self) -> dict[str, Any]:
    """Shapes and types of `{'params', 'batch_stats'}`; nothing is computed."""
    return jax.tree.map(lambda leaf: leaf, _shapes(self.clone(heads=FrozenDict(self.heads))))  # dicts of its own

  @nn.nowrap
  def parameter_count(self) -> int:
    """How many numbers its parameters have."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes()['params']))


@functools.lru_cache(maxsize=64)
def _shapes(network: Network) -> dict[str, Any]:
  """See `Network.shapes`; a comparison asks for those of one network many times. Its heads can be hashed."""
  return network_variables(jax.eval_shape(network.init, jax.random.key(0), network.example()))


@functools.lru_cache(maxsize=8)
def _own_names(network: Network) -> dict[str, str]:
  """The path of each variable by its name in torch."""
  return {network.torch_name(path): path for path in flax.traverse_util.flatten_dict(network.shapes(), sep='/')}


def network_variables(tree: Mapping[str, Any]) -> dict[str, Any]:
  """`{'params', 'batch_stats'}` of a tree that has them, perhaps among others; a network without running statistics has
  {}.
  """
  return {'params': tree['params'], 'batch_stats': tree.get('batch_stats', {})}


def head_of(path: str) -> str | None:
  """The name of the head that a parameter is of; None where it is of none."""
  first, _, rest = path.partition('/')
  return rest.partition('/')[0] if first == 'heads' else None


def is_backbone(path: str) -> bool:
  """Whether a parameter is of neither a head nor a method."""
  return path.partition('/')[0] not in ('heads', 'methods')


def head_pattern(head: str) -> str:
  """The pattern of the paths of a head's parameters."""
  return f'heads/{re.escape(head)}/.*'


def frozen_mask(network: Network, tree: Any) -> Any:
  """A tree of bools in the shape of a network's parameters or running statistics: which of them training leaves as they
  are.
  """

  def stays(path: tuple[Any, ...], _: Any) -> bool:
    # Running statistics stay where the scale of their layer does.
    name = '/'.join((*path[:-1], 'scale') if path[-1] in ('mean', 'var') else path)
    if network.batch_norm == 'frozen' and network.is_norm(name):
      return True
    return bool(network.frozen and re.fullmatch(network.frozen, name))

  return flax.traverse_util.path_aware_map(stays, tree)
