"""Label noise: the right number of wrong labels, independent of the order of files; val and test stay clean."""

import dataclasses
import json
import pathlib

from conftest import quick_main
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from configs import default
from ft_jax import noise, trained
from ft_jax.data import open_set
from ft_jax.data.image_set import ImageSet
from ft_jax.data.label_noise import probabilities, read_predictions, with_noise
from ft_jax.data.splits import open_splits, SplitSettings
from ft_jax.jobs import predict
from ft_jax.settings import check_fields

NAMES = tuple(f'class {k}' for k in range(67))


def indoor(count=4824, classes=67, split='train'):
  """A source of as many labels as the published experiment has; its images do not matter."""
  labels = (np.arange(count) % classes).astype(np.int32)
  ids = np.array([f'{split}/{NAMES[k]}/{i}.jpg' for i, k in enumerate(labels.tolist())])
  return ImageSet('indoor', NAMES[:classes], labels, ids, np.arange(count), lambda row: b'', 'fingerprint')


def binomial(n, p):
  """Five standard deviations: of all draws below, none is farther away by chance."""
  return 5 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize('percent', [20, 40, 60, 80])
def test_comparable_with_the_published_draw(shared, percent):
  """As many labels are redrawn, and about as many are wrong, as with the published code."""
  arrays = np.load(shared / 'reference' / 'regsl' / 'fixtures.npz')
  noisy = with_noise(indoor(), 'symmetric', percent / 100, 0)
  assert noisy.drawn == len(arrays[f'idx_{percent}'])
  theirs = int(np.sum(arrays[f'noisy_{percent}'] != arrays['labels']))
  for wrong in (noisy.wrong, theirs):
    assert abs(wrong - noisy.drawn * 66 / 67) < binomial(noisy.drawn, 1 / 67)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), rate=st.floats(0.02, 1.0),
       kind=st.sampled_from(['symmetric', 'nonuniform', 'model', 'asymmetric']),
       count=st.integers(60, 300), classes=st.integers(2, 9))
def test_counts_and_order(seed, rate, kind, count, classes):
  """int(rate * n) labels are redrawn; the order of the files and their split do not matter."""
  source, rng = indoor(count, classes), np.random.default_rng(seed)
  predicted = rng.integers(0, classes, count).astype(np.int32)
  class_map = [(NAMES[0], NAMES[1])]
  make = lambda source, predicted: with_noise(source, kind, rate, seed, class_map=class_map, predicted=predicted)
  of = count if kind != 'asymmetric' else int(np.sum(source.labels == 0))
  if not int(rate * of):
    with pytest.raises(ValueError, match='is less than one image of indoor'):
      make(source, predicted)
    return
  noisy = make(source, predicted)
  changed = noisy.images.labels != source.labels
  assert noisy.drawn == int(rate * of) and noisy.wrong == changed.sum() <= noisy.drawn
  assert noisy.images.labels.dtype == np.int32 and noisy.true_labels is source.labels
  assert set(noisy.images.labels) <= set(range(classes))
  if kind == 'model':
    np.testing.assert_array_equal(noisy.images.labels[changed], predicted[changed])
  if kind == 'asymmetric':
    assert noisy.wrong == noisy.drawn and set(source.labels[changed]) == {0}
    assert set(noisy.images.labels[changed]) == {1}
  shuffle = rng.permutation(count)
  moved = dataclasses.replace(indoor(count, classes, 'other'), fingerprint='of the other split').subset(shuffle)
  np.testing.assert_array_equal(make(moved, predicted[shuffle]).images.labels, noisy.images.labels[shuffle])


def test_another_seed_is_another_draw_and_another_fingerprint():
  """Two draws of half of the labels overlap as independent draws do; a run cannot resume with the other."""
  source = indoor()
  first, second, again = (with_noise(source, 'symmetric', 0.5, seed) for seed in (0, 1, 0))
  changed = [noisy.images.labels != source.labels for noisy in (first, second)]
  assert abs(np.sum(changed[0] & changed[1]) - 4824 / 4 * (66 / 67) ** 2) < binomial(4824, 0.25)
  assert len({source.fingerprint, first.images.fingerprint, second.images.fingerprint}) == 3
  assert first.images.fingerprint == again.images.fingerprint


@pytest.mark.parametrize('kind', ['symmetric', 'nonuniform'])
def test_new_labels_have_the_published_distribution(kind):
  """Every class as often as its probability says, whatever the true class."""
  source = indoor(20_000, 10)
  noisy, expected = with_noise(source, kind, 1.0, 3), probabilities(kind, 10, 3)
  for labels in (noisy.images.labels, noisy.images.labels[source.labels == 4]):
    counts = np.bincount(labels, minlength=10)
    assert np.all(np.abs(counts - len(labels) * expected) < binomial(len(labels), expected))
  if kind == 'symmetric':
    np.testing.assert_array_equal(expected, 0.1)
  else:  # softmax of numbers in [0, 1]: no two classes are farther apart than e
    assert 1.2 < expected.max() / expected.min() < np.e and not np.array_equal(expected, probabilities(kind, 10, 4))


def test_names_that_are_in_two_splits():
  """train/a/0.jpg and test/a/0.jpg of one set (train+test) are two images, drawn independently."""
  one, other = indoor(3000, 3), indoor(3000, 3, 'test')
  both = dataclasses.replace(one, labels=np.tile(one.labels, 2), ids=np.concatenate([one.ids, other.ids]),
                             rows=np.arange(6000))
  changed = with_noise(both, 'symmetric', 0.5, 0).images.labels != both.labels
  assert abs(np.sum(changed[:3000] & changed[3000:]) - 3000 / 9) < binomial(3000, 1 / 9)


def test_images_of_one_name_in_folders_without_splits(pool):
  """a/0.jpg, b/0.jpg, ...: the draws of two classes are independent."""
  source = open_set(f'folder:{pool}', 'train')
  drawn = [{name for name, changed in zip(source.ids.tolist(),
                                          with_noise(source, 'symmetric', 0.5, seed).images.labels != source.labels)
            if changed} for seed in range(4)]
  assert any(len({name.rpartition('/')[2] for name in names}) > len(names) / 6 + 1 for names in drawn)
  assert all(len(names) > 15 for names in drawn)


@pytest.mark.parametrize('fields,words', [
    (dict(kind='uniform'), r"noise.kind is 'uniform'; known: symmetric, asymmetric, nonuniform, model, or '' for none"),
    (dict(kind='symmetric', rate=1.5), 'noise.rate is 1.5; expected a number from 0 to 1'),
    (dict(kind='symmetric', rate=-0.1), 'noise.rate is -0.1; expected'),
    (dict(kind='symmetric', rate=float('nan')), 'noise.rate is nan; expected'),
    (dict(kind='symmetric'), "noise.kind is 'symmetric', but config.noise.rate is 0; give the fraction"),
    (dict(kind='model', labels='x.csv'), r'noise.rate is 0; give .* \(published: 1, all of them\)'),
    (dict(rate=0.4), 'noise.rate is 0.4, but config.noise.kind is empty; known: symmetric'),
    (dict(kind='asymmetric', rate=0.4), r"noise.map is \(\) and config.noise.kind 'asymmetric'; the kind 'asymmetric' "
                                        r"needs it"),
    (dict(kind='symmetric', rate=0.4, map=(('a', 'b'),)), 'no other takes it'),
    (dict(kind='model', rate=1.0), "noise.labels is '' and config.noise.kind 'model'"),
    (dict(kind='asymmetric', rate=0.4, map=('a', 'b')), r"noise.map is \('a', 'b'\); expected pairs such as"),
    (dict(kind='asymmetric', rate=0.4, map=(('a', 'a'),)), "takes 'a' to itself"),
    (dict(kind='asymmetric', rate=0.4, map=(('a', 'b'), ('a', 'c'))), "takes 'a' to 2 classes; expected one"),
    (dict(kind='model', rate=1.0, labels='/no/such'), 'noise.labels: /no/such holds no run'),
])
def test_bad_settings(fields, words):
  config = default.get_config()
  config.noise.update(fields)
  with pytest.raises(ValueError, match=words):
    check_fields(config)
    noise.NoiseSettings.from_config(config.noise)


def settings_of(**fields):
  config = default.get_config().noise
  config.update(fields)
  return noise.NoiseSettings.from_config(config)


def splits_of(photos):
  config = default.get_config().target
  config.name = f'folder:{photos}'
  return open_splits(SplitSettings.from_config(config), '', seed=0)


def test_val_and_test_stay_clean(photos):
  splits = splits_of(photos)
  after, true, about = noise.add(settings_of(kind='asymmetric', rate=0.5, map=(('roof', 'wall'), ('sky', 'roof'))), 0,
                                 splits)
  assert after.val is splits.val and after.test is splits.test and true is splits.train.labels
  assert about == {'kind': 'asymmetric', 'rate': 0.5, 'images': 44, 'drawn': 10, 'wrong': 10, 'wrong_rate': 10 / 44}
  assert [after.train[i].label for i in range(44)] == after.train.labels.tolist() != true.tolist()
  with pytest.raises(ValueError, match="has the class 'dog', which folder:.* lacks; it has 4: blossom, roof, sky, "
                                       "wall"):
    noise.add(settings_of(kind='asymmetric', rate=0.5, map=(('roof', 'dog'),)), 0, splits)
  assert noise.add(settings_of(), 0, splits) == (splits, None, None)


@pytest.mark.slow
def test_labels_of_another_network(trained_run, photos, tmp_path, monkeypatch):
  """Its run and the table of its job predict give the same labels; the network is asked once."""
  splits = splits_of(photos)
  run = trained.load(str(trained_run))
  found, _ = predict.predict(run, splits.train, 1, False)
  expected = found.classes[:, 0]
  assert 0 < np.sum(expected != splits.train.labels) < 44, 'nothing to compare'
  by_run = noise.add(settings_of(kind='model', rate=1.0, labels=str(trained_run)), 0, splits)
  np.testing.assert_array_equal(by_run.splits.train.labels, expected)
  names = [row.partition('/')[2] for row in splits.train.ids.tolist()]
  table = predict.table([*names, 'sky/more.jpg'], found._replace(ids=names), None, run.class_names, None)
  (tmp_path / 'predictions.csv').write_text(table)
  by_table = noise.add(settings_of(kind='model', rate=1.0, labels=str(tmp_path / 'predictions.csv')), 0, splits)
  assert by_table.splits.train.fingerprint == by_run.splits.train.fingerprint and by_table.about == by_run.about
  monkeypatch.setattr(predict, 'predict', None)
  again = noise.add(settings_of(kind='model', rate=1.0, labels=str(trained_run)), 0, splits)
  np.testing.assert_array_equal(again.splits.train.labels, expected)


def test_a_run_keeps_the_labels_that_a_model_gave_it(trained_run, photos, tmp_path, monkeypatch):
  """A run that resumes on another machine, which rounds differently and has no cache, keeps its labels."""
  splits, predicted = splits_of(photos), predict.Predictions([], np.arange(44)[:, None] % 4, np.ones((44, 1)))
  monkeypatch.setattr(predict, 'predict', lambda *_: (predicted, {}))
  fields, path = settings_of(kind='model', rate=1.0, labels=str(trained_run)), epath.Path(tmp_path) / 'predicted.json'
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'here'))
  begun = noise.add(fields, 0, splits, path).splits.train
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'there'))
  monkeypatch.setattr(predict, 'predict', lambda *_: (predicted._replace(classes=3 - predicted.classes), {}))
  resumed = noise.add(fields, 0, splits, path).splits.train
  assert resumed.fingerprint == begun.fingerprint != noise.add(fields, 0, splits).splits.train.fingerprint


def test_tables_that_do_not_fit(trained_run, photos, pool, tmp_path):
  source, path = splits_of(photos).train, tmp_path / 'labels.csv'
  names = source.ids.tolist()
  for text, words in (('name,class\n', 'has the columns name, class; expected file and class_1'),
                      ('', 'of an empty file'),
                      ('file,class_1\n' + '\n'.join(f'{name},sky' for name in names[1:]),
                       f'no class for 1 of the 44 images .* {names[0]}'),
                      ('file,class_1\n' + '\n'.join(f'{name},' for name in names), 'has no class for 44 of the 44'),
                      ('file,class_1\n' + '\n'.join(f'{name},dog' for name in names),
                       "has the class 'dog', which folder:.* lacks")):
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
      read_predictions(str(path), source)
  config = default.get_config().target
  config.update({'name': f'folder:{pool}', 'test': ''})
  with pytest.raises(ValueError, match='of other classes: only in the run: blossom, roof, sky, wall; only in '
                                       'folder:.*: a, b, c'):
    noise.add(settings_of(kind='model', rate=1.0, labels=str(trained_run)), 0,
              open_splits(SplitSettings.from_config(config), '', 0))


@pytest.fixture(scope='module')
def noisy_run(trained_run, photos, tmp_path_factory) -> pathlib.Path:
  """The workdir of configs/noisy.py in small: noise, correction and constraints."""
  workdir = tmp_path_factory.mktemp('runs') / 'noisy'
  run = quick_main(*FLAGS, f'--config.target.name=folder:{photos}', f'--config.model.weights={trained_run}',
                   f'--workdir={workdir}')
  assert run.returncode == 0, run.stderr
  assert 'noise: symmetric: 22 of 44 training labels redrawn' in run.stderr and 'val and test stay clean' in run.stderr
  return workdir


FLAGS = ['--config=configs/noisy.py:40', '--config.model.width=4', '--config.image_size=32',
         '--config.augment.short_side=36',
         '--config.train.learning_rate=0.01', '--config.train.steps=24', '--config.train.batch_size=8',
         '--config.train.eval_every=12',
         '--config.train.log_every=6', '--config.noise.rate=0.5', '--config.methods.self_label.reweight_epoch=2',
         '--config.methods.self_label.correct_epoch=3', '--config.methods.self_label.threshold=0.4']


@pytest.mark.slow
def test_whole_job(noisy_run, photos):
  """results.json and the report count wrong labels, metrics.jsonl the corrected ones; val and test are clean."""
  results = json.loads((noisy_run / 'results.json').read_text())
  told = results['noise']
  assert told['drawn'] == 22 and 10 < told['wrong'] <= 22 and told['wrong_rate'] == told['wrong'] / 44
  assert [row['images'] for row in results['test']['per_class']] == [5] * 4
  assert f'{100 * told["wrong_rate"]:.1f} % of all training labels are wrong' in (noisy_run / 'report.html').read_text()
  lines = [json.loads(line) for line in (noisy_run / 'metrics.jsonl').read_text().splitlines()]
  corrected, right, true = ([line[f'train/self_label/{key}'] for line in lines]
                            for key in ('corrected', 'precision', 'true'))
  assert corrected[0] == right[0] == 0 and corrected[-1] > 0 and 0 <= right[-1] <= 1
  np.testing.assert_allclose(true[0], 1 - told['wrong_rate'], rtol=1e-6)
  assert true[-1] != true[0]
