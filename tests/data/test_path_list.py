"""Image sets of files at any paths. What job predict reads by path is tested in tests/jobs/test_predict.py."""

import os
import pathlib

import numpy as np
import PIL.Image
import pytest

from ft_jax.data import contents
from ft_jax.data.image_set import ImageSet


def test_files_with_labels(photos):
  """Labels by name or number; the ids are the paths as given, so two sets share an id only if they share a file."""
  paths = sorted((photos / 'train').rglob('*.jpg'))[::5]
  names = [path.parent.name for path in paths]
  made = ImageSet.from_files(paths, names)
  assert made.class_names == ('blossom', 'roof', 'sky', 'wall') and [made.class_names[k] for k in made.labels] == names
  assert made.ids.tolist() == [str(path) for path in paths] and made[3].image == paths[3].read_bytes()
  numbered = ImageSet.from_files([str(path) for path in paths], made.labels, made.class_names, name='mine')
  assert numbered.fingerprint == made.fingerprint and numbered.name == 'mine'
  assert ImageSet.from_files(paths[::-1], names[::-1]).fingerprint != made.fingerprint
  assert ImageSet.from_files(paths).class_names == ('unlabelled',)


def test_other_bytes_under_the_same_path_are_another_set(photos, tmp_path, monkeypatch):
  """Also below the home directory."""
  monkeypatch.setenv('HOME', str(tmp_path))
  first, second = sorted((photos / 'train').rglob('*.jpg'))[:2]
  (tmp_path / 'a.jpg').write_bytes(first.read_bytes())
  before = ImageSet.from_files(['~/a.jpg'], [0])
  (tmp_path / 'a.jpg').write_bytes(second.read_bytes())
  after = ImageSet.from_files(['~/a.jpg'], [0])
  assert after.fingerprint != before.fingerprint and after[0].image == second.read_bytes()


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  (tmp_path / 'a.jpg').write_bytes(b'a')
  (tmp_path / 'link.jpg').symlink_to('nowhere.jpg')
  with open(tmp_path / 'huge.jpg', 'wb') as stream:
    stream.truncate(contents.MAX_FILE_BYTES + 1)
  return tmp_path


@pytest.mark.parametrize('paths,words', [
    (['a.jpg', 'gone.jpg'], r'paths\[1\]: there is no file .*gone.jpg'), (['.'], r'paths\[0\]: .* is a folder'),
    (['link.jpg'], r'paths\[0\]: .*link.jpg is a link to a file that does not exist'),
    (['huge.jpg'], r'paths\[0\]: .*huge.jpg has more bytes than an image'),
    (['a.jpg', 'a.jpg'], r"paths\[1\] is '.*a.jpg', as is paths\[0\]; give each image once"),
    ([], 'paths is empty; expected at least one image')])
def test_wrong_paths(folder, paths, words):
  with pytest.raises(ValueError, match=words) as caught:
    ImageSet.from_files([folder / path for path in paths])
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('call,words', [
    (lambda: ImageSet.from_files(None), 'paths is None; expected a list of paths'),
    (lambda: ImageSet.from_files([3]), r'paths\[0\] is of type int; expected a path'),
    (lambda: ImageSet.from_folder(None), 'path is None and split is \'train\'; expected the path of a folder'),
    (lambda: ImageSet.from_tfds('mnist', 3), "name is 'mnist' and split is 3; expected text"),
    (lambda: ImageSet.from_arrays(None), 'images is of type NoneType; expected uint8'),
    (lambda: ImageSet.from_arrays({'a': b'x'}), 'images is of type dict; expected uint8'),
    (lambda: ImageSet.from_arrays(PIL.Image.new('L', (8, 8))), r'images is one Pillow image; .* give \[image\]')])
def test_values_of_other_types(call, words):
  with pytest.raises(ValueError, match=f'^{words}'):
    call()


def test_a_folder_is_not_a_list_of_paths(folder):
  for path in (folder, str(folder)):
    with pytest.raises(ValueError, match=r'expected a list of paths \(a folder is for ImageSet.from_folder\)'):
      ImageSet.from_files(path)


def test_a_file_without_permission_is_refused(folder, monkeypatch):
  monkeypatch.setattr(os, 'access', lambda path, mode: False)  # root may read everything
  with pytest.raises(ValueError, match=r'paths\[0\]: .*a.jpg cannot be read \(permissions\)'):
    ImageSet.from_files([folder / 'a.jpg'])


def test_labels_that_do_not_fit(folder):
  with pytest.raises(ValueError, match=r'labels has shape \(2,\), but there are 1 images'):
    ImageSet.from_files([folder / 'a.jpg'], np.array([0, 1]))
