"""RegSL's label correction and reweighting: labels, weights and temperature are those of a plain loop in float64, on
any devices.
"""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import method_case
import numpy as np
import pytest

from ft_jax import methods
from ft_jax.methods.self_label import schedule, SelfLabel
from ft_jax.models import resnet
from ft_jax.models.resnet import Outputs
from ft_jax.parallel import AXIS


def context(labels, true_labels=None, batch_size=8):
  """What a method is set up with, where only labels matter."""
  labels = np.asarray(labels, np.int32)
  true_labels = labels if true_labels is None else true_labels
  return method_case.context(method_case.network(), classes=4, labels=labels, true_labels=true_labels,
                             batch_size=batch_size)


def step_context(logits, index, labels, step):
  outputs = {'target': Outputs(jnp.zeros((len(logits), 1)), {'target': logits}, {})}
  return methods.StepContext(None, {}, {}, {}, None, outputs, {}, labels, index, step, None, None)


def on_devices(function, devices):
  """As in a step: batches split over devices, state and step the same on each, what comes out of the first one or put
  together.
  """
  mapped = jax.jit(jax.vmap(function, in_axes=(0, None, None), axis_name=AXIS), compiler_options=method_case.QUICK)

  def call(batch, state, step):
    split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
    return jax.device_get(mapped(split, state, step))

  return call


@pytest.mark.parametrize('devices', [1, 4])
@pytest.mark.parametrize('temperature', [0.5, 1.0, 1.5, 2.0])
def test_reference_weights(shared, devices, temperature):
  """The weights of a recorded batch sum to one, and their mean over devices is one; the loss is the recorded one."""
  arrays = np.load(shared / 'reference' / 'regsl' / 'fixtures.npz')
  losses = arrays['per_sample_loss'].astype(np.float32)
  method = SelfLabel(True, reweight_epoch=1, temperature=temperature)
  state = method.setup(context(np.zeros(32), batch_size=32))
  weigh = on_devices(lambda batch, state, step: method.weigh(batch, step_context(batch[:, None], None, None, step),
                                                             state),
                     devices)
  weights = weigh(losses, state, 0).reshape(-1)
  np.testing.assert_allclose(weights / 32, arrays[f'w_T{temperature}'], rtol=2e-6)
  np.testing.assert_allclose(np.mean(weights * losses), arrays[f'loss_T{temperature}'], rtol=1e-6)
  np.testing.assert_allclose(np.mean(weights), 1, rtol=1e-6)


def test_reference_schedule(shared):
  """Thirty epochs with reweighting from the fifth on: the temperature of each."""
  expected = np.load(shared / 'reference' / 'regsl' / 'fixtures.npz')['temp_schedule_init2_adapt5']
  # What the weights of two losses say of the temperature: log(w1 / w2) = (l2 - l1) / tau. Epochs of 2.5 steps.
  method = SelfLabel(True, reweight_epoch=5, temperature=2.0)
  state = method.setup(context(np.zeros(20)))
  weigh = on_devices(lambda batch, state, step: method.weigh(batch, step_context(batch[:, None], None, None, step),
                                                             state),
                     1)
  for step in range(75):
    (first, second), = weigh(np.array([0.3, 1.8], np.float32), state, step)
    epoch = step * 8 // 20 + 1  # of the first image of the step
    if epoch < 5:
      assert first == second == 1.0
    else:
      np.testing.assert_allclose(1.5 / np.log(first / second), expected[epoch - 1], rtol=1e-5)
  np.testing.assert_allclose(2 * schedule(jnp.arange(-5, 25)), expected, rtol=1e-6)


def simulated(method, labels, batches, batch_size):
  """A plain loop over the images of each batch in float64: labels and weights after each step."""
  labels, history = labels.copy(), []
  for step, (index, logits) in enumerate(batches):
    epoch = step * batch_size // len(labels) + 1
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    if epoch >= method.correct_epoch:
      for i, row in zip(index, p):
        if row.max() > method.threshold:
          labels[i] = row.argmax()
    losses = -np.log(p[np.arange(len(index)), labels[index]])
    weights = np.ones(len(index))
    if epoch >= method.reweight_epoch:
      tau = method.temperature * max(0.5, np.exp(-0.1 * max(epoch - 1 - method.reweight_epoch, 0)))
      weights = np.exp(-losses / tau) / np.exp(-losses / tau).sum() * len(index)
    history.append((labels.copy(), losses, weights))
  return history


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), devices=st.sampled_from([1, 2, 8]), reweight=st.integers(1, 3),
       correct=st.integers(1, 3),
       threshold=st.sampled_from([0.5, 0.9]), known=st.booleans())
def test_some_steps(seed, devices, reweight, correct, threshold, known):
  """Labels (of rows that come twice in a batch, too), losses, weights and metrics of nine steps of two steps an epoch
  and a bit.
  """
  rng = np.random.default_rng(seed)
  method = SelfLabel(True, reweight, correct, threshold, 1.5)
  true, given = rng.integers(0, 4, 19).astype(np.int32), rng.integers(0, 4, 19).astype(np.int32)
  batches = [(rng.integers(0, 19, 8).astype(np.int32), (4 * rng.normal(size=(8, 4))).astype(np.float32))
             for _ in range(9)]
  state = method.setup(context(given, true if known else None))

  def step_of(batch, state, step):
    context = step_context(batch['logits'], batch['index'], batch['labels'], step)
    labels, state, metrics = method.relabel(context, state)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(batch['logits']), labels[:, None], 1)[:, 0]
    return labels, losses, method.weigh(losses, context._replace(labels=labels), state), state, metrics

  run = on_devices(step_of, devices)
  for step, ((index, logits), (labels, losses, weights)) in enumerate(zip(batches, simulated(method, given, batches,
                                                                                             8))):
    used, found_losses, found_weights, states, metrics = run({'logits': logits, 'index': index, 'labels': given[index]},
                                                             state, step)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), (states, metrics))
    state, metrics = jax.tree.map(lambda x: x[0], (states, metrics))
    np.testing.assert_array_equal(state['labels'], labels)
    np.testing.assert_array_equal(used.reshape(-1), labels[index])
    np.testing.assert_allclose(found_losses.reshape(-1), losses, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found_weights.reshape(-1), weights, rtol=1e-3, atol=1e-6)
    changed = labels != given
    assert metrics['corrected'] == changed.sum()
    if known:
      np.testing.assert_allclose(metrics['true'], np.mean(labels == true), rtol=1e-6)
      np.testing.assert_allclose(metrics['precision'], np.mean(labels[changed] == true[changed]) if changed.any()
                                 else 0.0, rtol=1e-6)
    else:
      assert set(metrics) == {'corrected'}


def test_the_last_sure_view_counts():
  """Of an example that comes four times: sure, sure, unsure, and sure of what it was given."""
  method = SelfLabel(True, 99, 1)
  sure = lambda k: 20.0 * np.eye(4, dtype=np.float32)[k]
  for views, expected in (([1, 2], 2), ([2, 1], 1), ([1, 0], 0)):
    logits = np.stack([*(sure(k) for k in views), np.zeros(4, np.float32), sure(3)])
    index = np.array([0, 0, 0, 1], np.int32)
    for devices in (1, 2, 4):
      run = on_devices(lambda batch, state, step: method.relabel(step_context(*batch, batch[1], step),
                                                                 state)[1]['labels'],
                       devices)
      labels = run((logits, index), method.setup(context([0, 2, 2])), 0)
      np.testing.assert_array_equal(labels, np.tile([expected, 3, 2], (devices, 1)))


def test_epochs_that_never_come():
  """A number beyond every run, and one beyond int32, cost nothing and switch nothing on."""
  method = SelfLabel(True, 10**12, 10**6)
  state = method.setup(context(np.zeros(5_000_000)))
  assert state['correct_from'].dtype == state['reweight_from'].dtype == np.int32 and state['reweight_from'].nbytes < 100
  assert min(state['correct_from'], *state['reweight_from']) == 2**31 - 1


def test_same_whatever_the_split():
  """Labels corrected and examples weighted from the first step on, with rows that come twice."""
  examples = method_case.images(16, method_case.TARGETS)
  wrong = examples | {'label': np.roll(examples['label'], 1)}
  index = np.array([*range(12), 3, 3, 7, 0], np.int32)

  def batches(step):
    batch = method_case.batch(seed=step)
    batch['target'] = {key: value[index] for key, value in batch['target'].items()}
    return batch

  case = dict(batches=batches, examples=wrong,
              model=resnet.ResNet((1,), resnet.BasicBlock, heads={}, width=4, stem='3x3', batch_norm='frozen'))
  active = {'self_label': SelfLabel(True, 1, 1, 0.3, 1.5)}
  assert method_case.run(active, **case)[1][0]['self_label/corrected'] > 3, 'nothing to compare'
  method_case.assert_same_whatever_the_split(active, **case)


def test_bad_settings():
  context = method_case.context(method_case.network(), pretrained=False)
  for fields, message in ((dict(reweight_epoch=0), 'self_label.reweight_epoch is 0; expected an epoch from 1'),
                          (dict(correct_epoch=-2), 'self_label.correct_epoch is -2; expected an epoch from 1'),
                          (dict(threshold=1.0),
                           'self_label.threshold is 1.0; expected a probability from 0 to below 1'),
                          (dict(threshold=-0.1), 'self_label.threshold is -0.1; expected a probability'),
                          (dict(temperature=0.0), 'self_label.temperature is 0.0; expected a number above 0')):
    with pytest.raises(ValueError, match=message):
      methods.check(methods.active({'self_label': {'enabled': True, **fields}}), context)
  methods.check(methods.active({'self_label': {'enabled': True}}), context)  # without pre-trained weights, too
  assert {'mixup', 'cutmix'} == set(SelfLabel.excludes)
