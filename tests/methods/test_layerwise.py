"""RegSL's constraints: projections are the formula, of the right tensors with the right radii, and hold after steps of
any optimizer.
"""

import dataclasses
import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import method_case
import numpy as np
import pytest

from ft_jax import methods
from ft_jax.methods.base import flat
from ft_jax.methods.layerwise import frobenius, into_ball, into_interval, Layerwise, outputs_l1
from ft_jax.models import resnet
from ft_jax.models.network import frozen_mask
from ft_jax.parallel import AXIS
from ft_jax.training.optimizer import make_optimizer, parameter_factors
from ft_jax.training.step import create_state, make_step

NORMS = {'frobenius': frobenius, 'mars': outputs_l1}
many = settings(max_examples=20, deadline=None, derandomize=True)


def length(offset, norm):
  """In float64: of the whole tensor, or of the weights into each output."""
  offset = np.asarray(offset, np.float64)
  return np.sqrt(np.sum(offset**2)) if norm == 'frobenius' else np.abs(offset).sum(tuple(range(offset.ndim - 1)))


def brought_back(value, center, radius, norm):
  """The published formula in float64: w0 + t / max(1, norm(t) / r)."""
  offset = value.astype(np.float64) - center
  return center + offset / np.maximum(1.0, length(offset, norm) / radius)


@functools.partial(jax.jit, static_argnums=3)
def jitted_ball(value, center, radius, norm):
  return into_ball(value, center, radius, NORMS[norm])


@pytest.mark.parametrize('norm,key', [('frobenius', 'W_frob_r1.5'), ('mars', 'W_mars_r1.5')])
def test_reference_arrays(shared, norm, key):
  """A kernel of four dimensions; the reference has torch's order, outputs first."""
  arrays = np.load(shared / 'reference' / 'regsl' / 'fixtures.npz')
  here = lambda name: arrays[name].transpose(2, 3, 1, 0)
  with jax.enable_x64():
    result = into_ball(jnp.asarray(here('W')), jnp.asarray(here('W0')), 1.5, NORMS[norm])
  np.testing.assert_allclose(result, here(key), rtol=1e-13, atol=1e-13)


@many
@given(seed=st.integers(0, 10**6), norm=st.sampled_from(sorted(NORMS)), radius=st.floats(1e-3, 30.0),
       dense=st.booleans(),
       away=st.sampled_from([0.0, 1e-3, 0.1, 3.0]))
def test_ball(seed, norm, radius, dense, away):
  """The formula; the radius is kept; once more changes nothing that rounding does not; what is inside stays bit for
  bit.
  """
  rng = np.random.default_rng(seed)
  shape = (5, 4) if dense else (3, 3, 2, 4)
  center = rng.normal(size=shape).astype(np.float32)
  value = (center + away * rng.normal(size=shape)).astype(np.float32)
  project = lambda value: np.asarray(jitted_ball(value, center, np.float32(radius), norm))
  once = project(value)
  np.testing.assert_allclose(once, brought_back(value, center, radius, norm), rtol=2e-6, atol=2e-6)
  assert np.all(length(once - center, norm) <= radius * (1 + 1e-5) + 1e-5)
  np.testing.assert_allclose(project(once), once, rtol=2e-6, atol=2e-6)
  inside = np.broadcast_to(length(value - center, norm) < radius * (1 - 1e-5), shape)
  np.testing.assert_array_equal(once[inside], value[inside])


@many
@given(seed=st.integers(0, 10**6), radius=st.floats(1e-3, 5.0))
def test_interval(seed, radius):
  """BatchNorm's rule with the current variance in float64: each s within the radius of s0; the others stay bit for bit.
  """
  rng = np.random.default_rng(seed)
  scale, first = (rng.normal(1.0, 1.0, 9).astype(np.float32) for _ in range(2))
  now, then = (rng.uniform(0.05, 4.0, 9).astype(np.float32) for _ in range(2))
  s, s0 = scale / np.sqrt(now + 1e-6, dtype=np.float64), first / np.sqrt(then + 1e-6, dtype=np.float64)
  result = np.asarray(into_interval(scale, now, first, then, radius))
  expected = (s0 + (s - s0) / np.maximum(1.0, np.abs(s - s0) / radius)) * np.sqrt(now + 1e-6, dtype=np.float64)
  np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
  inside = np.abs(s - s0) < radius * (1 - 1e-5)
  np.testing.assert_array_equal(result[inside], scale[inside])
  np.testing.assert_allclose(into_interval(result, now, first, then, radius), result, rtol=1e-5, atol=1e-5)


def one_stage(**kwargs):
  """What is compiled in a second."""
  return resnet.ResNet((1,), resnet.BasicBlock, heads={'target': 4, 'source': 6}, width=4, stem='3x3', **kwargs)


@functools.cache
def far_away():
  """Parameters far from where they started, with a head that was pre-trained and two fresh ones, one of a method."""
  model = method_case.network({'target': 4, 'source': 9, 'pretrained': 8})
  start = method_case.start_of(model)
  moved = method_case.variables(model, 7)
  params = jax.tree.map(lambda x: 3 * x, moved['params']) | {'methods': {'other': {'kernel': np.full((3, 3), 9.0,
                                                                                                     np.float32)}}}
  return start, params, moved['batch_stats']


def radii(method, classes=4):
  """The radius of each constrained parameter, written out."""
  d, gamma, head = method.radius, method.growth, method.head_radius
  stages = {'layer1': d, 'layer2': d, 'layer3': d * gamma, 'layer4': d * gamma**2}
  many_classes = {'target': 4, 'source': 9, 'pretrained': 8}
  for path in flat(far_away()[1]):
    first, *_, last = path.split('/')
    if first in stages and last != 'bias':
      yield path, stages[first]
    elif first == 'heads' and last == 'kernel':
      ratio = many_classes[path.split('/')[1]] / classes
      yield path, head * (ratio**0.5 if method.distance == 'frobenius' else 1.0)


@pytest.mark.parametrize('norm', sorted(NORMS))
def test_which_tensors_and_how_far(norm):
  """Kernels and scales of the four stages with shortcuts, heads around their own start or zero; stem, biases and
  methods are free.
  """
  method = Layerwise(norm, radius=0.3, growth=1.7, head_radius=0.8)
  start, params, stats = far_away()
  project = jax.jit(functools.partial(method.project, method_case.network()), compiler_options=method_case.QUICK)
  result, before, first = jax.device_get(flat(project(params, stats, start))), flat(params), flat(start['params'])
  now, then = flat(stats), flat(start['batch_stats'])
  assert result.keys() == before.keys()
  constrained = dict(radii(method))
  assert len(constrained) == 2 * (8 + 3) + 3 and sum('downsample' in path for path in constrained) == 6
  for path, value in before.items():
    if path not in constrained:
      np.testing.assert_array_equal(result[path], value, err_msg=path)
      continue
    if path.endswith('scale'):
      variance = f'{path[:-5]}var'
      spread = np.sqrt(now[variance] + 1e-6, dtype=np.float64)
      center = first[path] / np.sqrt(then[variance] + 1e-6, dtype=np.float64)
      offset = value / spread - center
      expected = (center + np.clip(offset, -constrained[path], constrained[path])) * spread
    else:
      expected = brought_back(value, first.get(path, np.zeros_like(value)), constrained[path], norm)
    assert np.abs(expected - value).max() > 0.01, f'{path} was not outside'
    np.testing.assert_allclose(result[path], expected, rtol=1e-5, atol=1e-5, err_msg=path)
  assert 'heads/pretrained/kernel' in first and 'heads/target/kernel' not in first


@pytest.mark.parametrize('norm,kind,rate', [('frobenius', 'amsgrad', 0.05), ('mars', 'sgd', 0.2)])
def test_holds_after_steps(norm, kind, rate):
  """Of both optimizers on several devices, with BatchNorm in training: everything is inside, and most of it was stopped
  at the border.
  """
  method = Layerwise(norm, radius=0.05, growth=1.5, head_radius=0.6)
  model = one_stage()
  start = method_case.start_of(model)
  params = method_case.variables(model, 2)['params'] | {key: value for key, value in start['params'].items()
                                                        if key != 'heads'}
  tx = make_optimizer(kind, lambda step: rate, parameter_factors(params))
  step = jax.jit(jax.vmap(make_step(model, tx, {'target': 1.0, 'source': 0.5}, methods={'layerwise': method}),
                          in_axes=(None, 0),
                          axis_name=AXIS), compiler_options=method_case.QUICK)
  state = create_state({'params': params, 'batch_stats': start['batch_stats']}, tx, start=start,
                       methods={'layerwise': {}})
  for number in range(3):
    state, _ = step(state, jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), method_case.batch(seed=number)))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[0], x[1]), state)
    state = jax.tree.map(lambda x: x[0], state)
  state = jax.device_get(state)
  after, first, at_the_border = flat(state.params), flat(start['params']), 0
  for path, radius in radii(method):
    if path not in after:
      continue
    if path.endswith('scale'):
      here, there = (flat(stats)[f'{path[:-5]}var'] for stats in (state.batch_stats, start['batch_stats']))
      offset = after[path] / np.sqrt(here + 1e-6, dtype=np.float64) - first[path] / np.sqrt(there + 1e-6,
                                                                                            dtype=np.float64)
      farthest = np.abs(offset).max()
    else:
      radius = 0.6 * ((after[path].shape[-1] / 4)**0.5 if norm == 'frobenius'
                      else 1.0) if path.startswith('heads') else radius
      farthest = length(after[path].astype(np.float64) - first.get(path, 0.0), norm).max()
    assert farthest <= radius * (1 + 1e-4), path
    at_the_border += farthest > radius * (1 - 1e-4)
  assert at_the_border == 6, 'two kernels, two scales, two heads'
  assert np.abs(after['conv1/kernel'] - first['conv1/kernel']).max() > 0.05, 'what is free went farther'


def test_what_is_frozen_keeps_every_bit():
  """The constraint would move it: the start is another network."""
  model = one_stage(batch_norm='frozen', frozen='layer1/0/conv2/.*')
  active = {'layerwise': Layerwise('frobenius', radius=0.01)}
  before = method_case.run(active, steps=0, model=model)[0].replace(start=method_case.start_of(model, seed=9))
  state, _ = method_case.run(active, model=model, state=before)
  stays = flat(frozen_mask(model, state.params))
  for path, value in flat(state.params).items():
    assert (value.tobytes() == np.asarray(flat(before.params)[path]).tobytes()) == stays[path], path


@pytest.mark.parametrize('norm', sorted(NORMS))
def test_penalty(norm):
  """The published sum in float64; its gradient against differences; nothing is projected."""
  method = Layerwise(norm, 'penalty', growth=1.7, weight=0.3, head_weight=0.2)
  start, params, stats = far_away()
  first = flat(start['params'])
  size = {'frobenius': lambda t: np.sum(t**2), 'mars': lambda t: length(t, 'mars').max()}[norm]
  weights = {'layer1': 0.3, 'layer2': 0.3, 'layer3': 0.3 * 1.7, 'layer4': 0.3 * 1.7**2, 'heads': 0.2}
  expected = sum(weights[path.split('/')[0]] * size(value.astype(np.float64) - first.get(path, 0.0))
                 for path, value in flat(params).items()
                 if path.split('/')[0] in weights and not path.endswith('bias'))
  step_context = lambda params: methods.StepContext(method_case.network(), params, stats, start, None, {}, {}, None,
                                                    None,
                                               None, None, None)
  assert method.project(method_case.network(), params, stats, start) is params
  with jax.enable_x64():
    wide = jax.tree.map(lambda x: x.astype(np.float64), params)
    loss = lambda params: method.loss(step_context(params), {}).loss
    gradient = jax.jit(jax.grad(loss), compiler_options=method_case.QUICK)(wide)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), wide)
    value_of = jax.jit(loss, compiler_options=method_case.QUICK)
    np.testing.assert_allclose(value_of(wide), expected, rtol=1e-12)
    moved = lambda step: value_of(jax.tree.map(lambda x, d: x + step * d, wide, direction))
    along = sum(np.sum(np.asarray(g) * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))
    np.testing.assert_allclose(along, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-6)


def test_same_whatever_the_split():
  active = {'layerwise': Layerwise('mars', 'penalty', weight=0.1)}
  method_case.assert_same_whatever_the_split(active, model=one_stage(batch_norm='frozen'))


def test_bad_settings():
  context = method_case.context(method_case.network())
  for fields, message in ((dict(distance='frob'),
                           r"layerwise.distance is 'frob'; known: frobenius, mars, or '' for none"),
                          (dict(form='ball'), r"layerwise.form is 'ball'; known: constraint, penalty"),
                          (dict(radius=0.0), r'layerwise.radius is 0.0; expected a number above 0'),
                          (dict(radius=-1.0), r'layerwise.radius is -1.0; expected a number above 0'),
                          (dict(head_radius=0.0), r'layerwise.head_radius is 0.0; expected a number above 0'),
                          (dict(growth=0.0), r'layerwise.growth is 0.0; expected a number above 0'),
                          (dict(weight=-0.1), r'layerwise.weight is -0.1; expected a number from 0')):
    with pytest.raises(ValueError, match=message):
      methods.check(methods.active({'layerwise': {'distance': 'mars', **fields}}), context)
  assert not methods.active({'layerwise': {'radius': 3.0}})
  with pytest.raises(ValueError,
                     match='methods.layerwise needs pre-trained weights, but config.model.weights is empty'):
    methods.check(methods.active({'layerwise': {'distance': 'mars'}}), dataclasses.replace(context, pretrained=False))
