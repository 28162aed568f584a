"""Image sets open the same way from folders and from TFDS, keep their ids, and say what is wrong with them."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

from conftest import write_images
from etils import epath
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from configs import default
from ft_jax.data import decode, image_set, open_set, prepare
from ft_jax.data.image_set import ImageSet, sample_per_class, split_off_val
from ft_jax.data.splits import open_splits


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
  """A TFDS set in TFDS's own form: JPEG files with a label and a name, and an image that is no input."""

  VERSION = tfds.core.Version('1.0.0')
  pkg_dir_path = epath.Path(__file__).parent  # where TFDS looks for checksums
  shift = 0  # of the labels
  brightness = 0

  def _info(self):
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
        'image': tfds.features.Image(encoding_format='jpeg'), 'label': tfds.features.ClassLabel(names=['dark', 'light']),
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


def test_folder(photos):
  train, test = open_set(f'folder:{photos}', 'train'), open_set('folder:' + photos.name, 'test', str(photos.parent))
  assert train.class_names == test.class_names == ('blossom', 'roof', 'sky', 'wall')
  assert np.bincount(train.labels).tolist() == [12] * 4 and np.bincount(test.labels).tolist() == [5] * 4
  example = train[13]
  assert (example.label, example.id.startswith('train/roof/')) == (1, True)
  assert example.image == (photos / example.id).read_bytes()
  assert train.fingerprint == open_set(f'folder:{photos}', 'train').fingerprint != test.fingerprint


def test_slices_of_a_folder_are_taken_by_class(pool):
  """The same expressions as TFDS's, but every class gives its part; two halves share nothing and miss nothing."""
  whole, first, second = (open_set(f'folder:{pool}', split) for split in ('train', 'train[:70%]', 'train[70%:]'))
  assert np.bincount(first.labels).tolist() == [7] * 6 and np.bincount(second.labels).tolist() == [3] * 6
  assert set(first.ids).isdisjoint(second.ids) and {*first.ids, *second.ids} == set(whole.ids)
  both = open_set(f'folder:{pool}', 'train[:2]+train[-1:]')
  assert np.bincount(both.labels).tolist() == [3] * 6


@pytest.mark.parametrize('split,images', [
    ('train[-10%:]', 1), ('train[:-10%]', 9), ('train[-4%:]', 0), ('train[:-4%]', 10), ('train[-20:]', 10)])
def test_slices_from_the_end(pool, split, images):
  """A negative part that rounds to no image is no image from the end, not all from the start."""
  if images:
    assert np.bincount(open_set(f'folder:{pool}', split).labels).tolist() == [images] * 6
  else:
    with pytest.raises(ValueError, match='the slice is empty'):
      open_set(f'folder:{pool}', split)


def test_tfds(tfds_dir):
  """Bytes come undecoded, labels and ids are known at once, a slice is TFDS's own; TensorFlow stays out."""
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
  """With file names and without, so that the same image in two slices is noticed."""
  for split in ('train', 'test'):
    whole, some = (open_set('tfds:tiny_photos', f'{split}{part}', tfds_dir) for part in ('', '[2:5]'))
    assert some.ids.tolist() == whole.ids[2:5].tolist()
  assert whole.ids.tolist() == [f'test/00000/{i}' for i in range(6)]
  both = open_set('tfds:tiny_photos', 'train[:2]+test[4:]', tfds_dir)
  assert both.ids.tolist() == ['train/00000/0', 'train/00000/1', 'test/00000/4', 'test/00000/5']


def test_a_tfds_set_that_was_made_again_is_noticed(tfds_dir, tmp_path, monkeypatch):
  """Same names and sizes, other labels: neither the kept labels nor the fingerprint are the old ones."""
  shutil.copytree(tfds_dir, tmp_path, dirs_exist_ok=True)
  before = open_set('tfds:tiny_photos', 'train', str(tmp_path))
  monkeypatch.setattr(TinyPhotos, 'shift', 1)
  shutil.rmtree(tmp_path / 'tiny_photos')
  TinyPhotos(data_dir=tmp_path, file_format='array_record').download_and_prepare()
  after = open_set('tfds:tiny_photos', 'train', str(tmp_path))
  assert after.ids.tolist() == before.ids.tolist()
  assert (after.labels != before.labels).all() and after.fingerprint != before.fingerprint


def test_other_images_of_a_tfds_set_are_noticed(tfds_dir, tmp_path, monkeypatch):
  """Same names, labels and classes; a copy of the set in another place is the same."""
  before = open_set('tfds:tiny_photos', 'train', tfds_dir)
  shutil.copytree(tfds_dir, tmp_path / 'copy', copy_function=shutil.copyfile)
  assert open_set('tfds:tiny_photos', 'train', str(tmp_path / 'copy')).fingerprint == before.fingerprint
  monkeypatch.setattr(TinyPhotos, 'brightness', 8)
  TinyPhotos(data_dir=tmp_path / 'new', file_format='array_record').download_and_prepare()
  tfds.core.registered._DATASET_REGISTRY.pop('tiny_photos', None)
  after = open_set('tfds:tiny_photos', 'train', str(tmp_path / 'new'))
  assert (after.ids.tolist(), after.labels.tolist()) == (before.ids.tolist(), before.labels.tolist())
  assert after.fingerprint != before.fingerprint and after.legacy_fingerprint == before.legacy_fingerprint


def test_subset_and_of_classes(photos):
  source = open_set(f'folder:{photos}', 'train')
  few = source.subset([30, 2])
  assert [few[0].id, few[1].id] == [source[30].id, source[2].id] and few.fingerprint != source.fingerprint
  assert set(source.of_classes([3, 1]).labels) == {1, 3}


def test_carve_is_by_class_and_seed_and_id(photos):
  source = open_set(f'folder:{photos}', 'train')
  train, val = split_off_val(source, 0.25, seed=0)
  assert np.bincount(val.labels).tolist() == [3] * 4 and np.bincount(train.labels).tolist() == [9] * 4
  assert set(train.ids).isdisjoint(val.ids)
  # The order of the files does not matter, the seed does.
  shuffled = source.subset(np.random.default_rng(0).permutation(len(source)))
  assert set(split_off_val(shuffled, 0.25, seed=0)[1].ids) == set(val.ids) != set(split_off_val(source, 0.25, seed=1)[1].ids)


def test_carve_leaves_every_class_an_image(tmp_path):
  write_images(tmp_path, {'one': 1, 'two': 2, 'many': 9})
  train, val = split_off_val(open_set(f'folder:{tmp_path}', 'train'), 0.01, seed=0)
  assert train.class_names == ('many', 'one', 'two')
  assert np.bincount(val.labels, minlength=3).tolist() == [1, 0, 1] and np.bincount(train.labels).tolist() == [8, 1, 1]


@pytest.mark.parametrize('id_of,drawn', [
    ('train/a/{}.jpg', ('567', '123')), ('a/{}.jpg', ('057', '135')), ('train/00000/{}', ('067', '357')),
    ('digits/{}', ('146', '456')), ('{}.jpg', ('057', '135'))])
def test_what_is_drawn_depends_on_the_seed_and_stays(id_of, drawn):
  """For ids of every kind; those with a slash draw what they drew when results were recorded."""
  ids = np.array([id_of.format(i) for i in range(8)])
  source = ImageSet('x', ('a',), np.zeros(8, np.int32), ids, np.arange(8), lambda row: b'', '')
  assert tuple(''.join(map(str, sample_per_class(source, 3, seed)[0].rows)) for seed in (0, 1)) == drawn
  assert tuple(''.join(map(str, sample_per_class(source, 0, seed, 3 / 8)[0].rows)) for seed in (0, 1)) == drawn


@pytest.mark.parametrize('name,split,words', [
    ('pets', 'train', 'expected tfds:..., folder:'),
    ('folder:/no/such', 'train', 'there is no folder /no/such'),
    ('folder:PHOTOS', 'val', "no split 'val'; known: test, train"),
    ('folder:PHOTOS/train', 'test', 'has no splits .* use slices such as'),
    ('folder:PHOTOS', 'train[', 'expected a name, such as train, or a slice'),
    ('folder:PHOTOS', 'train[:0]', 'the slice is empty'),
    ('folder:PHOTOS', '', "split '': expected a name"),
    ('folder:PHOTOS', 'train+', "split 'train\\+': expected a name"),
    ('tfds:tiny_photos', '', "has no split ''; it has train, test"),
    ('tfds:tiny_photos', 'train[99:]', r"has no split 'train\[99:\]'"),
    ('tfds:tiny_photos', 'train[:0]', 'the slice is empty'),
    ('tfds:no_such_set', 'train', 'Dataset no_such_set not found'),
    ('tfds:oxford_iiit_pet', 'train', 'is not prepared in .*with: python -m ft_jax.data.prepare tfds:oxford_iiit_pet --data_dir'),
    ('tfds:tiny_photos', 'val', "has no split 'val'; it has (test, train|train, test), with"),
    ('tfds:tiny_photos:9.0.0', 'train', 'not found'),
])
def test_errors(photos, tfds_dir, name, split, words):
  with pytest.raises(ValueError, match=words):
    open_set(name.replace('PHOTOS', str(photos)), split, tfds_dir)


def test_a_folder_without_classes(photos):
  """Images alone are a pool of one class, in slices and with ids as ever; what is trained on by label cannot be one."""
  source = open_set(f'folder:{photos}/train/sky', 'train')
  assert source.class_names == ('unlabelled',) and sorted(source.ids) == sorted(f'{i}.jpg' for i in range(12))
  assert (source.labels == 0).all() and len(open_set(f'folder:{photos}/train/sky', 'train[:25%]')) == 3
  config = default.get_config().target
  config.name = f'folder:{photos}/train/sky'
  with pytest.raises(ValueError, match='holds no class folders but 12 images, so their classes are not known; expected <class>/<image>'):
    open_splits(config, '', seed=0)


def test_validation_folders_have_two_names(tmp_path):
  """`val` and `validation` are one split, whichever the folder is called; where both are there, each is itself."""
  write_images(tmp_path / 'train', {'cat': 2, 'dog': 2})
  write_images(tmp_path / 'val', {'cat': 1, 'dog': 1})
  assert open_set(f'folder:{tmp_path}', 'validation').ids.tolist() == open_set(f'folder:{tmp_path}', 'val').ids.tolist()
  write_images(tmp_path / 'validation', {'cat': 3, 'dog': 3})
  assert [len(open_set(f'folder:{tmp_path}', split)) for split in ('val', 'validation')] == [2, 6]


@pytest.mark.parametrize('more', ['train', 'test'])
def test_classes_that_differ_are_named_with_their_split(more, tmp_path):
  """A class that only one split has, whichever it is: in a sum of splits, and between train and test of a run."""
  for split in ('train', 'test'):
    write_images(tmp_path / split, {'cat': 2, 'dog': 2, **({'emu': 2} if split == more else {})})
  with pytest.raises(ValueError, match=f'the classes of test and train differ: only in {more}: emu$'):
    open_set(f'folder:{tmp_path}', 'train+test')
  config = default.get_config().target
  config.name = f'folder:{tmp_path}'
  with pytest.raises(ValueError, match=f'have different classes: only in folder:.* {more}: emu$'):
    open_splits(config, '', seed=0)


def test_an_empty_class_folder_is_named(tmp_path):
  write_images(tmp_path / 'train', {'full': 2})
  (tmp_path / 'train' / 'hollow').mkdir()
  (tmp_path / 'train' / 'hollow' / 'notes.txt').write_text('no image')
  with pytest.raises(ValueError, match='no image in class folder .*hollow'):
    open_set(f'folder:{tmp_path}', 'train')


def test_tfrecord_is_named_with_the_command(tfds_dir, tmp_path):
  """A set that lies there as TFRecord: its metadata say so, and the error says how to get the other form."""
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
  """A set that is there is left as it is; a name that is not known is one line on the terminal."""
  assert prepare.prepare('tfds:tiny_photos', tfds_dir).endswith('tiny_photos/1.0.0')
  run = subprocess.run([sys.executable, '-m', 'ft_jax.data.prepare', 'tfds:no_such_set'], capture_output=True, text=True,
                       cwd=pathlib.Path(image_set.__file__).parents[2], check=False)
  assert run.returncode == 1 and 'error: tfds:no_such_set' in run.stderr and 'Traceback' not in run.stderr


def test_a_builder_that_needs_another_package_names_it(tfds_dir, monkeypatch):
  """TFDS's own builders may import TensorFlow; the error that says so is inside another one without a name."""
  def builder(*_, **__):
    raise ModuleNotFoundError('Failed to construct dataset') from ModuleNotFoundError('No module', name='tensorflow')
  monkeypatch.setattr(tfds, 'builder', builder)
  for use in (lambda: open_set('tfds:coco', 'train', tfds_dir), lambda: prepare.prepare('tfds:coco', tfds_dir)):
    with pytest.raises(ValueError, match='TFDS needs tensorflow for tfds:coco: pip install tensorflow'):
      use()


def test_digits():
  """The demo's sets: no writer on both sides, at least 25 pool classes, few target images a class."""
  pool, train, val, test = (open_set(*args) for args in (
      ('digits:pool', 'train'), ('digits:target', 'train'), ('digits:target', 'val'), ('digits:target', 'test')))
  assert len(pool.class_names) == 26 and (np.bincount(pool.labels) >= 60).all()
  assert np.bincount(train.labels).tolist() == [8] * 10
  ids = [i for source in (pool, train, val, test) for i in source.ids]
  assert len(ids) == len(set(ids))
  assert pool[0].image.shape == (8, 8)
