"""What is exported is the trained network: to torch's names and back bit for bit, and as a function with the same
outputs."""

import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

from conftest import quick_main
import jax
from jax import export as jax_export
import numpy as np
import PIL.Image
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch_weights import load_torch, RESNET

from configs import export as export_config
from ft_jax import trained
from ft_jax.data.image_set import Example
from ft_jax.jobs import export
from ft_jax.models import build
from ft_jax.models.export import state_dict
from ft_jax.training.checkpoints import Checkpoints
from ft_jax.training.finished_runs import load_variables

DATA = pathlib.Path(__file__).parents[1] / 'fixtures'
CONVENTION = jax_export.export(jax.jit(abs))(1.0).calling_convention_version


def test_state_dict_is_torchs_bit_for_bit(tmp_path):
  """Torch's own file, read and written again, has the same tensors under the same names and no others."""
  recorded = load_file(DATA / 'resnet50.safetensors')
  state = state_dict(RESNET, load_torch(DATA / 'resnet50.safetensors'), 'source')
  assert state.keys() == recorded.keys() and len(state) == 320
  for name, value in recorded.items():
    assert state[name].dtype == value.dtype and state[name].flags.c_contiguous
    np.testing.assert_array_equal(state[name], value)
  before = load_torch(DATA / 'resnet18.pth')
  save_file(state_dict(RESNET, before, 'source'), tmp_path / 'again.safetensors')
  jax.tree.map(np.testing.assert_array_equal, load_torch(tmp_path / 'again.safetensors'), before)


@pytest.fixture(scope='module')
def exported(trained_run) -> tuple[pathlib.Path, str]:
  """The folder that the command writes by itself, and what it prints."""
  run = quick_main('--config=configs/export.py', f'--config.workdir={trained_run}')
  assert run.returncode == 0, run.stderr
  return trained_run / 'export', run.stderr


def test_safetensors_is_the_best_checkpoint(exported, trained_run):
  folder, printed = exported
  variables = load_variables(trained_run)
  loaded = load_torch(folder / 'model.safetensors')
  loaded['params']['heads']['target'] = loaded['params']['heads'].pop('source')
  jax.tree.map(np.testing.assert_array_equal, dict(loaded), variables)
  assert sum(name.endswith('num_batches_tracked') for name in load_file(folder / 'model.safetensors')) == 20
  with safe_open(folder / 'model.safetensors', 'np') as file:
    header = {key: json.loads(value) for key, value in file.metadata().items() if key != 'format'}
  assert header['classes'] == ['blossom', 'roof', 'sky', 'wall']
  assert header['architecture'] == {'name': 'resnet18', 'width': 4, 'stem': '7x7', 'stages': 0}
  assert header['preprocessing']['image_size'] == 32 and header['preprocessing']['short_side'] == 36
  assert {path.name for path in folder.iterdir()} == {
      'README.txt', 'classes.txt', 'example.py', 'model.json', 'model.safetensors', 'model.stablehlo'}
  assert all(path.name in printed for path in folder.iterdir())


def apply(run):
  """The run's own network, compiled with little effort: that is what takes the time."""
  return jax.jit(run.model.apply, compiler_options={'xla_backend_optimization_level': 0})


def test_stablehlo_gives_the_models_own_outputs(exported, trained_run):
  """For any batch, with XLA's own convolutions only: the forms for the CPU would be slow, or worse, elsewhere."""
  folder, _ = exported
  function = jax_export.deserialize((folder / 'model.stablehlo').read_bytes())
  assert set(function.platforms) == {'cpu', 'cuda', 'rocm', 'tpu'}
  module = function.mlir_module()
  assert {'stablehlo.convolution', 'stablehlo.reduce_window'} <= set(re.findall(r'stablehlo\.\w+', module))
  # The head, once for each platform; im2col would have one for every convolution.
  assert module.count('stablehlo.dot_general') <= len(function.platforms)
  run = trained.load(str(trained_run))
  images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
  expected = apply(run)(run.variables, images).logits['target']
  for size in (1, 9):
    outputs = function.call(images[:size])
    np.testing.assert_allclose(outputs['logits'], expected[:size], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs['probabilities'], jax.nn.softmax(expected[:size]), rtol=1e-4, atol=1e-6)
  with pytest.raises(ValueError):
    function.call(np.zeros((2, 24, 32, 3), np.uint8))


@pytest.mark.parametrize('bits', [8, 16])
def test_the_example_runs(exported, photos, tmp_path, bits):
  """Alone, in another folder, without this project: it prepares images as the project does, also those of 16 bits and
  any name."""
  folder, _ = exported
  shutil.copytree(folder, tmp_path / 'elsewhere')
  path = photos / 'test' / 'sky' / '0.jpg'
  if bits == 16:
    with PIL.Image.open(path) as photo:
      grey = np.asarray(photo.convert('L')).astype(np.uint16) * 257
    path = tmp_path / os.fsdecode(b'deep\xe9.png')
    PIL.Image.fromarray(grey).save(path)
  run = subprocess.run([sys.executable, str(tmp_path / 'elsewhere' / 'example.py'), str(path)], cwd=tmp_path,
                       capture_output=True,
                       text=True, check=False, env={**os.environ, 'PYTHONPATH': ''})
  assert run.returncode == 0, run.stderr
  shown = str(path).encode(errors='backslashreplace').decode()
  about = json.loads((folder / 'model.json').read_text())
  assert (folder / 'classes.txt').read_text().split('\n')[:-1] == about['classes']
  loaded = trained.load(str(folder.parent))
  image = loaded.transform.evaluate(Example(path.read_bytes(), 0, ''))
  probabilities = jax.nn.softmax(apply(loaded)(loaded.variables, image[None]).logits['target'])[0]
  printed = {name: float(percent) / 100
             for name, percent in re.findall(r'(\w+) ([\d.]+)%', run.stdout.removeprefix(f'{shown}: '))}
  assert run.stdout.startswith(f'{shown}: ') and len(printed) == 3
  assert max(printed, key=printed.get) == next(iter(printed))
  # Scaled whole and then cut, as torchvision does it: a pixel may be rounded the other way than here.
  for name, probability in printed.items():
    assert abs(probability - probabilities[about['classes'].index(name)]) < 0.005


def make_workdir(path: pathlib.Path, **fields) -> dict:
  """A finished run with random weights, without a training; returns its variables."""
  config = export_config.get_config()
  config.job, config.model.name, config.model.width, config.image_size = 'pretrain', 'resnet18', 2, 32
  config.update(fields)
  model = build('resnet18', {'source': 3}, width=2)
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda s: rng.uniform(0.5, 1.5, s.shape).astype(np.float32), shapes)
  path.mkdir()
  checkpoints = Checkpoints(path)
  checkpoints.save(5, dict(variables), {'score': 0.5, 'loss': 1.0})
  checkpoints.close()
  (path / 'config.json').write_text(json.dumps(config.to_dict()))
  split = {'top1': 0.5, 'mean_per_class': 0.5, 'loss': 1.0, 'images': 2,
           'per_class': [{'name': n} for n in ('a', 'b "quoted"', 'ç\nd')]}
  (path / 'results.json').write_text(json.dumps({'job': config.job, 'best_step': 5, 'val': split, 'test': None}))
  return variables


def test_a_pre_training_and_once_more(tmp_path):
  """Its head is the pool's; the same command writes over what is there; a class name cannot break a line of
  classes.txt."""
  variables = make_workdir(tmp_path / 'run')
  config = export_config.get_config()
  config.workdir = str(tmp_path / 'run')
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'model.safetensors').write_text('of the last time')
  for _ in range(2):
    export.run(config, tmp_path / 'out')
    np.testing.assert_array_equal(load_file(tmp_path / 'out' / 'model.safetensors')['fc.weight'].T,
                                  variables['params']['heads']['source']['kernel'])
    assert (tmp_path / 'out' / 'classes.txt').read_text().splitlines() == ['a', 'b "quoted"', 'ç d']
    assert not [path for path in (tmp_path / 'out').iterdir() if path.name.startswith('.')]


def test_the_expiry_of_the_function_is_told_and_written(tmp_path, monkeypatch, caplog):
  """Jax guarantees to read it for six months; who finds the file a year later should know why it does not open."""
  make_workdir(tmp_path / 'run')
  config = export_config.get_config()
  config.workdir = str(tmp_path / 'run')
  monkeypatch.setattr(export, 'stablehlo_file', lambda run: b'')
  with caplog.at_level('INFO', 'ft_jax'):
    about = export.run(config, tmp_path / 'out', today=datetime.date(2026, 8, 31))
  expected = {'jax': jax.__version__, 'calling_convention_version': CONVENTION, 'exported': '2026-08-31',
              'readable_until': '2027-02-28'}
  assert about['stablehlo'].items() >= expected.items()
  assert json.loads((tmp_path / 'out' / 'model.json').read_text())['stablehlo'].items() >= expected.items()
  for text in (caplog.text, (tmp_path / 'out' / 'README.txt').read_text()):
    assert f'jax {jax.__version__} (calling convention {CONVENTION}) reads it' in text and 'until 2027-02-28' in text


@pytest.mark.parametrize('day, later',
                         [('2026-01-15', '2026-07-15'), ('2026-06-30', '2026-12-30'), ('2026-07-01', '2027-01-01'),
                                        ('2027-08-30', '2028-02-29'), ('2026-12-31', '2027-06-30')])
def test_six_months_later(day, later):
  assert str(export.months_later(datetime.date.fromisoformat(day), 6)) == later


def test_runs_that_cannot_be_used(tmp_path):
  make_workdir(tmp_path / 'stopped')
  (tmp_path / 'stopped' / 'results.json').unlink()
  make_workdir(tmp_path / 'compare', job='compare')
  shutil.copytree(tmp_path / 'stopped', tmp_path / 'compare' / 'uot-0')
  (tmp_path / 'empty').mkdir()
  for workdir, words in (('', 'config.workdir is empty; give'), (tmp_path / 'none', 'holds no run'),
                         (tmp_path / 'empty', 'holds no run'),
                         (tmp_path / 'stopped', 'is not finished'), (tmp_path / 'compare', 'such as .*uot-0')):
    config = export_config.get_config()
    config.workdir = str(workdir)
    with pytest.raises(ValueError, match=words):
      export.run(config, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
