"""The command line and the configs: wrong input is one clear line, and every config is the default with other
values."""

import pathlib
import re
import subprocess
import sys

from conftest import quick_main
from ml_collections import config_flags, ConfigDict
import pytest

from configs import (
  aircraft,
  caltech101,
  cars,
  cub,
  default,
  digits,
  dogs,
  dtd,
  export,
  miniature,
  pets,
  predict,
  pretrain,
  sun397,
)
from configs import fixmatch as fixmatch_config
from configs import stability as stability_config
from ft_jax.command import default_workdir

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize('flags,words', [
    ([], 'error: --config is missing; give a config, such as --config=configs/pets.py'),
    (['--config=configs/pets.py', '--confg.seed=1'], "Unknown command line flag 'confg.seed'"),
    (['--config=configs/pets.py:moco'], "error: unknown recipe 'moco'; expected :supervised or :mocov2"),
    (['--config=configs/export.py:mocov2'], 'error: this config takes no argument after a colon'),
    (['--config=configs/nothing.py'],
     'error: --config: there is no file configs/nothing.py; known configs: aircraft, caltech101'),
    (['--config', 'configs/nothing.py:x', '--config.seed=1'],
     'error: --config: there is no file configs/nothing.py; known configs: '),
    (['--config=configs'], 'error: --config: there is no file configs; known configs: '),
    (['--config=configs/digits.py:finetune', '--config.data.on_error=ignore'],
     "error: config.data.on_error is 'ignore'; known: raise, skip"),
    (['--config=configs/digits.py:finetune', '--config.sed=1'],
     "no field 'sed'; config has augment, checkpoints, compare, compile_cache, data"),
    (['--config=configs/digits.py:finetune', '--config.train.lr=1'],
     "no field 'train.lr'; config.train has accumulate_steps, batch_size, clip_norm"),
    (['--config=configs/digits.py:finetune', '--config.seed.x=1'], "no field 'seed.x'; config.seed is a single value"),
    (['--config=configs/digits.py:finetune', '--config.selection.by=colour'],
     "config.selection.by is 'colour'; known: class, cluster, example"),
    (['--config=configs/digits.py:finetune', '--config.selection.epsilon=0'],
     'config.selection.epsilon is 0.0; expected a number above 0'),
    (['--config=configs/digits.py:finetune', '--config.selection.size=27'],
     'config.selection.size is 27; expected 1 to 26'),
    (['--config=configs/digits.py:finetune', '--config.selection.by=cluster', '--config.selection.clusters=9999'],
     'config.selection.clusters is 9999; expected 1 to 2117, the images of digits:pool'),
    (['--config=configs/digits.py:finetune', '--config.selection.size=2.5'],
     'config.selection.size is 2.5; expected 1 to 26'),
    (['--config=configs/digits.py:finetune', '--config.selection.cost=best'],
     "config.selection.cost is 'best'; known: cosine, euclidean, bures"),
    (['--config=configs/digits.py:finetune', '--config.train.momentum=1.5'], 'train.momentum is 1.5'),
    (['--config=configs/digits.py:finetune', '--config.train.learning_rate=nan'],
     'train.learning_rate is nan; expected a number from 0'),
    (['--config=configs/digits.py:finetune', '--config.pretrain.epochs=0'], 'train.steps and train.epochs are both 0'),
    (['--config=configs/digits.py:finetune', "--config.train.learning_rate_groups=(('head.*',1.0),)"],
     "covers no parameter 'bn1/bias'"),
    (['--config=configs/digits.py:finetune', '--config.model.weights=no.pth'], 'there is no file or folder no.pth'),
    (['--config=configs/miniature.py', '--config.model.weights=', "--config.compare.variants=('none','best')"],
     "config.selection.method is 'best'"),
    (['--config=configs/digits.py:finetune', '--config.train.steps=many'],
     'error: flag --config.train.steps=many: expected a whole number'),
    (['--config=configs/digits.py:finetune', '--config.augment.flip=maybe'],
     '--config.augment.flip=maybe: expected true or false'),
    (['--config=configs/digits.py:finetune', '--config.train=5'],
     '--config.train=5: this is a group of fields; set one of them'),
    (['--config=configs/digits.py:finetune', '--config.augment.scale=0.5'],
     'config.augment.scale is (0.5,); expected two numbers such as'),
    (['--config=configs/digits.py:finetune', '--config.train.batch_size=-8'],
     'config.train.batch_size is -8; expected a whole number from 1'),
    (['--config=configs/digits.py:finetune', '--config.workdir=runs/x'],
     'this is job finetune; set its own folder by --workdir'),
    (['--config=configs/digits.py:finetune', 'digits'], "unexpected argument 'digits'"),
    (['--config=configs/digits.py:finetune', '--config.job=fine'],
     "config.job is 'fine'; known: finetune, pretrain, compare"),
    (['--config=configs/digits.py:finetune', '--config.selection.method=best'],
     "config.selection.method is 'best'; known: uot, ot, softmax, nearest"),
    (['--config=configs/digits.py:finetune', '--config.source_ratio=0.01'],
     'config.source_ratio 0.01 of batch 32 is 0.32 source images a step'),
    (['--config=configs/digits.py:finetune', '--config.target.name='], 'config.target.name is empty; name your images'),
    (['--config=configs/digits.py:finetune', '--config.source.name='],
     'config.source.name is empty; name the pre-training data'),
    (['--config=configs/digits.py:finetune', '--config.target.name=folder:/no/such'], 'there is no folder /no/such'),
    (['--config=configs/digits.py:finetune', '--config.model.name=vgg'], "model.name is 'vgg'; known: resnet18"),
    (['--config=configs/digits.py:finetune', '--config.model.dtype=int8'],
     "model.dtype is 'int8'; known: float32, bfloat16"),
    (['--config=configs/digits.py:finetune', '--config.train.batch_size=0'], 'train.batch_size is 0'),
    (['--config=configs/digits.py:finetune', '--config.target.metric=f1'],
     "config.target.metric is 'f1'; known: top1, mean_per_class"),
    (['--config=configs/pets.py', '--config.data_dir=/tmp', '--config.model.weights='],
     'prepare it with: python -m ft_jax.data.prepare tfds:oxford_iiit_pet --data_dir=/tmp'),
    (['--config=configs/export.py'], 'config.workdir is empty; give the workdir of a finished run'),
    (['--config=configs/predict.py', '--config.workdir=/no/such', '--config.predict.images=tests'],
     'no image in tests and its subfolders'),
    (['--config=configs/predict.py', '--config.workdir=/no/such', '--config.predict.images=docs'],
     'config.workdir: /no/such holds no run'),
    (['--config=configs/miniature.py:pets'], "config.job is 'pets'; known: finetune, pretrain, compare"),
])
def test_wrong_input_is_one_clear_line(tmp_path, flags, words):
  run = quick_main(*flags, f'--workdir={tmp_path / "run"}')
  assert run.returncode != 0 and words in run.stderr, run.stderr
  assert 'Traceback' not in run.stderr


@pytest.mark.parametrize('file_name,workdir', [
    ('configs/pets.py', 'runs/pets'), ('/x/configs/pets.py:mocov2', 'runs/pets-mocov2'), ('mine.py', 'runs/mine')])
def test_default_workdir(file_name, workdir):
  """Two recipes of one config do not meet in one folder."""
  assert default_workdir(file_name) == workdir


def test_default_workdir_of_a_job_that_uses_a_run():
  assert default_workdir('configs/export.py', 'runs/pets') == 'runs/pets/export'


def test_a_config_file_cannot_add_a_field(tmp_path):
  """A misspelt field in a file of one's own is refused as it is on the command line."""
  (tmp_path / 'mine.py').write_text(
      'from configs import default\n\ndef get_config():\n  config = default.get_config()\n'
                                    '  config.source_wieght = 0.3\n  return config\n')
  run = quick_main(f'--config={tmp_path / "mine.py"}', f'--workdir={tmp_path / "run"}')
  assert run.returncode == 1 and 'Traceback' not in run.stderr
  assert "sets 'source_wieght', which is not a field of the config (ft_jax/config.py). " in run.stderr
  assert 'Did you mean "source_weight"?' in run.stderr


def test_a_config_file_that_sets_a_wrong_type(tmp_path):
  (tmp_path / 'mine.py').write_text(
      'from configs import default\n\ndef get_config():\n  config = default.get_config()\n'
                                    "  config.seed = 'one'\n  return config\n")
  run = quick_main(f'--config={tmp_path / "mine.py"}', f'--workdir={tmp_path / "run"}')
  assert run.returncode == 1 and 'Traceback' not in run.stderr
  assert "error: the config file sets the field 'seed' to one, which is of type str; expected int" in run.stderr


def test_ctrl_c_outside_of_a_training_is_one_line(tmp_path):
  """While images are embedded, say: no traceback, and the exit status that a shell expects."""
  code = ('import sys; from ft_jax import main; from ft_jax.jobs import finetune\n'
          'def interrupted(*_): raise KeyboardInterrupt\n'
          f'finetune.run = interrupted; sys.argv = ["main.py", "--config=configs/digits.py:finetune", '
          f'"--workdir={tmp_path / "run"}"]\n'
          'main.command()')
  run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
  assert run.returncode == 130
  assert run.stderr.strip().endswith('stopped (SIGINT); the same command resumes from what is finished')
  assert 'Traceback' not in run.stderr


def test_help_needs_no_jax():
  """Help answers before anything heavy is imported."""
  run = subprocess.run([sys.executable, '-X', 'importtime', 'main.py', '--help'], cwd=ROOT, capture_output=True,
                       text=True, check=False)
  assert '--workdir' in run.stdout and '--config' in run.stdout
  imported = set(re.findall(r'\| +(jax|flax|tensorflow|tensorflow_datasets|ott|matplotlib|orbax)$', run.stderr,
                            flags=re.MULTILINE))
  assert not imported


def fields(config: ConfigDict, prefix: str = '') -> dict[str, type]:
  flat = {}
  for key, value in config.items():
    flat |= fields(value, f'{prefix}{key}.') if isinstance(value, ConfigDict) else {f'{prefix}{key}': type(value)}
  return flat


TARGETS = {'pets': pets, 'cub': cub, 'cars': cars, 'aircraft': aircraft, 'dogs': dogs, 'caltech101': caltech101,
           'dtd': dtd,
           'sun397': sun397}


@pytest.mark.parametrize('config', [
    digits.get_config(), pretrain.get_config(), export.get_config(), predict.get_config(),
    stability_config.get_config(),
    fixmatch_config.get_config(),
    miniature.get_config(), miniature.get_config('pretrain'),
    *(target.get_config(recipe) for target in TARGETS.values() for recipe in ('supervised', 'mocov2'))])
def test_configs_are_the_default_with_other_values(config):
  """No config adds a field or changes the type of one, so that ft_jax/config.py documents every field there is."""
  assert fields(config) == fields(default.get_config())


def test_the_eight_targets_have_the_published_settings():
  """What the authors' scripts for CUB set; which sets are judged by the mean over classes."""
  for name, target in TARGETS.items():
    supervised, mocov2 = target.get_config(), target.get_config('mocov2')
    assert supervised.target.metric == ('mean_per_class' if name in ('aircraft', 'pets', 'caltech101') else 'top1')
    assert [(c.model.name, c.source_weight, c.train.learning_rate) for c in (supervised, mocov2)] == [
        ('resnet18', 0.3, 0.003), ('resnet50', 1.0, 0.01)]
    assert mocov2.selection.features == 'projection'
    for config in (supervised, mocov2):
      train = config.train
      assert (train.batch_size, train.epochs, train.milestones, train.decay, train.weight_decay, train.momentum,
              train.nesterov) == (
          256, 100.0, (0.6, 0.8), 0.1, 1e-4, 0.9, True)
      assert train.learning_rate_groups == (), 'fresh heads have ten times the rate: test_fit.py'
      assert (config.selection.method, config.selection.size, config.selection.epsilon, config.selection.rho_source,
              config.selection.rho_target, config.source_ratio) == ('uot', 100.0, 0.1, 0.1, 10.0, 1.0)


def test_every_field_is_documented_on_its_line():
  lines = [line for line in (ROOT / 'ft_jax' / 'config.py').read_text().splitlines()
           if re.match(r'  (config|train)\.[\w.]+ = ', line) and not re.search(r'ConfigDict\(\)', line)]
  assert len(lines) > 40 and all(re.search(r'\S  # .{10,}', line) for line in lines)


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')  # ml_collections on Python 3.11
def test_config_flags_override_every_kind_of_value(monkeypatch):
  """Numbers, names, switches and pairs from the command line."""
  from absl import flags
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file('config', flag_values=values)
  line = ['x', f'--config={ROOT}/configs/digits.py:finetune', '--config.seed=3', '--config.augment.flip=true',
          '--config.train.learning_rate=0.5',
          "--config.train.learning_rate_groups=(('heads/.*',5.0),('.*',1.0))", '--config.target.name=folder:x']
  monkeypatch.setattr(sys, 'argv', line)  # where ml_collections looks for the fields that are overridden
  values(line)
  config = holder.value
  assert (config.seed, config.augment.flip, config.train.learning_rate, config.target.name) == (3, True, 0.5,
                                                                                                'folder:x')
  assert config.train.learning_rate_groups == (('heads/.*', 5.0), ('.*', 1.0))
