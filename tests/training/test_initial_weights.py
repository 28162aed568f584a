"""Splits of a data set have the same classes and no image in common; weights of every form come as they are, or are
refused by name.
"""

import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

from conftest import write_images
import jax
import numpy as np
import pytest
from torch_weights import load_torch, RESNET

from configs import default
from ft_jax.data.image_set import ImageSet
from ft_jax.data.splits import check_classes, log_classes_not_evaluated, open_splits, SplitSettings
from ft_jax.training import initial_weights
from ft_jax.training.checkpoints import Checkpoints
import selection

DATA = pathlib.Path(__file__).parents[1] / 'fixtures'


def target(**fields: Any) -> SplitSettings:
  config = default.get_config().target
  config.update(fields)
  return SplitSettings.from_config(config)


def test_val_is_carved_out_of_train(photos):
  splits = open_splits(target(name=f'folder:{photos}'), '', seed=0)
  assert (len(splits.train), len(splits.val), len(splits.test)) == (44, 4, 20)
  assert open_splits(target(name=f'folder:{photos}', test=''), '', seed=0).test is None


def test_a_part_of_each_class_is_drawn(photos):
  """A quarter of 12 and at least one of each class, by seed; the rest can be the test split."""
  drawn = lambda seed, **fields: open_splits(target(name=f'folder:{photos}', val='test', test='', **fields), '',
                                             seed).train
  quarter = drawn(0, train_fraction=0.25)
  assert np.bincount(quarter.labels).tolist() == [3] * 4
  assert np.bincount(drawn(0, train_fraction=0.01).labels).tolist() == [1] * 4
  assert set(drawn(0, train_fraction=0.01).ids) < set(quarter.ids) < set(drawn(0, train_fraction=0.5).ids)
  assert set(quarter.ids) != set(drawn(1, train_fraction=0.25).ids)
  splits = open_splits(target(name=f'folder:{photos}', val='test', test='rest', train_fraction=0.25), '', 0)
  assert len(splits.test) == 36 and not set(splits.test.ids) & set(splits.train.ids)


@pytest.mark.parametrize('fields,shared', [
    ({'test': 'train[80%:]'}, 'share 1[0-2] images, such as .*jpg'),  # train itself is left whole by mistake
    ({'train': 'train[:80%]', 'val': 'train[70%:]', 'test': ''}, 'share 6 images'),
    ({'train': 'train[:50%]', 'val': 'train[50%:]', 'test': 'train[90%:]'}, 'share 6 images')])
def test_images_in_two_splits_are_refused(pool, fields, shared):
  with pytest.raises(ValueError, match=shared + '.*slices that do not overlap'):
    open_splits(target(name=f'folder:{pool}', **fields), '', seed=0)


def test_slices_that_do_not_overlap(pool):
  splits = open_splits(target(name=f'folder:{pool}', train='train[:70%]', val='train[70%:80%]', test='train[80%:]'), '',
                       seed=0)
  assert [len(split) for split in splits] == [42, 6, 12]


def test_other_classes_are_named(photos, pool, tmp_path):
  (tmp_path / 'train').symlink_to(photos / 'train')
  (tmp_path / 'test').symlink_to(pool)
  with pytest.raises(ValueError,
                     match='have different classes: only in folder:.* train: blossom, .*; only in folder:.* test: a, '
                           'b, '):
    open_splits(target(name=f'folder:{tmp_path}'), '', seed=0)


def test_images_are_drawn_by_class_and_seed(pool):
  """So many of each class for training, the others for test, val out of the drawn ones; another seed draws others."""
  draw = lambda seed: open_splits(target(name=f'folder:{pool}', train_per_class=5, test='rest', val_fraction=0.2), '',
                                  seed)
  first, again, other = draw(0), draw(0), draw(1)
  assert [np.bincount(split.labels).tolist() for split in first] == [[4] * 6, [1] * 6, [5] * 6]
  assert len({*first.train.ids, *first.val.ids, *first.test.ids}) == 60
  assert first.test.ids.tolist() == again.test.ids.tolist() != other.test.ids.tolist()
  with pytest.raises(ValueError, match='train_per_class is 11, but a has 10 images, and 5 other classes have too few'):
    open_splits(target(name=f'folder:{pool}', train_per_class=11, test='rest'), '', seed=0)
  with pytest.raises(ValueError, match='train_per_class 10 leaves no image for test'):
    open_splits(target(name=f'folder:{pool}', train_per_class=10, test='rest'), '', seed=0)


def test_an_image_is_drawn_whichever_split_it_is_stored_in(pool, tmp_path):
  """Caltech-101 has no official split: the one that a builder made must not decide."""
  write_images(tmp_path / 'all', {'a': 9})
  for k, path in enumerate(sorted((tmp_path / 'all' / 'a').iterdir())):
    for layout, split in (('one', 'train' if k % 2 else 'test'), ('two', 'train' if k < 5 else 'test')):
      (tmp_path / layout / split / 'a').mkdir(parents=True, exist_ok=True)
      shutil.copy(path, tmp_path / layout / split / 'a')
  drawn = [open_splits(target(name=f'folder:{tmp_path / layout}', train='train+test', train_per_class=4, test='rest'),
                       '', seed=0)
           for layout in ('one', 'two')]
  names = [{i.partition('/')[2] for i in splits.test.ids} for splits in drawn]
  assert names[0] == names[1] and len(names[0]) == 5


def test_classes_are_left_out(pool):
  splits = open_splits(target(name=f'folder:{pool}', train='train[:70%]', test='train[70%:]', without=('b', 'e')), '',
                       seed=0)
  assert splits.train.class_names == splits.test.class_names == ('a', 'c', 'd', 'f')
  assert np.bincount(splits.test.labels).tolist() == [3] * 4
  assert all(i.startswith(name) for i, name in zip(splits.test.ids, [n for n in 'acdf' for _ in range(3)]))
  with pytest.raises(ValueError, match="has no class 'z' to leave out; it has 6: a, b"):
    open_splits(target(name=f'folder:{pool}', without=('z',)), '', seed=0)
  with pytest.raises(ValueError, match='all of its classes would be left out'):
    open_splits(target(name=f'folder:{pool}', without=tuple('abcdef')), '', seed=0)


def without_class(source: ImageSet, k: int) -> ImageSet:
  return source.subset(np.flatnonzero(source.labels != k))


def test_a_target_of_one_class_is_refused(photos):
  splits = open_splits(target(name=f'folder:{photos}', without=('roof', 'sky', 'wall')), '', seed=0)
  for without in ('target.without', ''):
    with pytest.raises(ValueError,
                       match="folder:.* has one class, 'blossom', so a classifier .* learns nothing; expected at least "
                             'two'):
      check_classes(splits, without)


def test_a_class_without_training_images_is_named(photos, tmp_path, caplog):
  """With its split, and where its images are: for a target that is an error; a pre-training only says so."""
  splits = open_splits(target(name=f'folder:{photos}'), '', seed=0)
  check_classes(splits, 'target.without')
  with pytest.raises(ValueError,
                     match=r"folder:.* train: no training image of class 'sky' \(images of 'sky': train 0, val 1, "
                           r"test 5\); add images, .*--config.target.without=\"\('sky',\)\""):
    check_classes(splits._replace(train=without_class(splits.train, 2)), 'target.without')
  with pytest.raises(ValueError, match="no training image of 2 classes: 'roof', 'sky' "):
    check_classes(splits._replace(train=without_class(without_class(splits.train, 2), 1)), 'target.without')
  check_classes(splits._replace(train=without_class(splits.train, 2)))
  assert "no training image of class 'sky', so nothing is learnt of it" in caplog.text
  write_images(tmp_path, {'a': 6, 'b': 6, 'c': 1})  # a slice is taken of each class by itself
  starved = open_splits(target(name=f'folder:{tmp_path}', train='train[:50%]', test='train[50%:]'), '', seed=0)
  with pytest.raises(ValueError,
                     match=r"train\[:50%\]: no training image of class 'c' \(images of 'c': train 0, val 0, test 1\)"):
    check_classes(starved, 'target.without')


def test_classes_that_are_not_evaluated_are_told(photos, caplog):
  splits = open_splits(target(name=f'folder:{photos}'), '', seed=0)
  log_classes_not_evaluated(splits._replace(test=None))
  assert not caplog.text
  log_classes_not_evaluated(splits._replace(test=without_class(splits.test, 2)))
  assert "test: no test image of class 'sky': mean_per_class is the mean over the other 3 classes" in caplog.text
  assert 'no val image' not in caplog.text


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Checkpoints of a run with a source and a target head: step 1 is the best, step 2 the newest, and all ones."""
  folder = tmp_path_factory.mktemp('runs') / 'pretrain'
  state = load_torch(DATA / 'resnet18.pth')
  state['params']['heads']['target'] = {'kernel': np.ones((32, 3), np.float32), 'bias': np.zeros(3, np.float32)}
  checkpoints = Checkpoints(folder)
  checkpoints.save(1, {**state, 'opt_state': np.zeros(3)}, {'score': 0.9, 'loss': 1.0})
  checkpoints.save(2, {**jax.tree.map(np.ones_like, state), 'opt_state': np.zeros(3)}, {'score': 0.1, 'loss': 1.0})
  checkpoints.close()
  return folder


def test_weights_of_a_file(caplog):
  """What is used, what is dropped and why is said in one line, and what results.json holds."""
  caplog.set_level(logging.INFO, 'ft_jax')
  weights = initial_weights.load_weights(str(DATA / 'resnet18.pth'), RESNET)
  assert weights.variables.keys() == {'params', 'batch_stats'} and 'heads' not in weights.variables['params']
  assert weights.about == {
      'name': str(DATA / 'resnet18.pth'), 'revision': None,
      'fingerprint': initial_weights.weights_fingerprint(weights.variables)}
  assert ("resnet18.pth: 100 tensors used; dropped: bn1.num_batches_tracked, layer1.0.bn1.num_batches_tracked, "
          "layer1.0.bn2.num_batches_tracked, layer1.1.bn1.num_batches_tracked and 16 more (BatchNorm's counters); "
          'fc.weight, fc.bias (old classifier)') in caplog.text
  kept = initial_weights.load_weights(str(DATA / 'resnet18.pth'), RESNET, classes=7)
  assert kept.variables['params']['heads'].keys() == {'source'} and kept.about == weights.about
  assert '102 tensors used' in caplog.text
  moco = initial_weights.load_weights(str(DATA / 'moco.pth.tar'), RESNET, projection=True)
  assert moco.variables.keys() == {'params', 'batch_stats', 'projection'}
  assert 'projection' not in initial_weights.load_weights(str(DATA / 'moco.pth.tar'), RESNET).variables
  assert 'fc.0, fc.2 (projection head)' in caplog.text and 'epoch, arch, optimizer (beside the network)' in caplog.text


def test_weights_of_a_run(workdir):
  """A workdir gives its best checkpoint, a checkpoint itself; the head of the source classes comes where it is wanted.
  """
  best = initial_weights.load_weights(str(workdir), RESNET, classes=7).variables
  jax.tree.map(np.testing.assert_array_equal, best, load_torch(DATA / 'resnet18.pth'))
  newest = initial_weights.load_weights(str(workdir / 'checkpoints' / '2'), RESNET).variables
  assert 'heads' not in newest['params'] and all((x == 1).all() for x in jax.tree.leaves(newest))
  with pytest.raises(ValueError, match='no file or folder .*checkpoints/7'):
    initial_weights.load_weights(str(workdir / 'checkpoints' / '7'), RESNET)


def test_a_checkpoint_cut_short_is_named(workdir, tmp_path):
  """In a process of its own, where the threads of tensorstore would print their tracebacks."""
  shutil.copytree(workdir, tmp_path / 'run')
  for path in (tmp_path / 'run' / 'checkpoints' / '1' / 'state' / 'd').iterdir():
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
  code = ('import sys; from ft_jax.models import build; from ft_jax.training import initial_weights\n'
          'try: initial_weights.load_weights(sys.argv[1], build("resnet18", {}))\n'
          'except ValueError as error: print(error)')
  run = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'run')], capture_output=True, text=True, check=False,
                       env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, cwd=DATA.parents[1])
  assert re.search('the checkpoint .*run/checkpoints/1 cannot be read; it is not whole',
                   run.stdout) and not run.stderr, run


def pretrained_on(folder: pathlib.Path, workdir: pathlib.Path, classes: str) -> str:
  """A copy of the run's workdir as of a pre-training on these classes."""
  shutil.copytree(workdir, folder)
  (folder / 'results.json').write_text(json.dumps({'job': 'pretrain',
                                                   'val': {'per_class': [{'name': name} for name in classes]}}))
  return str(folder)


def test_a_source_head_is_of_the_classes_of_the_source(workdir, tmp_path, caplog):
  """By name and in order, where the run says what it was trained on; else that it is not known is said."""
  run = pretrained_on(tmp_path / 'run', workdir, 'abcdefg')
  for name in (run, f'{run}/checkpoints/1'):
    assert 'source' in initial_weights.load_weights(name, RESNET, classes=7,
                                                    class_names='abcdefg').variables['params']['heads']
    with pytest.raises(ValueError,
                       match="has other classes than the source data, or another order: class 2 is 'c' there and 'd' "
                             'in'):
      initial_weights.load_weights(name, RESNET, classes=7, class_names='abdcefg')
  initial_weights.load_weights(name, RESNET, classes=None)  # no head is asked for
  assert 'not known' not in caplog.text
  for name in (str(workdir), str(DATA / 'resnet18.pth')):
    initial_weights.load_weights(name, RESNET, classes=7, class_names='abcdefg')
    assert f'the names of the classes of {name} are not known' in caplog.text


def test_a_source_head_of_a_fine_tuning(workdir, tmp_path):
  """Its selection says what the classes of its pool are."""
  shutil.copytree(workdir, tmp_path / 'run')
  (tmp_path / 'run' / 'results.json').write_text(json.dumps({'job': 'finetune'}))
  rng = np.random.default_rng(0)
  pool = selection.Embeddings(rng.normal(size=(14, 8)).astype(np.float32), np.arange(14) % 7, list('abcdefg'))
  selection.select(pool, (rng.normal(size=(6, 8)), np.arange(6) % 2), 2).save(tmp_path / 'run' / 'selection.json')
  initial_weights.load_weights(str(tmp_path / 'run'), RESNET, classes=7, class_names='abcdefg')
  with pytest.raises(ValueError, match="class 0 is 'a' there and 'g' in the source data"):
    initial_weights.load_weights(str(tmp_path / 'run'), RESNET, classes=7, class_names='gbcdefa')


@pytest.mark.parametrize('name,wanted,words', [
    ('resnet18.pth', {'classes': 1000},
     'the classifier of .* has 7 classes and the source data 1000; use --config.model'),
    ('moco.pth.tar', {'classes': 7}, 'has no classifier; use --config.model.source_head=fresh'),
    ('moco.pth.tar', {'classifier': True},
     'need the classifier of the pre-training, and .*moco.pth.tar has none; give weights with'),
    ('resnet18.pth', {'projection': True}, "has no projection head .* use --config.selection.features=pooled")])
def test_weights_without_what_is_asked_for(name, wanted, words):
  with pytest.raises(ValueError, match=words):
    initial_weights.load_weights(str(DATA / name), RESNET, **wanted)


@pytest.mark.parametrize('fields,words', [
    ({'weights': 'no.pth'}, 'there is no file or folder no.pth; expected one, or timm:<name>, or hf:<owner>/<name>'),
    ({'weights': 'torchvision:resnet50'}, 'there is no file or folder torchvision:resnet50'),
    ({'weights': 'tests'}, 'tests is not the workdir of a run'),
    ({'weights': 'hf:resnet50'}, 'expected hf:<owner>/<name>'),
    ({'weights': 'timm:resnet50d.ra2_in1k'},
     'a resnet50d, which is another network than resnet18, resnet34, resnet50, resnet101'),
    ({'weights': 'timm:wide_resnet50_2.tv_in1k'}, 'a wide_resnet50_2, which is another network'),
    ({'weights': 'timm:resnet34.ra4_e3600_r224_in1k'}, 'trained on images with a mean of 0.5'),
    ({'weights': 'timm:resnet18.tv_in1k'},
     'set --config.model.name=resnet18 --config.model.width=64 --config.model.stem=7x7'),
    ({'source_head': 'old'}, "source_head is 'old'; known: fresh, pretrained"),
    ({'source_head': 'pretrained'}, "source_head is 'pretrained' and model.weights is empty"),
    ({'batch_norm': 'frozen'}, "batch_norm is 'frozen' and model.weights is empty")])
def test_fields_of_the_model_that_cannot_be_right(fields, words):
  """Before anything is loaded."""
  config = default.get_config().model
  initial_weights.check_weights(config)
  config.update(fields)
  with pytest.raises(ValueError, match=words):
    initial_weights.check_weights(config)


def test_a_folder_as_on_the_hub(tmp_path):
  """A cloned repository: its weights are found; where they are called otherwise, they are named."""
  (tmp_path / 'config.json').write_text('{"architecture": "resnet18"}')
  with pytest.raises(ValueError,
                     match='is not the workdir of a run.* and has no model.safetensors or pytorch_model.bin; '
                           'give such a folder'):
    initial_weights.load_weights(str(tmp_path), RESNET)
  shutil.copy(DATA / 'resnet18.pth', tmp_path / 'net.PTH')
  with pytest.raises(ValueError, match='give one of its files: net.PTH'):
    initial_weights.load_weights(str(tmp_path), RESNET)
  (tmp_path / 'net.PTH').rename(tmp_path / 'pytorch_model.bin')
  expected = initial_weights.load_weights(str(DATA / 'resnet18.pth'), RESNET).about['fingerprint']
  assert initial_weights.load_weights(str(tmp_path), RESNET).about['fingerprint'] == expected
  (tmp_path
   / 'model.safetensors').write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 46807446\n')
  config = default.get_config().model
  config.weights = str(tmp_path)
  with pytest.raises(ValueError, match='model.safetensors is a pointer of Git LFS'):  # before anything is loaded
    initial_weights.check_weights(config)


def test_numbers_of_a_run_are_looked_at(tmp_path):
  """As those of a file."""
  state = load_torch(DATA / 'resnet18.pth')
  state['batch_stats']['bn1']['var'] = -state['batch_stats']['bn1']['var']
  checkpoints = Checkpoints(tmp_path / 'run')
  checkpoints.save(1, {**state, 'opt_state': np.zeros(3)}, {'score': 0.9, 'loss': 1.0})
  checkpoints.close()
  with pytest.raises(ValueError, match='run has negative running variances in batch_stats/bn1/var'):
    initial_weights.load_weights(str(tmp_path / 'run'), RESNET)


def test_names_of_timm_that_are_torchvisions_networks():
  config = default.get_config().model
  config.weights = 'timm:resnet50.a1_in1k@abc123'
  initial_weights.check_weights(config)
