"""Names that a file system allows: what is written below such folders is read again, or refused before anything
begins."""

import errno
import json
import os

from conftest import quick_main
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import pytest
from torch_weights import RESNET

from configs import export as export_config
from configs import predict as predict_config
from ft_jax.jobs import export, finetune, predict
from ft_jax.training import checkpoint_files, initial_weights
from ft_jax.training.checkpoints import Checkpoints, Damaged
from ft_jax.training.finished_runs import history, load_variables
from ft_jax.training.step import create_state
from ft_jax.workdir import Workdir
from selection import storage

# What URLs, patterns, formats and shells read in another way, and letters in two forms.
ALLOWED = ['C#', 'a?b', '100%', 'a%20b', '%', '#', '?', '[1]', '[', 'run*', '*', '{x}', '{', 'a|b', 'a|ocdbt:',
           'blank ', ' blank',
           'new\nline', 'caf\u00e9', 'cafe\u0301', '\u6c49\u5b57', '\U0001f600', '-dash', 'gs:x', 's3:', 'file:', '~',
           '$HOME', "quo'te",
           'quo"te', '\x1b[31m', '...', 'x.orbax-checkpoint-tmp', '5', 'x' * 255]
REFUSED = {'back\\slash': 'backslash', '\\': 'backslash', 'gs:': "ends in 'gs:'", 'logs:': "ends in 'gs:'",
           os.fsdecode(b'latin\xe9'): 'not UTF-8'}


def state_at(step: int):
  variables = {'params': {'a': {'kernel': np.full((2, 3), step, np.float32)}},
               'batch_stats': {'a': {'mean': np.zeros(3, np.float32)}}}
  return jax.device_get(create_state(variables, optax.trace(0.9)).replace(step=jnp.int32(step)))


def saved(workdir, *steps: int) -> None:
  workdir.mkdir(parents=True, exist_ok=True)
  checkpoints = Checkpoints(workdir)
  for step in steps:
    checkpoints.save(step, state_at(step), {'score': 1 / step, 'loss': 1.0})
  checkpoints.close()


@pytest.mark.parametrize('name', ALLOWED)
def test_checkpoints_below_any_name(tmp_path, name):
  """Restored, checked for wholeness where they lie, and used as weights."""
  workdir = tmp_path / name / 'runs'
  saved(workdir, 1, 2)
  checkpoints = Checkpoints(workdir)
  jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(2, state_at(0)), state_at(2))
  checkpoints.close()
  np.testing.assert_array_equal(load_variables(workdir)['params']['a']['kernel'], np.ones((2, 3)))
  assert [kept.step for kept in history(workdir)] == [1, 2]
  data = max((workdir / 'checkpoints' / '2' / 'state' / 'd').iterdir(), key=lambda path: path.stat().st_size)
  data.write_bytes(data.read_bytes()[:5])
  with pytest.raises(Damaged, match='checkpoints/2 cannot be read'):
    load_variables(workdir, 2)


def test_another_folder_is_not_read_in_the_place_of_the_one_named(tmp_path):
  """`%20` was read as a blank: the checkpoint that was checked was another run's."""
  for name in ('a%20b', 'a b'):
    saved(tmp_path / name, 1)
  for path in (tmp_path / 'a b' / 'checkpoints' / '1' / 'state' / 'd').iterdir():
    path.unlink()
  load_variables(tmp_path / 'a%20b', 1)
  with pytest.raises(Damaged):
    load_variables(tmp_path / 'a b', 1)


@pytest.mark.parametrize('name', ['run*', 'run?', 'run[12]'])
def test_a_folder_that_is_a_pattern_matches_itself_alone(tmp_path, name):
  """Orbax puts a checkpoint together from what a pattern finds: with `run*` from the folders of `run1` too."""
  for folder in (name, 'run1'):
    (tmp_path / folder / 'sub').mkdir(parents=True)
  folder = storage.located(tmp_path / name)
  assert list(folder.glob('s*b')) == [folder / 'sub'] and list(folder.parent.glob('*/s?b')) != []
  assert list(folder.glob('*/none')) == list((folder / 'gone').glob('*')) == []


@pytest.mark.parametrize('name', REFUSED)
def test_names_that_cannot_hold_checkpoints_are_refused_at_once(tmp_path, name):
  workdir = tmp_path / name / 'runs'
  with pytest.raises(ValueError, match=f'{REFUSED[name]}.*Give another folder') as raised:
    Workdir(workdir, {'job': 'finetune', 'seed': 0, 'train': {}})
  assert '\n' not in str(raised.value) and not workdir.exists()
  workdir.mkdir(parents=True)
  (workdir / 'checkpoints').mkdir()
  with pytest.raises(ValueError, match=REFUSED[name]) as raised:  # moved there after training
    load_variables(workdir)
  assert not isinstance(raised.value, Damaged)
  (tmp_path / 'link').symlink_to(workdir)
  saved(tmp_path / 'link', 1)
  assert [kept.step for kept in history(tmp_path / 'link')] == [1]


def test_a_folder_that_is_mistaken_for_object_storage_is_refused(tmp_path):
  """Etils takes /s3/bucket, where a bucket may well be mounted, for s3://bucket."""
  for path in ('/s3/runs', '/gs/runs', '/hf/x'):
    with pytest.raises(ValueError, match='reads it as (s3|gs|hf)://. Rename or mount it under another name'):
      storage.located(path)
  assert not storage.is_url(storage.located(tmp_path / 's3' / 'runs'))


def test_a_run_that_is_named_as_a_checkpoint_is_one(tmp_path):
  saved(tmp_path / 'checkpoints' / '5', 1, 2)
  weights = initial_weights.load_weights(str(tmp_path / 'checkpoints' / '5'), RESNET)
  np.testing.assert_array_equal(weights.variables['params']['a']['kernel'], np.ones((2, 3)))  # the best one


def test_files_with_names_as_long_as_they_can_be(tmp_path):
  path = tmp_path / ('x' * 251 + '.npz')
  storage.write_whole(path, b'data')
  assert path.read_bytes() == b'data' and os.listdir(tmp_path) == [path.name]
  assert storage.is_leftover('.0123456789abcdef0123456789abcdef.tmp') and storage.is_leftover(
      '.config.json.0123456789abcdef0123456789abcdef.tmp')
  assert not storage.is_leftover('.mine.tmp')  # nothing of a folder's own is removed


@pytest.mark.parametrize('code, reason', [(errno.EACCES, 'Permission denied'), (errno.EMFILE, 'Too many open files')])
def test_what_may_not_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch, code, reason):
  """Such a checkpoint is good, and must be neither moved nor given up for an older one."""
  saved(tmp_path, 1, 2)

  def opened(spec):
    raise ValueError(
        f'PERMISSION_DENIED: Error reading local file "manifest.ocdbt": {reason} [os_error_code=\'{code}\']')

  monkeypatch.setattr(checkpoint_files.tensorstore.KvStore, 'open', opened)
  checkpoints = Checkpoints(tmp_path)
  for read in (lambda: checkpoints.restore(2, state_at(0)), lambda: load_variables(tmp_path)):
    with pytest.raises(
        OSError, match=f'cannot be read here .{reason}., which does not mean that it is damaged; it is left as it is'):
      read()
  checkpoints.close()
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['1', '2']


def test_what_was_set_aside_before_stays(tmp_path):
  saved(tmp_path, 1, 2)
  (tmp_path / 'damaged' / '2').mkdir(parents=True)
  (tmp_path / 'damaged' / '2' / 'before').touch()
  checkpoints = Checkpoints(tmp_path)
  checkpoints.set_aside(2, 'it is damaged')
  checkpoints.close()
  assert (tmp_path / 'damaged' / '2' / 'before').exists() and (tmp_path / 'damaged' / '2-2' / 'state').exists()


def test_a_path_that_is_too_long_is_refused_at_once(tmp_path):
  """Orbax's own folders are further down than the workdir, and would not fit after hours of training."""
  workdir = tmp_path.joinpath(*['d' * 200] * 19)
  assert len(os.fspath(workdir)) < 4000
  with pytest.raises(ValueError, match=r'the path has \d,\d{3} bytes; expected 3,856 at most. Give another folder'):
    Workdir(workdir / ("x" * 150), {'job': 'finetune', 'seed': 0, 'train': {}})


@pytest.mark.slow
def test_a_whole_run_in_the_worst_of_folders(tmp_path, photos):
  """Trained, finished after a loss of its results, used as weights, by predict and by export, with data beside it."""
  data, workdir = tmp_path / 'images #[1]%20\\ ?', tmp_path / 'C#?%[]{}*|x%20y ' / 'runs*'
  data.mkdir()
  (data / 'photos*').symlink_to(photos)
  run = quick_main(
      '--config=configs/miniature.py:finetune', '--config.source.name=', '--config.selection.method=none',
      '--config.model.weights=',
      f'--config.target.name=folder:{data / "photos*"}', '--config.model.width=4', '--config.image_size=32',
      '--config.augment.short_side=36', '--config.train.steps=2', '--config.train.batch_size=8',
      '--config.train.eval_every=2',
      f'--workdir={workdir}')
  assert run.returncode == 0 and f'report: {workdir}/report.html' in run.stderr, run.stderr
  results = json.loads((workdir / 'results.json').read_text())
  (workdir / 'results.json').unlink()
  config = ConfigDict(json.loads((workdir / 'config.json').read_text()))
  assert finetune.run(config, workdir)['test'].keys() == results['test'].keys()
  kernel = lambda variables: variables['params']['conv1']['kernel']
  np.testing.assert_array_equal(kernel(initial_weights.load_weights(str(workdir), RESNET).variables),
                                kernel(load_variables(workdir)))

  predicting = predict_config.get_config()
  predicting.workdir, predicting.predict.images = str(workdir), str(data / 'photos*' / 'test')
  assert predict.run(predicting, workdir / 'predict\\ #')['images'] == 20
  exporting = export_config.get_config()
  exporting.workdir = str(workdir)
  export.run(exporting, workdir / 'export\\ #')
  assert sorted(os.listdir(workdir / 'predict\\ #')) == ['contact_sheet.png', 'predictions.csv']
  assert (workdir / 'export\\ #' / 'model.stablehlo').exists()
