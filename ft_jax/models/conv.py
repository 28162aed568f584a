"""2-D convolution and max-pooling with gradients that are fast on the CPU too.

XLA's CPU convolution is a good one at large images and collapses in two places that every ResNet visits: at tiny
spatial sizes (3x3, 512 channels, 2x2 pixels: about a hundred times the time of the same matrix product) and in the
input gradient of a strided convolution. Both are written here as im2col and one matrix product. The gradient of its
max-pooling runs on one core; here it is nine shifted maxima. Everything else, and every other backend, uses XLA's own.
`benchmarks/resnet_step.py` prints what it is worth.
"""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

Precision = jax.lax.Precision | None

# Up to this height or width im2col was the faster one in every pass (forward, input gradient, kernel gradient).
_TINY = 4


def conv2d(x: jax.Array, kernel: jax.Array, stride: int = 1, precision: Precision = None) -> jax.Array:
  """Convolution with torch's padding (size // 2 on each side), by the fastest exact way for the backend.

  Args:
    x: images `[b, h, w, c]`.
    kernel: `[k, k, c, d]` with odd k.
    stride: the same in both directions.
    precision: of the products, in every pass; None is the backend's default.

  Returns:
    `[b, ceil(h / stride), ceil(w / stride), d]`.
  """
  if jax.default_backend() != 'cpu':
    return conv2d_xla(x, kernel, stride, precision)
  if kernel.shape[0] == 1 or min(x.shape[1:3]) <= _TINY:
    return conv2d_im2col(x, kernel, stride, precision)
  if stride > 1:
    return _conv2d_strided(x, kernel, stride, precision)
  return conv2d_xla(x, kernel, stride, precision)


def conv2d_xla(x: jax.Array, kernel: jax.Array, stride: int = 1, precision: Precision = None) -> jax.Array:
  """XLA's own convolution, in every pass."""
  pad = kernel.shape[0] // 2
  return lax.conv_general_dilated(
      x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision=precision)


def conv2d_im2col(x: jax.Array, kernel: jax.Array, stride: int = 1, precision: Precision = None) -> jax.Array:
  """The patches side by side, times the kernel as one matrix: the same in every pass."""
  size = kernel.shape[0]
  patches = jnp.concatenate(_shifted(x, size, stride, 0.0), axis=-1)
  return jnp.matmul(patches, kernel.reshape(-1, kernel.shape[-1]), precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d_strided(x: jax.Array, kernel: jax.Array, stride: int, precision: Precision) -> jax.Array:
  """XLA's convolution and kernel gradient, im2col's input gradient."""
  return conv2d_xla(x, kernel, stride, precision)


def _strided_forward(x: jax.Array, kernel: jax.Array, stride: int,
                     precision: Precision) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return conv2d_xla(x, kernel, stride, precision), (x, kernel)


def _strided_backward(stride: int, precision: Precision, saved: tuple[jax.Array, jax.Array],
                      gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, kernel = saved
  dx = jax.vjp(lambda x: conv2d_im2col(x, kernel, stride, precision), x)[1](gradient)[0]
  dkernel = jax.vjp(lambda kernel: conv2d_xla(x, kernel, stride, precision), kernel)[1](gradient)[0]
  return dx, dkernel


_conv2d_strided.defvjp(_strided_forward, _strided_backward)


def max_pool(x: jax.Array) -> jax.Array:
  """Max-pooling 3x3 with stride 2 and one pixel of padding, as after the stem; `[b, h, w, c]` to `[b, h/2, w/2, c]`.

  Where values tie, the gradient goes to the first of them in every form.
  """
  if jax.default_backend() != 'cpu':
    return max_pool_xla(x)
  # `where` and not `maximum`, whose gradient is shared out among ties.
  return functools.reduce(lambda best, other: jnp.where(other > best, other, best), _shifted(x, 3, 2, -jnp.inf))


def max_pool_xla(x: jax.Array) -> jax.Array:
  """XLA's own max-pooling, in every pass."""
  return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def _shifted(x: jax.Array, size: int, stride: int, padding: float) -> list[jax.Array]:
  """The image under each of the size * size positions of a window: each `[b, ceil(h / stride), ceil(w / stride), c]`.
  """
  pad = size // 2
  b, h, w, c = x.shape
  x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=padding)
  rows, columns = (h - 1) // stride * stride + 1, (w - 1) // stride * stride + 1
  return [lax.slice(x, (0, i, j, 0), (b, i + rows, j + columns, c), (1, stride, stride, 1))
          for i in range(size) for j in range(size)]
