"""The whole study on real images: every part is there and agrees with its own definition, nothing finished is done
again."""

import csv
import json
import shutil

from conftest import quick_main
from etils import epath
from ml_collections import ConfigDict
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_weights import RESNET

from configs import default
from configs import study as study_config
from ft_jax import settings
from ft_jax.data.image_set import digest
from ft_jax.jobs import study
from ft_jax.models import export
from ft_jax.studies import history, study_results
from ft_jax.studies.study_data import open_target, Rows, Target
from ft_jax.training.finished_runs import load_variables

SIZES = ['--config.model.width=4', '--config.image_size=32', '--config.augment.short_side=36']


@pytest.fixture(scope='module')
def run(pool, photos, tmp_path_factory):
  """Pre-training with three checkpoints, and a study of them; (workdir of the first, of the second, command of the
  second, its output)."""
  folder = tmp_path_factory.mktemp('study')
  made = quick_main(
      '--config=configs/miniature.py:history', f'--config.source.name=folder:{pool}', *SIZES,
      '--config.train.batch_size=8',
      '--config.train.epochs=4', '--config.train.keep_epochs=(1,2)', '--config.source.val_fraction=0.2',
      f'--workdir={folder / "history"}')
  assert made.returncode == 0, made.stderr
  command = ['--config=configs/study.py', f'--config.checkpoints={folder / "history"}',
             f'--config.target.name=folder:{photos}', *SIZES[1:],
             '--config.study.seeds=(0,)', '--config.train.epochs=0', '--config.train.steps=6',
             '--config.train.batch_size=8',
             '--config.train.eval_every=6', '--config.target.val_fraction=0.25', f'--workdir={folder / "out"}']
  done = quick_main(*command)
  assert done.returncode == 0, done.stderr
  return folder / 'history', folder / 'out', command, done.stderr


def results(run):
  return json.loads((run[1] / 'study.json').read_text())


@pytest.mark.slow
def test_everything_is_there(run):
  found, printed = results(run), run[3]
  assert found['precision'] == {'training': 'default', 'embeddings': 'highest'}
  assert [entry['name'] for entry in found['history']] == ['epoch 1', 'epoch 2', 'epoch 4']
  target, = found['targets']
  assert (target['train'], target['val'], target['test'], target['classes']) == (36, 12, 20, 4)
  for each in target['rows']:
    assert set(each['fe']) == {'linear', 'nearest_mean', 'neighbours', 'main', 'residual'}
    assert all(len(rate['test']) == 1 for rate in (*each['fe'].values(), each['ft']))
    assert set(each['scores']) == {'h_score', 'h_score_regularised', 'leep', 'nce', 'logme', 'transrate'}
    for which in ('plain', 'centred'):
      numbers = each['spectrum'][which]
      assert numbers['images'] == 48 and numbers['dimensions'] == 32 and numbers['share'] >= 0.8
    assert each['fine_tuned']['residual'] > 0
  assert target['rows'][0]['change'] is None and target['rows'][2]['change']['since'] == 'epoch 2'
  assert {'source accuracy', 'leep'} <= set(target['correlations'])
  assert target['recommended']['fe']['sentence'] in printed and target['recommended']['ft']['sentence'] in printed
  assert (run[1] / 'report.html').stat().st_size > 10_000
  rows = list(csv.DictReader((run[1] / 'study.csv').read_text().splitlines()))
  assert [row['checkpoint'] for row in rows] == ['epoch 1', 'epoch 2', 'epoch 4']


@pytest.mark.slow
def test_source_accuracy_is_that_of_the_run(run):
  lines = [json.loads(line) for line in (run[0] / 'metrics.jsonl').read_text().splitlines()]
  of_step = {line['step']: line['val/top1'] for line in lines if 'val/top1' in line}
  assert [entry['source']['top1'] for entry in results(run)['history']] == [of_step[entry['step']]
                                                                            for entry in results(run)['history']]


@pytest.mark.slow
def test_fine_tuning_is_that_of_the_job(run):
  """Its test accuracy, taken from features and the head, is that in the run's own results.json."""
  target, = results(run)['targets']
  for each in target['rows']:
    for rate, page in zip(each['ft']['test'], each['ft']['report']):
      own = json.loads((run[1] / page).with_name('results.json').read_text())
      assert rate == own['test']['top1']
      # It goes on where it was stopped, whatever else is asked of the study.
      assert not {'study', 'checkpoints'} & set(json.loads((run[1] / page).with_name('config.json').read_text()))
      assert not (run[1] / page).with_name('checkpoints').exists()


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(run):
  """Of all parts but two nothing is run again; those, of which one is lost and one damaged, come back as they were."""
  _, out, command, _ = run
  before = {path: (path.read_text(), path.stat().st_mtime_ns) for path in (out / 'parts').iterdir()}
  assert len(before) == 3 + 3 + 2 + 3 + 3
  lost, damaged = (next(path for path in before if path.name.startswith(kind)) for kind in ('fine_tuned', 'change'))
  lost.unlink()
  damaged.write_text(before[damaged][0][:20])
  again = quick_main(*command)
  assert again.returncode == 0 and again.stderr.count('training 6 steps') == 1, again.stderr
  assert 'embedding' not in again.stderr, again.stderr
  assert {path: path.read_text() for path in (out / 'parts').iterdir()} == {path: text
                                                                            for path, (text, _) in before.items()}
  written = {path for path in before if path.stat().st_mtime_ns != before[path][1]}
  assert written - {lost, damaged} == {path for path in written if path.name.startswith('tuned_change')}
  assert len(written) == 3


@pytest.mark.slow
def test_fine_tunings_of_an_earlier_version_are_found(run, photos):
  """It named them by names and sizes of the images' files."""
  config = study_config.get_config()
  config.update_from_flattened_dict({
      'checkpoints': str(run[0]), 'target.name': f'folder:{photos}', 'image_size': 32, 'augment.short_side': 36,
      'study.seeds': (0,),
      'train.epochs': 0.0, 'train.steps': 6, 'train.batch_size': 8, 'train.eval_every': 6, 'target.val_fraction': 0.25})
  kept = history.read(config.checkpoints, config.model)
  config.model.update({name: kept.network[name] for name in ('name', 'width', 'stem')})

  def found(what):
    target = open_target(config, config.target.name)
    begun = study._Study(config, kept, [target], epath.Path(run[1]))
    made_of = {'ft': begun._tuned, 'ft_change': begun._tuned_change}[what]
    paths = [begun._parts._path(kind, key) for kind, *key in (made_of(0, 0, 0), made_of(0, 0, 0, legacy=True))]
    return begun._found[0][0][what].get(0), paths

  for what in ('ft', 'ft_change'):
    part, (now, before) = found(what)
    assert part and now.exists() and now != before
    now.rename(before)
    assert found(what)[0] == part
    before.rename(now)


@pytest.mark.slow
def test_bad_settings_are_refused_before_anything_long(run, photos):
  config = study_config.get_config()
  config.checkpoints, config.target.name = str(run[0]), f'folder:{photos}'

  def refused(words, **fields):
    other = ConfigDict(config.to_dict())
    other.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=words):
      study.run(other, '/nowhere')

  refused('config.study.seeds is empty', **{'study.seeds': ()})
  refused('config.study.seeds has 1 twice', **{'study.seeds': (1, 1)})
  refused('config.study.threshold is 1.0', **{'study.threshold': 1.0})
  refused("config.noise.kind is 'symmetric'", **{'noise.kind': 'symmetric'})
  refused('config.target.test is empty', **{'target.test': ''})
  refused('config.target.name is empty', **{'target.name': ''})
  refused('config.checkpoints is empty', checkpoints='')
  refused('config.study.epochs has 3, and .* there are epoch 1, epoch 2, epoch 4', **{'study.epochs': (3,)})
  refused('config.checkpoints: .* holds no checkpoints: it is not the workdir of a run', checkpoints=str(photos))
  with pytest.raises(ValueError, match='holds a run, whose files would be mixed'):
    study.run(config, run[0])
  # which its fine-tunings would need
  with pytest.raises(ValueError, match='no checkpoint can be kept in .*has a backslash'):
    study.run(config, '/nowhere/back\\slash')


@pytest.mark.slow
def test_checkpoints_of_two_runs_are_refused(run, tmp_path):
  mixed = tmp_path / 'mixed'
  shutil.copytree(run[0], mixed)
  about = mixed / 'checkpoints' / '6' / 'about' / 'metadata'
  about.write_text(about.read_text().replace('random weights": "', 'random weights": "x'))
  with pytest.raises(ValueError, match='checkpoints of two runs: those of step 6 and step 24 differ in random weights'):
    history.read(str(mixed), study_config.get_config().model)


def test_no_seed_learns_from_its_test_images(photos):
  """Where each seed draws its own training images and the rest is test."""
  config = study_config.get_config()
  config.target.update({'train_per_class': 5, 'test': 'rest', 'val_fraction': 0.2})
  target = open_target(config, f'folder:{photos}')
  for rows in target.rows.values():
    assert len(rows.learnt) == 20 and len(rows.test) == 28 and not set(rows.learnt) & set(rows.test)
  assert len(set(target.stamp.values())) == 3


@pytest.mark.slow
def test_a_folder_of_files(run, photos, tmp_path):
  """The same networks as files without classifiers: the same numbers, but for the scores that need one; then with them,
  these too."""
  config = study_config.get_config()
  config.update_from_flattened_dict({
      'checkpoints': str(tmp_path / 'files'), 'target.name': f'folder:{photos}', 'target.val_fraction': 0.25,
      'image_size': 32,
      'augment.short_side': 36, 'model.name': 'resnet18', 'model.width': 4, 'study.fine_tune': False,
      'study.seeds': (0,)})
  (tmp_path / 'files').mkdir()

  def study_files(head):
    for entry in results(run)['history'][::2]:
      variables = load_variables(run[0], entry['step'])
      save_file(export.state_dict(RESNET, variables, head),
                tmp_path / 'files' / f'checkpoint_{entry["epoch"]:03.0f}.safetensors')
    return study.run(config, tmp_path / 'out')

  found = study_files(None)
  assert [(entry['name'], entry['source']) for entry in found['history']] == [('epoch 1', None), ('epoch 4', None)]
  theirs, ours = results(run)['targets'][0]['rows'][::2], found['targets'][0]['rows']
  assert [each['scores']['leep'] for each in ours] == [None, None]
  assert 'source accuracy' not in found['targets'][0]['correlations']
  for one, other in zip(theirs, ours):
    values = [each['spectrum']['plain']['values'] for each in (one, other)]
    np.testing.assert_allclose(*values, rtol=0, atol=1e-6 * values[0][0])  # compiled with another effort
    assert one['scores']['h_score_regularised'] == pytest.approx(other['scores']['h_score_regularised'], rel=1e-4)
  again = study_files('source')['targets'][0]['rows']
  assert [each['scores']['leep'] for each in again] == pytest.approx([each['scores']['leep'] for each in theirs],
                                                                     rel=1e-4)


def test_classes_with_one_image_and_few_images_are_told():
  source = type('Source', (), {'class_names': ('two', 'absent', 'lone')})
  target = Target('folder:x', (source,), np.array([0, 0, 1, 1, 2]),
                  {0: Rows(np.array([0, 2, 3, 4]), np.array([1]), np.array([]))}, {}, {})
  found = [{'about': {'note': '5 images are fewer ...', 'scores': {'leep': None}}, 'probes': {}, 'ft': {0: {}},
            'ft_change': {}}]
  one, absent, few, without, moved = study_results.notes(target, 0, found, named_val=False)
  assert one.startswith('1 of 3 classes have one image for training and val together (lone), which is trained on')
  assert absent == '1 of 3 classes have no image in val (absent).'
  assert few.startswith('5 images are fewer ...') and 'no LEEP' in without and 'not known for all networks' in moved


def test_parts_of_an_older_version_are_found(monkeypatch):
  """What parts are named by does not change when a field is added, which belongs into study.ADDED then."""
  fields = lambda *added: study._own(changed(*added), 'folder:pets', 0, '').to_dict()

  def changed(*added):
    config = default.get_config().unlock()
    for name, value in added:
      config.train[name] = value
    return config

  assert digest(study._fields(fields(),
                              study._WITHOUT_EFFECT)) == 'dafb6c26e95ccaa5', 'a new field is missing in study.ADDED'
  assert digest(study._fields(fields())) == '7f16fe8cf548d6fa'
  monkeypatch.setattr(study, 'ADDED', (*study.ADDED, 'train.sharpness'))
  known = settings.defaults() | {'train.sharpness': 1.5}
  monkeypatch.setattr(study, 'defaults', lambda: known)
  assert digest(study._fields(fields(('sharpness',
                                      1.5)))) == '7f16fe8cf548d6fa' != digest(study._fields(fields(('sharpness', 2.0))))
