"""SGD is torch's, step by step; rates and decay go by pattern and leave nothing out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ft_jax import optimizer

PARAMS = {'conv1': {'kernel': np.full((2, 2), 0.5, np.float32)}, 'heads': {'target': {'bias': np.full(3, -1.0, np.float32)}}}


def make(**kwargs):
  defaults = dict(momentum=0.9, nesterov=True, weight_decay=0.01, learning_rate_groups=(('heads/.*', 10.0), ('.*', 1.0)),
                  weight_decay_groups=(('.*/bias', 0.0), ('.*', 1.0)))
  return optimizer.make_optimizer('sgd', optax.constant_schedule(0.1), PARAMS, **{**defaults, **kwargs})


@pytest.mark.parametrize('nesterov', [True, False])
def test_equals_torchs_formula(nesterov):
  """g += decay * w; buffer = momentum * buffer + g; step along g + momentum * buffer (Nesterov) or buffer; in float64."""
  tx = make(nesterov=nesterov)
  params, state = jax.tree.map(jnp.asarray, PARAMS), None
  state = tx.init(params)
  w = {'kernel': PARAMS['conv1']['kernel'].astype(np.float64), 'bias': PARAMS['heads']['target']['bias'].astype(np.float64)}
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


@pytest.mark.parametrize('kwargs,words', [
    ({'kind': 'linear'}, 'milestones, cosine, constant'), ({'warmup': 1.0}, 'from 0 to below 1'),
    ({'milestones': (60, 80)}, 'parts of the run between 0 and 1')])
def test_schedule_errors(kwargs, words):
  with pytest.raises(ValueError, match=words):
    rates(kwargs.pop('kind', 'milestones'), **kwargs)


@pytest.mark.parametrize('kind', ['adam', 'amsgrad', 'adamw'])
def test_adam_equals_torchs_formula(kind):
  """Moments, their corrections and the maximum (before its correction, unlike optax's) in float64; adamw decays apart from them."""
  tx = optimizer.make_optimizer(kind, optax.constant_schedule(0.01), PARAMS, weight_decay=0.02)
  params = jax.tree.map(jnp.asarray, PARAMS)
  state, w = tx.init(params), PARAMS['conv1']['kernel'].astype(np.float64)
  m = v = most = np.zeros_like(w)
  rng = np.random.default_rng(0)
  for t in range(1, 41):
    g = rng.normal(size=(2, 2)) * (100.0 if t < 3 else 1.0)  # the largest second moments lie behind: the maximum matters
    grads = {'conv1': {'kernel': g.astype(np.float32)}, 'heads': {'target': {'bias': np.zeros(3, np.float32)}}}
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    decayed = g + 0.02 * w if kind != 'adamw' else g
    m, v = 0.9 * m + 0.1 * decayed, 0.999 * v + 0.001 * decayed**2
    most = np.maximum(most, v) if kind == 'amsgrad' else v
    step = m / (1 - 0.9**t) / (np.sqrt(most / (1 - 0.999**t)) + 1e-8)
    w = w - 0.01 * (step + 0.02 * w if kind == 'adamw' else step)
    np.testing.assert_allclose(params['conv1']['kernel'], w, rtol=2e-5)
