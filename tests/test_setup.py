"""Splits of a data set have the same classes and no image in common."""

import shutil
from typing import Any

from conftest import write_images
from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import default
from ft_jax.jobs import setup


def target(**fields: Any) -> ConfigDict:
  config = default.get_config().target
  config.update(fields)
  return config


def test_val_is_carved_out_of_train(photos):
  splits = setup.open_splits(target(name=f'folder:{photos}'), '', seed=0)
  assert (len(splits.train), len(splits.val), len(splits.test)) == (44, 4, 20)
  assert setup.open_splits(target(name=f'folder:{photos}', test=''), '', seed=0).test is None


@pytest.mark.parametrize('fields,shared', [
    ({'test': 'train[80%:]'}, 'share 1[0-2] images, such as .*jpg'),  # train itself is left whole by mistake
    ({'train': 'train[:80%]', 'val': 'train[70%:]', 'test': ''}, 'share 6 images'),
    ({'train': 'train[:50%]', 'val': 'train[50%:]', 'test': 'train[90%:]'}, 'share 6 images')])
def test_images_in_two_splits_are_refused(pool, fields, shared):
  with pytest.raises(ValueError, match=shared + '.*slices that do not overlap'):
    setup.open_splits(target(name=f'folder:{pool}', **fields), '', seed=0)


def test_slices_that_do_not_overlap(pool):
  splits = setup.open_splits(target(name=f'folder:{pool}', train='train[:70%]', val='train[70%:80%]', test='train[80%:]'), '', seed=0)
  assert [len(split) for split in splits] == [42, 6, 12]


def test_other_classes_are_named(photos, pool, tmp_path):
  (tmp_path / 'train').symlink_to(photos / 'train')
  (tmp_path / 'test').symlink_to(pool)
  with pytest.raises(ValueError, match='have different classes: only in folder:.* train: blossom, .*; only in folder:.* test: a, b, '):
    setup.open_splits(target(name=f'folder:{tmp_path}'), '', seed=0)


def test_images_are_drawn_by_class_and_seed(pool):
  """So many of each class for training, the others for test, val out of the drawn ones; another seed draws others."""
  draw = lambda seed: setup.open_splits(target(name=f'folder:{pool}', train_per_class=5, test='rest', val_fraction=0.2), '', seed)
  first, again, other = draw(0), draw(0), draw(1)
  assert [np.bincount(split.labels).tolist() for split in first] == [[4] * 6, [1] * 6, [5] * 6]
  assert len({*first.train.ids, *first.val.ids, *first.test.ids}) == 60
  assert first.test.ids.tolist() == again.test.ids.tolist() != other.test.ids.tolist()
  with pytest.raises(ValueError, match='train_per_class is 11, but a has 10 images, and 5 other classes have too few'):
    setup.open_splits(target(name=f'folder:{pool}', train_per_class=11, test='rest'), '', seed=0)
  with pytest.raises(ValueError, match='train_per_class 10 leaves no image for test'):
    setup.open_splits(target(name=f'folder:{pool}', train_per_class=10, test='rest'), '', seed=0)


def test_an_image_is_drawn_whichever_split_it_is_stored_in(pool, tmp_path):
  """Caltech-101 has no official split: the one that a builder made must not decide."""
  write_images(tmp_path / 'all', {'a': 9})
  for k, path in enumerate(sorted((tmp_path / 'all' / 'a').iterdir())):
    for layout, split in (('one', 'train' if k % 2 else 'test'), ('two', 'train' if k < 5 else 'test')):
      (tmp_path / layout / split / 'a').mkdir(parents=True, exist_ok=True)
      shutil.copy(path, tmp_path / layout / split / 'a')
  drawn = [setup.open_splits(target(name=f'folder:{tmp_path / layout}', train='train+test', train_per_class=4, test='rest'), '', seed=0)
           for layout in ('one', 'two')]
  names = [{i.partition('/')[2] for i in splits.test.ids} for splits in drawn]
  assert names[0] == names[1] and len(names[0]) == 5


def test_classes_are_left_out(pool):
  splits = setup.open_splits(target(name=f'folder:{pool}', train='train[:70%]', test='train[70%:]', without=('b', 'e')), '', seed=0)
  assert splits.train.class_names == splits.test.class_names == ('a', 'c', 'd', 'f')
  assert np.bincount(splits.test.labels).tolist() == [3] * 4
  assert all(i.startswith(name) for i, name in zip(splits.test.ids, [n for n in 'acdf' for _ in range(3)]))
  with pytest.raises(ValueError, match="has no class 'z' to leave out; it has 6: a, b"):
    setup.open_splits(target(name=f'folder:{pool}', without=('z',)), '', seed=0)
  with pytest.raises(ValueError, match='all of its classes are to be left out'):
    setup.open_splits(target(name=f'folder:{pool}', without=tuple('abcdef')), '', seed=0)
