"""A workdir belongs to one config, and its files are whole."""

import json
import subprocess
import sys

from ml_collections import ConfigDict
import pytest

from ft_jax import config, settings, workdir
from ft_jax.metrics import MetricsWriter
from ft_jax.workdir import Workdir, write_results

CONFIG = {'job': 'finetune', 'seed': 0, 'train': {'steps': 5, 'milestones': (0.6, 0.8)}}


def test_same_config_again_and_another_refused(tmp_path):
  Workdir(tmp_path / 'run', CONFIG)
  (tmp_path / 'run' / 'checkpoints' / '5').mkdir(parents=True)
  Workdir(tmp_path / 'run', CONFIG)
  with pytest.raises(ValueError, match=r'another config \(config.seed is 0 there and 1 here; config.train.steps is 5 '
                                       r'there and 6 here\)'):
    Workdir(tmp_path / 'run', {**CONFIG, 'seed': 1, 'train': {**CONFIG['train'], 'steps': 6}})


def test_how_images_are_read_may_change(tmp_path):
  """A test image that cannot be read must not cost the training: on_error=skip goes on, and so does the cache that is
  advised."""
  Workdir(tmp_path / 'run', {**CONFIG, 'data': {'cache': False, 'on_error': 'raise'}})
  (tmp_path / 'run' / 'checkpoints' / '5').mkdir(parents=True)
  work = Workdir(tmp_path / 'run', {**CONFIG, 'data': {'cache': True, 'on_error': 'skip'}})
  assert json.loads(work.config_json.read_text())['data'] == {'cache': True, 'on_error': 'skip'}
  with pytest.raises(ValueError, match='config.seed is 0 there and 1 here'):
    Workdir(tmp_path / 'run', {**CONFIG, 'seed': 1, 'data': {'cache': True, 'on_error': 'skip'}})


@pytest.fixture
def run_of_an_older_version(tmp_path):
  """A run with a checkpoint, of whose config the later version knows more fields and other names."""
  older = {'job': 'finetune', 'seed': 0, 'train': {'batch_size': 8, 'average': 0.9, 'fuzzy': 0},
           'pretrain': {'average': 0.0}}
  path = tmp_path / 'run'
  (path / 'checkpoints' / '5').mkdir(parents=True)
  (path / 'config.json').write_text(json.dumps(older))
  return path


def later(**fields):
  """The config of the version of today, with other values by path."""
  return settings.nested(settings.flat(config.get_config().to_dict()) | {'train.batch_size': 8} | fields)


def test_a_field_that_an_older_version_did_not_have_is_its_default(run_of_an_older_version, monkeypatch):
  """Whatever fields are added, an old run is resumed with their defaults, and refused by name with other values."""
  monkeypatch.setattr(settings, 'REMOVED', {'train.fuzzy': 0})
  now = later(**{'train.ema_decay': 0.9})
  Workdir(run_of_an_older_version, now)
  assert workdir.read_config(run_of_an_older_version)['augment']['scale'] == [0.08, 1.0]
  added = config.get_config().unlock()
  added.train.sharpness, added.colours = 1.5, ConfigDict({'count': 3})
  monkeypatch.setattr(config, 'get_config', lambda: added)
  now = later(**{'train.ema_decay': 0.9})
  Workdir(run_of_an_older_version, now)
  assert json.loads((run_of_an_older_version / 'config.json').read_text())['colours'] == {'count': 3}
  with pytest.raises(ValueError, match=r'another config \(config.colours.count is 3 there and 4 here\); give another'):
    Workdir(run_of_an_older_version, later(**{'train.ema_decay': 0.9, 'colours.count': 4}))


def test_a_removed_field_that_had_no_effect_is_ignored(run_of_an_older_version, monkeypatch):
  now = later(**{'train.ema_decay': 0.9})
  monkeypatch.setattr(settings, 'REMOVED', {'train.fuzzy': 1})
  with pytest.raises(ValueError, match=r"\(config.train.fuzzy is 0 there and 'not known' here\)"):
    Workdir(run_of_an_older_version, now)
  monkeypatch.setattr(settings, 'REMOVED', {'train.fuzzy': 0})
  Workdir(run_of_an_older_version, now)


def test_a_run_of_a_newer_version_is_refused_by_its_fields(tmp_path):
  """To resume, and to use it: what a field means that is not known here could be anything."""
  Workdir(tmp_path / 'run', later(**{'model.depthwise': True, 'train.fuzzy': 2}))
  for use in (lambda: Workdir(tmp_path / 'run', later()), lambda: workdir.read_config(tmp_path / 'run')):
    with pytest.raises(ValueError, match=r'run was written by a newer version of this program: this one does not know '
                                         r'config.model.depthwise \(True\), config.train.fuzzy \(2\). Update the '
                                         r'program'):
      use()


def test_a_renamed_field_keeps_its_value(run_of_an_older_version, monkeypatch):
  """train.average of older versions is train.ema_decay now."""
  monkeypatch.setattr(settings, 'REMOVED', {'train.fuzzy': 0})
  assert workdir.read_config(run_of_an_older_version)['train']['ema_decay'] == 0.9
  Workdir(run_of_an_older_version, later(**{'train.ema_decay': 0.9}))
  with pytest.raises(ValueError, match=r'\(config.train.ema_decay is 0.9 there and 0.5 here\)'):
    Workdir(run_of_an_older_version, later(**{'train.ema_decay': 0.5}))
def test_a_run_of_an_older_version_has_a_field_that_is_gone(tmp_path):
  """It resumes, whatever the field said."""
  Workdir(tmp_path / 'run',
          {**CONFIG, 'train': {**CONFIG['train'], 'nonfinite_steps': 3}, 'pretrain': {'nonfinite_steps': 1}})
  (tmp_path / 'run' / 'checkpoints' / '5').mkdir(parents=True)
  work = Workdir(tmp_path / 'run', {**CONFIG, 'pretrain': {}})
  assert 'nonfinite_steps' not in work.config_json.read_text()


def test_a_run_without_a_checkpoint_takes_the_new_config(tmp_path):
  """A first try with a wrong path must not block the workdir; its selection is not kept."""
  work = Workdir(tmp_path / 'run', CONFIG)
  (tmp_path / 'run' / 'checkpoints').mkdir()
  work.selection_json.write_text('{}')
  again = Workdir(tmp_path / 'run', {**CONFIG, 'seed': 1})
  assert json.loads(again.config_json.read_text())['seed'] == 1 and not again.selection_json.exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(ValueError, match='not empty and holds no run'):
    Workdir(tmp_path, CONFIG)
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


@pytest.mark.parametrize('text', ['{"architectures": ["ResNet"]}', '[1]', 'no json'])
def test_another_programs_config_is_left_alone(tmp_path, text):
  """Model folders of other programs have a config.json too."""
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match='holds no run'):
    Workdir(tmp_path, CONFIG)
  assert (tmp_path / 'config.json').read_text() == text


def test_metrics_have_each_step_once_after_a_restart(tmp_path):
  """A run that died at step 7 and goes on from step 4: lines after 4 go, and so does one that was cut short."""
  work = Workdir(tmp_path / 'run', CONFIG)
  writer = MetricsWriter(work, 0)
  for step in (2, 4, 6):
    writer.write(step, {'train/loss': step / 2})
  writer.close()
  with work.metrics_jsonl.open('a') as stream:
    stream.write('{"step": 7, "tr')
  again = MetricsWriter(work, 4)
  again.write(6, {'train/loss': 9.0})
  again.close()
  assert work.metrics() == [{'step': 2, 'train/loss': 1.0}, {'step': 4, 'train/loss': 2.0},
                            {'step': 6, 'train/loss': 9.0}]
  assert list((work.path / 'tensorboard').iterdir())


def test_results_are_strict_json(tmp_path):
  work = Workdir(tmp_path / 'run', CONFIG)
  assert work.results() is None
  with pytest.raises(ValueError):
    write_results(work, {'loss': float('nan')})
  assert work.results() is None
  write_results(work, {'loss': 0.5})
  assert json.loads((tmp_path / 'run' / 'results.json').read_text()) == work.results() == {'loss': 0.5}


def test_two_processes_do_not_share_a_workdir(tmp_path, monkeypatch):
  """The second waits for the first and then says why it does not start; a process itself takes up its run as often as
  it likes."""
  script = (f'import sys; from ft_jax.workdir import Workdir; work = Workdir(sys.argv[1], {CONFIG}); '
            'print("here", flush=True); input()')
  command = [sys.executable, '-c', script, str(tmp_path / 'run')]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
    assert other.stdout.readline() == 'here\n'
    monkeypatch.setattr(workdir, 'PATIENCE', 0.0)
    with pytest.raises(OSError, match='another process is at work in .*run: two at once would corrupt it'):
      Workdir(tmp_path / 'run', CONFIG)
    other.kill()
  first, again = Workdir(tmp_path / 'run', CONFIG), Workdir(tmp_path / 'run', CONFIG)
  assert first.path == again.path
