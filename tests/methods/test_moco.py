"""MoCo: the loss, the queue and the key encoder against the formulas written out image by image in float64."""

import jax
import jax.numpy as jnp
import method_case
import numpy as np
import pytest

from ft_jax import methods
from ft_jax.methods.base import StepContext
from ft_jax.methods.moco import MoCo
from ft_jax.models import resnet
from ft_jax.models.network import Outputs
from ft_jax.parallel import AXIS

BATCH, WIDTH, QUEUE = 4, 6, 12
METHOD = MoCo(queue=QUEUE, temperature=0.3, momentum=0.8, projection=5)
RNG = np.random.default_rng(0)
START = {'layer': RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32)}


def tiny(**kwargs) -> resnet.ResNet:
  """One stage of one block: what is compiled quickly."""
  return resnet.ResNet((1,), resnet.BasicBlock, heads={}, width=4, stem='3x3', **kwargs)


def unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x)


def project(mlp, x: np.ndarray) -> np.ndarray:
  """One image."""
  hidden = np.maximum(x @ mlp['0']['kernel'] + mlp['0']['bias'], 0)
  return unit(hidden @ mlp['2']['kernel'] + mlp['2']['bias'])


class Reference:
  """The method, one image after the other."""

  def __init__(self, queue):
    self.queue = list(queue.astype(np.float64))  # the oldest first, after the first round
    self.next = 0
    self.key = None

  def step(self, features, views, network, mlp) -> float:
    now = jax.tree.map(lambda x: x.astype(np.float64), (network, mlp))
    self.key = now if self.key is None else jax.tree.map(lambda a, b: 0.8 * a + 0.2 * b, self.key, now)
    keys = [project(self.key[1], view @ self.key[0]['layer']) for view in views.astype(np.float64)]
    losses = []
    for x, key in zip(features.astype(np.float64), keys):
      query = project(now[1], x)
      logits = np.array([query @ key, *(query @ old for old in self.queue)]) / 0.3
      losses.append(np.log(np.sum(np.exp(logits))) - logits[0])
    for key in keys:
      self.queue[self.next] = key
      self.next = (self.next + 1) % QUEUE
    return np.mean(losses)


def term(features, views, network, mlp, state, step, devices=1, model=None, forward=None):
  """The method's loss and state; the network is one matrix."""
  forward = forward or (lambda variables, images: (Outputs(images @ variables['params']['layer'], {}, {}), {}))
  model = model or method_case.network(batch_norm='frozen')

  def loss(features, views):
    context = StepContext(model, {**network, 'methods': {'moco': mlp}}, {}, {}, None,
                          {'source': Outputs(features, {}, {})}, {'source/key': views}, None, None, step,
                          jax.random.key(7), forward)
    return METHOD.loss(context, state)

  split = lambda x: x.reshape(devices, -1, *x.shape[1:])
  found = jax.vmap(loss, axis_name=AXIS)(split(features), split(views))
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), found.state)
  return np.mean(found.loss), jax.tree.map(lambda x: np.asarray(x[0]), found.state)


def start_state():
  """The method's parameters and state before the first step, for the network of one matrix."""
  setup = method_case.context(method_case.network(), batch_size=BATCH, labels=np.zeros(20, np.int32))
  METHOD.check(setup)
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  mlp = {'0': {'kernel': draw(WIDTH, WIDTH), 'bias': draw(WIDTH)}, '2': {'kernel': draw(WIDTH, 5), 'bias': draw(5)}}
  state = METHOD.setup(setup)
  np.testing.assert_allclose(np.linalg.norm(state['queue'], axis=-1), 1, rtol=1e-6)
  return mlp, {**state, 'key': {'network': jax.tree.map(np.zeros_like, START), 'projection': mlp}}


@pytest.mark.parametrize('devices', [1, 2])
@pytest.mark.parametrize('batch_norm', ['frozen', 'train'])
def test_against_the_formulas(devices, batch_norm):
  """Losses, key encoder and queue over five steps, in which the queue goes round once and begins again; on two devices
  the same, shuffled or not."""
  mlp, state = start_state()
  reference = Reference(state['queue'])
  network = START
  rng = np.random.default_rng(2)
  for step in range(5):
    features, views = rng.normal(size=(2, BATCH, WIDTH)).astype(np.float32)
    model = method_case.network(batch_norm=batch_norm)
    loss, state = term(features, views, network, mlp, state, step, devices, model)
    np.testing.assert_allclose(loss, reference.step(features, views, network, mlp), rtol=1e-5)
    np.testing.assert_allclose(state['queue'], reference.queue, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state['key']['network']['layer'], reference.key[0]['layer'], rtol=1e-5)
    assert int(state['next']) == reference.next == (step + 1) * BATCH % QUEUE
    network = jax.tree.map(lambda x: x * np.float32(1.1), network)
    mlp = jax.tree.map(lambda x: x * np.float32(0.9), mlp)


@pytest.mark.parametrize('shuffled', [True, False])
def test_keys_are_shuffled_over_devices(shuffled):
  """The images of a device's queries are not those that its key encoder sees, unless BatchNorm is synchronised; every
  query gets the key of its own image all the same."""
  mlp, state = start_state()
  views = np.random.default_rng(3).normal(size=(BATCH, WIDTH)).astype(np.float32)
  model = method_case.network(axis_name=None if shuffled else AXIS)

  def keys(images):
    seen = []

    def forward(variables, images):
      seen.append(images)
      return Outputs(images, {}, {}), {}

    context = StepContext(model, {}, {}, {}, None, {}, {'source/key': images}, None, None, 0, jax.random.key(7),
                          forward)
    return (*METHOD._keys(context, state['key']), *seen)

  mine, everything, seen = jax.vmap(keys, axis_name=AXIS)(views.reshape(2, 2, WIDTH))
  np.testing.assert_allclose(mine.reshape(BATCH, -1), [project(mlp, x) for x in views], rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(everything[0], mine.reshape(BATCH, -1))
  order = np.asarray(jax.random.permutation(jax.random.key(7), BATCH)) if shuffled else np.arange(BATCH)
  assert shuffled == (set(order[:2].tolist()) != {0, 1})
  np.testing.assert_array_equal(seen.reshape(BATCH, WIDTH), views[order])


def test_a_step_is_the_same_on_two_devices_where_batch_norm_is():
  """Two steps of a ResNet whose BatchNorm is synchronised: the loss falls from that of a random guess, and two devices
  give what one gives."""
  active = {'moco': MoCo(queue=32, momentum=0.9, projection=8)}
  for model in (tiny(axis_name=AXIS), tiny(batch_norm='frozen')):
    one, history = method_case.pretrain(active, steps=2, model=model)
    two, other = method_case.pretrain(active, steps=2, model=model, devices=2)
    method_case.assert_same(one, two, 2e-3)
    for metrics, expected in zip(other, history):
      assert metrics == pytest.approx(expected, rel=1e-3)
    assert set(history[0]) == {'loss', 'loss_moco', 'moco/top1', 'gradient_norm'}


def test_interrupted_equals_uninterrupted():
  """Bit for bit, shuffled over microbatches, in bfloat16; parameters and state are float32 all the same."""
  active = {'moco': MoCo(queue=32, projection=8)}
  run = lambda **kwargs: method_case.pretrain(active, model=tiny(dtype=jnp.bfloat16), microbatches=2, **kwargs)
  whole, _ = run(steps=3)
  state, _ = run(steps=1)
  resumed, _ = run(steps=2, first=1, state=state)
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  assert {leaf.dtype for leaf in jax.tree.leaves((whole.params, whole.methods))} == {np.dtype('f4'), np.dtype('i4')}


def test_frozen_layers_stay():
  """In the network and in the key encoder, to the last bit."""
  model = tiny(frozen='conv1/.*|bn1/.*')
  before, _ = method_case.pretrain({'moco': MoCo(queue=32, projection=8)}, steps=0, model=model)
  after, _ = method_case.pretrain({'moco': MoCo(queue=32, projection=8)}, steps=2, model=model)
  for layer in ('conv1', 'bn1'):
    jax.tree.map(np.testing.assert_array_equal, after.params[layer], before.params[layer])
    jax.tree.map(np.testing.assert_array_equal, after.methods['moco']['key']['network'][layer], before.params[layer])
  assert np.abs(after.params['layer1']['0']['conv1']['kernel'] - before.params['layer1']['0']['conv1']['kernel']).max()


@pytest.mark.parametrize('method, context, message', [
    (MoCo(queue=100), {}, r'methods.moco.queue is 100, which batches of 16 images \(train.batch_size\) do not fill '
                          'evenly; use 96 or 112'),
    (MoCo(queue=8), {}, 'methods.moco.queue is 8, .* use 16'),
    (MoCo(queue=64), {'labels': np.zeros(50, np.int32)}, 'only 50 training images, so an image would be compared with '
                                                         'keys of its own; use at most 48'),
    (MoCo(queue=4), {'batch_size': 1}, 'train.batch_size is 1; methods.moco compares the images of a batch: use at '
                                       'least 2'),
    (MoCo(queue=16, temperature=0.0), {}, 'methods.moco.temperature is 0.0; expected a number above 0'),
    (MoCo(queue=16, momentum=1.5), {}, 'methods.moco.momentum is 1.5; expected a number from 0 to 1'),
    (MoCo(queue=16, projection=0), {}, 'methods.moco.projection is 0; expected a whole number from 1'),
    (MoCo(queue=-16), {}, 'methods.moco.queue is -16; expected a number above 0'),
])
def test_wrong_settings_are_refused(method, context, message):
  known = {'labels': np.zeros(0, np.int32), **context}
  with pytest.raises(ValueError, match=message):
    methods.check({'moco': method}, method_case.context(method_case.network(heads={}), **known))


def test_one_device_is_told(monkeypatch, caplog):
  """BatchNorm leaks where nothing is shuffled: on one device with one microbatch, unless it is synchronised or
  frozen."""
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  setup = lambda model, **kwargs: MoCo(queue=16).setup(method_case.context(model.clone(heads={}), **kwargs))
  setup(method_case.network(axis_name=AXIS))
  setup(method_case.network(batch_norm='frozen'))
  setup(method_case.network(), microbatches=2)
  assert not caplog.records
  setup(method_case.network())
  assert 'methods.moco shuffles keys over devices, and there is one device' in caplog.text
