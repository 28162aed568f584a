"""BYOL: the loss, the target network and the projector's statistics against the formulas in float64."""

import jax
import method_case
import numpy as np
import pytest

from ft_jax import methods
from ft_jax.methods.base import StepContext
from ft_jax.methods.byol import BYOL
from ft_jax.models import resnet
from ft_jax.models.network import Outputs
from ft_jax.models.weights import project
from ft_jax.parallel import AXIS

BATCH, WIDTH, STEPS = 8, 6, 4
METHOD = BYOL(enabled=True, momentum=0.7, hidden=7, projection=5)


def tiny(**kwargs) -> resnet.ResNet:
  """One stage of one block: what is compiled quickly."""
  return resnet.ResNet((1,), resnet.BasicBlock, heads={}, width=4, stem='3x3', **kwargs)


def unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def mlp(params, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The output, and mean and variance in between."""
  x = x @ params['0']['kernel']
  mean, var = x.mean(0), x.var(0)
  hidden = np.maximum((x - mean) / np.sqrt(var + 1e-5) * params['1']['scale'] + params['1']['bias'], 0)
  return hidden @ params['2']['kernel'], mean, var


class Reference:
  """The method; the network is one matrix."""

  def __init__(self):
    self.target, self.steps = None, 0
    self.mean, self.var = np.zeros(7), np.ones(7)

  def step(self, views, network, own) -> float:
    views, network, own = jax.tree.map(lambda x: np.asarray(x, np.float64), (views, network, own))
    now = (network, own['projector'])
    if self.target is None:
      self.target = now
    else:  # after the update of the step before
      kept = 1 - 0.3 * (np.cos(np.pi * (self.steps - 1) / STEPS) + 1) / 2
      self.target = jax.tree.map(lambda a, b: kept * a + (1 - kept) * b, self.target, now)
    self.steps += 1
    targets = [unit(mlp(self.target[1], view @ self.target[0]['layer'])[0]) for view in views]
    projected = [mlp(own['projector'], view @ network['layer']) for view in views]
    predicted = [unit(mlp(own['predictor'], z)[0]) for z, _, _ in projected]
    self.mean = 0.9 * self.mean + 0.05 * (projected[0][1] + projected[1][1])
    self.var = 0.9 * self.var + 0.05 * (projected[0][2] + projected[1][2])
    return sum(np.mean(np.sum((p - z) ** 2, -1)) for p, z in zip(predicted, reversed(targets)))


def term(views, network, own, state, step, devices):
  """The method's loss, state and metrics."""
  forward = lambda variables, images: (Outputs(images @ variables['params']['layer'], {}, {}), {})
  model = method_case.network(axis_name=AXIS)

  def loss(first, second):
    outputs = {'source': Outputs(first @ network['layer'], {}, {}),
               'source/second': Outputs(second @ network['layer'], {}, {})}
    context = StepContext(model, {**network, 'methods': {'byol': own}}, {}, {}, None, outputs,
                          {'source': first, 'source/second': second}, None, None, step, jax.random.key(7), forward)
    return METHOD.loss(context, state)

  found = jax.vmap(loss, axis_name=AXIS)(*(view.reshape(devices, -1, WIDTH) for view in views))
  jax.tree.map(lambda x: np.testing.assert_allclose(x, np.broadcast_to(x[:1], x.shape), rtol=1e-6), found.state)
  return np.mean(found.loss), jax.tree.map(lambda x: np.asarray(x[0]), found.state), found.metrics


@pytest.mark.parametrize('devices', [1, 2])
def test_against_the_formulas(devices):
  """Losses, target network and statistics over the four steps of a training; on two devices the same, as BatchNorm is
  synchronised."""
  setup = method_case.context(method_case.network(), batch_size=BATCH, steps=STEPS)
  METHOD.check(setup)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  network = {'layer': draw(WIDTH, WIDTH)}
  own = METHOD.params(setup)
  own['projector']['0']['kernel'] = draw(WIDTH, 7)
  state = METHOD.setup(setup)
  state['target'] = jax.tree.map(np.zeros_like, {'network': network, 'projector': own['projector']})
  reference = Reference()
  for step in range(STEPS):
    views = draw(2, BATCH, WIDTH)
    loss, state, metrics = term(views, network, own, state, step, devices)
    assert loss == pytest.approx(reference.step(views, network, own), rel=1e-4)
    np.testing.assert_allclose(state['target']['network']['layer'], reference.target[0]['layer'], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state['statistics']['mean'], reference.mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state['statistics']['var'], reference.var, rtol=1e-4)
    assert 0.2 < metrics['spread'][0] < 1.2
    network = jax.tree.map(lambda x: x * np.float32(1.2), network)
    own = jax.tree.map(lambda x: x + np.float32(0.05), own)
  # The head that is kept for `selection.features=projection`: the projector with its running statistics.
  x = draw(BATCH, WIDTH)
  wide = (x @ own['projector']['0']['kernel'] - reference.mean) / np.sqrt(reference.var + 1e-5)
  norm = own['projector']['1']
  expected = np.maximum(wide * norm['scale'] + norm['bias'], 0) @ own['projector']['2']['kernel']
  np.testing.assert_allclose(project(METHOD.projection_head(own, state), x), expected, rtol=1e-3, atol=1e-4)


def test_a_step_is_the_same_on_two_devices():
  """Two steps of a ResNet whose BatchNorm is synchronised; a collapsed projection has no spread."""
  active = {'byol': BYOL(True, hidden=16, projection=8)}
  one, history = method_case.pretrain(active, steps=2, model=tiny(axis_name=AXIS))
  two, other = method_case.pretrain(active, steps=2, model=tiny(axis_name=AXIS), devices=2)
  method_case.assert_same(one, two, 2e-3)
  for metrics, expected in zip(other, history):
    assert metrics == pytest.approx(expected, rel=1e-3)
  assert set(history[0]) == {'loss', 'loss_byol', 'byol/spread', 'gradient_norm'}


def test_interrupted_equals_uninterrupted():
  """Bit for bit, the rising momentum too."""
  run = lambda **kwargs: method_case.pretrain({'byol': BYOL(True, hidden=16, projection=8)}, model=tiny(), **kwargs)
  whole, _ = run(steps=3)
  state, _ = run(steps=1)
  resumed, _ = run(steps=2, first=1, state=state)
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)


@pytest.mark.parametrize('method, model, context, message', [
    (BYOL(True), {'batch_norm': 'frozen'}, {}, "model.batch_norm is 'frozen', with which methods.byol may collapse: .* "
                                               'only BatchNorm over the images of a batch keeps all features'),
    (BYOL(True), {}, {'batch_size': 4}, 'train.batch_size is 4, 1 image for each device; .* at least 2 for each'),
    (BYOL(True), {'axis_name': AXIS}, {'batch_size': 1}, 'train.batch_size is 1'),
    (BYOL(True, momentum=-0.1), {}, {}, 'methods.byol.momentum is -0.1; expected a number from 0 to 1'),
    (BYOL(True, hidden=0), {}, {}, 'methods.byol.hidden is 0; expected a whole number from 1'),
])
def test_wrong_settings_are_refused(method, model, context, message):
  with pytest.raises(ValueError, match=message):
    methods.check({'byol': method}, method_case.context(tiny(**model), **context))
