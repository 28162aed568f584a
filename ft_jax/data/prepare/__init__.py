"""Writes a TFDS set as ArrayRecord, which is read without TensorFlow:

    python -m ft_jax.data.prepare tfds:oxford_iiit_pet --data_dir=/data/tfds
    python -m ft_jax.data.prepare tfds:cars196 --from=/downloads/stanford_cars --data_dir=/data/tfds

The files are downloaded, or taken from a folder that holds them as they are published: the archives, or what is in them.
A set that is there already is left as it is, and an interrupted run is simply started again. See docs/data.md.
"""

import argparse
from collections.abc import Iterable, Iterator
import contextlib
import fcntl
import io
import logging
import os
import pathlib
import shutil
import sys
import time
from typing import Any, NamedTuple

from ft_jax import progress
from ft_jax.data import BACKENDS
from ft_jax.data.tfds import missing_package, tfds_builder

IMAGENET_FILES = {'ILSVRC2012_img_train.tar': 147_897_477_120, 'ILSVRC2012_img_val.tar': 6_744_924_160}  # bytes


class Known(NamedTuple):
  """What is known of a published set.

  Attributes:
    images: how many it has, over all splits; several numbers where its configs differ, none where it is not known.
    files: what to get by hand, and from where.
    dead: why its public link is not expected to work; '' where it is.
  """
  images: tuple[int, ...]
  files: str
  dead: str = ''


def prepare(name: str, data_dir: str = '', originals_dir: str = '') -> str:
  """Downloads and writes a set; nothing is done where it is there already.

  Args:
    name: `<name>[/config][:version]`, with or without `tfds:` in front.
    data_dir: where sets lie; '' is TFDS's own place.
    originals_dir: a folder with the files that the set is published as, packed or unpacked; '' downloads them.

  Returns:
    The folder that it lies in.

  Raises:
    ValueError: a set that TFDS does not know, that lies there in another form, or that cannot be made here; what to get by
      hand and where to put it, if that is why.
  """
  name = name.removeprefix('tfds:')
  kind, _, rest = name.partition(':')
  if kind in BACKENDS:
    raise ValueError(f'{name} needs no preparation: it is read as it is, with target.name={kind}:{rest or "..."} or source.name=...')
  if not name:
    raise ValueError('the name of the set is empty; expected tfds:<name>[/config][:version], such as tfds:oxford_iiit_pet')
  builder = tfds_builder(name, data_dir)
  if builder.is_prepared():
    form = builder.info.file_format.value
    if form != 'array_record':
      raise ValueError(f'{builder.data_dir} holds tfds:{name} as {form}; move that folder away, or give another --data_dir')
    progress.log.info('tfds:%s is there already: %s', name, _counts(builder))
    return str(builder.data_dir)
  root = pathlib.Path(os.path.expanduser(builder.data_dir_root))
  if pathlib.Path(builder.data_dir).exists():
    raise ValueError(f'{builder.data_dir} is there, but holds no whole set; move that folder away and start again')
  folder = pathlib.Path(os.path.expanduser(originals_dir)) if originals_dir else None
  if folder and not folder.is_dir():
    raise ValueError(f'--from: there is no folder {folder}; expected one with the files of tfds:{name}: {_files(builder.name)}')
  manual_dir = folder or root / 'downloads' / 'manual'
  if builder.name == 'imagenet2012':
    _check_imagenet(manual_dir, root)
  start = time.monotonic()
  with _alone(builder, root):
    _write(builder, name, folder, manual_dir, root)
  progress.log.info('written in %.0f s: %s', time.monotonic() - start, _counts(builder))
  _compare_counts(builder)
  _name_leftovers((root / 'downloads' / builder.name, root / 'downloads' / 'extracted' / builder.name))
  return str(builder.data_dir)


def _write(builder: Any, name: str, folder: pathlib.Path | None, manual_dir: pathlib.Path, root: pathlib.Path) -> None:
  """Runs TFDS's builder on files that are downloaded or given; every failure names the set."""
  import tensorflow_datasets as tfds

  from ft_jax.data.prepare import originals, without_tensorflow

  manager = originals.Originals(folder, root / 'downloads', manual_dir, builder)
  builder._make_download_manager = lambda **_: manager  # the only way into TFDS for another one
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  progress.log.info('preparing tfds:%s %s', name, f'from {folder}' if folder else f'in {root}')
  try:
    # TFDS prints a headline of sizes that it does not know; its bars are on stderr.
    with without_tensorflow.without_tensorflow(), contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  except originals.DownloadFailed as error:
    raise ValueError(f'tfds:{name}: {error}\n{_by_hand(builder.name, name)}') from error
  except ImportError as error:
    package = missing_package(error)
    raise ValueError(f'TFDS needs {package} to write tfds:{name}; for this one step: pip install {package} '
                     '(it is not needed to read the set)') from error
  except Exception as error:  # a builder fails on a folder with something missing in whatever way it happens to
    reason = str(error).strip() or type(error).__name__
    kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
    where = f' from {folder}' if folder else ''
    raise ValueError(f'tfds:{name} cannot be made{where}: {kind}{reason}') from error
  finally:
    manager.close()


@contextlib.contextmanager
def _alone(builder: Any, root: pathlib.Path) -> Iterator[None]:
  """One process at a time writes a set; what an interrupted one left is removed."""
  downloads = root / 'downloads'
  try:
    downloads.mkdir(parents=True, exist_ok=True)
    lock = open(downloads / f'{builder.name}.lock', 'w')  # the system lets go of it when the process ends, however it ends
  except OSError as error:
    raise ValueError(f'{downloads} cannot be written to ({error.strerror}); give another --data_dir') from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise ValueError(f'another process is preparing tfds:{builder.name} in {root}; wait for it') from error
    folder = pathlib.Path(builder.data_dir)
    for stale in (*folder.parent.glob(f'incomplete.*_{folder.name}'), *(downloads / builder.name).glob('*.tmp.*')):
      progress.log.info('removing what an interrupted run left: %s', stale)
      shutil.rmtree(stale)
    yield


def _check_imagenet(folder: pathlib.Path, root: pathlib.Path) -> None:
  """Raises with what to do by hand, unless both archives are in the folder."""
  if (folder / 'train').is_dir() and not (folder / 'ILSVRC2012_img_train.tar').is_file():
    raise ValueError(f'{folder} is the usual folder of ImageNet, unpacked: it needs no preparation; use '
                     f'source.name=folder:{folder} (train and val, a folder for each WordNet id)')
  missing = [f'{name} ({size / 1e9:.1f} GB)' for name, size in IMAGENET_FILES.items() if not (folder / name).is_file()]
  if missing:
    raise ValueError(
        f'ImageNet has to be downloaded by hand. Missing in {folder}: {" and ".join(missing)}.\n'
        f'Register at https://image-net.org, get the ILSVRC 2012 training and validation images (tasks 1 and 2) from '
        f'https://image-net.org/challenges/LSVRC/2012/2012-downloads.php, put both files, not unpacked, into\n'
        f'  {root / "downloads" / "manual"}\nor name their folder with --from, and run this again. '
        'Unpacked ImageNet (train/<wnid>/*.JPEG) needs no preparation: use folder:<path> instead of tfds:imagenet2012.')
  from ft_jax.data.prepare import originals

  for name, size in IMAGENET_FILES.items():
    originals.check_archive(folder / name, size)
  # TFDS writes the records twice: as they come, then shuffled.
  originals.check_room(root, 2 * sum((folder / name).stat().st_size for name in IMAGENET_FILES), 'writing ImageNet')


def _by_hand(set_name: str, name: str) -> str:
  known = SETS.get(set_name)
  dead = f'Known: {known.dead}. ' if known and known.dead else ''
  return (f'{dead}If you have or get the files otherwise ({_files(set_name)}), packed or unpacked, name their folder:\n'
          f'  python -m ft_jax.data.prepare tfds:{name} --from=FOLDER --data_dir=...')


def _files(set_name: str) -> str:
  return SETS[set_name].files if set_name in SETS else "the archives under their published names"


def _counts(builder: Any) -> str:
  splits = ', '.join(f'{split} {info.num_examples:,d}' for split, info in builder.info.splits.items())
  return f'{builder.data_dir} ({splits} images; {builder.info.dataset_size})'


def _compare_counts(builder: Any) -> None:
  known = SETS.get(builder.name)
  images = sum(info.num_examples for info in builder.info.splits.values())
  if known and known.images and images not in known.images:
    progress.log.warning('the published set has %s images, this one %s: is something missing?',
                         ' or '.join(f'{count:,d}' for count in known.images), f'{images:,d}')


def _name_leftovers(folders: Iterable[pathlib.Path]) -> None:
  from ft_jax.data.prepare import originals

  for folder in folders:
    size = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
    if size:
      progress.log.info('not needed any more: %s (%s)', folder, originals.in_bytes(size))


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('name', help='tfds:<name>[/config][:version]')
  parser.add_argument('--data_dir', default='', help="where TFDS sets lie (default: TFDS's own, ~/tensorflow_datasets)")
  parser.add_argument('--from', default='', dest='originals_dir', metavar='FOLDER',
                      help="a folder with the set's own files, packed or unpacked; nothing is downloaded then")
  arguments = parser.parse_args()
  progress.show_log()
  logging.getLogger('absl').setLevel(logging.ERROR)  # TFDS warns of each folder that is not there yet
  try:
    print(f'prepared: {prepare(arguments.name, arguments.data_dir, arguments.originals_dir)}')
  except ValueError as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    sys.exit('interrupted; run the same command again')


# What is known of the sets of the paper, by their TFDS names. Images as TFDS 4.9 writes them; docs/data.md has the rest.
SETS: dict[str, Known] = {
    'oxford_iiit_pet': Known((7_349,), 'images.tar.gz and annotations.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/pets/'),
    'caltech_birds2011': Known((11_788,), 'CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 and segmentations.tgz '
                               'from https://data.caltech.edu/records/w9d68-gec53'),
    'cars196': Known((16_185,), 'cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat',
                     'the pages of Stanford Cars answer 404 since 2023'),
    'fgvc_aircraft': Known((10_000,), 'fgvc-aircraft-2013b.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/'),
    'stanford_dogs': Known((20_580,), 'images.tar, annotation.tar and lists.tar from http://vision.stanford.edu/aditya86/ImageNetDogs/'),
    'caltech101': Known((), 'caltech-101.zip from https://data.caltech.edu/records/mzrjq-6wc02'),
    'dtd': Known((5_640,), 'dtd-r1.0.1.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/dtd/'),
    'sun397': Known((108_753, 108_752, 39_700), 'SUN397.tar.gz and Partitions.zip',
                    'the archive of SUN397 in Princeton answers 404 since 2025'),
    'imagenet2012': Known((1_331_167, 1_431_167), ' and '.join(IMAGENET_FILES) + ' from https://image-net.org'),
}
