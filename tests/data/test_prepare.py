"""Sets are written from their published files by TFDS's builders, without TensorFlow; what is wrong is named."""

from collections.abc import Callable, Mapping, Sequence
import hashlib
from importlib import util
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tarfile
import types
import zipfile

import numpy as np
import PIL.Image
import pytest
import scipy.io
import tensorflow_datasets as tfds

from ft_jax.data import decode, open_set, prepare
from ft_jax.data import imagenet as imagenet_names
from ft_jax.data.prepare import download, originals, write

ROOT = pathlib.Path(__file__).parents[2]
Labels = dict[str, dict[str, str]]  # split -> digest of an image's bytes -> class


# --- tiny sets in the layouts that they are published in ---


class Photos:
  """Writes photographs that differ, and keeps which class each was of."""

  def __init__(self):
    from sklearn import datasets

    self.photos, self.rng, self.labels = datasets.load_sample_images().images, np.random.default_rng(0), {}

  def pixels(self) -> np.ndarray:
    y, x = self.rng.integers(300), self.rng.integers(500)
    return self.photos[self.rng.integers(2)][y:y + 40, x:x + 50]

  def write(self, path: pathlib.Path, split: str, name: str, form: str = 'JPEG') -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(self.pixels()).save(path, form)
    self.labels.setdefault(split, {})[key(path.read_bytes())] = name


def key(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def encoded(image: PIL.Image.Image, form: str) -> bytes:
  stream = io.BytesIO()
  image.save(stream, form)
  return stream.getvalue()


MASK = encoded(PIL.Image.new('L', (50, 40), 2), 'PNG')


def write_mask(path: pathlib.Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(MASK)


def write_text(path: pathlib.Path, lines: list[str]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(f'{line}\n' for line in lines))


def write_pets(folder: pathlib.Path) -> Labels:
  photos = Photos()
  for split, listed in (('train', 'trainval'), ('test', 'test')):
    lines = []
    for label, (breed, name) in enumerate((('Abyssinian', 'Abyssinian'), ('american_bulldog', 'american_bulldog')), 1):
      for k in range(3):
        file = f'{breed}_{k + 10 * label + (100 if split == "test" else 0)}'
        photos.write(folder / 'images' / f'{file}.jpg', split, name)
        write_mask(folder / 'annotations' / 'trimaps' / f'{file}.png')
        lines.append(f'{file} {label} {label} 1')
    write_text(folder / 'annotations' / f'{listed}.txt', lines)
  return photos.labels


def write_birds(folder: pathlib.Path) -> Labels:
  photos, lines = Photos(), []
  birds = (('001.Black_footed_Albatross', 'Black_Footed_Albatross', 'black_footed_albatross'),
           ('002.Laysan_Albatross', 'Laysan_Albatross', 'laysan_albatross'))
  for number, (directory, bird, label) in enumerate(birds):
    for k in range(4):
      file = f'{directory}/{bird}_{k:04d}_{number}{k}'
      photos.write(folder / 'CUB_200_2011' / 'images' / f'{file}.jpg', 'train' if k < 3 else 'test', label)
      write_mask(folder / 'segmentations' / f'{file}.png')
      lines.append((f'{file}.jpg', '1' if k < 3 else '0'))
  base = folder / 'CUB_200_2011'
  write_text(base / 'images.txt', [f'{i} {file}' for i, (file, _) in enumerate(lines, 1)])
  write_text(base / 'train_test_split.txt', [f'{i} {part}' for i, (_, part) in enumerate(lines, 1)])
  write_text(base / 'bounding_boxes.txt', [f'{i} 1.0 2.0 30.0 20.0' for i, _ in enumerate(lines, 1)])
  return photos.labels


def write_cars(folder: pathlib.Path) -> Labels:
  photos = Photos()
  names = ('AM General Hummer SUV 2000', 'Acura RL Sedan 2012', 'Acura TL Sedan 2012')
  fields = ('bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2', 'class', 'fname')
  for split, place in (('train', 'devkit/cars_train_annos.mat'), ('test', 'cars_test_annos_withlabels.mat')):
    rows = np.zeros((1, 6), [(field, object) for field in fields])
    for k in range(6):
      photos.write(folder / f'cars_{split}' / f'{k + 1:05d}.jpg', split, names[k % 3])
      rows[0, k] = (1, 2, 30, 20, k % 3 + 1, f'{k + 1:05d}.jpg')
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(folder / place, {'annotations': rows})
  return photos.labels


def write_aircraft(folder: pathlib.Path) -> Labels:
  photos, base = Photos(), folder / 'fgvc-aircraft-2013b' / 'data'
  variants = ['707-320', 'Boeing 717', 'F/A-18', *(f'A{k}' for k in range(97))]
  write_text(base / 'variants.txt', variants)
  for part, split, first in (('train', 'train', 1), ('val', 'validation', 2), ('test', 'test', 3)):
    files = {f'{1000 * first + k:07d}': variants[k % 4] for k in range(5)}
    for file, name in files.items():
      photos.write(base / 'images' / f'{file}.jpg', split, name)
    write_text(base / f'images_variant_{part}.txt', [f'{file} {name}' for file, name in files.items()])
  return photos.labels


def write_dogs(folder: pathlib.Path) -> Labels:
  photos, lists = Photos(), {'train': [], 'test': []}
  for k in range(120):
    breed = f'n020{k:05d}-Dog_{k}'
    for split in ('train', 'test') if k < 3 else ('train',):
      file = f'{breed}/{breed[:9]}_{k}{len(split)}'
      photos.write(folder / 'Images' / f'{file}.jpg', split, breed.lower())
      sides = ''.join(f'<{side}>{size}</{side}>' for side, size in
                      (('width', 50), ('height', 40), ('xmin', 1), ('ymin', 2), ('xmax', 30), ('ymax', 20)))
      write_text(folder / 'Annotation' / file, [f'<annotation>{sides}</annotation>'])
      lists[split].append(f'{file}.jpg')
  for split, files in lists.items():
    scipy.io.savemat(folder / f'{split}_list.mat', {'file_list': np.array(files, object)[:, None]})
  return photos.labels


def write_textures(folder: pathlib.Path) -> Labels:
  photos = Photos()
  for part, split in (('train1', 'train'), ('val1', 'validation'), ('test1', 'test')):
    files = [f'{name}/{name}_{part}{k}.jpg' for name in ('banded', 'zigzagged') for k in range(3)]
    for file in files:
      photos.write(folder / 'dtd' / 'images' / file, split, file.split('/')[0])
    write_text(folder / 'dtd' / 'labels' / f'{part}.txt', files)
  return photos.labels


def write_objects(folder: pathlib.Path) -> Labels:
  """Caltech-101: the random split is TFDS's, so all that is known is the class."""
  photos = Photos()
  for name in ('BACKGROUND_Google', 'accordion', 'airplanes'):
    for k in range(33):
      photos.write(folder / '101_ObjectCategories' / name / f'image_{k:04d}.jpg', 'all', name.lower())
  return photos.labels


SETS: dict[str, tuple[Callable[[pathlib.Path], Labels], dict[str, tuple[str, ...]]]] = {
    'oxford_iiit_pet': (write_pets, {'images.tar.gz': ('images',), 'annotations.tar.gz': ('annotations',)}),
    'caltech_birds2011': (write_birds, {'CUB_200_2011.tgz': ('CUB_200_2011',),
                                        'segmentations.tgz': ('segmentations',)}),
    'cars196': (write_cars, {'cars_train.tgz': ('cars_train',), 'cars_test.tgz': ('cars_test',),
                             'car_devkit.tgz': ('devkit',)}),
    'fgvc_aircraft': (write_aircraft, {'fgvc-aircraft-2013b.tar.gz': ('fgvc-aircraft-2013b',)}),
    'stanford_dogs': (write_dogs, {'images.tar': ('Images',), 'annotation.tar': ('Annotation',),
                                   'lists.tar': ('train_list.mat', 'test_list.mat')}),
    'dtd': (write_textures, {'dtd-r1.0.1.tar.gz': ('dtd',)}),
    'caltech101': (write_objects, {'caltech-101.zip': ('101_ObjectCategories',)}),
}


ID_FORMS = {
    'oxford_iiit_pet': r'train/[A-Za-z_]+_\d+.jpg', 'caltech_birds2011': r'train/CUB_200_2011/images/.+/.+.jpg',
    'cars196': r'train/\d{5}',
    'fgvc_aircraft': r'train/\d{7}.jpg', 'stanford_dogs': r'train/Images/n02.+/n02.+.jpg',
    'dtd': r'train/[a-z]+/[a-z]+_.+.jpg',
    'caltech101': r'train/[a-z_]+/image_\d{4}.jpg'}


def pack(folder: pathlib.Path, archives: Mapping[str, tuple[str, ...]], to: pathlib.Path) -> None:
  """Packs folders as they are published; what is in no archive is published as it is."""
  to.mkdir()
  packed = {member for members in archives.values() for member in members}
  for path in folder.iterdir():
    if path.name not in packed:
      path.rename(to / path.name)
  for archive, members in archives.items():
    inner = to / (archive if not archive.endswith('.zip') else '101_ObjectCategories.tar.gz')
    with tarfile.open(inner, 'w' if archive.endswith('.tar') else 'w:gz') as tar:
      for member in members:
        tar.add(folder / member, member)
    if archive.endswith('.zip'):
      with zipfile.ZipFile(to / archive, 'w') as outer:
        outer.write(inner, f'caltech-101/{inner.name}')
      inner.unlink()


def read_labels(name: str, data_dir: pathlib.Path, splits: list[str]) -> Labels:
  found = {}
  for split in splits:
    source = open_set(f'tfds:{name}', split, str(data_dir))
    found[split] = {key(example.image): source.class_names[example.label] for example in source}
    assert len(found[split]) == len(source)
  return found


def assert_alike(image: bytes, pixels: np.ndarray) -> None:
  """Equal but for JPEG, which halves the resolution of colours."""
  decoded = decode.decode(image, 'it').astype(int)
  assert np.abs(decoded - pixels).mean() < 10
  assert np.abs(decoded.mean((0, 1)) - pixels.mean((0, 1))).max() < 2  # in red, green and blue


@pytest.mark.parametrize('form', ['unpacked', 'packed'])
@pytest.mark.parametrize('name', SETS)
def test_from_published_files(name, form, tmp_path):
  """Every image is in its split and class with its bytes unchanged; nothing is written to the user's folder."""
  write, archives = SETS[name]
  given = tmp_path / 'given'
  labels = write(given)
  if form == 'packed':
    pack(given, archives, tmp_path / 'packed')
    given = tmp_path / 'packed'
  before = sorted(given.rglob('*'))
  prepare.prepare(f'tfds:{name}', str(tmp_path / 'data'), str(given))
  assert sorted(given.rglob('*')) == before
  found = read_labels(name, tmp_path / 'data', ['train', 'test'] if name == 'caltech101' else list(labels))
  if name == 'caltech101':
    assert [len(found[split]) for split in ('train', 'test')] == [90, 9]
    found = {'all': found['train'] | found['test']}
  assert found == labels
  assert 'tensorflow' not in sys.modules
  ids = open_set(f'tfds:{name}', 'train', str(tmp_path / 'data')).ids
  assert re.fullmatch(ID_FORMS[name], ids[0]), ids[0]  # the file, so that a drawn subset and a report name images


def test_images_that_tfds_re_encodes(tmp_path):
  """Twelve files of Pets are damaged or not JPEG; TFDS re-encodes them, here with Pillow. Others are unchanged."""
  write_pets(tmp_path / 'given')
  png = np.dstack([Photos().pixels(), np.full((40, 50), 255, np.uint8)])
  for listed, file in (('trainval', 'Abyssinian_5'), ('test', 'Egyptian_Mau_14')):
    PIL.Image.fromarray(png).save(tmp_path / 'given' / 'images' / f'{file}.jpg', 'PNG')
    write_mask(tmp_path / 'given' / 'annotations' / 'trimaps' / f'{file}.png')
    path = tmp_path / 'given' / 'annotations' / f'{listed}.txt'
    path.write_text(path.read_text() + f'{file} 1 1 1\n')
  prepare.prepare('tfds:oxford_iiit_pet', str(tmp_path / 'data'), str(tmp_path / 'given'))
  train = open_set('tfds:oxford_iiit_pet', 'train', str(tmp_path / 'data'))
  image = train[train.ids.tolist().index('train/Abyssinian_5.jpg')].image
  assert PIL.Image.open(io.BytesIO(image)).format == 'JPEG'
  assert_alike(image, png[..., :3])


def test_sun397(tmp_path):
  """The official partition; images of other formats become JPEG, and TFDS shrinks large ones."""
  photos, files = Photos(), {}
  for split, first in (('Training', 0), ('Testing', 4)):
    for k, form in enumerate(('JPEG', 'PNG', 'BMP', 'GIF'), first):
      files[f'/a/abbey/sun_{k}.jpg'] = split
      photos.write(tmp_path / 'given' / 'SUN397' / 'a' / 'abbey' / f'sun_{k}.jpg', split, 'abbey', form)
  for k in range(1, 11):
    for split in ('Training', 'Testing'):
      write_text(tmp_path / 'given' / f'{split}_{k:02d}.txt', [file for file, part in files.items() if part == split])
  prepare.prepare('tfds:sun397/standard-part1-120k', str(tmp_path / 'data'), str(tmp_path / 'given'))
  for split, listed in (('train', 'Training'), ('test', 'Testing')):
    source = open_set('tfds:sun397/standard-part1-120k', split, str(tmp_path / 'data'))
    assert set(source.ids) == {f'{split}/{file}' for file, part in files.items() if part == listed}
    for example in source:
      assert source.class_names[example.label] == '/a/abbey'
      with PIL.Image.open(tmp_path / 'given' / 'SUN397' / example.id.split('//')[1]) as original:
        assert_alike(example.image, np.asarray(original.convert('RGB')))


# --- the real images of Pets, Caltech-101 and ImageNet (Tiny-ImageNet's), packed as those are published ---


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
  member = tarfile.TarInfo(name)
  member.size = len(data)
  tar.addfile(member, io.BytesIO(data))


def tar_of(files: Mapping[str, bytes], path: pathlib.Path, mode: str = 'w') -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, mode) as tar:
    for name, data in files.items():
      add(tar, name, data)


def real_images(shared: pathlib.Path, name: str, most: int,
                classes: Sequence[str] = ()) -> dict[str, dict[str, dict[str, bytes]]]:
  """Split -> class -> file -> bytes: the first files of each class."""
  found = {'train': {}, 'test': {}}
  with tarfile.open(shared / 'data' / f'{name}.tar.gz') as tar:
    for member in tar:
      parts = member.name.split('/')
      if member.isfile() and len(parts) == 4 and (not classes or parts[2] in classes):
        files = found[parts[1]].setdefault(parts[2], {})
        if len(files) < most:
          files[parts[3]] = tar.extractfile(member).read()
  return found


@pytest.fixture(scope='module')
def pets_dir(shared, tmp_path_factory) -> pathlib.Path:
  """Oxford-IIIT Pets with two training and two test images of every breed, prepared."""
  folder = tmp_path_factory.mktemp('pets')
  labels = tfds.builder('oxford_iiit_pet', data_dir=folder / 'none').info.features['label'].names
  images, notes = {}, {}
  for split, listed in (('train', 'trainval'), ('test', 'test')):
    lines = []
    for breed, files in real_images(shared, 'pets', 2)[split].items():
      label = [name.lower() for name in labels].index(breed)
      for file, data in files.items():
        images[f'images/{file}'] = data
        notes[f'annotations/trimaps/{file[:-4]}.png'] = MASK
        lines.append(f'{file[:-4]} {label + 1} {1 if file[0].isupper() else 2} 1\n')
    notes[f'annotations/{listed}.txt'] = ''.join(lines).encode()
  tar_of(images, folder / 'files' / 'images.tar.gz', 'w:gz')
  tar_of(notes, folder / 'files' / 'annotations.tar.gz', 'w:gz')
  prepare.prepare('tfds:oxford_iiit_pet', str(folder / 'data'), str(folder / 'files'))
  return folder / 'data'


def test_real_pets(pets_dir):
  """TFDS's own builder on real images: both splits and all breeds, as the file names say."""
  for split in ('train', 'test'):
    source = open_set('tfds:oxford_iiit_pet', split, str(pets_dir))
    assert np.bincount(source.labels).tolist() == [2] * 37
    for example in source:
      file = example.id.removeprefix(f'{split}/')
      assert source.class_names[example.label].lower() == file.rsplit('_', 1)[0].lower()
      assert min(decode.decode(example.image, example.id).shape[:2]) == 128


@pytest.mark.slow
def test_the_pets_config_runs_on_prepared_pets(pets_dir, tmp_path):
  """`--config=configs/pets.py` with a prepared data_dir, made tiny: results.json has the test results."""
  values = {
      'data_dir': pets_dir, 'image_size': 32, 'source.name': '', 'selection.method': 'none', 'model.weights': '',
      'model.width': 4,
      'model.name': 'resnet18', 'target.val_fraction': 0.5, 'train.batch_size': 8, 'train.steps': 2}
  run = subprocess.run([sys.executable, 'main.py', '--config=configs/pets.py', f'--workdir={tmp_path / "run"}',
                        *(f'--config.{field}={value}' for field, value in values.items())],
                       # Compiling is most of it.
                       cwd=ROOT, env=os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}, capture_output=True,
                       text=True, check=False)
  assert run.returncode == 0, run.stderr
  results = json.loads((tmp_path / 'run' / 'results.json').read_text())
  assert results['test']['images'] == 74 and len(results['test']['per_class']) == 37


def test_real_caltech101(shared, tmp_path):
  """An archive in an archive; TFDS draws 30 images of each class for train, the same ones every time."""
  images = real_images(shared, 'caltech101', 30, ('accordion', 'faces_easy', 'wild_cat'))
  files, classes = {}, {}
  for split in images:
    for name, found in images[split].items():
      for file, data in found.items():
        files[f'101_ObjectCategories/{name.capitalize()}/{split}_{file}'] = data
        classes[key(data)] = name
  tar_of(files, tmp_path / '101_ObjectCategories.tar.gz', 'w:gz')
  (tmp_path / 'files').mkdir()
  with zipfile.ZipFile(tmp_path / 'files' / 'caltech-101.zip', 'w') as outer:
    outer.write(tmp_path / '101_ObjectCategories.tar.gz', 'caltech-101/101_ObjectCategories.tar.gz')
  drawn = []
  for place in ('one', 'two'):
    prepare.prepare('tfds:caltech101', str(tmp_path / place), str(tmp_path / 'files'))
    train, test = (open_set('tfds:caltech101', split, str(tmp_path / place)) for split in ('train', 'test'))
    assert np.bincount(train.labels)[np.unique(train.labels)].tolist() == [30] * 3
    assert {key(example.image): source.class_names[example.label] for source in (train, test)
            for example in source} == classes
    drawn.append([key(example.image) for example in train])
  assert drawn[0] == drawn[1]


WNIDS = ('n02123394', 'n02123045', 'n02124075', 'n01443537')  # not in the order of labels; Tiny-ImageNet has them


@pytest.fixture(scope='module')
def imagenet(shared, tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path, dict[str, str]]:
  """ImageNet of four classes: (folder of the two published archives, the usual folder, validation file -> WordNet
  id)."""
  root = tmp_path_factory.mktemp('imagenet')
  found = real_images(shared, 'tiny_imagenet', 6)
  train = {wnid: found['train'][name] for wnid in WNIDS for name in found['train'] if name.startswith(wnid)}
  assert len(train) == len(WNIDS)
  inner = {}
  for wnid, images in train.items():
    named = {f'{wnid}_{k}.JPEG': data for k, data in enumerate(images.values())}
    tar_of(named, root / 'inner' / f'{wnid}.tar')
    inner[f'{wnid}.tar'] = (root / 'inner' / f'{wnid}.tar').read_bytes()
    for file, data in named.items():
      (root / 'usual' / 'train' / wnid).mkdir(parents=True, exist_ok=True)
      (root / 'usual' / 'train' / wnid / file).write_bytes(data)
  tar_of(inner, root / 'files' / 'ILSVRC2012_img_train.tar')
  # TFDS gives the validation images, sorted by name, the labels of a list that it has; the order in the archive is
  # another.
  listed = tfds.core.tfds_path('datasets/imagenet2012/validation_labels.txt').read_text().split()
  images = [data for files in found['test'].values() for data in files.values()][:len(WNIDS) * 3]
  val = {f'ILSVRC2012_val_{k:08d}.JPEG': data for k, data in enumerate(images, 1)}
  wnids = dict(zip(val, listed))
  tar_of(dict(reversed(val.items())), root / 'files' / 'ILSVRC2012_img_val.tar')
  for file, data in val.items():
    (root / 'usual' / 'val' / wnids[file]).mkdir(parents=True, exist_ok=True)
    (root / 'usual' / 'val' / wnids[file] / file).write_bytes(data)
  return root / 'files', root / 'usual', wnids


def test_imagenet_from_its_archives_and_as_a_folder(imagenet, tmp_path):
  """The same images, class names and order both ways; the id of each image has its WordNet id."""
  files, usual, wnids = imagenet
  prepare.prepare('tfds:imagenet2012', str(tmp_path), str(files))
  stored, folder = open_set('tfds:imagenet2012', 'train', str(tmp_path)), open_set(f'folder:{usual}', 'train')
  assert len(stored.class_names) == 1000 and stored.class_names[0] == 'tench'
  assert folder.class_names == ('goldfish', 'tabby', 'Persian cat', 'Egyptian cat')
  named = [{key(example.image): (source.class_names[example.label], example.id.rsplit('/', 1)[1]) for example in source}
           for source in (stored, folder)]
  assert named[0] == named[1] and len(named[0]) == 24
  assert all(example.id.split('/')[-1].startswith(WNIDS) for example in stored)
  order = [stored.class_names.index(name) for name in folder.class_names]
  assert order == sorted(order)

  names = imagenet_names.names()
  stored, folder = open_set('tfds:imagenet2012', 'validation', str(tmp_path)), open_set(f'folder:{usual}', 'validation')
  for source in (stored, folder):
    assert {example.id.split('/')[-1]: source.class_names[example.label] for example in source} == {
        file: names[wnid] for file, wnid in wnids.items()}
  assert 'tensorflow' not in sys.modules


def test_imagenet_by_hand(imagenet, tmp_path):
  """One message says which files, how large, from where and to where; unpacked ImageNet is sent to `folder:`."""
  files, usual, _ = imagenet
  with pytest.raises(ValueError, match=r'(?s)by hand.*ILSVRC2012_img_train.tar \(147.9 GB\) and ILSVRC2012_img_val.tar '
                                       r'\(6.7 GB\)'
                                       r'.*Register at https://image-net.org.*downloads/manual'):
    prepare.prepare('imagenet2012', str(tmp_path))
  with pytest.raises(ValueError, match='the usual folder of ImageNet.*folder:'):
    prepare.prepare('imagenet2012', str(tmp_path), str(usual))
  manual = tmp_path / 'downloads' / 'manual'
  manual.mkdir(parents=True)
  for file in files.iterdir():
    (manual / file.name).write_bytes(file.read_bytes())
  prepare.prepare('imagenet2012', str(tmp_path))
  assert len(open_set('tfds:imagenet2012', 'train', str(tmp_path))) == 24
  path = manual / 'ILSVRC2012_img_train.tar'
  path.write_bytes(path.read_bytes()[:-10240])
  with pytest.raises(ValueError, match='ILSVRC2012_img_train.tar is damaged or cut short'):
    prepare.prepare('imagenet2012', str(tmp_path / 'other'), str(manual))


# --- what goes wrong ---


def run(arguments: list[str], code: str = '') -> subprocess.CompletedProcess:
  """The command, in a process of its own, with some code before it."""
  script = f'import sys; from ft_jax.data.prepare.__main__ import main\n{code}\nsys.argv[1:] = {arguments!r}; main()'
  return subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=False)


def test_killed_in_the_middle(tmp_path):
  """After a kill -9 while records are written, the next run starts clean; another one has nothing to do."""
  labels = write_aircraft(tmp_path / 'given')
  arguments = ['tfds:fgvc_aircraft', f'--data_dir={tmp_path / "data"}', f'--from={tmp_path / "given"}']
  die = '''
import os, signal
from ft_jax.data.prepare.builders.fgvc_aircraft import FgvcAircraft
whole = FgvcAircraft._generate_examples
def part(self, data, images_file):
  for k, example in enumerate(whole(self, data, images_file)):
    if images_file == 'images_variant_val.txt' and k == 2:
      os.kill(os.getpid(), signal.SIGKILL)
    yield example
FgvcAircraft._generate_examples = part
'''
  killed = run(arguments, die)
  assert killed.returncode == -signal.SIGKILL
  folder = tmp_path / 'data' / 'fgvc_aircraft'
  assert [path.name for path in folder.iterdir()] != ['1.0.0'] and not (folder / '1.0.0').exists()
  with pytest.raises(ValueError, match='is not prepared'):
    open_set('tfds:fgvc_aircraft', 'train', str(tmp_path / 'data'))
  again = run(arguments)
  assert again.returncode == 0, again.stderr
  assert 'removing what an interrupted run left' in again.stderr
  assert all(f'{split} 5' in again.stderr for split in labels)
  assert [path.name for path in folder.iterdir()] == ['1.0.0']
  assert read_labels('fgvc_aircraft', tmp_path / 'data', list(labels)) == labels
  once_more = run(arguments)
  assert 'exists already' in once_more.stderr and once_more.returncode == 0


@pytest.mark.parametrize('name,words', [
    ('folder:pets', 'folder:pets needs no preparation: .*target.name=folder:pets'),
    ('tfds:', 'the name of the set is empty; expected tfds:'),
    ('tfds:a/b/c', 'tfds:a/b/c: expected tfds:<name>.*, such as'),
    ('oxford_iiit_pet/foo', "the set has no config 'foo'; it has none: use tfds:oxford_iiit_pet[.] The sets"),
    ('sun397/foo:4.0.0', "the set has no config 'foo'; known: tfds, standard-part1-120k, .*standard-part10-120k[.] The "
                         "sets"),
    ('dtd:9.9.9', 'tfds:dtd:9.9.9: Dataset dtd cannot be loaded at version 9.9.9')])
def test_a_wrong_name_is_one_whole_sentence(name, words, tmp_path):
  with pytest.raises(ValueError, match=words) as raised:
    prepare.prepare(name, str(tmp_path))
  assert '\n' not in str(raised.value) and 'builder_kwargs' not in str(raised.value)


@pytest.mark.parametrize('data,words', [
    (b'', 'is empty .0 bytes.: get it again'), (b'<html>moved</html>', 'damaged or cut short .*; 18 bytes')])
def test_what_is_no_archive_is_one_line(data, words, tmp_path):
  """tarfile itself has a line for every compression that it tried."""
  for archive in ('images.tar.gz', 'annotations.tar.gz'):
    (tmp_path / archive).write_bytes(data)
  with pytest.raises(ValueError, match=words) as raised:
    prepare.prepare('oxford_iiit_pet', str(tmp_path / 'data'), str(tmp_path))
  assert '\n' not in str(raised.value)


def test_two_at_a_time_are_refused(tmp_path):
  write_aircraft(tmp_path / 'given')
  builder = tfds.builder_cls('dtd')(data_dir=tmp_path / 'data')
  refused = pytest.raises(ValueError, match='another process is preparing tfds:dtd')
  with write._locked(builder, tmp_path / 'data'), refused:
    prepare.prepare('dtd', str(tmp_path / 'data'), str(tmp_path / 'given'))


def test_a_folder_without_the_files_is_named(tmp_path):
  """What was looked for, what is there, and where the file is published; other errors name the set."""
  (tmp_path / 'given' / 'holiday').mkdir(parents=True)
  with pytest.raises(ValueError, match=r'have neither annotations.tar.gz nor annotations. There is: holiday. '
                                       r'.*thor.robots.ox.ac.uk'):
    prepare.prepare('oxford_iiit_pet', str(tmp_path / 'data'), str(tmp_path / 'given'))
  with pytest.raises(ValueError, match='there is no folder .*nowhere; expected one with .*images.tar.gz and '
                                       'annotations.tar.gz'):
    prepare.prepare('oxford_iiit_pet', str(tmp_path / 'data'), str(tmp_path / 'nowhere'))
  write_pets(tmp_path / 'given')
  (tmp_path / 'given' / 'images' / 'Abyssinian_11.jpg').unlink()
  with pytest.raises(ValueError, match='tfds:oxford_iiit_pet cannot be written from '
                                       '.*FileNotFoundError.*Abyssinian_11.jpg'):
    prepare.prepare('oxford_iiit_pet', str(tmp_path / 'data'), str(tmp_path / 'given'))
  assert not list((tmp_path / 'data' / 'oxford_iiit_pet').glob('*'))


@pytest.mark.parametrize('name,archive,keep', [
    ('oxford_iiit_pet', 'images.tar.gz', 0.6), ('stanford_dogs', 'images.tar', 0.5),
    ('stanford_dogs', 'lists.tar', 0.2),
    ('caltech101', 'caltech-101.zip', 0.7)])
def test_an_archive_that_is_cut_short_is_named(name, archive, keep, tmp_path):
  """gzip notices by itself; a plain tar that ends between two files would pass as complete."""
  write, archives = SETS[name]
  write(tmp_path / 'given')
  pack(tmp_path / 'given', archives, tmp_path / 'packed')
  path = tmp_path / 'packed' / archive
  data = path.read_bytes()
  size = int(len(data) * keep)
  if archive == 'images.tar':  # at the end of a file in it
    with tarfile.open(path) as tar:
      member = [member for member in tar if member.isfile()][60]
      size = member.offset_data + -(-member.size // 512) * 512
  path.write_bytes(data[:size])
  with pytest.raises(ValueError, match=rf'{archive} is (damaged or )?cut short'):
    prepare.prepare(name, str(tmp_path / 'data'), str(tmp_path / 'packed'))


def test_a_link_that_does_not_answer(tmp_path, monkeypatch):
  """One request, no minutes of retries; the message says what failed, what is known of it, and what to do."""
  import requests

  class Answer(io.BytesIO):
    status_code, reason = 404, 'Not Found'

  monkeypatch.setattr(requests, 'get', lambda *_, **__: Answer())
  with pytest.raises(ValueError, match=r'(?s)jkrause.* answers 404 Not Found.*Known: the pages of Stanford Cars answer '
                                       r'404 since 2023'
                                       r'.*cars_test_annos_withlabels.mat.*--from=FOLDER'):
    prepare.prepare('cars196', str(tmp_path))

  def unreachable(*_, **__):
    raise requests.ConnectionError('no route')
  monkeypatch.setattr(requests, 'get', unreachable)
  with pytest.raises(ValueError, match='dtd-r1.0.1.tar.gz does not answer .*is there a network'):
    prepare.prepare('dtd', str(tmp_path))


def test_a_download_of_something_else(tmp_path, monkeypatch):
  """A web page instead of the archive: TFDS's checksum notices, and the message says what to do by hand."""
  import requests

  monkeypatch.setattr(originals, 'check_address', lambda url: None)
  page = requests.Response()
  page.status_code, page.url, page.raw = 200, 'https://x.org/dtd-r1.0.1.tar.gz', io.BytesIO(b'<html>moved</html>')
  monkeypatch.setattr(requests.Session, 'get', lambda *_, **__: page)
  with pytest.raises(ValueError, match=r'(?s)tfds:dtd: the download failed: .*dtd-r1.0.1.tar.gz.*wrong '
                                       r'checksum.*--from=FOLDER'):
    prepare.prepare('dtd', str(tmp_path))


@pytest.mark.skipif(util.find_spec('tensorflow') is not None, reason='TensorFlow is installed')
def test_a_builder_that_needs_more_of_tensorflow(tmp_path, monkeypatch):
  """What is not replaced comes from TensorFlow; if that is missing, the message names the package."""
  from tensorflow_datasets.datasets.oxford_iiit_pet import oxford_iiit_pet_dataset_builder as pets

  write_pets(tmp_path / 'given')
  monkeypatch.setattr(pets.Builder, '_generate_examples', lambda self, **_: iter(pets.tf.strings.split('a b')))
  with pytest.raises(ValueError, match='TFDS needs tensorflow to write tfds:oxford_iiit_pet; for this step alone: pip '
                                       'install tensorflow'):
    prepare.prepare('oxford_iiit_pet', str(tmp_path / 'data'), str(tmp_path / 'given'))


def test_no_room(tmp_path, monkeypatch):
  """Refused before anything is downloaded."""
  monkeypatch.setattr(originals, 'check_address', lambda url: None)
  monkeypatch.setattr(download.shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=10**9))
  with pytest.raises(ValueError, match='625 MB to download.* take about 1.9 GB, .* 1.0 GB free'):
    prepare.prepare('dtd', str(tmp_path))


def test_a_download(tmp_path, monkeypatch):
  """TFDS's own download from a server on this machine, written without TensorFlow; not downloaded twice."""
  import functools
  import http.server
  import threading

  from ft_jax.data.prepare.builders import fgvc_aircraft

  labels = write_aircraft(tmp_path / 'given')
  pack(tmp_path / 'given', SETS['fgvc_aircraft'][1], tmp_path / 'packed')
  asked = []
  monkeypatch.setenv('NO_PROXY', '*')

  class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
      asked.append(self.path)

  handler = functools.partial(Handler, directory=tmp_path / 'packed')
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fgvc_aircraft, 'URL', f'http://127.0.0.1:{server.server_port}/fgvc-aircraft-2013b.tar.gz')
    prepare.prepare('fgvc_aircraft', str(tmp_path / 'data'))
    server.shutdown()
  assert len(asked) == 2  # does it answer, and the file
  assert read_labels('fgvc_aircraft', tmp_path / 'data', list(labels)) == labels
  os.rename(tmp_path / 'data' / 'fgvc_aircraft', tmp_path / 'moved')
  prepare.prepare('fgvc_aircraft', str(tmp_path / 'data'))  # the server is gone; the file is there
  assert read_labels('fgvc_aircraft', tmp_path / 'data', list(labels)) == labels
