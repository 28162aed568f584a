"""ResNet-18/34/50/101 (v1.5) with any set of named heads.

Layers carry torchvision's names and numbers: the parameter `layer1/0/conv1/kernel` here is `layer1.0.conv1.weight` there
(He et al., CVPR 2016; v1.5 puts the stride of a bottleneck on its 3x3 convolution).
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import re
from typing import Any, NamedTuple

import flax
from flax import linen as nn
import jax
import jax.numpy as jnp

from ft_jax.models.conv import conv2d, conv2d_xla, max_pool, max_pool_xla
from ft_jax.models.precision import PRECISIONS

# Per-channel mean and standard deviation of ImageNet in [0, 1]: what torchvision's weights were trained on.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ModuleDef = Callable[..., nn.Module]


class Outputs(NamedTuple):
  """One forward pass: `features` [b, d]; `logits` {head: [b, K]}; `taps` {'layer1': [b, h, w, c], ... 'layer4'}."""
  features: jax.Array
  logits: dict[str, jax.Array]
  taps: dict[str, jax.Array]


class Conv(nn.Module):
  """A convolution without bias; the kernel starts normal with He et al.'s scale over the fan-out, as in torchvision."""
  features: int
  size: int
  stride: int = 1
  dtype: jnp.dtype = jnp.float32
  precision: jax.lax.Precision | None = None
  portable: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[b, h, w, c]` to `[b, h / stride, w / stride, features]`."""
    kernel = self.param('kernel', nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
                        (self.size, self.size, x.shape[-1], self.features))
    convolve = conv2d_xla if self.portable else conv2d
    return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.precision)


class BatchNorm(nn.BatchNorm):
  """flax's, with torch's running variance: that of the batch times n / (n - 1), where n is its number of pixels (of all devices
  where they share statistics). A batch is normalised with the variance itself in both.

  It matters where n is small: at 2x2 pixels and 8 images, a thirty-second part of every update.

  Attributes:
    train: whether the statistics of the batch normalise, and move the running ones.
    frozen: a pattern of paths of parameters; where the scale's is matched, it is as if `train` were False.
  """
  train: bool = False
  frozen: str = ''

  @property
  def trains(self) -> bool:
    """Whether the statistics of the batch take part."""
    return self.train and not (self.frozen and re.fullmatch(self.frozen, '/'.join((*self.path, 'scale'))))

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[b, h, w, c]` to the same."""
    before = self.get_variable('batch_stats', 'var')
    y = super().__call__(x, use_running_average=not self.trains)
    if self.trains and not self.is_initializing():
      n = x.size // x.shape[-1] * (jax.lax.axis_size(self.axis_name) if self.axis_name else 1)
      after = self.get_variable('batch_stats', 'var')
      # What was added is (1 - momentum) times the variance.
      self.put_variable('batch_stats', 'var', after + (after - self.momentum * before) / max(n - 1, 1))
    return y


class Downsample(nn.Module):
  """The shortcut where the shape changes: 1x1 convolution and normalisation (`downsample.0`, `downsample.1`)."""
  features: int
  stride: int
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[b, h, w, c]` to `[b, h / stride, w / stride, features]`."""
    return self.norm(name='1')(self.conv(self.features, 1, self.stride, name='0')(x))


class BasicBlock(nn.Module):
  """Two 3x3 convolutions (ResNet-18 and 34)."""
  planes: int
  stride: int
  conv: ModuleDef
  norm: ModuleDef
  expansion = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[b, h, w, c]` to `[b, h / stride, w / stride, planes]`."""
    y = nn.relu(self.norm(name='bn1')(self.conv(self.planes, 3, self.stride, name='conv1')(x)))
    y = self.norm(name='bn2')(self.conv(self.planes, 3, name='conv2')(y))
    if y.shape != x.shape:
      x = Downsample(self.planes, self.stride, self.conv, self.norm, name='downsample')(x)
    return nn.relu(x + y)


class Bottleneck(nn.Module):
  """1x1, 3x3 (with the stride), 1x1 to four times the planes (ResNet-50 and 101)."""
  planes: int
  stride: int
  conv: ModuleDef
  norm: ModuleDef
  expansion = 4

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[b, h, w, c]` to `[b, h / stride, w / stride, 4 * planes]`."""
    y = nn.relu(self.norm(name='bn1')(self.conv(self.planes, 1, name='conv1')(x)))
    y = nn.relu(self.norm(name='bn2')(self.conv(self.planes, 3, self.stride, name='conv2')(y)))
    y = self.norm(name='bn3')(self.conv(self.planes * 4, 1, name='conv3')(y))
    if y.shape != x.shape:
      x = Downsample(self.planes * 4, self.stride, self.conv, self.norm, name='downsample')(x)
    return nn.relu(x + y)


class Stage(nn.Module):
  """The blocks of one resolution, numbered from '0'."""
  block: type[nn.Module]
  depth: int
  planes: int
  stride: int
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """All blocks; the first one has the stride."""
    for i in range(self.depth):
      x = self.block(self.planes, self.stride if i == 0 else 1, self.conv, self.norm, name=str(i))(x)
    return x


class Heads(nn.Module):
  """One linear classifier a name, side by side on the same features, in float32.

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


class ResNet(nn.Module):
  """The network: images to features, logits of every head, and the output of each stage.

  Attributes:
    depths: blocks of each of the four stages.
    block: BasicBlock or Bottleneck.
    heads: number of classes of each head, by name.
    width: channels of the first stage; 64 is the published network.
    stem: '7x7' (stride 2 and a max-pool of stride 2, for photographs) or '3x3' (full resolution, for tiny images).
    axis_name: the pmapped axis over which BatchNorm averages; None keeps statistics of each device apart.
    dtype: of the computation; parameters and statistics are float32.
    precision: of the products of float32 numbers in convolutions and heads, forwards and backwards; a key of `PRECISIONS`.
    norm: the normalisation layer, with the arguments of `BatchNorm`.
    batch_norm: 'train', or 'frozen': running statistics normalise in training too and stay as they are.
    frozen: a pattern of paths of parameters that training leaves as they are; '' is none.
    portable: XLA's own convolution and pooling, and not what is fastest on the machine at hand: for an export to others.
  """
  depths: Sequence[int]
  block: type[nn.Module]
  heads: Mapping[str, int]
  width: int = 64
  stem: str = '7x7'
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32
  precision: str = 'default'
  norm: ModuleDef = BatchNorm
  batch_norm: str = 'train'
  frozen: str = ''
  portable: bool = False

  @property
  def width_of_features(self) -> int:
    """Numbers in the pooled features of an image."""
    return self.width * 2 ** (len(self.depths) - 1) * self.block.expansion

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
    """Runs the network.

    Args:
      images: uint8 `[b, h, w, 3]`, normalised here, or float `[b, h, w, 3]`, taken as normalised.
      train: whether BatchNorm uses the batch and updates its running statistics.
    """
    precision = PRECISIONS[self.precision]
    conv = functools.partial(Conv, dtype=self.dtype, precision=precision, portable=self.portable)
    # 0.9 here is torch's momentum of 0.1.
    norm = functools.partial(self.norm, train=train and self.batch_norm != 'frozen', momentum=0.9, epsilon=1e-5,
                             axis_name=self.axis_name, dtype=self.dtype, frozen=self.frozen)
    x = normalize(images) if images.dtype == jnp.uint8 else images
    if self.stem == '7x7':
      x = nn.relu(norm(name='bn1')(conv(self.width, 7, 2, name='conv1')(x)))
      x = (max_pool_xla if self.portable else max_pool)(x)
    else:
      x = nn.relu(norm(name='bn1')(conv(self.width, 3, name='conv1')(x)))
    taps = {}
    for i, depth in enumerate(self.depths):
      x = Stage(self.block, depth, self.width * 2**i, 1 if i == 0 else 2, conv, norm, name=f'layer{i + 1}')(x)
      taps[f'layer{i + 1}'] = x
    features = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
    return Outputs(features, Heads(self.heads, precision, name='heads')(features), taps)


def normalize(images: jax.Array) -> jax.Array:
  """uint8 images to float32 with ImageNet's mean and standard deviation taken out."""
  mean, std = jnp.asarray(IMAGENET_MEAN), jnp.asarray(IMAGENET_STD)
  return (images.astype(jnp.float32) / 255.0 - mean) / std


def frozen_mask(model: ResNet, tree: Any) -> Any:
  """A tree of bools in the shape of a network's parameters or running statistics: which of them training leaves as they are."""

  def stays(path: tuple[str, ...], _: Any) -> bool:
    if path[-1] in ('mean', 'var'):
      path = (*path[:-1], 'scale')
    normalises = path[0] not in ('heads', 'methods') and path[-1] in ('scale', 'bias')
    return normalises and model.batch_norm == 'frozen' or bool(model.frozen and re.fullmatch(model.frozen, '/'.join(path)))

  return flax.traverse_util.path_aware_map(stays, tree)


def build(name: str, heads: Mapping[str, int], *, width: int = 64, stem: str = '7x7', axis_name: str | None = None,
          dtype: jnp.dtype = jnp.float32, precision: str = 'default', batch_norm: str = 'train', frozen: str = '') -> ResNet:
  """A network of the table below; raises ValueError for a name, stem, width, precision or batch_norm that it does not know, or a wrong
  pattern.
  """
  if name not in NETWORKS:
    raise ValueError(f'model.name is {name!r}; known: {", ".join(NETWORKS)}')
  if stem not in STEMS:
    raise ValueError(f'model.stem is {stem!r}; known: {", ".join(STEMS)}')
  if width < 1:
    raise ValueError(f'model.width is {width}; expected 1 or more (64 is the published network)')
  if precision not in PRECISIONS:
    raise ValueError(f'model.precision is {precision!r}; known: {", ".join(PRECISIONS)}')
  if batch_norm not in BATCH_NORMS:
    raise ValueError(f'model.batch_norm is {batch_norm!r}; known: {", ".join(BATCH_NORMS)}')
  frozen = FROZEN.get(frozen, frozen)
  try:
    re.compile(frozen)
  except re.error as error:
    raise ValueError(f'train.freeze is {frozen!r}; expected {", ".join(FROZEN)}, or a regular expression of paths of parameters ({error})'
                     ) from error
  block, depths = NETWORKS[name]
  return ResNet(depths, block, dict(heads), width, stem, axis_name, dtype, precision, batch_norm=batch_norm, frozen=frozen)


STEMS = ('7x7', '3x3')

BATCH_NORMS = ('train', 'frozen')

# Names for patterns of what stays frozen.
FROZEN = {'backbone': r'(?!heads/|methods/).*'}

NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    'resnet18': (BasicBlock, (2, 2, 2, 2)),
    'resnet34': (BasicBlock, (3, 4, 6, 3)),
    'resnet50': (Bottleneck, (3, 4, 6, 3)),
    'resnet101': (Bottleneck, (3, 4, 23, 3)),
}
