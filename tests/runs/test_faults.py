"""What a run does when something goes wrong: it diverges, images stop coming, the number of devices is another one, it
is killed."""

import dataclasses
import json
import pathlib
import shutil
import threading

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
from orbax import checkpoint as ocp
import pytest

from configs import default, miniature
from ft_jax import methods, models, parallel
from ft_jax.data import open_set, pipeline
from ft_jax.data.pipeline import place_of, rows_at, Stalled, train_batches, Transform
from ft_jax.data.splits import open_splits, SplitSettings
from ft_jax.embedding import Encoder, remove_partial
from ft_jax.jobs import finetune
from ft_jax.training import fit, initial_weights
from ft_jax.training.loop import Diverged
from selection import journal


def run(photos, workdir, **fields):
  """Plain fine-tuning from random weights: eight steps of eight images, a checkpoint at every second one."""
  config = miniature.get_config('finetune')
  with config.unlocked():
    config.update_from_flattened_dict({
        'source.name': '', 'selection.method': 'none', 'target.name': f'folder:{photos}', 'model.weights': '',
        'model.width': 4,
        'image_size': 32, 'augment.short_side': 36, 'train.steps': 8, 'train.batch_size': 8, 'train.eval_every': 2,
        'train.log_every': 1,
        'train.keep_epochs': (0.8,), 'model.sync_batch_norm': True, 'target.val_fraction': 0.25, **fields})
  return finetune.run(config, workdir)


def state(workdir, step=8):
  with ocp.CheckpointManager(workdir / 'checkpoints', item_names=('state', 'about')) as manager:
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))['state']


def lines(workdir):
  """Metrics without the clock."""
  read = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{key: value for key, value in line.items() if key not in ('waiting_share', 'images_per_second')}
          for line in read]


@pytest.fixture(scope='module')
def whole(photos, tmp_path_factory) -> pathlib.Path:
  """An undisturbed run on four devices."""
  workdir = tmp_path_factory.mktemp('faults') / 'whole'
  run(photos, workdir)
  return workdir


def begun(whole, workdir):
  """The run as it was when the checkpoint of step 4 was its newest."""
  shutil.copytree(whole, workdir)
  for step in (workdir / 'checkpoints').iterdir():
    if step.name != '4':
      shutil.rmtree(step)
  (workdir / 'results.json').unlink()


def test_embeddings_that_were_killed_go_on(pool, tmp_path, monkeypatch):
  """Each by itself, bit for bit, reading again no more than one batch of what is embedded; nothing of it is left in the
  end."""
  monkeypatch.setattr(journal, 'SECONDS', 0.0)
  network, source = default.get_config().model, open_set(f'folder:{pool}', 'train')
  network.name, network.width = 'resnet18', 4
  variables = initial_weights.init_variables(models.from_config(network, {}, 32), 0, None)

  def run(folder, read):
    """Of a first set, and then of a second one, which is read by `read`."""
    place, sets = epath.Path(tmp_path), (source, dataclasses.replace(source.subset(range(60)), read=read))
    encoder = Encoder(network.name, models.from_config(network, {}, 32), variables, Transform(size=32, short_side=36), 8,
                      folder=place / folder, unfinished=place / 'unfinished')
    found = [encoder.embed(images, 'source', means=True) for images in sets]
    remove_partial(place / 'unfinished')
    return found[1]

  def gone(row):
    if row >= 40:
      raise OSError(f'no image {row}')
    return source.read(row)

  expected, again = run('undisturbed', source.read), []
  with pytest.raises(OSError, match='no image 40'):
    run('killed', gone)
  found = run('killed', lambda row: again.append(row) or source.read(row))
  # The fifth batch was with the devices when the sixth could not be read, and the fourth is compared.
  assert sorted(again) == list(range(24, 60)) and found.features.tobytes() == expected.features.tobytes()
  assert {path.name for path in tmp_path.iterdir()} == {'undisturbed', 'killed'}
  assert len(list((tmp_path / 'killed').iterdir())) == 2


def training_rows(place, monkeypatch):
  """(ids, rows) of the batch at a place in the order, once the run has opened its images."""
  found, fitted = {}, fit.fit

  def remember(training, work, data, *args):
    images = data.streams['target'].images
    found['rows'] = rows_at(images, place, 8, stream='target', seed=0)
    found['ids'] = images.ids[found['rows']].tolist()
    return fitted(training, work, data, *args)

  monkeypatch.setattr(fit, 'fit', remember)
  return found


def test_a_batch_that_diverges_is_named_or_left_out(photos, whole, tmp_path, monkeypatch, caplog):
  """The run ends with the ids of the batch and the last good checkpoint; told to, it goes on without the batch as if it
  had never been."""
  with monkeypatch.context() as patched:
    batch, made = training_rows(4, patched), fit.make_train_step

    def make(*args, **kwargs):
      step = made(*args, **kwargs)

      def poisoned(state, data):
        bad = sorted(np.asarray(data['target']['row']).reshape(-1).tolist()) == sorted(batch['rows'])
        spoil = lambda x: x * float('nan') if bad and jnp.issubdtype(x.dtype, jnp.floating) else x
        state, metrics = step(state, data)
        return state.replace(params=jax.tree.map(spoil, state.params)), jax.tree.map(spoil, metrics)

      return poisoned

    patched.setattr(fit, 'make_train_step', make)
    workdir = tmp_path / 'run'
    with pytest.raises(
        Diverged, match='the loss is nan at step 5 .*state is the checkpoint of step 4 .*skip_diverged=1') as error:
      run(photos, workdir)
    assert all(name in str(error.value) for name in batch['ids'][:3])
    told, = json.loads((workdir / 'diverged.json').read_text())
    assert (told['place'], told['step'], told['examples'], told['skipped']) == (4, 5, {'target': batch['ids']}, False)
    assert lines(workdir) == lines(whole)[:4] and not (workdir / 'results.json').exists()
    with caplog.at_level('WARNING', 'ft_jax'):
      results = run(photos, workdir, **{'train.skip_diverged': 1})
    assert 'Resuming from there without this batch' in caplog.text and results['skipped_batches'] == 1
  # The same from the start of step 5 on, where it was known already.
  begun(whole, tmp_path / 'known')
  (tmp_path / 'known' / 'diverged.json').write_bytes((workdir / 'diverged.json').read_bytes())
  run(photos, tmp_path / 'known')
  jax.tree.map(np.testing.assert_array_equal, state(workdir), state(tmp_path / 'known'))
  assert lines(workdir) == lines(tmp_path / 'known') != lines(whole)


@dataclasses.dataclass(frozen=True)
class Spoils(methods.Method):
  """A term whose loss and gradient are not finite for one batch of training examples, and zero for all others."""
  rows: tuple = (0,)  # of that batch

  def loss(self, context: methods.StepContext, state: methods.State) -> methods.LossTerm:
    """See `Method`."""
    spoilt = jnp.array_equal(jnp.sort(parallel.gather(context.rows)), jnp.sort(jnp.array(self.rows)))
    return methods.LossTerm(jnp.where(spoilt, jnp.nan, 0.0) * jnp.sum(context.outputs['target'].features), state)


def test_a_step_that_is_not_finite_leaves_nothing_behind(photos, tmp_path, monkeypatch):
  """Of the real step, whose update is applied before anybody reads the loss: the run goes back, and ends with a finite
  state."""
  monkeypatch.setitem(methods.METHODS, 'spoils', Spoils)
  config = default.get_config().target
  config.name, config.val_fraction = f'folder:{photos}', 0.25
  source = open_splits(SplitSettings.from_config(config), '', 0).train
  rows = tuple(rows_at(source, 4, 8, stream='target', seed=0))
  results = run(photos, tmp_path / 'run',
                **{'methods.spoils.rows': rows, 'train.skip_diverged': 1, 'train.ema_decay': 0.5})
  told, = json.loads((tmp_path / 'run' / 'diverged.json').read_text())
  assert (told['step'], told['skipped'], results['skipped_batches'], results['steps']) == (5, True, 1, 8)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state(tmp_path / 'run')))


def test_parameters_that_are_not_finite_are_never_saved(photos, tmp_path):
  """An update too large for its loss to show it in time; there is no checkpoint, and so nothing to go on from but the
  beginning."""
  with pytest.raises(Diverged, match='(parameter is not finite any more|loss on val is (nan|inf)|is nan) at step [12] '
                                     '.*no checkpoint yet'):
    run(photos, tmp_path / 'run', **{'train.learning_rate': 1e38, 'train.optimizer': 'sgd', 'train.eval_every': 1})
  assert not list((tmp_path / 'run' / 'checkpoints').iterdir())


def test_images_that_stop_coming_end_the_run_with_its_state(photos, whole, tmp_path, monkeypatch, caplog):
  """It says what it waits for, saves, and goes on later to the very same end."""
  decode, gate, count = pipeline.decode, threading.Event(), [0]
  with monkeypatch.context() as patched:
    batch = training_rows(6, patched)

    def hangs(image, name, **kwargs):
      if name == batch['ids'][0]:
        count[0] += 1
        if count[0] == 2:  # the first time was in the pass before
          gate.wait(300)
      return decode(image, name, **kwargs)

    patched.setattr(pipeline, 'decode', hangs)
    patched.setattr(pipeline, 'SLOW', 0.1)
    with caplog.at_level('WARNING', 'ft_jax'), pytest.raises(Stalled) as error:
      run(photos, tmp_path / 'run', **{'data.timeout': 3.0})
    gate.set()
  assert batch['ids'][0] in str(error.value) and 'stopped at step 6 of 8, saved' in str(error.value), error.value
  assert 'waiting for images of' in caplog.text and f'being read: {batch["ids"][0]} for' in caplog.text
  run(photos, tmp_path / 'run')
  jax.tree.map(np.testing.assert_array_equal, state(tmp_path / 'run'), state(whole))
  assert lines(tmp_path / 'run') == lines(whole)


def test_waiting_for_images_can_be_cancelled():
  """As by a signal: the batches end."""
  gate = threading.Event()
  batches = pipeline._with_timeout(iter(gate.wait, None), pipeline._Reading(None), 0, cancelled=lambda: True)
  assert list(batches) == []
  gate.set()


def test_the_order_without_some_batches(photos):
  """Steps go on as if these had never been; the rows of a batch are known without reading it."""
  assert [place_of(step, [5, 1, 2]) for step in range(5)] == [0, 3, 4, 6, 7]
  source = open_set(f'folder:{photos}', 'train')
  order = {'stream': 'target', 'seed': 3}
  batches = train_batches(source, Transform(8), 10, start=2, skip=[1, 3], **order)
  for place in (4, 5, 6):
    assert next(batches)['row'].tolist() == rows_at(source, place, 10, **order)


def test_going_on_with_fewer_devices(photos, whole, tmp_path, monkeypatch, caplog):
  """With statistics of the whole batch the same result but for rounding; what ran where is in the results."""
  begun(whole, tmp_path / 'run')
  devices = jax.devices()[:2]
  monkeypatch.setattr(jax, 'devices', lambda *_: devices)
  monkeypatch.setattr(jax, 'local_devices', lambda *_: devices)
  monkeypatch.setattr(jax, 'device_count', lambda *_: 2)
  monkeypatch.setattr(jax, 'local_device_count', lambda *_: 2)
  with caplog.at_level('INFO', 'ft_jax'):
    results = run(photos, tmp_path / 'run')
  assert results['devices_from_step'] == [[0, 4], [4, 2]] and results['devices'].startswith('2 x ')
  assert 'on 2 devices now, 4 before: the same batches' in caplog.text
  after, before = state(tmp_path / 'run')['params'], state(whole)['params']
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), after, before)
  for line, before in zip(lines(tmp_path / 'run'), lines(whole), strict=True):
    assert line == pytest.approx(before, rel=1e-2, abs=1e-3)


def test_statistics_of_each_device_change_with_their_number(caplog):
  model = miniature.get_config('finetune').model
  tell = lambda sync, start=24: fit.log_changed_devices([[0, 8], [24, 4]], start, fit_model(model, sync), 32)
  with caplog.at_level('WARNING', 'ft_jax'):
    tell(True)
    tell(False, start=30)  # that was said before
    assert not caplog.text
    tell(False)
  assert 'on 4 devices now, 8 before: BatchNorm takes its statistics from the 8 images of each device' in caplog.text
  assert 'of each device now, from 4 before' in caplog.text


def fit_model(config, sync):
  with config.unlocked():
    config.sync_batch_norm = sync
  return models.from_config(config, {'target': 2}, 32)
