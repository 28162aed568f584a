"""The Python interface: a tiny job through it, what it refuses, and that it leaves its caller alone."""

import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import PIL.Image
import pytest

import ft_jax
from ft_jax.data import digits
from ft_jax.data.image_set import ImageSet
import selection

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = {
    'image_size': 16, 'augment': {'short_side': 16, 'scale': (0.6, 1.0), 'flip': False},
    'model': {'name': 'resnet18', 'width': 8}, 'selection': {'size': 3},
    'train': {'steps': 4, 'batch_size': 16, 'eval_every': 2, 'log_every': 1}}
FLAGS = [
    '--config=default', '--config.image_size=16', '--config.augment.short_side=16', '--config.augment.scale=(0.6,1.0)',
    '--config.augment.flip=false', '--config.model.name=resnet18', '--config.model.width=8',
    '--config.selection.size=3', '--config.train.steps=4', '--config.train.batch_size=16',
    '--config.train.eval_every=2', '--config.train.log_every=1', '--config.target.name=digits:target',
    '--config.target.val=val', '--config.source.name=digits:pool']
DIGITS = {'target': {'name': 'digits:target', 'val': 'val'}, 'source': 'digits:pool'}


def image_set(name, split, most=None):
  """Some of the demo's digits, as a user has them: arrays and the names of classes."""
  images, labels, _, class_names = digits.load(name, split)
  rows = np.random.default_rng(0).permutation(len(images))[:most]
  return ImageSet.from_arrays(images[rows], labels[rows], class_names, name=f'my {name}')


@pytest.fixture(scope='session')
def sets():
  return {'target': {'train': image_set('target', 'train'), 'test': image_set('target', 'test', 50)},
          'source': image_set('pool', 'train', 400)}


@pytest.fixture(scope='session')
def run(sets, tmp_path_factory):
  return ft_jax.finetune(**sets, **SETTINGS, workdir=tmp_path_factory.mktemp('run') / 'digits')


def parameters(run):
  return jax.tree.leaves(run._network.variables)


def same(one, other):
  return all(np.array_equal(a, b) for a, b in zip(parameters(one), parameters(other), strict=True))


def test_import_is_light():
  code = ('import sys, ft_jax; assert not {"jax", "flax", "numpy", "tensorflow_datasets"} & set(sys.modules); '
          'assert "finetune" in dir(ft_jax); ft_jax.ImageSet; assert "jax" not in sys.modules')
  subprocess.run([sys.executable, '-W', 'error', '-c', code], cwd=ROOT, check=True)
  with pytest.raises(AttributeError, match="module 'ft_jax' has no attribute 'fine_tune'"):
    ft_jax.fine_tune  # noqa: B018


def test_a_run_has_what_its_files_hold(run):
  results = json.loads((run.workdir / 'results.json').read_text())
  assert (run.test.top1, run.test.loss, run.test.images) == (results['test']['top1'], results['test']['loss'], 50)
  assert run.val.mean_per_class == results['val']['mean_per_class']
  assert list(run.test.per_class) == list(run.class_names)
  assert isinstance(run.selection, selection.Selection) and len(run.selection.units) == 3
  assert run.report.exists() and run.results == results
  metrics = run.metrics if isinstance(run.metrics, list) else run.metrics.to_dict('records')
  assert [line['step'] for line in metrics][-1] == 4 and 'val/top1' in metrics[-1]
  assert sum(row['right'] for row in results['test']['per_class']) == pytest.approx(50 * run.test.top1)


def test_a_run_shows_itself(run):
  text = repr(run)
  assert text.startswith('Run: resnet18, fine-tuned on ') and f'test top-1 {run.test.top1:.1%}' in text
  assert '3 classes, selected by uot' in text and str(run.report) in text
  page = run._repr_html_()
  assert page.count('<iframe') == 1 and '<html' not in page, 'the report is in a frame of its own'


def test_loading_gives_the_same_run(run):
  again = ft_jax.load(str(run.workdir))
  assert repr(again) == repr(run) and same(again, run)


def test_the_same_call_returns_the_finished_run(run, sets, capsys):
  stamp = os.stat(run.workdir / 'results.json').st_mtime_ns
  assert same(ft_jax.finetune(**sets, **SETTINGS, workdir=run.workdir), run)
  assert os.stat(run.workdir / 'results.json').st_mtime_ns == stamp and 'is finished' in capsys.readouterr().err


def test_another_call_in_that_workdir_is_refused(run, sets):
  other = {**SETTINGS, 'train': {**SETTINGS['train'], 'steps': 5}, 'seed': 1}
  message = (r"another config \(seed is 0 there and 1 here; train\['steps'\] is 4 there and 5 here\); "
             'give another workdir$')
  with pytest.raises(ValueError, match=message):
    ft_jax.finetune(**sets, **other, workdir=run.workdir)
  images = {'target': {**sets['target'], 'train': image_set('target', 'train', 60)}, 'source': sets['source']}
  with pytest.raises(ValueError, match=r"target\['train'\] is 'images:\w+' there and 'images:\w+' here"):
    ft_jax.finetune(**images, **SETTINGS, workdir=run.workdir)


@pytest.mark.slow
def test_the_command_line_gives_the_same_parameters(tmp_path):
  """Bit for bit, and each resumes or shows what the other wrote."""
  env = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(jax.device_count())}
  command = [sys.executable, 'main.py', *FLAGS, f'--workdir={tmp_path / "command"}']
  subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
  called = ft_jax.finetune(**DIGITS, **SETTINGS, workdir=tmp_path / 'called')
  assert same(called, ft_jax.load(tmp_path / 'command'))
  assert same(called, ft_jax.finetune(**DIGITS, **SETTINGS, workdir=tmp_path / 'command'))


class Interrupts(logging.Handler):
  """Sends an interrupt when a line is logged, as a user does who has seen it."""

  def __init__(self, line):
    super().__init__()
    self.line = line

  def emit(self, record):
    if record.getMessage().strip().startswith(self.line):
      os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_call_resumes(run, sets, tmp_path, capsys):
  handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  log, handler = logging.getLogger('ft_jax'), Interrupts('step 2/4')
  log.addHandler(handler)
  try:
    with pytest.raises(KeyboardInterrupt, match=r'stopped at step \d of 4, saved in .*; the same call resumes'):
      ft_jax.finetune(**sets, **SETTINGS, workdir=tmp_path / 'run')
  finally:
    log.removeHandler(handler)
  assert handlers == {number: signal.getsignal(number) for number in handlers}
  assert 'stopping after this step' in capsys.readouterr().err and not (tmp_path / 'run' / 'results.json').exists()
  with pytest.raises(ValueError, match='^workdir: the run in .* is not finished'):
    ft_jax.load(tmp_path / 'run')
  assert same(ft_jax.finetune(**sets, **SETTINGS, workdir=tmp_path / 'run'), run)


def test_a_call_in_a_thread(run, sets, tmp_path):
  """Only the main thread may handle signals: there, nobody does."""
  found = []
  thread = threading.Thread(target=lambda: found.append(ft_jax.finetune(**sets, **SETTINGS, workdir=tmp_path / 'run')))
  thread.start()
  thread.join()
  assert same(*found, run)


def test_nothing_stays_of_a_call(run, sets):
  """The fixture has made one: no log handlers, and jax's settings."""
  assert not logging.getLogger('ft_jax').handlers and logging.getLogger('ft_jax').propagate


def test_plain_fine_tuning_needs_no_source(sets, tmp_path):
  settings = {**SETTINGS, 'selection': {}, 'train': {'steps': 2, 'batch_size': 16}}
  plain = ft_jax.finetune(sets['target']['train'], **settings, workdir=tmp_path / 'plain')
  assert plain.selection is None and plain.test is None and plain.val.images > 0 and 'val top-1' in repr(plain)


def test_pretrain_makes_weights(sets, tmp_path):
  """Their network is that of the fine-tuning unless it is given."""
  settings = {**SETTINGS, 'train': {'steps': 2, 'batch_size': 16, 'keep_epochs': ()}}
  del settings['selection']
  weights = ft_jax.pretrain(sets['source'], **settings, workdir=tmp_path / 'weights')
  assert weights.class_names == sets['source'].class_names and 'pre-trained on' in repr(weights)
  del settings['model']
  tuned = ft_jax.finetune(sets['target']['train'], weights=tmp_path / 'weights', **settings, workdir=tmp_path / 'tuned')
  assert (tuned.config.model.name, tuned.config.model.width) == ('resnet18', 8)


@pytest.mark.slow
def test_a_call_that_trains_its_weights_first(sets, tmp_path):
  """On the source that it was given."""
  tuned = ft_jax.finetune(**sets, **SETTINGS, weights='pretrain', pretrain={'steps': 2, 'batch_size': 16},
                          workdir=tmp_path / 'run')
  assert ft_jax.load(tmp_path / 'run' / 'pretrain').results['source']['name'] == 'my pool' and tuned.results['weights']


# --- use ---


def test_predictions_do_not_depend_on_how_images_are_given(run, sets, tmp_path):
  test = sets['target']['test']
  arrays = [test[i].image for i in range(5)]
  for i, array in enumerate(arrays):
    PIL.Image.fromarray(array).save(tmp_path / f'{i}.png')
  paths = sorted(tmp_path.glob('*.png'))
  expected = run.predict(test.subset(range(5)))
  assert expected.probabilities.shape == (5, 10) and expected.probabilities.dtype == np.float32
  assert expected.class_names == [run.class_names[k] for k in expected.probabilities.argmax(1)]
  np.testing.assert_allclose(expected.probabilities.sum(1), 1, rtol=1e-5)
  features = run.features(test.subset(range(5)))
  for given in (np.stack(arrays), arrays, paths, [str(path) for path in paths], tmp_path,
                [PIL.Image.open(path) for path in paths], [arrays[0], *paths[1:]],
                np.array([str(path) for path in paths])):
    np.testing.assert_allclose(run.predict(given).probabilities, expected.probabilities, rtol=1e-4)
    np.testing.assert_allclose(run.features(given), features, rtol=1e-4, atol=1e-6)
  for one in (arrays[0], paths[0], PIL.Image.open(paths[0]), [arrays[0]]):
    np.testing.assert_allclose(run.predict(one).probabilities, expected.probabilities[:1], rtol=1e-4)
  assert run.predict(tmp_path).ids == [path.name for path in paths]


def test_predictions_are_those_of_the_test_split(run, sets):
  test = sets['target']['test']
  right = [name == test.class_names[label] for name, label in zip(run.predict(test).class_names, test.labels)]
  assert np.mean(right) == pytest.approx(run.test.top1)
  assert run.features(test).shape == (50, 64)


def test_no_images(run, sets):
  for none in ([], sets['source'].subset([])):
    assert run.predict(none).probabilities.shape == (0, 10) and run.features(none).shape == (0, 64)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I;16'])
def test_pillow_images_of_any_mode(run, mode):
  grey = np.linspace(0, 255, 64).reshape(8, 8).astype(np.uint8)
  if mode == 'I;16':
    picture = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
  elif mode == 'LAB':
    picture = PIL.Image.frombytes('LAB', (8, 8), np.stack([grey, 0 * grey, 0 * grey], -1).tobytes())
  else:
    picture = PIL.Image.fromarray(grey).convert('P' if mode == 'PA' else 'RGB').convert(mode)
  assert picture.mode == mode and len(run.predict(picture).class_names) == 1


@pytest.mark.parametrize('images,message', [
    (np.zeros((2, 8, 8, 3), np.float32), 'images has dtype float32; expected uint8'),
    (np.zeros((2, 3, 8, 8), np.uint8), r'images has shape \(2, 3, 8, 8\); expected uint8 \[n, h, w, 3\]'),
    (np.zeros(8, np.uint8), r'images has shape \(8,\); expected'),
    ([np.zeros((8, 8, 4), np.uint8)], r'images\[0\] has shape \(8, 8, 4\)'),
    ([3], r'images\[0\] is of type int; expected'),
    (None, '^images is of type NoneType; expected a path, a list of paths'),
    (3, '^images is of type int; expected a path'),
    ({'a': 1}, '^images is of type dict; expected a path'),
    (np.uint8(3), r'^images has shape \(\); expected'),
    (np.zeros((8, 9, 4), np.uint8), r'^images has shape \(8, 9, 4\), which is one image with transparency'),
    (['/no/such.png', np.zeros((8, 8), np.uint8)], r'^images\[0\]: there is no file /no/such.png'),
    ([str(ROOT), np.zeros((8, 8), np.uint8)], r'^images\[0\]: .* is a folder'),
    (PIL.Image.fromarray(np.zeros((8, 8), np.float32)),
     r'images\[0\] cannot be read as an image .its pixels are of mode F'),
    ('/no/such.png', '^images: .*there is no file /no/such.png'),
    (['/no/such.png'], r'^images\[0\]: there is no file /no/such.png'),
    (str(ROOT / 'setup.py'), 'images: there is no file .*, as .*setup.py lists$')])
def test_images_that_cannot_be_read(run, images, message):
  with pytest.raises(ValueError, match=message):
    run.predict(images)


def test_export(run, tmp_path):
  folder = run.export(tmp_path / 'export')
  assert (folder / 'model.safetensors').exists() and (folder / 'model.stablehlo').exists()


# --- what is refused ---


@pytest.mark.parametrize('given,message', [
    ({'train': {'epochs': -1}}, r"^train\['epochs'\] is -1; expected a number from 0"),
    ({'selection': {'size': 27}}, r"^selection\['size'\] is 27; expected 1 to 26"),
    ({'selection': {'method': 'best'}}, r"'best'; known: uot, ot"),
    ({'source': ''}, r"^selection\['method'\] is 'uot' but source is empty; name the pre-training data, or use "
                     r"selection={'method': 'none'}"),
    ({'target': ''}, '^target is empty; name your images'),
    ({'target': 'folder:/no/such'}, 'there is no folder /no/such'),
    ({'target': str(ROOT)}, f"^target is '{ROOT}'; expected tfds:..., .*; did you mean 'folder:{ROOT}'"),
    ({'target': {'name': 'digits:target', 'val': 'vla'}}, r"^target\['val'\] is 'vla': "),
    ({'target': {'train': np.zeros((2, 8, 8))}}, r"^target\['train'\] is of type ndarray; expected an ft_jax.ImageSet"),
    ({'target': {'name': 'digits:target', 'metric': 'f1'}}, r"^target\['metric'\] is 'f1'; known: top1"),
    ({'weights': 3}, '^weights is 3; expected text such as timm:'),
    ({'target': 3}, '^target is of type int; expected text such as folder:photos, an ft_jax.ImageSet'),
    ({'weights': 'no.pth'}, '^weights: there is no file or folder no.pth'),
    ({'model': 'vgg'}, r"^model\['name'\] is 'vgg'; known: resnet18"),
    ({'config': 'nothing'}, "^config 'nothing': there is no file nothing; known configs: aircraft"),
    ({'methods': {'l2_sp': 1}}, r"^methods\['l2_sp'\] needs pre-trained weights, but weights is empty")])
def test_wrong_arguments_are_refused(given, message, tmp_path):
  selected = {'method': 'uot', **SETTINGS['selection'], **given.get('selection', {})}
  with pytest.raises(ValueError, match=message):
    ft_jax.finetune(**{**DIGITS, **SETTINGS, **given, 'selection': selected}, workdir=tmp_path / 'run')


def test_image_sets_for_some_splits_only(tmp_path):
  few = image_set('target', 'test', 9)
  for target, message in (({'test': few}, '^target has image sets for test; expected one for train, too'),
                          ({'train': few, 'val': 'val'}, r"^target\['val'\] is 'val'; expected an image set"),
                          ({'train': few, 'metric': few}, r"^target\['metric'\] is an image set; expected one")):
    with pytest.raises(ValueError, match=message):
      ft_jax.finetune(target, workdir=tmp_path / 'run')


def test_an_argument_that_does_not_exist(tmp_path):
  with pytest.raises(TypeError, match=r"^finetune\(\) has no argument 'epochs'; did you mean train={'epochs': ...}\?"):
    ft_jax.finetune('digits:target', workdir=tmp_path, epochs=3)


def test_a_folder_without_a_run(tmp_path):
  with pytest.raises(ValueError, match=r'^workdir: .* holds no run \(no config.json of one\)'):
    ft_jax.load(tmp_path)


@pytest.mark.parametrize('call', [ft_jax.load, lambda workdir: ft_jax.finetune('digits:target', workdir=workdir)])
@pytest.mark.parametrize('workdir', [None, 3, ''])
def test_what_is_no_workdir(call, workdir):
  with pytest.raises(ValueError, match=f'^workdir is {workdir!r}; expected a path, such as runs/photos$'):
    call(workdir)


def test_a_run_of_a_newer_version(run, tmp_path):
  shutil.copytree(run.workdir, tmp_path / 'run')
  stored = json.loads((tmp_path / 'run' / 'config.json').read_text())
  stored['train']['teleport'] = True
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(stored))
  message = r"was written by a newer version of this program: this one does not know train\['teleport'\] \(True\)"
  with pytest.raises(ValueError, match=message):
    ft_jax.load(tmp_path / 'run')
