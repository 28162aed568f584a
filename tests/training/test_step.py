"""The pmapped joint step is the plain formula on the whole batch; what is frozen stays; averages follow."""

import flax
import jax
import jax.numpy as jnp
import method_case
import numpy as np
import optax
import pytest
from torch_record import error, Record
from torch_weights import RESNET

from ft_jax import parallel
from ft_jax.methods import METHODS
from ft_jax.models import build, export
from ft_jax.training.forward import forward
from ft_jax.training.optimizer import make_optimizer, parameter_factors
from ft_jax.training.step import create_state, make_step, make_train_step

LAMBDA = 0.3


def batch_of(rng, size, classes):
  return {'input': rng.integers(0, 255, (size, 16, 16, 3)).astype(np.uint8),
          'label': rng.integers(0, classes, size).astype(np.int32)}


@pytest.fixture(scope='module')
def setting():
  rng = np.random.default_rng(0)
  batch = {'target': batch_of(rng, 8, 3), 'source': batch_of(rng, 16, 5)}
  model = build('resnet18', {'target': 3, 'source': 5}, width=4, axis_name=parallel.AXIS)
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
  alone = build('resnet18', {'target': 3, 'source': 5}, width=4)

  def loss_fn(params):
    images = np.concatenate([batch['target']['input'], batch['source']['input']])
    outputs, updates = alone.apply({'params': params, 'batch_stats': variables['batch_stats']}, images, train=True,
                                   mutable=['batch_stats'])
    losses = [-jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]) for logits, labels in (
        (outputs.logits['target'][:8], batch['target']['label']),
        (outputs.logits['source'][8:], batch['source']['label']))]
    return losses[0] + LAMBDA * losses[1], (losses, updates['batch_stats'], outputs.logits['target'][:8])

  (loss, (losses, batch_stats,
          logits)), gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(variables['params'])
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose([metrics['loss_target'], metrics['loss_source']], losses, rtol=1e-5)
  np.testing.assert_allclose(metrics['top1_target'], np.mean(np.argmax(logits, -1) == batch['target']['label']))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state.batch_stats, batch_stats)
  assert all((new != old).any() for new, old in zip(jax.tree.leaves([state.params, state.batch_stats]), jax.tree.leaves(
      [variables['params'], variables['batch_stats']]))), 'BatchNorm is not frozen here'
  # The first Nesterov step is 1.9 times the gradient.
  jax.tree.map(lambda new, old, g: np.testing.assert_allclose((old - new) / 0.19, g, rtol=1e-3,
                                                              atol=2e-4 * float(jnp.abs(g).max()) + 1e-6),
               state.params, variables['params'], gradients)
  assert state.step == 1


def test_batch_norm_of_each_device_is_the_mean_over_devices(setting):
  """Without an axis name each device normalises with its own part of both streams; statistics are averaged."""
  _, variables, batch = setting
  model = build('resnet18', {'target': 3, 'source': 5}, width=4)
  state, _ = step_once(model, variables, batch)
  parts = [np.concatenate([batch['target']['input'][2 * d:2 * d + 2], batch['source']['input'][4 * d:4 * d + 4]])
           for d in range(4)]
  apply = jax.jit(lambda images: model.apply(variables, images, train=True, mutable=['batch_stats'])[1]['batch_stats'])
  stats = [apply(part) for part in parts]
  jax.tree.map(lambda mean, *each: np.testing.assert_allclose(mean, np.mean(each, 0), rtol=1e-4, atol=1e-5),
               state.batch_stats, *stats)


def test_state_may_be_built_from_arrays_that_are_used_again(setting):
  """A donated step must not destroy the variables that it was made of."""
  model, variables, batch = setting
  on_device = jax.tree.map(jnp.asarray, variables)
  first = step_once(model, on_device, batch)[0]
  second = step_once(model, on_device, batch)[0]
  jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_steps_equal_torchs(tmp_path):
  """Two Nesterov steps of torch.optim.SGD with weight decay on one device: gradients, statistics and parameters on four
  here.
  """
  record = Record('resnet18')
  variables = record.variables(tmp_path)
  model = build('resnet18', {'source': 7}, width=2, axis_name=parallel.AXIS)
  # Keeps the gradients of a step beside what the optimiser keeps.
  keep = optax.GradientTransformation(lambda params: params, lambda gradients, state,
                                      params=None: (gradients, gradients))
  tx = optax.chain(keep, make_optimizer('sgd', optax.constant_schedule(0.05), parameter_factors(variables['params']),
                                        momentum=0.9,
                                        nesterov=True, weight_decay=0.02))
  step = make_train_step(model, tx, {'source': 1.0})
  state = parallel.replicate(create_state(variables, tx))
  batch = {'source': parallel.shard({'input': record.images, 'label': record.labels})}
  state, _ = step(state, batch)
  first = parallel.unreplicate(state)
  state, _ = step(state, batch)
  second = parallel.unreplicate(state)
  for kind, values in (('gradients', {'params': first.opt_state[0]}),
                       ('statistics', {'batch_stats': first.batch_stats}),
                       ('after', {'params': second.params})):
    values = export.state_dict(RESNET, values, 'source')
    errors = {key: error(values[key], expected) for key, expected in record.tensors(kind).items()}
    assert max(errors.values()) < 1e-4, (kind, errors)


def test_frozen_batch_norm_keeps_every_bit(setting):
  """Statistics, scales and biases after steps of SGD with weight decay and momentum on four devices; all else moves."""
  _, variables, batch = setting
  rng = np.random.default_rng(1)
  noisy = jax.tree.map(lambda x: (x + rng.uniform(0.1, 0.3, x.shape)).astype(x.dtype), variables)
  noisy['params']['bn1']['bias'][0] = -0.0  # an update of zero would lose the sign
  model = build('resnet18', {'target': 3, 'source': 5}, width=4, batch_norm='frozen')
  factors = parameter_factors(noisy['params'], (('heads/.*', 10.0), ('.*bn.*', 2.0), ('.*', 1.0)))
  optimizer = make_optimizer('sgd', lambda step: 0.1, factors, momentum=0.9, nesterov=True, weight_decay=0.1)
  state = parallel.replicate(create_state(noisy, optimizer))
  step = make_train_step(model, optimizer, {'target': 1.0, 'source': LAMBDA})
  for _ in range(3):
    state, _ = step(state, {name: parallel.shard(part) for name, part in batch.items()})
  flat = lambda params, stats: flax.traverse_util.flatten_dict({'params': params, 'batch_stats': stats}, sep='/')
  before, copies = flat(noisy['params'], noisy['batch_stats']), flat(state.params, state.batch_stats)
  normalisation = {key for key in before
                   if key.startswith('batch_stats') or not key.startswith('params/heads')
                   and key.endswith(('scale', 'bias'))}
  assert len(normalisation) == 20 * 4 and len(before) == 20 * 4 + 20 + 4
  for key, copy in copies.items():
    kept = all(np.asarray(shard.data).tobytes() == before[key].tobytes() for shard in copy.addressable_shards)
    assert kept == (key in normalisation), key


def test_frozen_batch_norm_normalises_with_running_statistics(setting):
  """The output of a training step's forward pass is that of evaluation."""
  _, variables, batch = setting
  model = build('resnet18', {'target': 3, 'source': 5}, width=4, batch_norm='frozen')
  images = batch['target']['input']
  outputs, updates = jax.jit(lambda: model.apply(variables, images, train=True, mutable=['batch_stats']))()
  np.testing.assert_array_equal(outputs.features, jax.jit(lambda: model.apply(variables, images).features)())
  jax.tree.map(np.testing.assert_array_equal, updates['batch_stats'], variables['batch_stats'])


def test_averages_and_what_is_evaluated():
  """Each step moves the averages by 1 - min(average, (1 + step) / (10 + step)) of the way; they are what is evaluated.
  """
  start = method_case.start_of(method_case.network())
  plain = method_case.run({}, start=start)[0]
  step = jax.jit(jax.vmap(make_step(method_case.network(), optax.sgd(0.05), {'target': 1.0, 'source': 0.5},
                                    ema_decay=0.25),
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
  """Parameters and running statistics under the pattern, with weight decay and averages of several devices; all else
  moves.
  """
  model = build('resnet18', {}, frozen=pattern)
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
  divided, _ = method_case.run({}, start=start, model=model, rate=0.0, microbatches=2)
  batch = method_case.batch()
  forward = jax.jit(lambda stats, images: model.clone(heads={}).apply(
      {'params': start['params'], 'batch_stats': stats}, images, train=True, mutable=['batch_stats'])[1]['batch_stats'],
                    compiler_options=method_case.QUICK)
  stats = start['batch_stats']
  for rows in (slice(0, 8), slice(8, 16)):
    images = np.concatenate([batch[stream]['input'][rows] for stream in ('target', 'source')])
    stats = forward(stats, images)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), divided.batch_stats, stats)
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(whole.batch_stats), jax.tree.leaves(stats)))


@pytest.mark.parametrize('microbatches', [1, 2])
def test_statistics_of_each_stream(microbatches):
  """Each stream is normalised as if it were alone, with its views; the running statistics are the target's."""
  model = method_case.network({'target': 3}, stages=1, batch_norm='per_stream')
  variables, batch = method_case.variables(model), method_case.batch(8)
  images = {'target': batch['target']['input'], 'source': batch['source']['input'],
            'source/strong': batch['source']['strong']}
  compiled = lambda function: jax.jit(function, compiler_options=method_case.QUICK)
  outputs, stats = compiled(lambda: forward(model, variables, images, microbatches=microbatches))()
  alone = compiled(lambda stats, images: model.apply({**variables, 'batch_stats': stats}, images, train=True,
                                                     mutable=['batch_stats']))
  target, source, expected = [], [], variables['batch_stats']
  for rows in np.split(np.arange(8), microbatches):
    found, updates = alone(expected, images['target'][rows])
    both, _ = alone(expected, np.concatenate([images['source'][rows], images['source/strong'][rows]]))
    expected = updates['batch_stats']
    target.append(found.features)
    source.append(both.features[:len(rows)])
  for name, features in (('target', target), ('source', source)):
    np.testing.assert_allclose(outputs[name].features, np.concatenate(features), rtol=1e-4, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), stats, expected)


def test_statistics_of_each_stream_on_several_devices():
  """Two steps on four devices that share statistics are those on one; a plain fine-tuning is as with the mixture."""
  states = []
  for norm, devices, streams in (('per_stream', 1, 2), ('per_stream', 4, 2), ('per_stream', 1, 1), ('train', 1, 1)):
    model = method_case.network(stages=1, batch_norm=norm, axis_name=parallel.AXIS)
    heads = {'target': 1.0, 'source': 0.5}
    batches = lambda _, streams=streams: dict(list(method_case.batch().items())[:streams])
    states.append(method_case.run({}, model=model, steps=2, devices=devices, loss_weights=heads, batches=batches,
                                  start=method_case.start_of(model))[0])
  for one, other in (states[:2], states[2:]):
    for a, b in zip(jax.tree.leaves((one.params, one.batch_stats)), jax.tree.leaves((other.params, other.batch_stats))):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max() + 1e-6)


def test_statistics_of_each_stream_with_views_of_methods():
  """Source images and their strong view go together; the pass of momentum keys is one of its own."""
  active = {'bi_tuning': METHODS['bi_tuning'](weight=1.0), 'fixmatch': METHODS['fixmatch'](weight=1.0)}
  model = method_case.network(stages=1, batch_norm='per_stream')
  state, history = method_case.run(active, model=model, devices=2)
  assert all(np.isfinite(value) for value in history[0].values()) and history[0]['loss_fixmatch'] > 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
