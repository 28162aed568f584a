"""The newest and the best checkpoint are kept and restored exactly; damage is noticed."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ft_jax.training import checkpoints as checkpoints_module
from ft_jax.training import finished_runs
from ft_jax.training.checkpoints import Checkpoints, Damaged
from ft_jax.training.finished_runs import load_variables
from ft_jax.training.step import create_state, TrainState


def state_at(step: int) -> TrainState:
  variables = {'params': {'a': {'kernel': np.full((2, 3), step, np.float32)}},
               'batch_stats': {'a': {'mean': np.full(3, -step, np.float32)}}}
  state = create_state(variables, optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda step: 1.0)))
  return jax.device_get(state.replace(step=jnp.int32(step)))


def save(folder, scores):
  checkpoints = Checkpoints(folder)
  for step, metrics in scores.items():
    checkpoints.save(step, state_at(step), metrics)
  checkpoints.wait()
  return checkpoints


def steps(folder):
  return sorted(int(p.name) for p in (folder / 'checkpoints').iterdir())


def test_newest_and_best_are_kept_and_restored(tmp_path):
  checkpoints = save(tmp_path, {k: {'score': s, 'loss': 1.0} for k, s in ((1, 0.2), (2, 0.9), (3, 0.3), (4, 0.5))})
  assert steps(tmp_path) == [2, 4] and (checkpoints.best_step, checkpoints.latest_step) == (2, 4)
  restored = checkpoints.restore(2, state_at(0))
  assert isinstance(restored, TrainState)
  jax.tree.map(np.testing.assert_array_equal, restored, state_at(2))
  assert jax.tree.structure(restored) == jax.tree.structure(state_at(0))
  checkpoints.close()


def test_kept_steps_stay_over_restarts(tmp_path):
  """Each with its metrics and what it was made from, which tells two runs apart."""
  metrics = lambda step: {'score': step / 10, 'loss': 1.0}
  for first in (1, 4):
    checkpoints = Checkpoints(tmp_path, {'images': str(first)}, keep=(2, 5))
    for step in range(first, first + 3):
      checkpoints.save(step, state_at(step), metrics(step))
    checkpoints.close()
  assert steps(tmp_path) == [2, 5, 6]
  assert finished_runs.history(tmp_path) == [
      (2, metrics(2), {'images': '1'}), (5, metrics(5), {'images': '4'}), (6, metrics(6), {'images': '4'})]
  assert finished_runs.history(tmp_path / 'checkpoints') == []


def test_equal_scores_go_by_loss_and_then_to_the_later_step(tmp_path):
  scores = {1: (0.5, 0.4), 2: (0.5, 0.3), 3: (0.5, 0.3), 4: (0.1, 0.1), 5: (0.2, 0.1)}
  checkpoints = save(tmp_path, {k: {'score': s, 'loss': loss} for k, (s, loss) in scores.items()})
  assert checkpoints.best_step == 3 and steps(tmp_path) == [3, 5]
  checkpoints.close()


def test_a_stop_without_evaluation_is_the_newest_and_never_the_best(tmp_path):
  """Saved on a signal: the run resumes there, and it is removed when a newer one is saved."""
  checkpoints = save(tmp_path, {1: {'score': 0.2, 'loss': 1.0}, 2: None})
  assert (checkpoints.best_step, checkpoints.latest_step) == (1, 2)
  checkpoints.save(3, state_at(3), {'score': 0.1, 'loss': 1.0})
  checkpoints.close()
  assert steps(tmp_path) == [1, 3]


def test_metrics_come_later_without_the_state_being_written_again(tmp_path):
  """Stopped in an evaluation and started again: the newest state is there all the while, and may be the best one then.
  """
  checkpoints = save(tmp_path, {1: {'score': 0.2, 'loss': 1.0}, 2: None})
  written = {path: path.stat().st_mtime_ns for path in (tmp_path / 'checkpoints' / '2').rglob('*') if path.is_file()}
  checkpoints.save(2, state_at(2), {'score': 0.3, 'loss': 1.0})
  assert checkpoints.best_step == 2 and {path: path.stat().st_mtime_ns for path in written} == written
  checkpoints.tidy()
  checkpoints.close()
  assert steps(tmp_path) == [2]
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.best_step == checkpoints.latest_step == 2 and checkpoints.evaluated(2)
  jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(2, state_at(0)), state_at(2))
  checkpoints.close()


def test_a_half_removed_checkpoint_is_removed(tmp_path):
  """What kill -9 leaves in the middle of removing an old one; the newest, the best and those to be kept stay."""
  scores = {1: 0.1, 2: 0.9, 3: 0.3}
  save(tmp_path, {step: {'score': score, 'loss': 1.0} for step, score in scores.items()}).close()
  half = tmp_path / 'checkpoints' / '1'
  shutil.copytree(tmp_path / 'checkpoints' / '3', half)
  (half / 'state' / '_METADATA').unlink()
  shutil.rmtree(half / 'metrics')
  checkpoints = Checkpoints(tmp_path, keep=(3,))
  checkpoints.tidy()
  checkpoints.close()
  assert steps(tmp_path) == [2, 3]


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
  """What kill -9 leaves in the middle of a save."""
  save(tmp_path, {1: {'score': 0.2, 'loss': 1.0}}).close()
  (tmp_path / 'checkpoints' / '2.orbax-checkpoint-tmp').mkdir()
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.latest_step == 1
  checkpoints.close()


def test_reading_leaves_a_save_in_progress_alone(tmp_path):
  """Weights may be read from a pre-training that is still running."""
  save(tmp_path, {1: {'score': 0.2, 'loss': 1.0}}).close()
  (tmp_path / 'checkpoints' / '2.orbax-checkpoint-tmp').mkdir()
  load_variables(tmp_path)
  assert (tmp_path / 'checkpoints' / '2.orbax-checkpoint-tmp').exists()


def test_other_data_than_before_is_refused(tmp_path):
  """Resuming with other images under the same names would mix two runs."""
  checkpoints = Checkpoints(tmp_path, {'target images': 'a', 'val images': 'b'})
  checkpoints.save(1, state_at(1), {'score': 0.2, 'loss': 1.0})
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path, {'target images': 'a', 'val images': 'c'})
  with pytest.raises(ValueError, match='changed since then: val images; bring it back'):
    checkpoints.restore(1, state_at(0))
  checkpoints.close()


def test_what_only_one_version_recorded_is_not_compared(tmp_path):
  """Versions before recorded a hash of random weights, which depends on the processor."""
  checkpoints = Checkpoints(tmp_path, {'val images': '1', 'pre-trained weights': '0123456789abcdef'})
  checkpoints.save(1, state_at(1), {'score': 0.2, 'loss': 1.0})
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path, {'val images': '1', 'random weights': 'drawn with seed 0'})
  jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, state_at(0)), state_at(1))
  checkpoints.close()


def test_a_checkpoint_of_another_format_is_refused_and_still_gives_weights(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints_module, 'FORMAT_VERSION', 1)
    save(tmp_path, {1: {'score': 0.2, 'loss': 1.0}}).close()
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(ValueError, match='has format version 1; this program resumes from 3'):
    checkpoints.restore(1, state_at(0))
  checkpoints.close()
  assert set(load_variables(tmp_path)) == {'params', 'batch_stats'}


def test_load_variables_takes_the_best(tmp_path, monkeypatch):
  save(tmp_path, {1: {'score': 0.9, 'loss': 1.0}, 2: {'score': 0.2, 'loss': 1.0}}).close()
  monkeypatch.chdir(tmp_path.parent)
  variables = load_variables(tmp_path.name)  # as `runs/pretrain` on a command line
  assert set(variables) == {'params', 'batch_stats'}
  np.testing.assert_array_equal(variables['params']['a']['kernel'], np.ones((2, 3)))
  np.testing.assert_array_equal(load_variables(tmp_path, 2)['params']['a']['kernel'], np.full((2, 3), 2))
  with pytest.raises(ValueError, match='holds no checkpoint of step 3; there are 1, 2'):
    load_variables(tmp_path, 3)


def test_folders_without_checkpoints(tmp_path):
  with pytest.raises(ValueError, match='holds no checkpoints'):
    load_variables(tmp_path)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(ValueError, match='holds no finished checkpoint'):
    load_variables(tmp_path)


def damage(folder, file, how):
  """Cuts a file of a checkpoint short, flips a bit in its middle, or removes it."""
  (path,) = {'data': [max((folder / 'state' / 'd').iterdir(), key=lambda path: path.stat().st_size)],
             'metadata': [folder / 'state' / '_METADATA'], 'about': [folder / 'about' / 'metadata']}[file]
  data = bytearray(path.read_bytes())
  cut = data[:len(data) // 2]
  data[len(data) // 2] ^= 1
  {'cut': lambda: path.write_bytes(cut), 'flipped': lambda: path.write_bytes(data), 'gone': path.unlink}[how]()


@pytest.mark.parametrize('file, how', [
    ('data', 'cut'), ('data', 'flipped'), ('data', 'gone'), ('metadata', 'cut'), ('metadata', 'gone'), ('about', 'cut'),
    ('about', 'gone')])
def test_damage_is_seen_and_set_aside(tmp_path, file, how):
  """The run can resume from the one before; the last one is never given up for a fresh start."""
  save(tmp_path, {1: {'score': 0.9, 'loss': 1.0}, 2: {'score': 0.2, 'loss': 1.0}}).close()
  damage(tmp_path / 'checkpoints' / '2', file, how)
  with pytest.raises(Damaged, match='checkpoints/2 '):
    load_variables(tmp_path, 2)
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(Damaged, match='checkpoints/2 ') as error:
    checkpoints.restore(2, state_at(0))
  checkpoints.set_aside(2, str(error.value))
  assert checkpoints.latest_step == 1 and steps(tmp_path) == [1] and (tmp_path / 'damaged' / '2').exists()
  jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, state_at(0)), state_at(1))
  checkpoints.save(2, state_at(2), {'score': 0.3, 'loss': 1.0})
  checkpoints.wait()
  jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(2, state_at(0)), state_at(2))
  checkpoints.set_aside(1, 'it is damaged')
  with pytest.raises(Damaged, match='There is no other checkpoint in .*, or give another --workdir'):
    checkpoints.set_aside(2, 'it is damaged')
  assert steps(tmp_path) == [2]
  checkpoints.close()


def test_damage_that_another_process_sees_is_damage_here(tmp_path, monkeypatch):
  """Whatever is asked of a checkpoint: where one process sets it aside and another reads on, each waits for the other
  for ever.
  """
  checkpoints = save(tmp_path, {1: {'score': 0.5, 'loss': 1.0}})
  monkeypatch.setattr(checkpoints_module.parallel, 'everyone', lambda value: [value, (True, 'damaged there')])
  for ask in (lambda: checkpoints.structure(1), lambda: checkpoints.restore(1, state_at(0))):
    with pytest.raises(Damaged, match='damaged there'):
      ask()
  checkpoints.close()


def test_metrics_that_cannot_be_read(tmp_path):
  """Orbax reads those of all checkpoints at once: a damaged one must not keep the others from being used."""
  save(tmp_path, {1: {'score': 0.9, 'loss': 1.0}, 2: {'score': 0.2, 'loss': 1.0}}).close()
  (tmp_path / 'checkpoints' / '2' / 'metrics' / 'metrics').write_text('{"score": 0.2, "lo')
  with pytest.raises(Damaged, match='the metrics of the checkpoint .*/2 cannot be read .*; run the command of'):
    load_variables(tmp_path)
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.latest_step == checkpoints.best_step == 1 and (tmp_path / 'damaged' / '2').exists()
  checkpoints.close()


def test_a_step_that_was_saved_before_it_was_evaluated(tmp_path):
  """Stopped before its evaluation and evaluated at the next start, it has metrics then; what has them is not saved
  again.
  """
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(4, state_at(4), {'score': 0.1, 'loss': 1.0})
  checkpoints.save(5, state_at(5), None)
  checkpoints.close()
  again = Checkpoints(tmp_path)
  assert (again.latest_step, again.best_step, again.evaluated(5), again.evaluated(4)) == (5, 4, False, True)
  again.save(5, state_at(5), None)
  again.save(5, state_at(5), {'score': 0.5, 'loss': 0.5})
  again.save(5, state_at(6), {'score': 0.9, 'loss': 0.5})
  again.wait()
  assert (again.latest_step, again.best_step, again.evaluated(5)) == (5, 5, True)
  jax.tree.map(np.testing.assert_array_equal, again.restore(5, state_at(0)), state_at(5))
  again.close()
