"""The fast CPU forms are the same convolution and the same pooling, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax.models import build, conv, resnet


def resnet_shapes() -> list[tuple[int, int, int, int, int]]:
  """(height, channels in, channels out, kernel size, stride) of every convolution in ResNet-18 and 50 at three image
  sizes."""
  shapes = set()
  original = resnet.conv2d

  def record(x, kernel, stride=1, precision=None):
    shapes.add((x.shape[1], x.shape[3], kernel.shape[3], kernel.shape[0], stride))
    return original(x, kernel, stride, precision)

  resnet.conv2d = record
  try:
    for name in ('resnet18', 'resnet50'):
      for size in (32, 64, 112):
        model = build(name, {}, width=8)
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3), jnp.uint8))
  finally:
    resnet.conv2d = original
  return sorted(shapes)


@pytest.mark.parametrize('height,cin,cout,size,stride', resnet_shapes())
def test_equals_xla(height, cin, cout, size, stride):
  """Values and both gradients at every shape that a ResNet uses, here with an odd width too."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, height, height + height % 2, cin)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(size, size, cin, cout)) / (size * cin ** 0.5), jnp.float32)

  def all_of(function):
    y, back = jax.vjp(lambda x, kernel: function(x, kernel, stride), x, kernel)
    return (y, *back(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)))

  for ours, theirs in zip(jax.jit(lambda: all_of(conv.conv2d))(), jax.jit(lambda: all_of(conv.conv2d_xla))()):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * float(jnp.abs(theirs).max()))


def test_every_form_is_tested():
  """The shapes above lead through all three forms, so none is left out by a new rule."""
  def form(h, c, d, k, s):
    program = str(jax.make_jaxpr(lambda x, kernel: conv.conv2d(x, kernel, s))(jnp.zeros((1, h, h, c)),
                                                                              jnp.zeros((k, k, c, d))))
    return 'strided' if 'custom_vjp' in program else 'xla' if 'conv_general_dilated' in program else 'im2col'

  assert {form(*shape) for shape in resnet_shapes()} == {'im2col', 'strided', 'xla'}


@pytest.mark.parametrize('height', [1, 2, 7, 16])
def test_max_pool_equals_xla_with_ties(height):
  """Small integers tie all the time: the gradient must go to the same pixel as XLA's."""
  x = jnp.asarray(np.random.default_rng(1).integers(0, 3, (2, height, height + 1, 5)), jnp.float32)
  weights = lambda y: jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
  value_and_gradient = lambda f: (f(x), jax.grad(lambda x: jnp.sum(f(x) * weights(f(x))))(x))
  for ours, theirs in zip(value_and_gradient(conv.max_pool), value_and_gradient(conv.max_pool_xla)):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_other_backends_use_xla(monkeypatch):
  """On a GPU or TPU the network is XLA's own convolution and nothing else."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  x, kernel = jnp.ones((1, 2, 2, 4)), jnp.ones((3, 3, 4, 4))
  assert 'conv_general_dilated' in str(jax.make_jaxpr(conv.conv2d)(x, kernel))
  assert 'reduce_window' in str(jax.make_jaxpr(conv.max_pool)(x))
