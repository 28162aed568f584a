"""Bi-Tuning: both divergences, the key encoder and the queues, against the formulas written out example by example in
float64.
"""

import functools

import jax
import method_case
import numpy as np
import pytest

from ft_jax import methods
from ft_jax.methods.base import SetupContext, StepContext
from ft_jax.methods.bi_tuning import BiTuning
from ft_jax.methods.bss import BSS
from ft_jax.models import resnet
from ft_jax.models.resnet import Outputs
from ft_jax.parallel import AXIS

CLASSES, BATCH, WIDTH, QUEUE = 3, 7, 32, 2
METHOD = BiTuning(weight=0.7, queue=QUEUE, temperature=0.3, momentum=0.8, projection=6)
STEP = {'bi_tuning': BiTuning(1.0, queue=3, momentum=0.5), 'bss': BSS(0.05, 4)}

# One stage of one block: enough of a network for what is tested here.
NETWORK = resnet.ResNet((1,), resnet.BasicBlock, heads={}, width=8, stem='3x3', batch_norm='frozen')


def unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x)


class Reference:
  """The method, one example after the other."""

  def __init__(self, state):
    self.h = [list(ring.astype(np.float64)) for ring in state['h']]
    self.z = [list(ring.astype(np.float64)) for ring in state['z']]
    self.next = [0] * CLASSES
    self.key = None

  def step(self, features, view, params, labels) -> float:
    """The loss of one step; `params` are (network, projection kernel and bias, head kernel and bias)."""
    network, kernel, bias, head, head_bias = (p.astype(np.float64) for p in params)
    now = (network, kernel, bias)
    self.key = now if self.key is None else tuple(0.8 * old + 0.2 * new for old, new in zip(self.key, now))
    keys = view @ self.key[0]
    before = [list(ring) for ring in self.z]
    new = [(unit(np.append(k, 1.0)), unit(k @ self.key[1] + self.key[2])) for k in keys]
    for y, (h, z) in zip(labels, new):
      self.h[y][self.next[y]], self.z[y][self.next[y]] = h, z
      self.next[y] = (self.next[y] + 1) % QUEUE
    loss = 0.0
    for f, y, (_, k) in zip(features.astype(np.float64), labels, new):
      h, z, w = unit(np.append(f, 1.0)), unit(f @ kernel + bias), unit(np.append(head[:, y], head_bias[y]))
      for query, current, queues in ((z, z @ k, before), (w, w @ h, self.h)):
        others = [query @ q for c in range(CLASSES) if c != y for q in queues[c]]
        logits = np.array([current, *(query @ q for q in queues[y]), *others]) / 0.3
        logs = logits - np.log(np.sum(np.exp(logits)))
        u = 1 / (QUEUE + 1)
        loss += np.sum(u * (np.log(u) - logs[:QUEUE + 1])) / len(labels)
    return 0.7 * loss


def context() -> SetupContext:
  return method_case.context(method_case.network(), classes=CLASSES, labels=np.zeros(9, np.int32), batch_size=BATCH)


def term(network, projection, heads, features, state, view, labels, step):
  """The method's term; the network is one matrix."""
  params = {'layer': network, 'heads': {'target': heads}, 'methods': {'bi_tuning': projection}}
  forward = lambda variables, images: (Outputs(images @ variables['params']['layer'], {}, {}), variables['batch_stats'])
  context = StepContext(NETWORK, params, {'mean': np.zeros(1)}, {}, None, {'target': Outputs(features, {}, {})},
                     {'target/key': view}, labels, labels, step,
              jax.random.key(0), forward)
  loss = lambda state: METHOD.loss(context, state)[:2]
  return jax.tree.map(lambda x: x[0], jax.vmap(loss, in_axes=None, axis_size=1, axis_name=AXIS)(state))


def test_against_the_formulas():
  """Over some steps: losses, queues (also where a class comes more often than its queue is long) and their places;
  gradients in float64.
  """
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape)
  state = METHOD.setup(context())
  np.testing.assert_allclose(np.linalg.norm(state['z'], axis=-1), 1.0, rtol=1e-6)
  state['key'] = {'params': {'layer': np.zeros((5, WIDTH))}, 'batch_stats': {'mean': np.zeros(1)},
                  'projection': state['key']['projection']}
  reference = Reference(state)
  with jax.enable_x64(True):
    gradient = jax.jit(jax.value_and_grad(term, (0, 1, 2, 3), has_aux=True))
    state = jax.tree.map(lambda x: x if x.dtype == np.int32 else x.astype(np.float64), state)
    for step, labels in enumerate(([0, 1, 2, 0, 1, 0, 1], [2, 2, 2, 2, 2, 0, 0], [1, 1, 1, 0, 0, 2, 0])):
      network, kernel, bias = draw(5, WIDTH), draw(WIDTH, 6), draw(6)
      head, head_bias = draw(WIDTH, CLASSES), draw(CLASSES)
      features, view, labels = draw(BATCH, WIDTH), draw(BATCH, 5), np.asarray(labels, np.int32)
      inputs = network, {'kernel': kernel, 'bias': bias}, {'kernel': head, 'bias': head_bias}, features
      rest = state, view, labels, step
      (loss, after), slopes = gradient(*inputs, *rest)
      np.testing.assert_allclose(loss, reference.step(features, view, (network, kernel, bias, head, head_bias), labels),
                                 rtol=1e-10)
      for name, rings in (('h', reference.h), ('z', reference.z)):
        np.testing.assert_allclose(after[name], np.array(rings), atol=1e-10)
      assert after['next'].tolist() == reference.next
      # Keys and the head are not trained: it is the features and the projection that have a gradient.
      assert not np.any(slopes[0]) and not np.any(slopes[2]['kernel']) and not np.any(slopes[2]['bias'])
      directions = {'kernel': draw(WIDTH, 6), 'bias': draw(6)}, draw(BATCH, WIDTH)
      slope = sum(np.sum(a * np.asarray(b)) for a, b in zip(jax.tree.leaves(directions),
                                                            jax.tree.leaves((slopes[1], slopes[3]))))
      # The key encoder, which follows the trained projection, is held where it was.
      held = lambda projection, key=after['key'], network=network: {
          'params': {'layer': (key['params']['layer'] - 0.2 * network) / 0.8}, 'batch_stats': key['batch_stats'],
          'projection': jax.tree.map(lambda k, p: (k - 0.2 * p) / 0.8, key['projection'], projection)}
      ends = []
      for end in (1e-6, -1e-6):
        projection, moved = jax.tree.map(lambda x, d, end=end: x + end * d, (inputs[1], features), directions)
        ends.append(gradient(network, projection, inputs[2], moved, state | {'key': held(projection)}, view, labels,
                             1)[0][0])
      np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-6)
      state = after


def test_key_encoder_starts_as_the_network_and_follows_it():
  state, _ = method_case.run(STEP, model=NETWORK)
  key, began = state.methods['bi_tuning']['key'], method_case.start_of(NETWORK)
  jax.tree.map(np.testing.assert_array_equal, key['params'], {k: v for k, v in began['params'].items() if k != 'heads'})
  jax.tree.map(np.testing.assert_array_equal, key['batch_stats'], began['batch_stats'])
  after, _ = method_case.run(STEP, model=NETWORK, state=state)
  moved = after.methods['bi_tuning']['key']
  follow = functools.partial(jax.tree.map, lambda old, new, got: np.testing.assert_allclose(got, 0.5 * (old + new),
                                                                                            atol=1e-7))
  follow(key['params'], {name: state.params[name] for name in key['params']}, moved['params'])
  follow(key['projection'], state.params['methods']['bi_tuning'], moved['projection'])


def test_same_whatever_the_split():
  """Queues, and (for test_bss.py) singular values of the whole batch."""
  method_case.assert_same_whatever_the_split(STEP, model=NETWORK)


def test_bad_settings():
  context = method_case.context(method_case.network())
  for field, value, expected in (('queue', 0, 'a whole number from 1'), ('projection', 0, 'a whole number from 1'),
                                 ('temperature', 0.0, 'a number above 0'), ('momentum', 1.5, 'a number from 0 to 1')):
    with pytest.raises(ValueError, match=f'bi_tuning.{field} is {value}; expected {expected}'):
      methods.check(methods.active({'bi_tuning': {'weight': 1.0, field: value}}), context)
