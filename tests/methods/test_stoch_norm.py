"""StochNorm: channels take the batch's or the running statistics, drawn alike everywhere; running statistics are
updated all the same.
"""

import dataclasses
import functools

from flax import linen as nn
import jax
import method_case
import numpy as np
import pytest

from ft_jax import methods
from ft_jax.methods.stoch_norm import StochNorm, StochNormLayer
from ft_jax.models import resnet
from ft_jax.models.batch_norm import BatchNorm
from ft_jax.models.network import FROZEN
from ft_jax.parallel import AXIS
from ft_jax.training.forward import forward

CHANNELS = 12


def case(seed: int = 0) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
  """A batch, and variables of a layer."""
  rng = np.random.default_rng(seed)
  scale, bias, mean, var = rng.uniform(0.5, 2.0, (4, CHANNELS)).astype(np.float32)
  x = rng.normal(1.0, 2.0, (8, 3, 2, CHANNELS)).astype(np.float32)
  return x, {'params': {'scale': scale, 'bias': bias}, 'batch_stats': {'mean': mean, 'var': var}}


def apply(layer: BatchNorm, variables: dict, x: np.ndarray, seed: int = 0) -> tuple[np.ndarray, dict]:
  y, updated = layer.apply(variables, x, rngs={'norm': jax.random.key(seed)}, mutable=['batch_stats'])
  return y, updated['batch_stats']


make = functools.partial(StochNormLayer, train=True, momentum=0.9, epsilon=1e-5)
plain = functools.partial(BatchNorm, train=True, momentum=0.9, epsilon=1e-5)


def reference(x: np.ndarray, variables: dict) -> np.ndarray:
  """Normalised by running statistics and by those of the batch, `[2, ...]`, in float64."""
  x, scale, bias, mean, var = (a.astype(np.float64) for a in (x, *variables['params'].values(),
                                                              *variables['batch_stats'].values()))
  statistics = ((mean, var), (x.mean((0, 1, 2)), x.var((0, 1, 2))))
  return np.stack([(x - m) / np.sqrt(v + 1e-5) * scale + bias for m, v in statistics])


def test_channels_take_either_statistics():
  """Each channel is one of both formulas, as often as asked; statistics before the update; another draw gives others.
  """
  x, variables = case()
  running, batch = reference(x, variables)
  shares, draws = [], set()
  for seed in range(30):
    y, _ = apply(make(probability=0.7), variables, x, seed)
    by_batch = np.all(np.isclose(y, batch, atol=1e-5), (0, 1, 2))
    by_running = np.all(np.isclose(y, running, atol=1e-5), (0, 1, 2))
    assert np.all(by_batch ^ by_running)
    shares.append(by_batch.mean())
    draws.add(tuple(by_batch))
  assert abs(np.mean(shares) - 0.7) < 0.08 and len(draws) > 20


def test_ends_of_the_probability():
  """1 is BatchNorm, bit by bit, also its gradient; 0 takes running statistics alone; both update them as BatchNorm
  does.
  """
  x, variables = case()
  y, stats = apply(plain(), variables, x)
  for probability in (0.0, 0.5, 1.0):
    got, updated = apply(make(probability=probability), variables, x)
    jax.tree.map(np.testing.assert_array_equal, updated, stats)
    if probability == 1.0:
      np.testing.assert_array_equal(got, y)
    if probability == 0.0:
      np.testing.assert_allclose(got, reference(x, variables)[0], atol=1e-5)
  cubes = lambda params, x, layer: (apply(layer, variables | {'params': params}, x)[0] ** 3).sum()
  slopes = [jax.grad(cubes, (0, 1))(variables['params'], x, layer) for layer in (make(probability=1.0), plain())]
  jax.tree.map(np.testing.assert_array_equal, *slopes)


def test_gradient_goes_through_the_statistics_of_the_batch():
  x, variables = case()
  direction = np.random.default_rng(1).normal(size=x.shape)
  with jax.enable_x64(True):
    layer = make(probability=0.5, dtype=np.float64)
    run = lambda x: (apply(layer, jax.tree.map(np.float64, variables), x)[0] ** 3).sum()
    slope = np.sum(direction * np.asarray(jax.grad(run)(x.astype(np.float64))))
    step = 1e-4
    np.testing.assert_allclose(slope, (run(x + step * direction) - run(x - step * direction)) / (2 * step), rtol=1e-5)


def test_evaluation_and_frozen_layers_are_plain():
  x, variables = case()
  for settings in (dict(train=False), dict(frozen='scale')):
    y, stats = apply(make(**settings), variables, x)
    np.testing.assert_array_equal(y, apply(plain(**settings), variables, x)[0])
    jax.tree.map(np.testing.assert_array_equal, stats, variables['batch_stats'])


def test_devices_draw_alike():
  """With statistics of all devices, two devices give what one gives; without, they choose the same channels."""
  x, variables = case()
  split = x.reshape(2, 4, *x.shape[1:])
  mapped = lambda layer: jax.vmap(lambda x: apply(layer, variables, x), axis_name=AXIS)(split)
  y, stats = apply(make(probability=0.5), variables, x)
  both, both_stats = mapped(make(probability=0.5, axis_name=AXIS))
  np.testing.assert_allclose(both.reshape(x.shape), y, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5), both_stats, stats)
  by_running = np.isclose(mapped(make(probability=0.5))[0], reference(x, variables)[0].reshape(split.shape), atol=1e-5)
  np.testing.assert_array_equal(*by_running.all((1, 2, 3)))


def test_parts_of_a_batch_draw_alike():
  """A pass in two microbatches is two passes with the same draw, the second with the statistics that the first left."""
  model = resnet.ResNet((1,), resnet.BasicBlock, heads={}, width=4, stem='3x3', norm=StochNorm(True).norm())
  variables, images = method_case.variables(model), method_case.images(8, 4)['input']

  def draw(variables, images, microbatches):
    return forward(model, variables, {'target': images}, key=jax.random.key(3), microbatches=microbatches)

  run = jax.jit(draw, static_argnums=2, compiler_options=method_case.QUICK)
  whole, whole_stats = run(variables, images, 2)
  first, stats = run(variables, images[:4], 1)
  second, stats = run(variables | {'batch_stats': stats}, images[4:], 1)
  np.testing.assert_allclose(whole['target'].features, np.concatenate([first['target'].features,
                                                                       second['target'].features]), atol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), whole_stats, stats)


class Shifted(BatchNorm):
  """Uses the layer of its parent class twice."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[b, h, w, c]` to the same."""
    return super().__call__(x) - super().__call__(x) / 2 + 1


@pytest.mark.parametrize('norm', [StochNorm(True).norm(), Shifted, BatchNorm])
@pytest.mark.parametrize('microbatches', [1, 2])
def test_taps_are_the_outputs_that_the_next_layer_gets(norm, microbatches):
  """A block is relu(input + bn2): so the tap of bn2 is not the output of one of the calls that it is made of."""
  model = resnet.ResNet((2,), resnet.BasicBlock, heads={}, width=4, stem='3x3', norm=norm)
  variables, images = method_case.variables(model), method_case.images(8, 4)['input']
  layers = ('layer1/0', 'layer1/1/bn2', 'layer1/1')
  run = jax.jit(lambda variables, images: forward(model, variables, {'target': images}, key=jax.random.key(3),
                                                  layers=layers, microbatches=microbatches),
                compiler_options=method_case.QUICK)
  taps = run(variables, images)[0]['target'].taps
  np.testing.assert_allclose(np.maximum(taps['layer1/0'] + taps['layer1/1/bn2'], 0), taps['layer1/1'], atol=1e-6)
  assert np.std(taps['layer1/1/bn2']) > 0.1


def test_bad_settings():
  context = method_case.context(method_case.network(), pretrained=False)
  on = methods.active({'stoch_norm': {'enabled': True}})
  methods.check(on, context)
  methods.check(on, dataclasses.replace(context, model=method_case.network(frozen='layer1/.*')))
  for frozen in (dict(batch_norm='frozen'), dict(frozen=FROZEN['backbone'])):
    with pytest.raises(ValueError, match='stoch_norm has no layer to replace: model.batch_norm .* train.freeze'):
      methods.check(on, dataclasses.replace(context, model=method_case.network(**frozen)))
  with pytest.raises(ValueError, match='stoch_norm.probability is 1.5; expected a number from 0 to 1'):
    methods.check(methods.active({'stoch_norm': {'enabled': True, 'probability': 1.5}}), context)
