"""Optimizers are torch's, step by step; rates and decay go by pattern and leave nothing out."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ft_jax.models.resnet import BasicBlock, ResNet
from ft_jax.training import optimizer

PARAMS = {'conv1': {'kernel': np.full((2, 2), 0.5, np.float32)},
          'heads': {'target': {'bias': np.full(3, -1.0, np.float32)}}}


def make(**kwargs):
  factors = optimizer.parameter_factors(PARAMS, (('heads/.*', 10.0), ('.*', 1.0)), (('.*/bias', 0.0), ('.*', 1.0)))
  defaults = dict(momentum=0.9, nesterov=True, weight_decay=0.01)
  return optimizer.make_optimizer('sgd', optax.constant_schedule(0.1), factors, **{**defaults, **kwargs})


@pytest.mark.parametrize('nesterov', [True, False])
def test_equals_torchs_formula(nesterov):
  """g += decay * w; buffer = momentum * buffer + g; step along g + momentum * buffer (Nesterov) or buffer; in float64.
  """
  tx = make(nesterov=nesterov)
  params, state = jax.tree.map(jnp.asarray, PARAMS), None
  state = tx.init(params)
  w = {'kernel': PARAMS['conv1']['kernel'].astype(np.float64),
       'bias': PARAMS['heads']['target']['bias'].astype(np.float64)}
  buffers = {key: np.zeros_like(value) for key, value in w.items()}
  rng = np.random.default_rng(0)
  for _ in range(5):
    g = {'kernel': rng.normal(size=(2, 2)), 'bias': rng.normal(size=3)}
    grads = jax.tree.map(jnp.float32, {'conv1': {'kernel': g['kernel']}, 'heads': {'target': {'bias': g['bias']}}})
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for key, decay, rate in (('kernel', 0.01, 0.1), ('bias', 0.0, 1.0)):
      d = g[key] + decay * w[key]
      buffers[key] = 0.9 * buffers[key] + d
      w[key] = w[key] - rate * (d + 0.9 * buffers[key] if nesterov else buffers[key])
  np.testing.assert_allclose(params['conv1']['kernel'], w['kernel'], rtol=1e-5)
  np.testing.assert_allclose(params['heads']['target']['bias'], w['bias'], rtol=1e-5)


def test_lars_scales_kernels_by_their_norm():
  """g += decay * w; g *= 0.001 |w| / |g| where the parameter has several axes; then momentum, in float64."""
  factors = optimizer.parameter_factors(PARAMS, weight_decay_groups=(('.*/bias', 0.0), ('.*', 1.0)))
  tx = optimizer.make_optimizer('lars', optax.constant_schedule(0.1), factors, nesterov=False, weight_decay=0.01)
  params = jax.tree.map(jnp.asarray, PARAMS)
  state = tx.init(params)
  kernel, bias, buffers = np.full((2, 2), 0.5), np.full(3, -1.0), [0.0, 0.0]
  rng = np.random.default_rng(0)
  for _ in range(3):
    g, h = rng.normal(size=(2, 2)), rng.normal(size=3)
    grads = jax.tree.map(jnp.float32, {'conv1': {'kernel': g}, 'heads': {'target': {'bias': h}}})
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    g = g + 0.01 * kernel
    buffers = [0.9 * buffers[0] + g * 0.001 * np.linalg.norm(kernel) / np.linalg.norm(g), 0.9 * buffers[1] + h]
    kernel, bias = kernel - 0.1 * buffers[0], bias - 0.1 * buffers[1]
  np.testing.assert_allclose(params['conv1']['kernel'], kernel, rtol=1e-6)
  np.testing.assert_allclose(params['heads']['target']['bias'], bias, rtol=1e-5)


@pytest.mark.parametrize('groups,words', [
    ((('heads/.*', 1.0),), "covers no parameter 'conv1/kernel'"),
    ((('.*', 1.0), ('heads/.*', 2.0)), "'heads/.*' matches no parameter before"),
    ((('[', 1.0),), 'expected .regular expression, number. pairs'),
    (('heads',), 'expected .regular expression, number. pairs')])
def test_groups_that_do_not_fit(groups, words):
  with pytest.raises(ValueError, match=words):
    optimizer.by_pattern(PARAMS, groups, 'train.learning_rate_groups')


def rates(kind, **kwargs):
  defaults = dict(milestones=(0.6, 0.8), decay=0.1, warmup=0.0)
  schedule = optimizer.make_schedule(kind, 1.0, 100, **{**defaults, **kwargs})
  return np.array([float(schedule(step)) for step in range(100)])


def test_schedules():
  """Milestones drop after 60 and 80 of 100; cosine ends near zero; warm-up rises to the rate and joins on."""
  np.testing.assert_allclose(rates('milestones')[[0, 59, 60, 79, 80, 99]], [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-5)
  np.testing.assert_allclose(rates('cosine'), 0.5 * (1 + np.cos(np.pi * np.arange(100) / 100)), atol=1e-5)
  warm = rates('milestones', warmup=0.1)
  np.testing.assert_allclose(warm[:11], [*(np.arange(1, 11) / 10), 1], rtol=1e-5)
  np.testing.assert_allclose(warm[[59, 60]], [1, 0.1], rtol=1e-5)
  np.testing.assert_allclose(rates('constant', warmup=0.02)[[0, 1, 50]], [0.5, 1, 1])


def test_milestones_on_one_step_multiply_the_rate_each():
  """In any order: three decays are three, however short the run is."""
  np.testing.assert_allclose(rates('milestones', milestones=(0.8, 0.3, 0.304))[[29, 30, 79, 80]],
                             [1, 0.01, 0.01, 0.001], rtol=1e-5)
  short = optimizer.make_schedule('milestones', 1.0, 2, milestones=(0.4, 0.5, 0.6), decay=0.1, warmup=0.0)
  np.testing.assert_allclose([short(0), short(1)], [1, 1e-3], rtol=1e-5)


@pytest.mark.parametrize('kind', optimizer.SCHEDULES)
def test_every_warmup_and_length_makes_a_schedule(kind):
  """The rate rises, is never above the highest one, and the last step is the schedule's own."""
  for steps in (1, 2, 3, 10, 1000):
    for warmup in (0.0, 0.05, 0.5, 0.95, 0.9999999):
      schedule = optimizer.make_schedule(kind, 0.5, steps, milestones=(0.6, 0.8), decay=0.1, warmup=warmup)
      values = np.array([float(schedule(step)) for step in range(steps)])
      assert np.isfinite(values).all() and (values > 0).all() and values.max() <= 0.5 + 1e-6, (steps, warmup)
      rise = min(round(warmup * steps), steps - 1)
      np.testing.assert_allclose(values[:rise], 0.5 * (1 + np.arange(rise)) / max(rise, 1), rtol=1e-5)


def test_layers_decay_with_their_distance_from_the_heads():
  """Heads at the full rate, the last block once, each block before it once more, the stem most."""
  model = ResNet((2, 1), BasicBlock, heads={})
  paths = ('conv1/kernel', 'layer1/0/conv1/kernel', 'layer1/1/bn2/scale', 'layer2/0/downsample/0/kernel',
           'heads/target/bias',
           'methods/own/kernel')
  params = flax.traverse_util.unflatten_dict({path: jnp.zeros(2) for path in paths}, sep='/')
  factors = optimizer.parameter_factors(params, (('heads/.*', 10.0), ('.*', 1.0)), depth=model.depth, layer_decay=0.5)
  tx = optimizer.make_optimizer('sgd', optax.constant_schedule(1.0), factors, momentum=0.0, nesterov=False)
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
  steps = {path: -float(value[0]) for path, value in flax.traverse_util.flatten_dict(updates, sep='/').items()}
  assert steps == {'heads/target/bias': 10.0, 'methods/own/kernel': 1.0, 'layer2/0/downsample/0/kernel': 0.5,
                   'layer1/1/bn2/scale': 0.25,
                   'layer1/0/conv1/kernel': 0.125, 'conv1/kernel': 0.0625}


def test_clipping_is_of_the_gradient_alone():
  """Scaled to the norm over all parameters, before the weight decay is added; a smaller gradient stays."""
  params = {'a': {'kernel': jnp.array([3.0])}, 'b': {'kernel': jnp.array([4.0])}}
  tx = optimizer.make_optimizer('sgd', optax.constant_schedule(1.0), optimizer.parameter_factors(params), momentum=0.0,
                                nesterov=False,
                                weight_decay=0.1, clip_norm=0.5)
  for scale, expected in ((1.0, 0.5 / 5), (0.05, 0.05)):
    updates, _ = tx.update(jax.tree.map(lambda x, s=scale: s * x, params), tx.init(params), params)
    np.testing.assert_allclose(updates['a']['kernel'], -(3.0 * expected + 0.3), rtol=1e-6)
    np.testing.assert_allclose(updates['b']['kernel'], -(4.0 * expected + 0.4), rtol=1e-6)


@pytest.mark.parametrize('kind', ['adam', 'adamw'])
def test_adam_equals_torchs_formula(kind):
  """adam adds the decay to the gradient, adamw to the update (Loshchilov and Hutter, ICLR 2019); in float64."""
  params, state = {'a': {'kernel': jnp.array([0.5, -1.0])}}, None
  tx = optimizer.make_optimizer(kind, optax.constant_schedule(0.1), optimizer.parameter_factors(params),
                                weight_decay=0.1)
  state, w, m, v = tx.init(params), np.array([0.5, -1.0]), np.zeros(2), np.zeros(2)
  rng = np.random.default_rng(0)
  for t in range(1, 6):
    g = rng.normal(size=2)
    updates, state = tx.update({'a': {'kernel': jnp.float32(g)}}, state, params)
    params = optax.apply_updates(params, updates)
    d = g + 0.1 * w if kind == 'adam' else g
    m, v = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d * d
    step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    w = w - 0.1 * (step if kind == 'adam' else step + 0.1 * w)
  np.testing.assert_allclose(params['a']['kernel'], w, rtol=1e-4)  # float32's 1 - 0.999**t


def test_amsgrad_equals_torchs_formula():
  """The maximum is of the second moments before their correction, unlike optax's; in float64."""
  tx = optimizer.make_optimizer('amsgrad', optax.constant_schedule(0.01), optimizer.parameter_factors(PARAMS),
                                weight_decay=0.02)
  params = jax.tree.map(jnp.asarray, PARAMS)
  state, w = tx.init(params), PARAMS['conv1']['kernel'].astype(np.float64)
  m = v = most = np.zeros_like(w)
  rng = np.random.default_rng(0)
  for t in range(1, 41):
    # the largest second moments lie behind: the maximum matters
    g = rng.normal(size=(2, 2)) * (100.0 if t < 3 else 1.0)
    grads = {'conv1': {'kernel': g.astype(np.float32)}, 'heads': {'target': {'bias': np.zeros(3, np.float32)}}}
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    g = g + 0.02 * w
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    most = np.maximum(most, v)
    w = w - 0.01 * m / (1 - 0.9**t) / (np.sqrt(most / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(params['conv1']['kernel'], w, rtol=2e-5)
