"""ResNet-18/34/50/101 (v1.5) with any set of named heads.

Layers carry torchvision's names and numbers: the parameter `layer1/0/conv1/kernel` here is `layer1.0.conv1.weight`
there (He et al., CVPR 2016; v1.5 puts the stride of a bottleneck on its 3x3 convolution).
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import re
from typing import Any, ClassVar

from flax import linen as nn
import jax
import jax.numpy as jnp

from ft_jax.models.conv import conv2d, conv2d_xla, max_pool, max_pool_xla
from ft_jax.models.network import Heads, is_backbone, Network, Outputs
from ft_jax.models.precision import PRECISIONS

ModuleDef = Callable[..., nn.Module]


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


class ResNet(Network):
  """The network: images to features, logits of every head, and the output of each stage.

  Attributes:
    depths: blocks of each stage of the family; the published networks have four stages.
    block: BasicBlock or Bottleneck.
    width: channels of the first stage; 64 is the published network.
    stem: '7x7' (stride 2 and a max-pool of stride 2, for photographs) or '3x3' (full resolution, for tiny images).
    stages: how many of the stages there are, from the first on; 0 is all. The features are the mean of the last one.
  """
  depths: Sequence[int]
  block: type[BasicBlock] | type[Bottleneck]
  width: int = 64
  stem: str = '7x7'
  stages: int = 0

  has_batch_norm: ClassVar[bool] = True

  def __post_init__(self) -> None:
    if self.stem not in STEMS:
      raise ValueError(f'model.stem is {self.stem!r}; known: {", ".join(STEMS)}')
    if self.width < 1:
      raise ValueError(f'model.width is {self.width}; expected 1 or more (64 is the published network)')
    if not 0 <= self.stages <= len(self.depths):
      raise ValueError(f'model.stages is {self.stages}; expected 1 to {len(self.depths)}, or 0 for all')
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: jax.Array, train: bool = False) -> Outputs:
    """See `Network`; the inputs are images `[b, h, w, 3]` of any size."""
    precision = PRECISIONS[self.precision]
    conv = functools.partial(Conv, dtype=self.dtype, precision=precision, portable=self.portable)
    # 0.9 here is torch's momentum of 0.1.
    norm = functools.partial(self.norm, train=train and self.batch_norm != 'frozen', momentum=0.9, epsilon=1e-5,
                             axis_name=self.axis_name, dtype=self.dtype, frozen=self.frozen)
    x = self.input.normalize(inputs)
    if self.stem == '7x7':
      x = nn.relu(norm(name='bn1')(conv(self.width, 7, 2, name='conv1')(x)))
      x = (max_pool_xla if self.portable else max_pool)(x)
    else:
      x = nn.relu(norm(name='bn1')(conv(self.width, 3, name='conv1')(x)))
    taps = {}
    for i, (name, depth) in enumerate(zip(self.stage_names, self._depths)):
      x = Stage(self.block, depth, self.width * 2**i, 1 if i == 0 else 2, conv, norm, name=name)(x)
      taps[name] = x
    features = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
    return Outputs(features, Heads(self.heads, precision, name='heads')(features), taps)

  @property
  def features_dim(self) -> int:
    """The channels of the last stage."""
    return self.width * 2 ** (len(self._depths) - 1) * self.block.expansion

  @property
  def stage_names(self) -> tuple[str, ...]:
    """`layer1` and so on."""
    return tuple(f'layer{i + 1}' for i in range(len(self._depths)))

  @property
  def _depths(self) -> Sequence[int]:
    """Blocks of each stage of this network."""
    return self.depths[:self.stages or None]

  @property
  def stage_layers(self) -> tuple[str, ...]:
    """The last convolution of each stage."""
    name = 'conv3' if self.block is Bottleneck else 'conv2'
    return tuple(f'{stage}/{depth - 1}/{name}' for stage, depth in zip(self.stage_names, self._depths))

  @nn.nowrap
  def depth(self, path: str) -> int:
    """How many residual blocks a parameter is from the heads: 1 in the last one, one more than there are blocks in the
    stem.
    """
    if not is_backbone(path):
      return 0
    if not (match := re.match(r'layer(\d+)/(\d+)/', path)):
      return sum(self._depths) + 1
    stage, block = int(match[1]), int(match[2])
    return sum(self._depths[stage - 1:]) - block

  @nn.nowrap
  def is_norm(self, path: str) -> bool:
    """See `Network`."""
    return bool(_NORM.fullmatch(path.rpartition('/')[0]))

  @nn.nowrap
  def is_shortcut(self, path: str) -> bool:
    """See `Network`."""
    return '/downsample/' in path

  @nn.nowrap
  def torch_name(self, path: str) -> str:
    """Torchvision's name."""
    _, _, rest = path.partition('/')
    module, _, leaf = re.sub(r'^heads/[^/]+', 'fc', rest).rpartition('/')
    return f'{module.replace("/", ".")}.{_TORCH_LEAVES[leaf]}'

  @nn.nowrap
  def torch_constructor(self, name: str, classes: int) -> str:
    """Torchvision's, which has one width and one stem."""
    published = self.width == 64 and self.stem == '7x7' and len(self._depths) == len(self.depths)
    return f'torchvision.models.{name}(num_classes={classes})' if published else ''

  @nn.nowrap
  def torch_path(self, name: str) -> str | None:
    """See `Network`."""
    if not _TORCH_NAME.fullmatch(name):
      return None
    module, _, leaf = name.replace('.', '/').rpartition('/')
    if leaf.startswith('running_'):
      return f'batch_stats/{module}/{leaf.removeprefix("running_")}'
    if leaf == 'weight':
      leaf = 'scale' if self.is_norm(f'{module}/weight') else 'kernel'
    return f'params/{"heads/source" if module == "fc" else module}/{leaf}'

  @property
  def torch_anchors(self) -> tuple[str, str]:
    """See `Network`."""
    return 'conv1.weight', 'layer1.0.conv1.weight'

  @nn.nowrap
  def options_like(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """See `Network`."""
    if 'params/conv1/kernel' not in shapes:
      return {}
    height, width, _, channels = shapes['params/conv1/kernel'].shape
    stem = f'{height}x{width}'
    if stem not in STEMS:
      return {}
    found = len({match[1] for path in shapes if (match := re.match(r'params/layer(\d+)/', path))})
    return {'width': channels, 'stem': stem, 'stages': found if found < len(self.depths) else 0}

  @nn.nowrap
  def is_beyond(self, path: str) -> bool:
    """See `Network`."""
    match = re.match(r'layer(\d+)/', path)
    return match is not None and len(self._depths) < int(match[1]) <= len(self.depths)


STEMS = ('7x7', '3x3')

_NORM = re.compile(r'(.*/)?(bn\d|downsample/1)')
_TORCH_NAME = re.compile(
    r'(conv1|bn1|layer\d+\.\d+\.(conv[123]|bn[123]|downsample\.[01]))\.(weight|bias|running_mean|running_var)|fc\.(weight|bias)')
_TORCH_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
