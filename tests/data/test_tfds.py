"""TFDS sets are read without TensorFlow, keep their ids in every slice, and say what is wrong with them."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

from etils import epath
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from ft_jax.data import decode, open_set, prepare
from ft_jax.data.image_set import ImageSet


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
  """A TFDS set in TFDS's own form: JPEG files with a label and a name, and an image that is no input."""

  VERSION = tfds.core.Version('1.0.0')
  pkg_dir_path = epath.Path(__file__).parent  # where TFDS looks for checksums
  shift = 0  # of the labels
  brightness = 0

  def _info(self):
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
        'image': tfds.features.Image(encoding_format='jpeg'),
        'label': tfds.features.ClassLabel(names=['dark', 'light']),
        'file_name': tfds.features.Text(), 'mask': tfds.features.Image(shape=(None, None, 1), encoding_format='png')}))

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'train': self._generate_examples(20, 0), 'test': self._generate_examples(6, 50)}

  def _generate_examples(self, count, first):
    for i in range(first, first + count):
      files = {}
      for key, form, shape in (('image', 'JPEG', (20, 30, 3)), ('mask', 'PNG', (20, 30))):
        files[key] = io.BytesIO()
        PIL.Image.fromarray(np.full(shape, 4 * i + self.brightness, np.uint8)).save(files[key], form)
        files[key].seek(0)
      # The test split has no file names.
      yield i, {**files, 'label': (i + self.shift) % 2, 'file_name': f'{i:03d}.jpg' if i < 50 else ''}


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory) -> str:
  folder = tmp_path_factory.mktemp('tfds')
  TinyPhotos(data_dir=folder, file_format='array_record').download_and_prepare()
  # From here on the set is found by what lies in the folder, as a user's own set would be.
  tfds.core.registered._DATASET_REGISTRY.pop('tiny_photos')
  return str(folder)


def test_tfds(tfds_dir):
  """Undecoded bytes; labels and ids without decoding; slices are TFDS's own; TensorFlow is not imported."""
  train = open_set('tfds:tiny_photos', 'train', tfds_dir)
  assert (len(train), train.class_names) == (20, ('dark', 'light'))
  assert sorted(train.ids) == [f'train/{i:03d}.jpg' for i in range(20)]
  for i in (0, 7, 19):
    example = train[i]
    number = int(example.id[6:9])
    assert example.label == number % 2
    assert abs(int(decode.decode(example.image, example.id).mean()) - 4 * number) <= 2
  half = open_set('tfds:tiny_photos:1.0.0', 'train[:50%]', tfds_dir)
  assert half.ids.tolist() == train.ids[:10].tolist() and half.fingerprint != train.fingerprint
  assert 'tensorflow' not in sys.modules


@pytest.mark.parametrize('name', ['C#', '100%', 'a%20b', 'back\\slash', '{SHARD_INDEX}', 'x@4', 'new\nline', 'gs:'])
def test_tfds_below_any_name(tfds_dir, tmp_path, name):
  (tmp_path / name).symlink_to(tfds_dir)
  assert open_set('tfds:tiny_photos', 'train', str(tmp_path / name))[0].image[:2] == b'\xff\xd8'


@pytest.mark.parametrize('name, problem', [('[1]', 'TFDS reads as a pattern'), ('run*', 'TFDS reads as a pattern'),
                                           (os.fsdecode(b'latin\xe9'), 'array_record refuses')])
def test_a_name_that_tfds_would_misread_is_no_reason_to_download_again(tfds_dir, tmp_path, name, problem):
  (tmp_path / name).symlink_to(tfds_dir)
  with pytest.raises(ValueError, match=f'{problem}; give another folder, or a path through a symbolic link'):
    open_set('tfds:tiny_photos', 'train', str(tmp_path / name))


def test_labels_of_tfds_are_read_once(tfds_dir, monkeypatch):
  before = open_set('tfds:tiny_photos', 'test', tfds_dir)
  with monkeypatch.context() as patch:
    patch.setattr(np, 'savez', None)  # a second pass would fail when it saves
    assert open_set('tfds:tiny_photos', 'test', tfds_dir).labels.tolist() == before.labels.tolist()


def test_tfds_ids_are_the_same_in_every_slice(tfds_dir):
  """With and without file names, so that an image in two slices is noticed."""
  for split in ('train', 'test'):
    whole, some = (open_set('tfds:tiny_photos', f'{split}{part}', tfds_dir) for part in ('', '[2:5]'))
    assert some.ids.tolist() == whole.ids[2:5].tolist()
  assert whole.ids.tolist() == [f'test/00000/{i}' for i in range(6)]
  both = open_set('tfds:tiny_photos', 'train[:2]+test[4:]', tfds_dir)
  assert both.ids.tolist() == ['train/00000/0', 'train/00000/1', 'test/00000/4', 'test/00000/5']


def test_a_tfds_set_that_was_made_again_is_noticed(tfds_dir, tmp_path, monkeypatch):
  """The same names and sizes, other labels: neither cached labels nor the old fingerprint are used."""
  shutil.copytree(tfds_dir, tmp_path, dirs_exist_ok=True)
  before = open_set('tfds:tiny_photos', 'train', str(tmp_path))
  monkeypatch.setattr(TinyPhotos, 'shift', 1)
  shutil.rmtree(tmp_path / 'tiny_photos')
  TinyPhotos(data_dir=tmp_path, file_format='array_record').download_and_prepare()
  after = open_set('tfds:tiny_photos', 'train', str(tmp_path))
  assert after.ids.tolist() == before.ids.tolist()
  assert (after.labels != before.labels).all() and after.fingerprint != before.fingerprint


def test_other_images_of_a_tfds_set_are_noticed(tfds_dir, tmp_path, monkeypatch):
  """The same names, labels and classes; a copy of the set elsewhere is the same set."""
  before = open_set('tfds:tiny_photos', 'train', tfds_dir)
  shutil.copytree(tfds_dir, tmp_path / 'copy', copy_function=shutil.copyfile)
  assert open_set('tfds:tiny_photos', 'train', str(tmp_path / 'copy')).fingerprint == before.fingerprint
  monkeypatch.setattr(TinyPhotos, 'brightness', 8)
  TinyPhotos(data_dir=tmp_path / 'new', file_format='array_record').download_and_prepare()
  tfds.core.registered._DATASET_REGISTRY.pop('tiny_photos', None)
  after = open_set('tfds:tiny_photos', 'train', str(tmp_path / 'new'))
  assert (after.ids.tolist(), after.labels.tolist()) == (before.ids.tolist(), before.labels.tolist())
  assert after.fingerprint != before.fingerprint and after.legacy_fingerprint == before.legacy_fingerprint


def test_tfrecord_is_named_with_the_command(tfds_dir, tmp_path):
  """A set stored as TFRecord: the error says how to write it as ArrayRecord."""
  before = pathlib.Path(tfds_dir) / 'tiny_photos' / '1.0.0'
  after = tmp_path / 'tiny_photos' / '1.0.0'
  after.mkdir(parents=True)
  for path in before.iterdir():
    (after / path.name.replace('array_record', 'tfrecord')).write_bytes(path.read_bytes())
  info = json.loads((after / 'dataset_info.json').read_text())
  info['fileFormat'] = 'tfrecord'
  for split in info['splits']:
    split['filepathTemplate'] = split['filepathTemplate'].replace('array_record', 'tfrecord')
  (after / 'dataset_info.json').write_text(json.dumps(info))
  with pytest.raises(ValueError, match='stored as tfrecord .* no random access.*python -m ft_jax.data.prepare'):
    open_set('tfds:tiny_photos', 'train', str(tmp_path))
  with pytest.raises(ValueError, match='move that folder away'):
    prepare.prepare('tfds:tiny_photos', str(tmp_path))


def test_prepare(tfds_dir):
  """A prepared set is left as it is; an unknown name is one line on the terminal."""
  assert prepare.prepare('tfds:tiny_photos', tfds_dir).endswith('tiny_photos/1.0.0')
  run = subprocess.run([sys.executable, '-m', 'ft_jax.data.prepare', 'tfds:no_such_set'], capture_output=True,
                       text=True,
                       cwd=pathlib.Path(prepare.__file__).parents[3], check=False)
  assert run.returncode == 1 and 'error: tfds:no_such_set' in run.stderr and 'Traceback' not in run.stderr


def test_a_builder_that_needs_another_package_names_it(tfds_dir, monkeypatch):
  """TFDS's own builders may import TensorFlow; TFDS wraps the error in another one without the name."""
  def builder(*_, **__):
    raise ModuleNotFoundError('Failed to construct dataset') from ModuleNotFoundError('No module', name='tensorflow')
  monkeypatch.setattr(tfds, 'builder', builder)
  for use in (lambda: open_set('tfds:coco', 'train', tfds_dir), lambda: prepare.prepare('tfds:coco', tfds_dir)):
    with pytest.raises(ValueError, match='TFDS needs tensorflow for tfds:coco: pip install tensorflow'):
      use()


@pytest.mark.parametrize('name,split,words', [
    ('tiny_photos', '', "has no split ''; it has train, test"),
    ('tiny_photos', 'train[99:]', r"has no split 'train\[99:\]'"),
    ('tiny_photos', 'train[:0]', 'the slice is empty'),
    ('no_such_set', 'train', 'Dataset no_such_set not found'),
    ('oxford_iiit_pet', 'train',
     'is not prepared in .*with: python -m ft_jax.data.prepare tfds:oxford_iiit_pet --data_dir'),
    ('tiny_photos', 'val', "has no split 'val'; it has (test, train|train, test), with"),
    ('tiny_photos:9.0.0', 'train', 'not found')])
def test_errors(tfds_dir, name, split, words):
  with pytest.raises(ValueError, match=words):
    open_set(f'tfds:{name}', split, tfds_dir)


def test_from_tfds(tfds_dir):
  """With or without the prefix, as on the command line."""
  expected = open_set('tfds:tiny_photos', 'train[:5]', tfds_dir)
  for name in ('tiny_photos', 'tfds:tiny_photos'):
    assert ImageSet.from_tfds(name, 'train[:5]', tfds_dir).fingerprint == expected.fingerprint
