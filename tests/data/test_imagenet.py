"""Names of the ImageNet classes: unique, in the order of the labels, only if all classes are WordNet ids."""

import json

from conftest import write_images
import pytest
import tensorflow_datasets as tfds

from ft_jax.data import imagenet, open_set


def test_order_is_that_of_tfds_and_of_sorted_folders():
  wnids = list(imagenet.names())
  assert wnids == sorted(wnids) == tfds.core.tfds_path('datasets/imagenet2012/labels.txt').read_text().split()


def test_names_are_unique():
  """Even without upper case; the five names that WordNet uses twice are told apart."""
  names = imagenet.names()
  assert len({name.lower() for name in names.values()}) == 1000
  assert (names['n02012849'], names['n03126707']) == ('crane (bird)', 'crane (machine)')
  assert (names['n02113186'], names['n02963159']) == ('Cardigan Welsh corgi', 'cardigan')
  assert (names['n03710637'], names['n03710721']) == ('maillot (tights)', 'tank suit')


def test_names_are_the_published_ones(shared):
  """Each is a synonym in the list of the paper's code, except where two classes had to be told apart."""
  published = json.loads((shared / 'reference' / 'imagenet_classes.json').read_text())
  names = imagenet.names()
  assert list(names) == published['wnid']
  other = {wnid for wnid, synonyms in zip(published['wnid'], published['names'])
           if names[wnid].lower() not in [word.strip("', ").lower() for word in synonyms.split(',')]}
  assert other == {'n02012849', 'n03126707', 'n03710637'}


def test_folders(tmp_path):
  """WordNet ids become names, even if only some of the classes exist; longer folder names stay as they are."""
  write_images(tmp_path / 'some', {'n02123045': 2, 'n02124075': 2, 'n01443537': 2})
  source = open_set(f'folder:{tmp_path / "some"}', 'train')
  assert source.class_names == ('goldfish', 'tabby', 'Egyptian cat')
  assert source.ids[0].startswith('n01443537/')
  write_images(tmp_path / 'named', {'n02123045_tabby': 2, 'n02124075': 2})
  assert open_set(f'folder:{tmp_path / "named"}', 'train').class_names == ('n02123045_tabby', 'n02124075')
  assert imagenet.human_names(['n02123045', 'tabby']) == ('n02123045', 'tabby')


def test_a_flat_validation_folder(tmp_path):
  write_images(tmp_path / 'train', {'n02123045': 2, 'n02124075': 2})
  write_images(tmp_path, {'val': 3})
  for split in ('val', 'validation'):
    with pytest.raises(ValueError, match='val has no class folders but 3 images.*50,000 '
                                         'validation.*valprep.sh.*tfds:imagenet2012'):
      open_set(f'folder:{tmp_path}', split)
