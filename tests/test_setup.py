"""Splits of a data set have the same classes and no image in common."""

from ml_collections import ConfigDict
import pytest

from configs import default
from ft_jax.jobs import setup


def target(**fields: str) -> ConfigDict:
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
  with pytest.raises(ValueError, match='have different classes: a, b, blossom'):
    setup.open_splits(target(name=f'folder:{tmp_path}'), '', seed=0)
