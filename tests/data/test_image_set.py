"""Parts of an image set: which examples they have does not depend on the order of the files."""

from conftest import write_images
import numpy as np
import pytest

from ft_jax.data import open_set
from ft_jax.data.image_set import ImageSet, sample_per_class, split_off_val


def test_subset_and_of_classes(photos):
  images = open_set(f'folder:{photos}', 'train')
  few = images.subset([30, 2])
  assert [few[0].id, few[1].id] == [images[30].id, images[2].id] and few.fingerprint != images.fingerprint
  assert set(images.of_classes([3, 1]).labels) == {1, 3}


def test_split_off_val_is_by_class_and_seed_and_id(photos):
  images = open_set(f'folder:{photos}', 'train')
  train, val = split_off_val(images, 0.25, seed=0)
  assert np.bincount(val.labels).tolist() == [3] * 4 and np.bincount(train.labels).tolist() == [9] * 4
  assert set(train.ids).isdisjoint(val.ids)
  # The order of the files does not matter, the seed does.
  shuffled = images.subset(np.random.default_rng(0).permutation(len(images)))
  assert set(split_off_val(shuffled, 0.25, seed=0)[1].ids) == set(val.ids)
  assert set(split_off_val(images, 0.25, seed=1)[1].ids) != set(val.ids)


def test_split_off_val_leaves_every_class_an_image(tmp_path):
  write_images(tmp_path, {'one': 1, 'two': 2, 'many': 9})
  train, val = split_off_val(open_set(f'folder:{tmp_path}', 'train'), 0.01, seed=0)
  assert train.class_names == ('many', 'one', 'two')
  assert np.bincount(val.labels, minlength=3).tolist() == [1, 0, 1] and np.bincount(train.labels).tolist() == [8, 1, 1]


@pytest.mark.parametrize('id_of,drawn', [
    ('train/a/{}.jpg', ('567', '123')), ('a/{}.jpg', ('057', '135')), ('train/00000/{}', ('067', '357')),
    ('digits/{}', ('146', '456')), ('{}.jpg', ('057', '135'))])
def test_what_is_drawn_depends_on_the_seed_and_stays(id_of, drawn):
  """For ids of every kind; ids with a slash give the sample of the recorded results."""
  ids = np.array([id_of.format(i) for i in range(8)])
  images = ImageSet('x', ('a',), np.zeros(8, np.int32), ids, np.arange(8), lambda row: b'', '')
  assert tuple(''.join(map(str, sample_per_class(images, 3, seed)[0].rows)) for seed in (0, 1)) == drawn
  assert tuple(''.join(map(str, sample_per_class(images, 0, seed, 3 / 8)[0].rows)) for seed in (0, 1)) == drawn


def test_an_image_set_in_a_notebook_is_one_line(photos):
  images = open_set(f'folder:{photos}', 'train')
  assert repr(images) == f"ImageSet('folder:{photos} train', 48 images of 4 classes)"
