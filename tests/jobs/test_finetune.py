"""A selection made elsewhere is used as it is, only chosen images are read, what does not fit is refused; features to
compare by."""

import json
import pathlib
import shutil

from conftest import write_images
from etils import epath
import jax
import numpy as np
import pytest
from torch_weights import RESNET

from configs import default, miniature
from ft_jax import selecting
from ft_jax.data import open_set
from ft_jax.data.image_set import ImageSet
from ft_jax.jobs import finetune, pretrain
from ft_jax.studies import study_data
from ft_jax.training import initial_weights
import selection

MOCO = pathlib.Path(__file__).parents[1] / 'fixtures' / 'moco.pth.tar'


def config(photos, pool, **fields):
  """A fine-tuning of two steps from random weights, on folders."""
  tiny = miniature.get_config('finetune')
  with tiny.unlocked():
    tiny.update_from_flattened_dict({
        'source.name': f'folder:{pool}', 'target.name': f'folder:{photos}', 'model.weights': '', 'model.width': 4,
        'image_size': 32,
        'augment.short_side': 36, 'selection.size': 2.0, 'train.steps': 2, 'train.batch_size': 8, **fields})
  return tiny


def select_as_in_colab(pool_set, by, **kwargs):
  """With features that are not the job's, and ids of the pool."""
  rng = np.random.default_rng(0)
  source = selection.Embeddings(rng.normal(size=(len(pool_set), 8)) + pool_set.labels[:, None], pool_set.labels,
                                pool_set.class_names,
                                ids=pool_set.ids)
  return selection.select(source, (rng.normal(size=(9, 8)), np.arange(9) % 3), 2 if by == 'class' else 5, by=by,
                          **kwargs)


def test_plain_fine_tuning_needs_no_pre_training_data(trained_run):
  """The run names data that are not there: nothing of them was opened, and its report is written all the same."""
  config, results = (json.loads((trained_run / name).read_text()) for name in ('config.json', 'results.json'))
  assert config['source']['name'] == 'tfds:imagenet2012' and config['selection']['method'] == 'none'
  assert results['source'] is None and results['selection'] is None and (trained_run / 'report.html').exists()


@pytest.mark.parametrize('fields,opened', [({}, True), ({'selection.method': 'none'}, False),
                                           ({'selection.method': 'none', 'model.weights': 'pretrain'}, True)])
def test_the_pre_training_data_are_opened_where_they_are_used(photos, tmp_path, monkeypatch, fields, opened):
  """For a selection, or a pre-training of the run's own: where they are missing, that is said before anything long
  begins."""
  began = []
  monkeypatch.setattr(finetune, '_weights', lambda *args: began.append(args))
  monkeypatch.setattr(finetune, '_select', lambda *_: None)
  monkeypatch.setattr(finetune, '_network', lambda *_: None)
  monkeypatch.setattr(finetune.fit, 'fit', lambda *_, **__: {'precision': {}})
  monkeypatch.setattr(finetune, '_write_report', lambda *_: {})
  run = lambda: finetune.run(config(photos, tmp_path / 'gone', **fields), tmp_path / 'run')
  if opened:
    with pytest.raises(ValueError, match='there is no folder .*gone'):
      run()
  else:
    run()
  assert len(began) == (not opened)


@pytest.mark.slow
@pytest.mark.parametrize('by', ['class', 'list'])
def test_only_chosen_images_are_ever_read(photos, pool, tmp_path, by):
  """Everything in the pool that was not chosen is spoilt; nothing of it is missed, in training or in the report."""
  shutil.copytree(pool, tmp_path / 'pool')
  whole = open_set(f'folder:{tmp_path / "pool"}', 'train')
  chosen = select_as_in_colab(whole, 'class' if by == 'class' else 'example')
  path = tmp_path / ('ids.txt' if by == 'list' else 'selection.json')
  (chosen.export if by == 'list' else chosen.save)(path)
  for name in set(whole.ids) - set(chosen.ids):
    (tmp_path / 'pool' / name).write_bytes(b'no image')
  results = finetune.run(config(photos, tmp_path / 'pool', **{'selection.file': str(path)}), tmp_path / 'run')
  assert results['selection']['images'] == len(chosen.ids)
  assert results['selection']['method'] == ('uot' if by == 'class' else 'given')
  page = (tmp_path / 'run' / 'report.html').read_text()
  assert all(name in page for name in (chosen.class_names if by == 'class' else chosen.ids.tolist()))
  assert not (tmp_path / 'run' / 'embeddings').exists()


def test_images_of_a_selection_are_found_by_their_ids(pool, tmp_path):
  """Also where the pool has more images now, or another order."""
  whole = open_set(f'folder:{pool}', 'train')
  chosen = select_as_in_colab(whole.of_classes([0, 1, 2]), 'example')
  chosen.save(tmp_path / 'selection.json')
  given = selecting.read(str(tmp_path / 'selection.json'), whole.subset(np.arange(60)[::-1]))
  assert given.ids.tolist() == chosen.ids.tolist() and given.rows.tolist() == (59 - chosen.rows).tolist()


def test_unreadable_images_of_a_list_are_left_out(pool, tmp_path, caplog):
  """They are not there any more where images that cannot be read are skipped. (Notepad writes a mark in front.)"""
  whole = open_set(f'folder:{pool}', 'train')
  path = tmp_path / 'ids.txt'
  path.write_text('\n'.join(whole.ids[:4]), encoding='utf-8-sig')
  given = selecting.read(str(path), whole.subset(np.arange(1, 60)), {'cannot be read': [str(whole.ids[0])]})
  assert given.ids.tolist() == whole.ids[1:4].tolist()
  assert '1 of 4 images of' in caplog.text and 'left out' in caplog.text


def test_a_selection_that_does_not_fit_is_refused(photos, pool, tmp_path):
  whole = open_set(f'folder:{pool}', 'train')
  path = tmp_path / 'selection.json'
  select_as_in_colab(whole.of_classes([0, 1, 2]), 'example').save(path)
  other = open_set(f'folder:{pool}', 'train').of_classes([3, 4, 5])
  with pytest.raises(ValueError, match=r'5 of 5 ids are not in folder:.*, such as .*; its ids look like'):
    selecting.read(str(path), other)
  (tmp_path / 'ids.txt').write_text(f'{whole.ids[0]}\nnowhere.jpg\n')
  with pytest.raises(ValueError, match="1 of 2 ids are not in .*, such as 'nowhere.jpg'"):
    selecting.read(str(tmp_path / 'ids.txt'), whole)
  (tmp_path / 'ids.txt').write_bytes('caf\xe9.jpg'.encode('latin-1'))
  with pytest.raises(ValueError, match='ids.txt is not text in UTF-8; expected ids of images, one a line'):
    selecting.read(str(tmp_path / 'ids.txt'), whole)
  (tmp_path / 'ids.txt').write_text('\n')
  with pytest.raises(ValueError, match='is empty; expected ids'):
    selecting.read(str(tmp_path / 'ids.txt'), whole)
  means = selection.select((np.eye(3), [0, 1, 2]), np.eye(3), 2)
  means.save(path)
  with pytest.raises(ValueError, match='its classes are not those of folder'):
    selecting.read(str(path), whole)
  (tmp_path / 'broken.json').write_text('{')
  with pytest.raises(ValueError, match='broken.json holds no selection that can be read'):
    selecting.read(str(tmp_path / 'broken.json'), whole)


def test_a_selection_without_an_image_is_refused(photos, pool, tmp_path):
  whole = open_set(f'folder:{pool}', 'train')
  select_as_in_colab(whole, 'class').save(tmp_path / 'selection.json')
  text = (tmp_path / 'selection.json').read_text()
  empty = {'units': [], 'plan': None, 'rows': [], 'ids': [], 'row_units': []}
  (tmp_path / 'selection.json').write_text(json.dumps({**json.loads(text), **empty}))
  fields = {'selection.file': str(tmp_path / 'selection.json')}
  with pytest.raises(ValueError, match='selection.json. has no image of folder:.*; select again'):
    finetune.run(config(photos, pool, **fields), tmp_path / 'run')


@pytest.mark.parametrize('fields,words', [
    ({'selection.file': 'nowhere.json'}, 'there is no file nowhere.json; expected a selection.json, or ids as text'),
    ({'selection.file': __file__, 'selection.method': 'none'}, "selection.method is 'none', which uses no selection"),
    ({'source_first': 0.5, 'selection.method': 'none'}, "source_first is 0.5, but config.selection.method is 'none'"),
    ({'source_first': 1.0}, 'source_first is 1.0; expected a number from 0 to below 1'),
    ({'source_weight_schedule': 'step'}, "source_weight_schedule is 'step'; known: constant, linear, cosine"),
    ({'model.stages': 9}, 'model.stages is 9; expected 1 to 4, or 0 for all'),
    ({'model.batch_norm': 'per_stream', 'train.batch_size': 4, 'source_ratio': 2.0},
     'BatchNorm layer4/0/bn1 would see one value per channel'),
    ({'target.train_per_class': -1}, 'target.train_per_class is -1; expected'),
    ({'target.test': 'rest'}, "target.test is 'rest', .*target.train_per_class is 0")])
def test_what_is_checked_first(photos, pool, fields, words):
  with pytest.raises(ValueError, match=words):
    finetune.Settings.from_config(config(photos, pool, **fields))


def test_projection_features_are_the_mlp_of_the_pooled_ones(photos, tmp_path):
  """The output of MoCo-v2's projection head, per image and not normalised, in a file of its own."""
  weights = initial_weights.load_weights(str(MOCO), RESNET, projection=True)
  source, folder, features = open_set(f'folder:{photos}', 'train'), epath.Path(tmp_path), {}
  for name in selecting.FEATURES:
    settings = finetune.Settings.from_config(config(photos, photos, **{
        'model.weights': str(MOCO), 'model.width': 1, 'selection.by': 'example', 'selection.features': name}))
    embedded = finetune._encoder(settings, weights, folder / 'kept', folder / 'unfinished').embed(source, 'source')
    features[name] = embedded.features.astype(np.float64), embedded.fingerprint
  (pooled, encoder), (projected, with_head) = features['pooled'], features['projection']
  w0, b0, w2, b2 = (np.arange(n, dtype=np.float64) for n in (64, 8, 32, 4))  # tests/fixtures/make_torch_files.py
  hidden = np.maximum(pooled @ (w0.reshape(8, 8) / 64 - 0.5).T + b0 / 8 - 0.4, 0)
  np.testing.assert_allclose(projected, hidden @ (w2.reshape(4, 8) / 32 - 0.5).T + b2, rtol=1e-4, atol=1e-4)
  assert pooled.shape == (48, 8) and projected.shape == (48, 4) and np.ptp(projected, axis=0).min() > 1e-3
  assert encoder != with_head and len(list((folder / 'kept').iterdir())) == 2


def test_embeddings_of_random_weights_are_found_again_on_another_machine(photos, tmp_path, monkeypatch):
  """There the last bits of drawn weights differ; another seed draws other weights."""
  source, folder, features = open_set(f'folder:{photos}', 'test'), epath.Path(tmp_path), []
  drawn = initial_weights.init_variables
  for seed, factor in ((0, 1.0), (0, 1 + 2.0 ** -23), (1, 1.0)):
    monkeypatch.setattr(initial_weights, 'init_variables', lambda *args, f=factor: jax.tree.map(
        lambda x: x * np.float32(f), drawn(*args)))
    settings = finetune.Settings.from_config(config(photos, photos, seed=seed, **{'model.width': 1}))
    features.append(finetune._encoder(settings, None, folder / 'kept', folder / 'unfinished').embed(source, 'source',
                                                                                                    means=True))
  assert len(list((folder / 'kept').iterdir())) == 2
  np.testing.assert_array_equal(features[0].features, features[1].features)
  assert np.abs(features[0].features - features[2].features).max() > 1e-3


@pytest.mark.parametrize('weights,features,words', [
    ('', 'projection', r"features is 'projection', which config.model.weights '' do not have; give MoCo-v2's .pth.tar"),
    ('timm:resnet18.tv_in1k', 'projection', 'do not have'), ('pretrain', 'projection', 'do not have'),
    (str(MOCO), '128', "features is '128'; known: pooled, projection")])
def test_features_that_cannot_be(photos, weights, features, words):
  with pytest.raises(ValueError, match=words):
    finetune.Settings.from_config(config(photos, photos, **{'model.weights': weights, 'selection.features': features}))


@pytest.mark.parametrize('fields,words', [
    ({'target.without': ('roof', 'sky', 'wall')}, "has one class, 'blossom'"),
    ({'target.name': 'folder:{starved}', 'target.train': 'train[:50%]', 'target.test': 'train[50%:]'},
     "no training image of class 'c'")])
def test_a_target_that_cannot_be_learnt_is_refused_before_anything_long(photos, pool, tmp_path, fields, words,
                                                                        monkeypatch):
  write_images(tmp_path / 'starved', {'a': 6, 'b': 6, 'c': 1})
  monkeypatch.setattr(finetune, '_weights', None)
  fields = {key: value.format(starved=tmp_path / 'starved') if isinstance(value, str) else value
            for key, value in fields.items()}
  with pytest.raises(ValueError, match=words):
    finetune.run(config(photos, pool, **fields), tmp_path / 'run')


def test_the_other_jobs_refuse_such_a_target_too(photos, tmp_path):
  """Pre-training and the study."""
  write_images(tmp_path / 'one', {'a': 6})
  settings = default.get_config()
  settings.source.name, settings.image_size = f'folder:{tmp_path / "one"}', 32
  settings.model.name, settings.model.width = 'resnet18', 4
  settings.train.batch_size = 8
  with pytest.raises(ValueError, match="has one class, 'a', so a classifier"):
    pretrain.run(settings, tmp_path / 'run')
  settings.target.without, settings.target.val_fraction = ('roof', 'sky', 'wall'), 0.2
  with pytest.raises(ValueError, match="has one class, 'blossom', so a classifier"):
    study_data.open_target(settings, f'folder:{photos}')


def test_image_sets_in_memory(tmp_path):
  """Given in place of names: val is split off, test is what is not sampled for training; another target does not resume
  the run."""
  rng = np.random.default_rng(0)
  images = lambda n: rng.integers(0, 256, (n, 40, 40, 3), np.uint8)
  target = ImageSet.from_arrays(images(30), np.arange(30) % 3, ['ant', 'bee', 'cat'])
  source = ImageSet.from_arrays(images(24), np.arange(24) % 4, ['w', 'x', 'y', 'z'])
  settings = config('', '',
                    **{'target.name': '', 'source.name': '', 'target.test': 'rest', 'target.train_fraction': 0.6,
                               'target.val_fraction': 0.2, 'model.width': 1})
  results = finetune.run(settings, tmp_path / 'run', target={'train': target}, source={'train': source})
  assert [results['target'][split] for split in ('train', 'val', 'test')] == [15, 3, 12]
  assert results['target']['name'] == target.name and results['source']['classes'] == 4
  assert results['selection']['units'] == 2
  assert 'data:image/jpeg' in (tmp_path / 'run' / 'report.html').read_text()
  (tmp_path / 'run' / 'results.json').unlink()
  other = ImageSet.from_arrays(images(30), np.arange(30) % 3, ['ant', 'bee', 'cat'])
  with pytest.raises(ValueError, match='changed since then: target images'):
    finetune.run(settings, tmp_path / 'run', target={'train': other}, source={'train': source})
  with pytest.raises(ValueError, match='config.target.name is empty'):
    finetune.run(settings, tmp_path / 'other', source={'train': source})


def in_memory(classes, count, seed=0):
  images = np.random.default_rng(seed).integers(0, 256, (count, 40, 40, 3), np.uint8)
  return ImageSet.from_arrays(images, np.arange(count) % classes, [f'class {k}' for k in range(classes)])


@pytest.fixture
def fitted(monkeypatch):
  """What the job hands to the training, which is left out."""
  given = []
  monkeypatch.setattr(finetune.fit, 'fit', lambda training, work, data, *_: given.append(data) or {'precision': {}})
  return given


@pytest.mark.parametrize('by', ['class', 'example'])
def test_the_whole_pool(by, tmp_path, fitted, monkeypatch):
  """Every image, whatever the size and the unit, and without an embedding; the report says so."""
  monkeypatch.setattr(finetune, '_encoder', None)
  monkeypatch.setattr(finetune.report, 'write', lambda work, section, _: given.append(section))
  given, pool_set = [], in_memory(4, 24, seed=1)
  settings = config('', '', **{'target.name': '', 'source.name': '', 'selection.method': 'all', 'selection.by': by,
                               'selection.size': 0.3, 'target.test': '', 'model.width': 1})
  results = finetune.run(settings, tmp_path / 'run', target={'train': in_memory(3, 30)}, source={'train': pool_set})
  assert fitted[0].streams['source'].images.ids.tolist() == pool_set.ids.tolist()
  assert (results['selection']['method'], results['selection']['units']) == ('all', 4)
  assert '4 of 4 classes of arrays, the whole pool.' in given[0].how


def test_labels_of_the_source_are_shuffled_after_the_selection(tmp_path, fitted, monkeypatch):
  """The classes are chosen by true labels; training gets as many labels of each chosen class, on other images."""
  monkeypatch.setattr(finetune, '_write_report', lambda work, _: work.results())
  data = {'target': {'train': in_memory(3, 30)}, 'source': {'train': in_memory(4, 80, seed=1)}}
  fields = {'target.name': '', 'source.name': '', 'target.test': '', 'model.width': 1, 'selection.method': 'random'}
  for name, shuffled in (('plain', False), ('shuffled', True)):
    made = config('', '', **fields, **{'source.shuffle_labels': shuffled})
    results = finetune.run(made, tmp_path / name, **data)
    assert results['selection']['shuffled_labels'] == shuffled
  true, control = (given.streams['source'].images for given in fitted)
  assert true.ids.tolist() == control.ids.tolist() and true.fingerprint != control.fingerprint
  assert np.bincount(true.labels).tolist() == np.bincount(control.labels).tolist()
  assert 0.25 < np.mean(true.labels != control.labels) < 0.75


@pytest.mark.parametrize('fields', [{'selection.method': 'none'}, {'methods.fixmatch.weight': 1.0}])
def test_labels_that_are_not_used_are_not_shuffled(photos, pool, fields):
  with pytest.raises(ValueError, match='source.shuffle_labels is True, but no labels of source images are trained on'):
    finetune.Settings.from_config(config(photos, pool, **fields, **{'source.shuffle_labels': True}))
  with pytest.raises(ValueError, match='shuffle_labels is True, which is for the selected images of a fine-tuning'):
    pretrain.run(config(photos, pool, **{'source.shuffle_labels': True}), 'nowhere')
