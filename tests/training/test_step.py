"""The pmapped joint step is the plain formula on the whole batch, and the loop reads, evaluates, stops and ends where it should."""

import functools
import types

import flax
import jax
import jax.numpy as jnp
import method_case
import numpy as np
import optax
import pytest
from torch_record import error, Record

from ft_jax import parallel
from ft_jax.models import export, resnet
from ft_jax.training.loop import Observer, Stream
from ft_jax.training.optimizer import make_optimizer, parameter_factors
from ft_jax.training.step import create_state, Diverged, make_step, make_train_step, run_steps

LAMBDA = 0.3


def batch_of(rng, size, classes):
  return {'input': rng.integers(0, 255, (size, 16, 16, 3)).astype(np.uint8), 'label': rng.integers(0, classes, size).astype(np.int32)}


@pytest.fixture(scope='module')
def setting():
  rng = np.random.default_rng(0)
  batch = {'target': batch_of(rng, 8, 3), 'source': batch_of(rng, 16, 5)}
  model = resnet.build('resnet18', {'target': 3, 'source': 5}, width=4, axis_name=parallel.AXIS)
  return model, method_case.variables(model), batch


def step_once(model, variables, batch):
  optimizer = optax.sgd(0.1, 0.9, nesterov=True)
  state = parallel.replicate(create_state(variables, optimizer))
  step = make_train_step(model, optimizer, {'target': 1.0, 'source': LAMBDA})
  state, metrics = step(state, {name: parallel.shard(part) for name, part in batch.items()})
  return parallel.unreplicate(state), parallel.unreplicate(metrics)


def test_step_on_four_devices_is_the_formula_on_the_whole_batch(setting):
  """Loss, accuracy, running statistics and updated parameters, with BatchNorm over all devices."""
  model, variables, batch = setting
  state, metrics = step_once(model, variables, batch)
  alone = resnet.build('resnet18', {'target': 3, 'source': 5}, width=4)

  def loss_fn(params):
    images = np.concatenate([batch['target']['input'], batch['source']['input']])
    outputs, updates = alone.apply({'params': params, 'batch_stats': variables['batch_stats']}, images, train=True, mutable=['batch_stats'])
    losses = [-jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]) for logits, labels in (
        (outputs.logits['target'][:8], batch['target']['label']), (outputs.logits['source'][8:], batch['source']['label']))]
    return losses[0] + LAMBDA * losses[1], (losses, updates['batch_stats'], outputs.logits['target'][:8])

  (loss, (losses, batch_stats, logits)), gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(variables['params'])
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose([metrics['loss_target'], metrics['loss_source']], losses, rtol=1e-5)
  np.testing.assert_allclose(metrics['top1_target'], np.mean(np.argmax(logits, -1) == batch['target']['label']))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state.batch_stats, batch_stats)
  assert all((new != old).any() for new, old in zip(jax.tree.leaves([state.params, state.batch_stats]), jax.tree.leaves(
      [variables['params'], variables['batch_stats']]))), 'BatchNorm is not frozen here'
  # The first Nesterov step is 1.9 times the gradient.
  jax.tree.map(lambda new, old, g: np.testing.assert_allclose((old - new) / 0.19, g, rtol=1e-3, atol=2e-4 * float(jnp.abs(g).max()) + 1e-6),
               state.params, variables['params'], gradients)
  assert state.step == 1


def test_batch_norm_of_each_device_is_the_mean_over_devices(setting):
  """Without an axis name each device normalises with its own part of both streams; statistics are averaged."""
  _, variables, batch = setting
  model = resnet.build('resnet18', {'target': 3, 'source': 5}, width=4)
  state, _ = step_once(model, variables, batch)
  parts = [np.concatenate([batch['target']['input'][2 * d:2 * d + 2], batch['source']['input'][4 * d:4 * d + 4]]) for d in range(4)]
  apply = jax.jit(lambda images: model.apply(variables, images, train=True, mutable=['batch_stats'])[1]['batch_stats'])
  stats = [apply(part) for part in parts]
  jax.tree.map(lambda mean, *each: np.testing.assert_allclose(mean, np.mean(each, 0), rtol=1e-4, atol=1e-5), state.batch_stats, *stats)


def test_state_may_be_built_from_arrays_that_are_used_again(setting):
  """A donated step must not eat the variables that it was made from."""
  model, variables, batch = setting
  on_device = jax.tree.map(jnp.asarray, variables)
  first = step_once(model, on_device, batch)[0]
  second = step_once(model, on_device, batch)[0]
  jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_steps_equal_torchs(tmp_path):
  """Two Nesterov steps of torch.optim.SGD with weight decay on one device: gradients, statistics and parameters on four here."""
  record = Record('resnet18')
  variables = record.variables(tmp_path)
  model = resnet.build('resnet18', {'source': 7}, width=2, axis_name=parallel.AXIS)
  # Keeps the gradients of a step beside what the optimiser keeps.
  keep = optax.GradientTransformation(lambda params: params, lambda gradients, state, params=None: (gradients, gradients))
  tx = optax.chain(keep, make_optimizer('sgd', optax.constant_schedule(0.05), parameter_factors(variables['params']), momentum=0.9,
                                        nesterov=True, weight_decay=0.02))
  step = make_train_step(model, tx, {'source': 1.0})
  state = parallel.replicate(create_state(variables, tx))
  batch = {'source': parallel.shard({'input': record.images, 'label': record.labels})}
  state, _ = step(state, batch)
  first = parallel.unreplicate(state)
  state, _ = step(state, batch)
  second = parallel.unreplicate(state)
  for kind, values in (('gradients', {'params': first.opt_state[0]}), ('statistics', {'batch_stats': first.batch_stats}),
                       ('after', {'params': second.params})):
    values = export.state_dict(values, 'source')
    errors = {key: error(values[key], expected) for key, expected in record.tensors(kind).items()}
    assert max(errors.values()) < 1e-4, (kind, errors)


def test_frozen_batch_norm_keeps_every_bit(setting):
  """Statistics, scales and biases after steps of SGD with weight decay and momentum on four devices; all else moves."""
  _, variables, batch = setting
  rng = np.random.default_rng(1)
  noisy = jax.tree.map(lambda x: (x + rng.uniform(0.1, 0.3, x.shape)).astype(x.dtype), variables)
  noisy['params']['bn1']['bias'][0] = -0.0  # an update of zero would lose the sign
  model = resnet.build('resnet18', {'target': 3, 'source': 5}, width=4, batch_norm='frozen')
  factors = parameter_factors(noisy['params'], (('heads/.*', 10.0), ('.*bn.*', 2.0), ('.*', 1.0)))
  optimizer = make_optimizer('sgd', lambda step: 0.1, factors, momentum=0.9, nesterov=True, weight_decay=0.1)
  state = parallel.replicate(create_state(noisy, optimizer))
  step = make_train_step(model, optimizer, {'target': 1.0, 'source': LAMBDA})
  for _ in range(3):
    state, _ = step(state, {name: parallel.shard(part) for name, part in batch.items()})
  flat = lambda params, stats: flax.traverse_util.flatten_dict({'params': params, 'batch_stats': stats}, sep='/')
  before, copies = flat(noisy['params'], noisy['batch_stats']), flat(state.params, state.batch_stats)
  normalisation = {key for key in before
                   if key.startswith('batch_stats') or not key.startswith('params/heads') and key.endswith(('scale', 'bias'))}
  assert len(normalisation) == 20 * 4 and len(before) == 20 * 4 + 20 + 4
  for key, copy in copies.items():
    kept = all(np.asarray(shard.data).tobytes() == before[key].tobytes() for shard in copy.addressable_shards)
    assert kept == (key in normalisation), key


def test_frozen_batch_norm_normalises_with_running_statistics(setting):
  """The output of a training step's forward pass is that of evaluation."""
  _, variables, batch = setting
  model = resnet.build('resnet18', {'target': 3, 'source': 5}, width=4, batch_norm='frozen')
  images = batch['target']['input']
  outputs, updates = jax.jit(lambda: model.apply(variables, images, train=True, mutable=['batch_stats']))()
  np.testing.assert_array_equal(outputs.features, jax.jit(lambda: model.apply(variables, images).features)())
  jax.tree.map(np.testing.assert_array_equal, updates['batch_stats'], variables['batch_stats'])


class Recorder:

  def __init__(self, unfinished=(), bad=None):
    self.lines, self.evaluated, self.saved, self._unfinished, self._bad = [], [], [], unfinished, bad

  def wrote(self, step, metrics):
    self.lines.append((step, metrics))

  def evaluate(self, step, state):
    self.evaluated.append((step, state))
    return None if step in self._unfinished else {'val/loss': 0.5 if step != self._bad else float('inf')}

  def save(self, step, state, val):
    assert not self.lines or step <= self.lines[-1][0], 'saved before it was told of'
    self.saved.append((step, state, val is not None))


def loop(steps=10, start=0, losses=None, norms=None, stop=lambda: False, log_every=3, eval_every=4, last=1000, unfinished=(), bad=None,
         **kwargs):
  """The loop around a step that counts."""
  seen, recorder = [], Recorder(unfinished, bad)

  def step(state, batch):
    assert batch == state, 'the batch of another step'
    return state + 1, parallel.replicate({'loss': np.float32(state if losses is None else losses[state]),
                                          'gradient_norm': np.float32(1 if norms is None else norms[state])})

  state, done = run_steps(step, start, iter(range(start, last)), start=start, steps=steps, images=8, log_every=log_every,
                                due=lambda step: step > 0 and step % eval_every == 0, observer=recorder, stop=stop,
                                progress=lambda step, loss: seen.append((step, loss)), clock=lambda: 0.0, **kwargs)
  return state, done, recorder, seen


def test_loop_writes_means_of_windows_and_each_step_once():
  state, done, recorder, seen = loop()
  assert (state, done) == (10, 10)
  # Step k has loss k - 1 here. Evaluation ends a window too: at 4 and 8; the end is evaluated.
  assert [(step, metrics['train/loss']) for step, metrics in recorder.lines] == [
      (3, 1.0), (4, 3.0), (6, 4.5), (8, 6.5), (9, 8.0), (10, 9.0)]
  assert [step for step, metrics in recorder.lines if 'val/loss' in metrics] == [4, 8, 10]
  assert recorder.evaluated == [(4, 4), (8, 8), (10, 10)]
  assert recorder.saved == [(4, 4, True), (8, 8, True), (10, 10, True)]
  assert seen == [(k + 1, float(k)) for k in range(10)]


def test_loop_goes_on_from_a_step():
  _, _, whole, _ = loop()
  _, done, recorder, _ = loop(start=4)
  assert done == 10 and recorder.lines == whole.lines[2:]


def test_loop_stops_when_asked():
  asked = iter([False, False, True])
  state, done, recorder, _ = loop(stop=lambda: next(asked))
  assert state == done == 3 and not recorder.evaluated and recorder.saved == [(3, 3, False)]


def test_loop_that_is_stopped_where_it_evaluates_does_so_when_it_goes_on():
  """Asked before the evaluation of step 4 or in the middle of it: saved without, and the next start begins with it."""
  asked = iter([False, False, False, True])
  for stopped in (loop(stop=lambda: next(asked)), loop(unfinished=(4,))):
    state, done, recorder, _ = stopped
    assert state == done == 4 and recorder.saved == [(4, 4, False)]
    assert [(step, set(metrics)) for step, metrics in recorder.lines][-1] == (
        4, {'train/loss', 'train/gradient_norm'})
  _, _, again, _ = loop(start=4, evaluated=False)
  assert again.lines[0] == (4, {'val/loss': 0.5}) and again.saved == [(4, 4, True), (8, 8, True), (10, 10, True)]
  _, _, at_the_end, _ = loop(start=10, evaluated=False)
  assert at_the_end.saved == [(10, 10, True)]


def test_loop_saves_where_the_batches_end():
  """As where images do not come any more."""
  state, done, recorder, _ = loop(last=6)
  assert state == done == 6 and recorder.saved == [(4, 4, True), (6, 6, False)]
  assert loop(last=0)[2].saved == []


@pytest.mark.parametrize('what', ['losses', 'norms'])
@pytest.mark.parametrize('at', [0, 3, 5, 9])
def test_loop_stops_when_loss_or_gradient_are_not_finite(what, at):
  """Named with its step, and before anything of it is written or kept."""
  values = [float('nan') if k == at else 1.0 for k in range(10)]
  with pytest.raises(Diverged, match=f'at step {at + 1}$') as caught:
    loop(**{what: values})
  assert caught.value.step == at + 1


def test_loop_stops_when_the_loss_on_val_is_not_finite():
  with pytest.raises(Diverged, match='the loss on val is inf at step 4$'):
    loop(bad=4)


class Metric(float):
  """A loss that a device is through with, or not."""

  def __new__(cls, ready):
    return super().__new__(cls, 1.0)

  def __init__(self, ready):
    self.ready = ready

  def is_ready(self):
    return self.ready


@pytest.mark.parametrize('ready,shares', [(True, [2 / 8, 3 / 12]), (False, [1 / 8, 1 / 12])])
@pytest.mark.parametrize('start', [0, 9])
def test_images_per_second_and_share_of_time_waiting_for_them(start, ready, shares, monkeypatch):
  """Seconds of a made clock: a batch takes one, a step three, the first one a hundred more, evaluation a thousand. Counted is what a ready
  device waits.

  The first step of the run, or of a run that goes on, is compiled and does not count, neither as time nor as images; after it and after
  each window the device has nothing left to do, so the batch counts.
  """
  monkeypatch.setattr(parallel, 'unreplicate', lambda metrics: metrics)
  now, recorder = [0.0], Recorder()
  monkeypatch.setattr(recorder, 'evaluate', lambda step, state: now.__setitem__(0, now[0] + 1000) or {'val/loss': 0.5})

  def batches():
    while True:
      now[0] += 1
      yield 'batch'

  def step(state, batch):
    now[0] += 3 if state else 103
    return state + 1, {'loss': Metric(ready), 'gradient_norm': Metric(ready)}

  run = functools.partial(run_steps, step, 0, start=start, images=8, stop=lambda: False, progress=lambda step, loss: None,
                          clock=lambda: now[0])
  run(batches(), steps=start + 6, log_every=3, due=lambda step: step == start + 3, observer=recorder)
  assert [metrics['waiting_share'] for _, metrics in recorder.lines] == pytest.approx(shares)
  assert [metrics['images_per_second'] for _, metrics in recorder.lines] == pytest.approx([8 / 4, 8 / 4])
  # Windows of one step: of the first one there is nothing to tell.
  recorder.lines.clear()
  run(batches(), steps=start + 3, log_every=1, due=lambda step: step == start + 2, observer=recorder)
  (_, first), *others = recorder.lines
  assert first == {'train/loss': 1.0, 'train/gradient_norm': 1.0}
  assert [(line['images_per_second'], line['waiting_share']) for _, line in others] == [(8 / 4, 1 / 4)] * 2


@pytest.mark.parametrize('share,told', [(0.43, True), (0.05, False)])
def test_a_device_that_waits_for_images_is_told_of_once(share, told, caplog):
  """After twenty steps, over all of them; a metrics line has the share of its own window."""
  lines = []
  writer = types.SimpleNamespace(write=lambda step, metrics: lines.append(metrics) or metrics)
  run = types.SimpleNamespace(streams={'target': Stream(None, 8, 1.0)}, schedule=lambda step: 0.1)
  observer = Observer(run, writer, 0, lambda: False)
  with caplog.at_level('INFO', 'ft_jax'):
    observer.wrote(10, {'train/loss': 1.0, 'waiting_share': 2 * share})
    assert not caplog.text
    for step in (20, 30, 40):
      observer.wrote(step, {'train/loss': 1.0, 'waiting_share': 0.0 if step == 20 else share})
  assert caplog.text.count(f'the device waits for images {share:.0%}'.replace('%', ' %')) == told
  assert [line['waiting_share'] for line in lines] == [2 * share, 0.0, share, share]


def test_averages_and_what_is_evaluated():
  """Each step moves the averages by 1 - min(average, (1 + step) / (10 + step)) of the way; they are what is evaluated."""
  start = method_case.start_of(method_case.network())
  plain = method_case.run({}, start=start)[0]
  step = jax.jit(jax.vmap(make_step(method_case.network(), optax.sgd(0.05), {'target': 1.0, 'source': 0.5}, ema_decay=0.25),
                          in_axes=(None, 0), axis_name=parallel.AXIS), compiler_options=method_case.QUICK)
  first = {'params': plain.params, 'batch_stats': plain.batch_stats}
  state, expected, weights = plain.replace(step=0, average=first), first, (0.1, 2 / 11, 0.25, 0.25)
  for kept in weights:
    state, _ = jax.tree.map(lambda x: x[0], step(state, jax.tree.map(lambda x: x[None], method_case.batch())))
    now = {'params': state.params, 'batch_stats': state.batch_stats}
    expected = jax.tree.map(lambda old, new, kept=kept: kept * old + (1 - kept) * new, expected, now)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.average, expected)
  assert state.eval_variables is state.average
  without = plain.replace(params={**plain.params, 'methods': {'some': np.zeros(3)}}).eval_variables
  assert 'methods' not in without['params'] and without['params'].keys() == plain.params.keys()


@pytest.mark.parametrize('pattern,stays', [
    ('backbone', ('bn1', 'conv1', 'layer')), ('conv1/.*|bn1/.*|layer[12]/.*', ('bn1', 'conv1', 'layer1', 'layer2'))])
def test_what_is_frozen_keeps_every_bit(pattern, stays):
  """Parameters and running statistics under the pattern, with weight decay and averages of several devices; all else moves."""
  model = resnet.build('resnet18', {}, frozen=pattern)
  model = method_case.network(frozen=model.frozen)
  start = method_case.start_of(model)
  before, _ = method_case.run({}, start=start, model=model, rate=0.0)
  after, _ = method_case.run({}, start=start, model=model, steps=2, devices=2, state=before)
  moved = method_case.run({}, start=start, model=model, steps=2, devices=2, rate=0.5, state=before)[0]
  for tree, old in ((after, before), (moved, before)):
    for path, value in flax.traverse_util.flatten_dict({'p': tree.params, 's': tree.batch_stats}, sep='/').items():
      was = flax.traverse_util.flatten_dict({'p': old.params, 's': old.batch_stats}, sep='/')[path]
      frozen = path[2:].startswith(stays)
      assert (value.tobytes() == was.tobytes()) == frozen, path


def test_parts_are_the_whole_batch_but_for_batch_norm():
  """With BatchNorm in training mode each part has its own statistics, and running ones are updated part after part."""
  model = method_case.network()
  start = method_case.start_of(model)
  whole, _ = method_case.run({}, start=start, model=model, rate=0.0)
  parts, _ = method_case.run({}, start=start, model=model, rate=0.0, microbatches=2)
  batch = method_case.batch()
  forward = jax.jit(lambda stats, images: model.clone(heads={}).apply(
      {'params': start['params'], 'batch_stats': stats}, images, train=True, mutable=['batch_stats'])[1]['batch_stats'],
                    compiler_options=method_case.QUICK)
  stats = start['batch_stats']
  for rows in (slice(0, 8), slice(8, 16)):
    images = np.concatenate([batch[stream]['input'][rows] for stream in ('target', 'source')])
    stats = forward(stats, images)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), parts.batch_stats, stats)
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(whole.batch_stats), jax.tree.leaves(stats)))
