"""Pre-training without labels, as whole runs: it does not collapse, resumes bit for bit, and its workdir gives weights
and projection to a fine-tuning; what cannot be right is refused before an image is read."""

import json

import jax
import numpy as np
import pytest

from configs import pretrain as recipes
import ft_jax
from ft_jax import trained
from ft_jax.data.image_set import ImageSet
from ft_jax.jobs import pretrain
from ft_jax.methods import METHODS
from ft_jax.models.weights import project
from ft_jax.training import initial_weights, loop
from ft_jax.training.finished_runs import load_variables

SMALL = {'model.name': 'resnet18', 'model.width': 4, 'model.stem': '3x3', 'image_size': 16, 'augment.short_side': 16,
         'train.batch_size': 32}
METHOD = {'moco': {'methods.moco.queue': 96, 'methods.moco.momentum': 0.99, 'methods.moco.projection': 16},
          'byol': {'methods.byol.hidden': 16, 'methods.byol.projection': 8, 'train.optimizer': 'sgd'}}


def config(kind, **fields):
  """Of a few steps on four devices."""
  small = recipes.get_config(kind)
  with small.unlocked():
    small.update_from_flattened_dict({**SMALL, **METHOD[kind], **fields})
  return small


@pytest.fixture(scope='module')
def shapes() -> ImageSet:
  """Stripes of three directions in random colours: colour and place say nothing of the class."""
  rng = np.random.default_rng(0)
  labels = np.arange(180) % 3
  y, x = np.mgrid[:16, :16]
  waves = [np.sin(1.6 * (x if k == 0 else y if k == 1 else 0.7 * (x + y)) + rng.uniform(0, 6)) for k in labels]
  low, high = rng.uniform(0, 100, (2, 180, 1, 1, 3))
  images = low + (np.stack(waves)[..., None] + 1) / 2 * (155 + high - low)
  return ImageSet.from_arrays(np.clip(images, 0, 255).astype(np.uint8), labels, name='stripes')


class Killed(Exception):
  """Stands for kill -9."""


@pytest.mark.parametrize('kind', ['moco', pytest.param('byol', marks=pytest.mark.slow)])
def test_a_run_resumes_and_gives_its_projection(kind, shapes, tmp_path, monkeypatch, caplog):
  """The best checkpoint is the one where nearest neighbours know most classes; a run that is killed in the middle ends
  as the one that nobody disturbed, bit for bit. (So few steps teach nothing: docs/weights.md has what it learns.)"""
  fields = config(kind, **{
      'train.steps': 24, 'train.eval_every': 12, 'train.log_every': 1, 'model.width': 8, 'source.val_fraction': 0.4,
      'train.learning_rate': 0.05 if kind == 'moco' else 0.1, 'augment.scale': (0.6, 1.0), 'augment.flip': False,
      'augment.jitter_probability': 0.0})
  results = pretrain.run(fields, tmp_path / 'whole', source={'train': shapes})
  lines = [json.loads(line) for line in (tmp_path / 'whole' / 'metrics.jsonl').read_text().splitlines()]
  measured = {line['step']: line['val/top1'] for line in lines if 'val/top1' in line}
  assert list(measured) == [12, 24]
  assert results['val']['top1'] == max(measured.values())
  assert results['methods'] == [kind] and results['test'] is None
  assert 'nearest neighbours' in (tmp_path / 'whole' / 'report.html').read_text()
  losses = [line[f'train/loss_{kind}'] for line in lines]
  # Where all features are the same, MoCo's loss is that of a guess among 97, and BYOL's was 4 at first.
  assert np.mean(losses[8:]) < (np.log(97) - 0.03 if kind == 'moco' else 3)

  save = loop.save

  def save_and_die(run, writer, step, state, val):
    save(run, writer, step, state, val)
    if step == 12:
      run.checkpoints.wait()
      raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(loop, 'save', save_and_die)
    with pytest.raises(Killed):
      pretrain.run(fields, tmp_path / 'killed', source={'train': shapes})
  resumed = pretrain.run(fields, tmp_path / 'killed', source={'train': shapes})
  whole, again = (load_variables(tmp_path / name, 24) for name in ('whole', 'killed'))
  jax.tree.map(np.testing.assert_array_equal, again, whole)
  assert resumed['val'] == results['val']

  caplog.set_level('INFO', 'ft_jax')
  model = pretrain.Settings.from_config(fields, source_given=True).model
  weights = initial_weights.load_weights(str(tmp_path / 'whole'), model, projection=True)
  projected = project(weights.variables['projection'], np.ones((2, 64), np.float32))
  assert projected.shape == (2, 16 if kind == 'moco' else 8)
  assert 'projection' not in initial_weights.load_weights(str(tmp_path / 'whole'), model).variables
  assert 'projection/0, projection/2 (projection head)' in caplog.text
  with pytest.raises(ValueError, match="model.source_head is 'pretrained', but .* has no classifier"):
    initial_weights.load_weights(str(tmp_path / 'whole'), model, classes=3)

  opened = ft_jax.load(tmp_path / 'whole')
  assert opened.features(shapes.subset(range(3))).shape == (3, 64) and 'pre-trained on' in repr(opened)
  with pytest.raises(ValueError, match='is a pre-training without labels, which has no classifier: it cannot predict'):
    opened.predict(shapes)
  with pytest.raises(ValueError, match=rf'config.workdir: .* is a pre-training without labels \(methods.{kind}\)'):
    trained.load(str(tmp_path / 'whole'))


def test_one_class_is_enough(tmp_path, caplog):
  """Images in a folder without class folders: nothing can be measured, so the last checkpoint is the best."""
  caplog.set_level('INFO', 'ft_jax')
  images = ImageSet.from_arrays(np.random.default_rng(0).integers(0, 255, (120, 16, 16), np.uint8), name='noise')
  fields = config('moco', **{'train.steps': 2, 'train.eval_every': 1, 'model.width': 8})  # compiled above
  results = pretrain.run(fields, tmp_path / 'run', source={'train': images})
  assert results['best_step'] == 2
  assert 'the source has one class, so nearest neighbours measure nothing: the last checkpoint is the' in caplog.text


@pytest.mark.parametrize('kind, fields, message', [
    ('moco', {'methods.moco.queue': 100}, r'methods.moco.queue is 100, which batches of 32 images .* use 96 or 128'),
    ('moco', {'methods.moco.queue': 192}, 'methods.moco.queue is 192, but there are only 171 training images'),
    ('moco', {'train.batch_size': 1, 'methods.moco.queue': 4}, 'train.batch_size is 1'),
    ('moco', {'methods.byol.enabled': True}, 'methods.moco and methods.byol cannot be combined'),
    ('moco', {'methods.l2_sp.weight': 0.1}, 'config.methods.l2_sp is switched on, which is for fine-tuning'),
    ('moco', {'model.source_head': 'pretrained', 'model.weights': 'timm:resnet18.tv_in1k', 'model.width': 64,
              'model.stem': '7x7'}, "config.model.source_head is 'pretrained', but methods.moco uses no labels"),
    ('moco', {'train.ema_decay': 0.99}, 'train.ema_decay is 0.99, which averages the network but not the projection of '
                                        'methods.moco'),
    ('moco', {'train.freeze': 'backbone'}, "train.freeze is 'backbone', which leaves no parameter to train"),
    ('byol', {'model.batch_norm': 'frozen', 'model.weights': 'timm:resnet18.tv_in1k', 'model.width': 64,
              'model.stem': '7x7'}, "model.batch_norm is 'frozen', with which methods.byol may collapse"),
    ('byol', {'train.batch_size': 4}, 'train.batch_size is 4, 1 image for each device'),
    ('byol', {'augment.jitter': (0.4, 0.4)}, r'augment.jitter is \(0.4, 0.4\); expected the strengths of brightness'),
])
def test_wrong_settings_are_refused(kind, fields, message, shapes, tmp_path, monkeypatch):
  """Before any image is read."""
  monkeypatch.setattr(ImageSet, '__getitem__', lambda *_: pytest.fail('an image was read'))
  with pytest.raises(ValueError, match=message):
    pretrain.run(config(kind, **fields), tmp_path / 'run', source={'train': shapes})


def test_the_recipes_are_the_published_ones():
  """MoCo-v2's and BYOL's augmentations, and the supervised recipe without either method."""
  moco, byol, supervised = (recipes.get_config(kind) for kind in ('moco', 'byol', ''))
  for kind, found in (('moco', moco), ('byol', byol)):
    settings = pretrain.Settings.from_config(found, source_given=True)
    assert list(settings.methods) == [kind] and not settings.model.heads
    assert {name: found.methods[kind][name] for name in METHODS[kind].published} == METHODS[kind].published
  assert pretrain.Settings.from_config(supervised, source_given=True).model.heads == {'source': pretrain.UNKNOWN}
  with pytest.raises(ValueError, match='configs/pretrain.py:simclr is not known; known: , moco, byol'):
    recipes.get_config('simclr')
