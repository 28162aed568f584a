"""Folders as people have them: splits and classes are recognised, unused files are reported, errors say what to do."""

import logging
import os
import pathlib
import tarfile
import unicodedata

from conftest import write_images
import numpy as np
import PIL.Image
import pytest

from configs import default
from ft_jax import noise, settings
from ft_jax.data import decode, folder_listing, open_set, opened_once
from ft_jax.data.image_set import ImageSet
from ft_jax.data.splits import drop_unreadable, open_splits, Splits, SplitSettings


def tree(root: pathlib.Path, *names: str, images: int = 2) -> pathlib.Path:
  """Files of these names; for a name that ends in a slash a folder of small images."""
  for k, name in enumerate(names):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith('/'):
      path.mkdir(exist_ok=True)
      for i in range(images):
        image(path / f'{i}.jpg', k + i)
    else:
      path.write_text('text')
  return root


def image(path: pathlib.Path, value: int = 0, form: str = 'JPEG', mode: str = 'RGB') -> None:
  with path.open('wb') as stream:
    PIL.Image.new(mode, (9, 7), value).save(stream, form)


def opened(root: pathlib.Path, split: str = 'train') -> dict[str, int]:
  """How many images of each class."""
  source = open_set(f'folder:{root}', split)
  return dict(zip(source.class_names, np.bincount(source.labels, minlength=len(source.class_names)).tolist()))


def target(root: pathlib.Path, **fields):
  config = default.get_config().target
  config.update({'name': f'folder:{root}', **fields})
  return SplitSettings.from_config(config)


def warned(caplog) -> list[str]:
  return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# --- opening ---


def test_folder(photos):
  train, test = open_set(f'folder:{photos}', 'train'), open_set('folder:' + photos.name, 'test', str(photos.parent))
  assert train.class_names == test.class_names == ('blossom', 'roof', 'sky', 'wall')
  assert np.bincount(train.labels).tolist() == [12] * 4 and np.bincount(test.labels).tolist() == [5] * 4
  example = train[13]
  assert (example.label, example.id.startswith('train/roof/')) == (1, True)
  assert example.image == (photos / example.id).read_bytes()
  assert train.fingerprint == open_set(f'folder:{photos}', 'train').fingerprint != test.fingerprint


def test_a_split_is_opened_once_where_that_is_asked_for(photos):
  """Another split, or one of another folder, is another set; afterwards a folder is listed again."""
  with opened_once():
    first = open_set(f'folder:{photos}', 'train')
    assert open_set(f'folder:{photos}', 'train') is first
    assert open_set(f'folder:{photos}', 'test') is not first
    assert open_set(f'folder:{photos.name}', 'train', str(photos.parent)) is not first
  assert open_set(f'folder:{photos}', 'train') is not first


def test_slices_of_a_folder_are_taken_by_class(pool):
  """TFDS's expressions, but of each class separately; two halves are disjoint and complete."""
  whole, first, second = (open_set(f'folder:{pool}', split) for split in ('train', 'train[:70%]', 'train[70%:]'))
  assert np.bincount(first.labels).tolist() == [7] * 6 and np.bincount(second.labels).tolist() == [3] * 6
  assert set(first.ids).isdisjoint(second.ids) and {*first.ids, *second.ids} == set(whole.ids)
  both = open_set(f'folder:{pool}', 'train[:2]+train[-1:]')
  assert np.bincount(both.labels).tolist() == [3] * 6


@pytest.mark.parametrize('split,images', [
    ('train[-10%:]', 1), ('train[:-10%]', 9), ('train[-4%:]', 0), ('train[:-4%]', 10), ('train[-20:]', 10)])
def test_slices_from_the_end(pool, split, images):
  """A negative bound that rounds to zero images counts zero from the end, not from the start."""
  if images:
    assert np.bincount(open_set(f'folder:{pool}', split).labels).tolist() == [images] * 6
  else:
    with pytest.raises(ValueError, match='the slice is empty'):
      open_set(f'folder:{pool}', split)


def test_a_folder_without_classes(photos):
  """Images alone are a pool of one class, with slices and ids; they cannot be trained on by label."""
  source = open_set(f'folder:{photos}/train/sky', 'train')
  assert source.class_names == ('unlabelled',) and sorted(source.ids) == sorted(f'{i}.jpg' for i in range(12))
  assert (source.labels == 0).all() and len(open_set(f'folder:{photos}/train/sky', 'train[:25%]')) == 3
  config = default.get_config().target
  config.name = f'folder:{photos}/train/sky'
  with pytest.raises(ValueError, match='holds no class folders but 12 images, so their classes are not known; expected '
                                       '<class>/<image>'):
    open_splits(SplitSettings.from_config(config), '', seed=0)


def test_validation_folders_have_two_names(tmp_path):
  """`val` and `validation` are one split; if both folders exist, each name means its own."""
  write_images(tmp_path / 'train', {'cat': 2, 'dog': 2})
  write_images(tmp_path / 'val', {'cat': 1, 'dog': 1})
  assert open_set(f'folder:{tmp_path}', 'validation').ids.tolist() == open_set(f'folder:{tmp_path}', 'val').ids.tolist()
  write_images(tmp_path / 'validation', {'cat': 3, 'dog': 3})
  assert [len(open_set(f'folder:{tmp_path}', split)) for split in ('val', 'validation')] == [2, 6]


@pytest.mark.parametrize('more', ['train', 'test'])
def test_classes_that_differ_are_named_with_their_split(more, tmp_path):
  """A class that only one split has: in a sum of splits, and between train and test of a run."""
  for split in ('train', 'test'):
    write_images(tmp_path / split, {'cat': 2, 'dog': 2, **({'emu': 2} if split == more else {})})
  with pytest.raises(ValueError, match=f'the classes of test and train differ: only in {more}: emu$'):
    open_set(f'folder:{tmp_path}', 'train+test')
  config = default.get_config().target
  config.name = f'folder:{tmp_path}'
  with pytest.raises(ValueError, match=f'have different classes: only in folder:.* {more}: emu$'):
    open_splits(SplitSettings.from_config(config), '', seed=0)


def test_an_empty_class_folder_is_named(tmp_path):
  write_images(tmp_path / 'train', {'full': 2})
  (tmp_path / 'train' / 'hollow').mkdir()
  (tmp_path / 'train' / 'hollow' / 'notes.txt').write_text('no image')
  with pytest.raises(ValueError, match='no image in class folder .*hollow'):
    open_set(f'folder:{tmp_path}', 'train')


@pytest.mark.parametrize('path,split,words', [
    ('/no/such', 'train', 'there is no folder /no/such'),
    ('PHOTOS', 'val', "no split 'val'; known: test, train"),
    ('PHOTOS/train', 'test', 'has no splits .* use slices such as'),
    ('PHOTOS', 'train[', 'expected a name, such as train, or a slice'),
    ('PHOTOS', 'train[:0]', 'the slice is empty'),
    ('PHOTOS', '', "split '': expected a name"),
    ('PHOTOS', 'train+', "split 'train\\+': expected a name")])
def test_errors(photos, path, split, words):
  with pytest.raises(ValueError, match=words):
    open_set(f'folder:{path.replace("PHOTOS", str(photos))}', split)


def test_from_folder(photos, monkeypatch):
  """As on the command line; a relative path stays the same folder when the working directory changes."""
  expected = open_set(f'folder:{photos}', 'test')
  monkeypatch.chdir(photos.parent)
  relative = ImageSet.from_folder(photos.name, 'test')
  monkeypatch.chdir('/')
  assert relative[0].image == expected[0].image
  assert relative.fingerprint == ImageSet.from_folder(photos, split='test').fingerprint == expected.fingerprint
  with pytest.raises(ValueError, match='there is no folder /no/such; give the path of a folder'):
    ImageSet.from_folder('/no/such')


# --- splits and classes ---


@pytest.mark.parametrize('name', ['train', 'val', 'test', 'validation', 'Train'])
def test_a_class_may_be_called_like_a_split(tmp_path, name):
  """A folder with images beside other class folders is a class: none of the nine images is lost."""
  tree(tmp_path, 'bus/', 'car/', f'{name}/', images=3)
  assert opened(tmp_path) == dict.fromkeys(sorted(['bus', 'car', name]), 3)
  assert sum(opened(tmp_path, 'train[:34%]').values()) == 3
  with pytest.raises(ValueError, match=rf'no splits .* all of it is called train \({name}/ .* is a class\): use slices '
                                       rf'such as'):
    opened(tmp_path, 'test')
  with pytest.raises(ValueError, match='no image in class folder .*/bus; it holds 1 .heic, 0.heic'):
    opened(tree(tmp_path / 'other', 'bus/0.heic', f'{name}/'))  # also where the other images are not read here


@pytest.mark.parametrize('others', [(), ('test/',)])
def test_a_split_beside_folders_of_images_is_refused(tmp_path, others):
  """It could be either, and both readings would lose images."""
  tree(tmp_path, 'train/a/', 'train/b/', 'bus/', 'car/', *others)
  words = 'train/ in it has class folders, .* beside it have images, .*: bus, car; .* Give folder:.*/train to'
  with pytest.raises(ValueError, match=words):
    opened(tmp_path)
  assert opened(tmp_path / 'train') == {'a': 2, 'b': 2}


def test_splits_beside_other_folders(tmp_path, caplog):
  """A folder of images beside splits is reported, and opens when it is asked for (such as STL-10's unlabeled)."""
  tree(tmp_path, 'train/a/', 'test/a/', 'unlabeled/', 'notes/todo.txt')
  assert opened(tmp_path) == opened(tmp_path, 'test') == {'a': 2} and opened(tmp_path, 'unlabeled') == {'unlabelled': 2}
  assert [line.partition('used: ')[2] for line in warned(caplog)] == [
      '1 folder of images beside the splits, unlabeled (classes are folders inside a split)']


def test_flat_splits(tmp_path):
  """Images without classes in a split folder are not a class of the set."""
  tree(tmp_path, 'train/a/', 'train/b/', 'test/')
  assert opened(tmp_path) == {'a': 2, 'b': 2} and opened(tmp_path, 'test') == {'unlabelled': 2}
  with pytest.raises(ValueError, match='test holds no class folders but 2 images, so their classes are not known'):
    open_splits(target(tmp_path, val_fraction=0.5), '', seed=0)
  tree(tmp_path / 'flat', 'train/', 'docs/how.txt')
  assert opened(tmp_path / 'flat') == {'unlabelled': 2}


@pytest.mark.parametrize('names,split', [
    (('Train/', 'TEST/'), 'train'), (('training/', 'testing/'), 'train'), (('Training/', 'Testing/', 'Valid/'), 'val'),
    (('train /', 'test/'), 'train'), (('valid/', 'train/'), 'validation'), (('train/',), 'training')])
def test_splits_are_known_by_other_names(tmp_path, names, split):
  """Any usual name of a split, in upper or lower case."""
  tree(tmp_path, *(f'{name}a/' for name in names), *(f'{name}b/' for name in names))
  assert opened(tmp_path, split) == {'a': 2, 'b': 2}


def test_two_names_of_one_split(tmp_path, caplog):
  """The folder of the given name is used and the other one reported; if neither has it, both are named."""
  tree(tmp_path, 'train/a/', 'training/a/', 'valid/a/', 'Validation/a/')
  assert opened(tmp_path) == opened(tmp_path, 'valid') == {'a': 2}
  assert '1 folder with another name of the same split, training' in warned(caplog)[0]
  with pytest.raises(ValueError, match="split 'val' may be Validation or valid; give the name of one, or remove the "
                                       "others"):
    opened(tmp_path, 'val')


# --- what an image is ---


def test_endings_are_those_of_the_decoder(tmp_path):
  """Every ending that Pillow knows for a format that is read is listed, and such files decode."""
  PIL.Image.init()
  known = {ending for ending, form in PIL.Image.registered_extensions().items() if form in decode.FORMATS}
  assert known - set(decode.IMAGE_ENDINGS) == {'.pfm'}  # pixels of any range, which `decode` refuses
  (tmp_path / 'a').mkdir()
  for form, endings in decode.FORMATS.items():
    for ending in endings:
      image(tmp_path / 'a' / f'{form}{ending.upper()}', 3, form, 'L' if form == 'PPM' else 'RGB')
  source = open_set(f'folder:{tmp_path}', 'train')
  assert len(source) == len(decode.IMAGE_ENDINGS) and source.unused.found == {}
  assert all(decode.decode(source[i].image, source.ids[i]).shape == (7, 9, 3) for i in range(len(source)))
  assert {'.jfif', '.jpe', '.pgm', '.pbm', '.pnm'} < set(decode.IMAGE_ENDINGS)


def test_listing_asks_nothing_of_each_file(tmp_path, monkeypatch):
  """A pool may have a million files on a slow disk: regular files need no system call each."""
  tree(tmp_path, 'train/a/', 'train/b/', 'test/a/')
  asked = []
  for name in ('isfile', 'exists', 'isdir'):
    monkeypatch.setattr(os.path, name, asked.append)
  listing = folder_listing.list_classes(tmp_path, 'train', 'folder:x')
  assert {name: len(images) for name, images in listing.classes.items()} == {'a': 2, 'b': 2} and not asked


def linked(root: pathlib.Path) -> pathlib.Path:
  """Two classes of four; of a, two images are links that lead nowhere, one of them to itself."""
  write_images(root, {'a': 2, 'b': 4})
  (root / 'a' / 'gone.jpg').symlink_to(root / 'nowhere.jpg')
  (root / 'a' / 'self.jpg').symlink_to('self.jpg')
  (root / 'a' / 'good.jpg').symlink_to('0.jpg')
  return root


def test_broken_links_are_unreadable_images(tmp_path):
  """They are listed, and either end the run before it begins or are skipped and counted."""
  linked(tmp_path)
  source = open_set(f'folder:{tmp_path}', 'train')
  assert len(source) == 9 and source.broken == {'a/gone.jpg', 'a/self.jpg'}
  assert source.subset([0]).broken == source.broken
  for name in source.broken:
    with pytest.raises(ValueError, match=f'{name} is a link to .*, which does not exist'):
      source[source.ids.tolist().index(name)]
  splits = Splits(source, source, None)
  with pytest.raises(ValueError, match='2 of 9 images are links to files that are not there, such as a/gone.jpg; '
                                       '.*on_error=skip'):
    drop_unreadable(splits, 'target', 'raise')
  drop_unreadable(Splits(source.of_classes([1]), source.of_classes([1]), None), 'target', 'raise')
  kept, _, skipped = drop_unreadable(splits, 'target', 'skip')
  assert len(kept.train) == 7 and skipped['target train'] == ['a/gone.jpg', 'a/self.jpg']


# --- what is not used ---


def test_unused_files_are_logged_in_one_line(tmp_path, caplog):
  """How many, of which kinds, an example of each and what to do; again only if something else is found."""
  tree(tmp_path, 'a/', 'b/', 'a/more/', 'a/more/deep/', 'a/0.heic', 'a/1.HEIC', 'b/2.heic', 'labels.csv', 'b/.3.jpg',
       'README.md')
  tree(tmp_path, '.DS_Store', 'a/.DS_Store', 'a/Thumbs.db', 'a/desktop.ini', 'a/._0.jpg', 'a/.ipynb_checkpoints/',
       '__MACOSX/a/._0.jpg')
  image(tmp_path / 'stray.jpg')
  for _ in range(2):
    assert opened(tmp_path) == {'a': 2, 'b': 2} and sum(opened(tmp_path, 'train[:50%]').values()) == 2
  assert warned(caplog) == [
      f'warning: folder:{tmp_path}: 10 files or folders are not used: '
      '4 images in a folder inside a class folder, such as a/more/0.jpg (expected <class>/<image>: move them up); '
      '3 .heic, such as a/0.heic (a format that is not read: save as .jpg or .png); '
      '1 image outside the class folders, stray.jpg (expected <class>/<image>: their class is not known); '
      '1 .csv, labels.csv (classes are read from the names of folders, not from a table); '
      '1 hidden, b/.3.jpg (names that begin with a dot are not read)']
  (tmp_path / 'b' / 'new.txt').write_text('text')
  opened(tmp_path)
  assert len(warned(caplog)) == 2 and '1 .txt, b/new.txt' in warned(caplog)[1]


def test_images_with_other_endings_are_recognised_by_their_contents(tmp_path, caplog):
  tree(tmp_path, 'a/', 'a/text')
  image(tmp_path / 'a' / 'photo.jpg_large')
  os.symlink('/', tmp_path / 'a' / 'disk')  # is not walked through
  opened(tmp_path)
  line, = warned(caplog)
  assert '1 .jpg_large, a/photo.jpg_large (an image by its contents: rename it to end in .jpg or .png)' in line
  assert '1 without an ending, a/text;' in line + ';' and '1 link to a folder in a class folder, a/disk' in line
  tree(tmp_path / 'x', 'a/', *(f'a/{i}.{i}' for i in range(9)))
  opened(tmp_path / 'x')
  assert warned(caplog)[1].endswith('1 .4, a/4.4; and 4 of 4 other kinds')


def test_unused_files_of_all_splits_are_logged_together(tmp_path, caplog):
  """One line for train and test; the next seed, or one split alone, logs nothing new."""
  tree(tmp_path, 'train/a/', 'train/b/', 'test/a/', 'test/b/', 'train/a/0.heic', 'test/b/0.heic', 'test/b/x.txt',
       'x.csv', images=3)
  for seed in (0, 1):
    open_splits(target(tmp_path), '', seed)
  opened(tmp_path, 'test')
  line, = warned(caplog)
  assert '4 files or folders are not used: 2 .heic, such as test/b/0.heic (' in line
  assert 'x.csv' in line and 'test/b/x.txt' in line


# --- folders that are nearly right ---


@pytest.mark.parametrize('names,words', [
    (('a/images/', 'b/images/'), r'no image in class folder .*/a \(and 1 others\), but there are some in folders '
                                 r'further down, such as '
     r'.*/a/images/0.jpg; expected <class>/<image>: move the images up'),
    (('trainset/a/', 'testset/a/'), 'if the folders are splits, call them train, val and test'),
    (('photos/a/', 'photos/b/'), 'has one folder, photos/, .*; give folder:.*/photos$'),
    (('x/y/train/a/', 'x/y/train/b/'), 'has one folder, x/, .*; give folder:.*/x/y$'),
    (('train/set/a/', 'train/set/b/'), 'has one folder, set/, .*; move what is in .*/train/set to .*/train$'),
    (('a/', 'b/0.heic', 'b/1.heic'),
     r'no image in class folder .*b; it holds 2 .heic, such as 0.heic \(a format .*\); an image ends in .jpg'),
    (('photos.zip',), r'has no class folders; .* it holds 1 .zip, photos.zip \(an archive: unpack it\)'),
    (('cat/', 'cat /'), "the class folders 'cat' and 'cat ', which look the same; put their images into one"),
    (('two words/', 'two\xa0words/'), r"the class folders 'two words' and 'two\\xa0words', which look the same"),
    (tuple(unicodedata.normalize(form, 'café/') for form in ('NFC', 'NFD')),
     r"folders 'cafe\\u0301' and 'caf\\xe9', which look the same")])
def test_what_to_do_with_a_folder_that_is_nearly_right(tmp_path, names, words):
  with pytest.raises(ValueError, match=words) as caught:
    opened(tree(tmp_path, *names))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('one,other,shown', [
    ('café', unicodedata.normalize('NFD', 'café'), (r'caf\\xe9', r'cafe\\u0301')), ('cat ', 'cat', ('cat ', 'cat')),
    ('Cat', 'cat', ('Cat', 'cat'))])
def test_classes_that_differ_in_what_is_not_seen(tmp_path, one, other, shown):
  """Classes of two splits whose names look the same are written so that the difference shows."""
  tree(tmp_path, f'train/{one}/', f'test/{other}/', 'train/dog/', 'test/dog/', 'test/emu/')
  words = f"'{shown[0]}' in .* train is '{shown[1]}' in .* test; give the folder one name; only in .* test: emu$"
  with pytest.raises(ValueError, match=words):
    open_splits(target(tmp_path, val_fraction=0.5), '', seed=0)


def test_classes_that_differ_by_capitals(tmp_path, caplog):
  """Images of letters have such classes: they are kept, with a warning."""
  assert opened(tree(tmp_path, 'a/', 'A/')) == opened(tmp_path) == {'A': 2, 'a': 2}
  line, = warned(caplog)
  assert "the class folders 'A' and 'a'" in line and 'differ in capitals only and are two classes' in line


@pytest.mark.parametrize('name,words', [
    ('pets.zip', 'pets.zip is an archive, not a folder; unpack it'), ('pets.tar.gz', 'is an archive, not a folder'),
    ('pets.jpg', 'pets.jpg is a file, not a folder'), ('link', 'is a link to .*nowhere, which does not exist'),
    ('none', 'there is no folder')])
def test_what_is_no_folder(tmp_path, name, words):
  if name == 'link':
    (tmp_path / name).symlink_to(tmp_path / 'nowhere')
  elif name != 'none':
    (tmp_path / name).write_bytes(b'PK')
  with pytest.raises(ValueError, match=words):
    open_set(f'folder:{tmp_path / name}', 'train')


def test_labels_in_a_table(tmp_path):
  """Images without class folders: one line says where the classes have to be."""
  tree(tmp_path, 'photos/', 'photos/labels.csv')
  with pytest.raises(ValueError, match='no class folders but 2 images.*classes are read from the names of folders, not '
                                       'from a'):
    open_splits(target(tmp_path / 'photos', test=''), '', seed=0)


@pytest.mark.parametrize('without', [(1, 3), ('1', 3)])
def test_numbers_are_names_of_classes(tmp_path, without):
  """On the command line 10 is a number, even if it is the name of a folder."""
  tree(tmp_path, *(f'{k}/' for k in range(4)))
  source = open_set(f'folder:{tmp_path}', 'train')
  assert source.without(without).class_names == ('0', '2')
  tree(tmp_path, '010/')
  with pytest.raises(ValueError, match=r"has no class '10' to leave out; it has 5: .*; if you mean '010', write "
                                       r"\('010',\)"):
    open_set(f'folder:{tmp_path}', 'train').without((10,))


def test_numbers_are_names_of_classes_in_every_field_that_names_some(tmp_path):
  """From the config on, as in a job."""
  tree(tmp_path, *(f'{k}/' for k in range(4)))
  config = default.get_config()
  config.target.update({'name': f'folder:{tmp_path}', 'test': '', 'without': (3,)})
  config.noise.update({'kind': 'asymmetric', 'rate': 1.0, 'map': ((0, 1), ('2', 0))})
  settings.check_fields(config)
  splits, true_labels, _ = noise.add(noise.NoiseSettings.from_config(config.noise), 0,
                                      open_splits(SplitSettings.from_config(config.target), '', seed=0))
  assert splits.train.class_names == ('0', '1', '2')
  assert set(zip(true_labels.tolist(), splits.train.labels.tolist())) == {(0, 1), (1, 1), (2, 0)}


@pytest.fixture(scope='module')
def cases(shared, tmp_path_factory) -> pathlib.Path:
  """Small sets as people really have them, a README in each."""
  folder = tmp_path_factory.mktemp('cases')
  with tarfile.open(shared / 'data' / 'cases.tar.gz') as archive:
    archive.extractall(folder, filter='tar')  # links that lead out of it are one of the cases
  return next(folder.rglob('broken_links')).parent


@pytest.mark.parametrize('case,images', [
    ('broken_links/photos', 10), ('capital_splits/set', 6), ('class_called_test/docs', 15), ('csv_labels/photos', 4),
    ('hidden/photos', 6),
    ('nested_some/photos', 6), ('numeric/photos', 24), ('only_jfif/photos', 10), ('only_pgm/faces', 8),
    ('training_testing/set', 6)])
def test_cases_that_open(cases, case, images):
  assert len(open_set(f'folder:{cases / case}', 'train')) == images


@pytest.mark.parametrize('case,fields,words', [
    ('zip/pets.zip', {}, 'is an archive, not a folder; unpack it'),
    ('csv_labels/photos', {'test': ''}, 'classes are read from the names of folders'),
    ('class_called_test/docs', {}, 'test/ in it has images itself, .* use slices'),
    ('nfc_nfd/photos', {}, r"'caf\\xe9' in .* train is 'cafe\\u0301' in .* test; give the folder one name"),
    ('trailing_space/photos', {}, "'cat ' in .* train is 'cat' in .* test; give the folder one name")])
def test_cases_that_are_refused(cases, case, fields, words):
  with pytest.raises(ValueError, match=words) as caught:
    open_splits(target(cases / case, **fields), '', seed=0)
  assert '\n' not in str(caught.value)
