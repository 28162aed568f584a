"""Steps with one of the two streams alone: which they are, what they change; a run resumes at their borders."""

import dataclasses
import types

import flax
import jax
import method_case
import numpy as np
import pytest

from configs import default
from ft_jax import methods, workdir
from ft_jax.data.image_set import ImageSet
from ft_jax.data.pipeline import train_batches, Transform
from ft_jax.jobs import finetune
from ft_jax.jobs.finetune import JointSettings
from ft_jax.methods import METHODS
from ft_jax.parallel import AXIS
from ft_jax.training import divergence, finished_runs, loop
from ft_jax.training.cost import training_cost
from ft_jax.training.loop import Stream, TrainingData
from ft_jax.training.optimizer import make_optimizer, make_weight_schedule, parameter_factors
from ft_jax.training.settings import Training
from ft_jax.training.step import create_state, make_step


def joint(**fields):
  return dataclasses.replace(JointSettings(1.0, 'constant', 8, 0.0, 0.0), **fields)


@pytest.mark.parametrize('source_first,target_last,steps,expected', [
    (0.0, 0.0, 10, (0, 10)), (0.3, 0.0, 10, (3, 10)), (0.0, 0.3, 10, (0, 7)), (0.3, 0.4, 10, (3, 6)),
    (0.5, 0.5, 10, (5, 5)), (0.5, 0.5, 5, (2, 2)), (0.7, 0.3, 10, (7, 7))])
def test_borders_of_phases(source_first, target_last, steps, expected):
  """The first step with the target, and the first one without the source."""
  assert joint(source_first=source_first, target_last=target_last).steps(steps) == expected


@pytest.mark.parametrize('fields,steps,words', [
    ({'source_first': 0.01}, 10, 'source_first 0.01 of 10 steps is 0 steps; expected at least one'),
    ({'source_first': 0.99}, 10, 'source_first 0.99 of 10 steps is 10 steps'),
    ({'target_last': 0.01}, 10, 'target_last 0.01 of 10 steps is 0 steps'),
    ({'source_first': 0.5, 'target_last': 0.48}, 10, 'leave none of 10 steps to both')])
def test_phases_without_a_step_are_refused(fields, steps, words):
  with pytest.raises(ValueError, match=words):
    joint(**fields).steps(steps)


@pytest.mark.parametrize('fields,active,words', [
    ({'source_first': 0.6, 'target_last': 0.6}, (), 'are more than the whole training'),
    ({'source_first': 0.5, 'batch': 0}, (), "source_first is 0.5, but config.selection.method is 'none'"),
    ({'target_last': 0.5, 'batch': 0}, (), "target_last is 0.5, but config.selection.method is 'none'"),
    ({'schedule': 'linear', 'batch': 0}, (), "source_weight_schedule is 'linear', but config.selection.method"),
    ({'schedule': 'quadratic'}, (), "source_weight_schedule is 'quadratic'; known: constant, linear, cosine"),
    ({'schedule': 'cosine', 'source_first': 0.5, 'target_last': 0.5}, (), 'no step has both source and target images'),
    ({'source_first': 0.5}, ('fixmatch',), 'source_first trains on source labels, which methods.fixmatch does not use'),
    ({'schedule': 'linear'}, ('fixmatch',), 'source_weight_schedule changes the weight of source labels')])
def test_combinations_that_cannot_work_are_refused(fields, active, words):
  with pytest.raises(ValueError, match=words):
    joint(**fields).check({name: METHODS[name](1.0) for name in active})


def test_weights_that_fall_to_zero():
  """Over the joint steps 2 to 5; a step before them has no target, and weight one whatever this says."""
  steps = np.arange(2, 6)
  linear, cosine = (make_weight_schedule(kind, 0.4, 2, 6) for kind in ('linear', 'cosine'))
  np.testing.assert_allclose([linear(step) for step in steps], [0.4, 0.3, 0.2, 0.1], rtol=1e-6)
  np.testing.assert_allclose([cosine(step) for step in steps], 0.2 * (1 + np.cos(np.pi * np.arange(4) / 4)), rtol=1e-6)
  assert make_weight_schedule('constant', 0.4, 2, 6) == 0.4
  np.testing.assert_allclose([linear(6), cosine(6), linear(0)], [0, 0, 0.4], atol=1e-6)


def test_images_of_steps():
  """What a training costs counts each step's own streams, and the views of methods only in their steps."""
  data = TrainingData({'target': Stream(None, 4, 1.0, first=3), 'source': Stream(None, 8, 0.5, end=6)}, None, None, 0)
  each = [data.images_in(step, step + 1) for step in range(10)]
  assert each == [8, 8, 8, 12, 12, 12, 4, 4, 4, 4] and data.images_in(0, 10) == sum(each)
  needs = methods.Needs(forwarded_views=(methods.View('target', 'key'), methods.View('source', 'strong')))
  assert training_cost(data, needs, 10, [])['images'] == sum(each) + 7 * 4 + 3 * 8
  assert data.summary() == '4 target images from step 4 on + 8 source images up to step 6'


def test_a_stream_that_comes_later_begins_with_its_first_batch():
  """So the second phase of a sequential training has the batches of a plain fine-tuning."""
  images = ImageSet.from_arrays(np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3), np.uint8), np.arange(20) % 2)
  rows = lambda **where: [next(batches)['row'].tolist() for batches in [train_batches(
      images, Transform(8), 4, stream='target', seed=0, **where)] for _ in range(3)]
  assert rows(start=5, first=5) == rows(start=0) and rows(start=7, first=5)[:1] == rows(start=2)[:1]


def test_a_batch_that_diverged_is_named_and_left_out_of_a_later_stream():
  """Of the streams that the step has, each at its own place in the order."""
  images = ImageSet.from_arrays(np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3), np.uint8), np.arange(20) % 2)
  data = TrainingData({'target': Stream(images, 4, 1.0, first=3), 'source': Stream(images, 4, 1.0, end=6)}, None,
                      Transform(8), 0)
  rows = lambda skip: [next(batches)['row'].tolist() for batches in [train_batches(
      images, Transform(8), 4, stream='target', seed=0, start=6, first=3, skip=skip)] for _ in range(2)]
  whole, without = rows(()), rows((6,))
  named = divergence._ids_at(types.SimpleNamespace(data=data), 6, 6)
  assert named == {'target': images.ids[whole[0]].tolist()} and without[0] == whole[1]


@pytest.mark.parametrize('mu', [3, 9])
def test_a_small_source_repeats(mu):
  """A step of mu source images for each target image, of a set with fewer: all come before any comes again."""
  images = ImageSet.from_arrays(np.random.default_rng(0).integers(0, 256, (10, 12, 12, 3), np.uint8), np.arange(10) % 2)
  batches = train_batches(images, Transform(8), 8 * mu, stream='source', seed=0, start=0)
  rows = np.concatenate([next(batches)['row'] for _ in range(5)])
  assert len(rows) == 40 * mu and np.bincount(rows).tolist() == [4 * mu] * 10
  assert all(sorted(epoch) == list(range(10)) for epoch in rows.reshape(-1, 10))


def test_the_learning_rate_begins_again_with_the_target():
  training = Training.from_config(_train_config(schedule='cosine', warmup=0.2, learning_rate=0.5))
  whole, first, second = training.make_schedule(12, 5), training.make_schedule(5), training.make_schedule(7)
  expected = [first(step) for step in range(5)] + [second(step) for step in range(7)]
  np.testing.assert_allclose([whole(step) for step in range(12)], expected, rtol=1e-6)


def _train_config(**fields):
  config = default.get_config().train
  config.update(fields)
  return config


SEQUENTIAL = 2  # steps on the source


@pytest.fixture(scope='module')
def sequential():
  """States after 0 to 4 steps of a sequential training, and what makes its second phase by itself."""
  model = method_case.network(stages=1)
  training = Training.from_config(_train_config(learning_rate=0.1, schedule='cosine', weight_decay=0.05))
  optimizer = lambda variables, schedule: make_optimizer(
      'sgd', schedule, parameter_factors(variables['params']), momentum=0.9, weight_decay=0.05)
  variables = method_case.variables(model)
  whole = optimizer(variables, training.make_schedule(4, SEQUENTIAL))
  step = _compiled(make_step(model, whole, {'target': 1.0, 'source': 0.3}, ema_decay=0.5, restart=SEQUENTIAL))
  states, batches = [create_state(variables, whole, averaged=True)], [method_case.batch(seed=k) for k in range(4)]
  history = []
  for number, batch in enumerate(batches):
    stream = 'source' if number < SEQUENTIAL else 'target'
    state, metrics = step(states[-1], {stream: batch[stream]})
    states.append(state)
    history.append(metrics)
  plain = optimizer(_of_target(variables), training.make_schedule(4 - SEQUENTIAL))
  alone = _compiled(make_step(model.clone(heads={'target': method_case.TARGETS}), plain, {'target': 1.0},
                              ema_decay=0.5))
  return states, history, batches, plain, alone


def _compiled(step):
  run = jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name=AXIS), compiler_options=method_case.QUICK)
  first = lambda tree: jax.tree.map(lambda x: x[0], tree)
  return lambda state, batch: first(run(state, jax.tree.map(lambda x: x[None], batch)))


def _of_target(variables):
  heads = {'target': variables['params']['heads']['target']}
  return {**variables, 'params': {**variables['params'], 'heads': heads}}


def test_steps_of_one_stream_leave_the_other_head_as_it_is(sequential):
  """In spite of weight decay and momentum; everything else moves, and the source is learnt with weight one."""
  states, history, *_ = sequential
  for number, (before, after) in enumerate(zip(states, states[1:])):
    same = {path for path, value in _flat(after.params).items() if np.array_equal(value, _flat(before.params)[path])}
    idle = 'target' if number < SEQUENTIAL else 'source'
    assert same == {f'heads/{idle}/{leaf}' for leaf in ('kernel', 'bias')}, number
  assert history[0].keys() == {'loss', 'gradient_norm', 'loss_source', 'top1_source'}
  np.testing.assert_allclose(history[0]['loss'], history[0]['loss_source'])


def test_the_second_phase_of_a_sequential_training_is_a_plain_fine_tuning(sequential):
  """From the same network: optimizer, averages and schedule begin again."""
  states, _, batches, plain, alone = sequential
  at_border = {'params': states[SEQUENTIAL].params, 'batch_stats': states[SEQUENTIAL].batch_stats}
  state = create_state(_of_target(at_border), plain, averaged=True)
  for number in range(SEQUENTIAL, 4):
    state, _ = alone(state, {'target': batches[number]['target']})
    expected, found = _flat(_shared(state)), _flat(_shared(states[number + 1]))
    assert expected.keys() == found.keys()
    for path, value in expected.items():
      scale = np.abs(np.asarray(value)).max() + 1e-6
      np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-5 * scale, err_msg=path)


def _shared(state):
  """What both have: all but the head of the source."""
  return {'now': _of_target({'params': state.params, 'batch_stats': state.batch_stats}),
          'average': _of_target(state.average)}


def _flat(tree):
  return flax.traverse_util.flatten_dict(tree, sep='/')


@pytest.mark.parametrize('name,published', [('fixmatch', {'weight': 1.0}), ('self_label', {'enabled': True})])
def test_methods_in_steps_of_one_stream(name, published):
  """A method of source images does nothing in steps without them; others do nothing without the target."""
  active = {name: METHODS[name](**published)}
  streams = ['target'] if name == 'fixmatch' else ['source']
  batches = lambda _: {stream: method_case.batch()[stream] for stream in streams}
  model = method_case.network(stages=1, batch_norm='frozen')
  state, history = method_case.run(active, model=model, batches=batches)
  assert 'loss' in history[0] and not any(name in metric for metric in history[0])
  assert jax.tree.all(jax.tree.map(lambda x: np.isfinite(x).all(), state.params))


def config(**fields):
  made = default.get_config()
  made.update_from_flattened_dict({
      'model.name': 'resnet18', 'model.width': 2, 'model.stages': 1, 'image_size': 16, 'train.batch_size': 8,
      'selection.method': 'all', 'target.test': '', 'target.val_fraction': 0.2, 'train.steps': 6, 'train.eval_every': 2,
      'train.log_every': 3, 'source_first': 1 / 3, 'target_last': 1 / 3, 'train.ema_decay': 0.9,
      'source_weight_schedule': 'cosine', 'source_ratio': 3.0, **fields})
  return made


def sets():
  draw = lambda classes, n: ImageSet.from_arrays(
      np.random.default_rng(n).integers(0, 256, (n, 16, 16, 3), np.uint8), np.arange(n) % classes)
  return {'target': {'train': draw(3, 30)}, 'source': {'train': draw(4, 40)}}


class Killed(Exception):
  """The process is gone."""


def test_resumed_at_each_border_bit_for_bit(tmp_path, monkeypatch):
  """Of phases: source alone, both, target alone; the best checkpoint is one that has seen the target."""
  whole = finetune.run(config(), tmp_path / 'whole', **sets())
  save = loop.save

  def save_and_die(run, writer, step, *args):
    save(run, writer, step, *args)
    run.checkpoints.close()
    raise Killed

  for _ in range(2):  # after 2 steps, and after 4
    with monkeypatch.context() as patch:
      patch.setattr(loop, 'save', save_and_die)
      with pytest.raises(Killed):
        finetune.run(config(), tmp_path / 'resumed', **sets())
  resumed = finetune.run(config(), tmp_path / 'resumed', **sets())
  states = [finished_runs.load_variables(tmp_path / name, 6) for name in ('whole', 'resumed')]
  jax.tree.map(np.testing.assert_array_equal, *states)
  assert workdir.saved_steps(tmp_path / 'resumed')[-1] == 6
  assert resumed['val'] == whole['val'] and whole['best_step'] > 2
  assert whole['stream_steps'] == {'target': [3, 6], 'source': [1, 4]}
  assert whole['cost']['images'] == 4 * 8 + 4 * 3 * 8
  metrics = workdir.read_metrics(tmp_path / 'whole')
  assert [line['step'] for line in metrics if 'val/loss' in line] == [4, 6]
  assert metrics[0]['train/loss_source'] > 0 and 'train/loss_target' not in metrics[0]
