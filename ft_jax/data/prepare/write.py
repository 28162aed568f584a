"""Writes a set with TFDS's builder, without TensorFlow; one process at a time."""

from collections.abc import Iterable, Iterator
import contextlib
import fcntl
import io
import os
import pathlib
import shutil
import sys
import time
from typing import Any

import tensorflow_datasets as tfds

from ft_jax import progress
from ft_jax.data import BACKENDS
from ft_jax.data.prepare.archives import check_archive, in_bytes
from ft_jax.data.prepare.download import check_room, DownloadFailed
from ft_jax.data.prepare.originals import Originals
from ft_jax.data.prepare.published_sets import files_of, how_to_get_by_hand, IMAGENET_FILES, SETS
from ft_jax.data.prepare.without_tensorflow import without_tensorflow
from ft_jax.data.tfds import missing_package, tfds_builder


def prepare(name: str, data_dir: str = '', originals_dir: str = '') -> str:
  """Downloads and writes a set, unless it exists already.

  Args:
    name: `<name>[/config][:version]`, with or without `tfds:` in front.
    data_dir: the folder of sets; '' is TFDS's own.
    originals_dir: a folder with the files that the set is published as, packed or unpacked; '' downloads them.

  Returns:
    The folder of the set.

  Raises:
    ValueError: TFDS does not know the set, it exists in another format, or it cannot be written; if files have to be
      fetched by hand, the message says which and where to put them.
  """
  name = name.removeprefix('tfds:')
  kind, _, rest = name.partition(':')
  if kind in BACKENDS:
    raise ValueError(f'{name} needs no preparation: it is read as it is, with target.name={kind}:{rest or "..."} '
                     'or source.name=...')
  if not name:
    raise ValueError('the name of the set is empty; expected tfds:<name>[/config][:version], such as '
                     'tfds:oxford_iiit_pet')
  builder = tfds_builder(name, data_dir)
  if builder.is_prepared():
    file_format = builder.info.file_format.value
    if file_format != 'array_record':
      raise ValueError(f'{builder.data_dir} has tfds:{name} as {file_format}; move that folder away, or give '
                       'another --data_dir')
    progress.log.info('tfds:%s exists already: %s', name, _counts(builder))
    return str(builder.data_dir)
  root = pathlib.Path(os.path.expanduser(builder.data_dir_root))
  if pathlib.Path(builder.data_dir).exists():
    raise ValueError(f'{builder.data_dir} exists, but the set in it is not complete; move that folder away '
                     'and start again')
  folder = pathlib.Path(os.path.expanduser(originals_dir)) if originals_dir else None
  if folder and not folder.is_dir():
    raise ValueError(f'--from: there is no folder {folder}; expected one with the files of tfds:{name}: '
                     f'{files_of(builder.name)}')
  manual_dir = folder or root / 'downloads' / 'manual'
  if builder.name == 'imagenet2012':
    _check_imagenet(manual_dir, root)
  start = time.monotonic()
  with _locked(builder, root):
    _write(builder, name, folder, manual_dir, root)
  progress.log.info('written in %.0f s: %s', time.monotonic() - start, _counts(builder))
  _compare_counts(builder)
  _log_leftovers((root / 'downloads' / builder.name, root / 'downloads' / 'extracted' / builder.name))
  return str(builder.data_dir)


def _write(builder: Any, name: str, folder: pathlib.Path | None, manual_dir: pathlib.Path, root: pathlib.Path) -> None:
  """Runs TFDS's builder on files that are downloaded or given; the message of every error names the set."""
  manager = Originals(folder, root / 'downloads', manual_dir, builder)
  builder._make_download_manager = lambda **_: manager  # TFDS offers no other way to use one's own
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  progress.log.info('preparing tfds:%s %s', name, f'from {folder}' if folder else f'in {root}')
  try:
    # TFDS prints a line with sizes that it does not know; its progress bars are on stderr.
    with without_tensorflow(), contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  except DownloadFailed as error:
    raise ValueError(f'tfds:{name}: {error}\n{how_to_get_by_hand(builder.name, name)}') from error
  except ImportError as error:
    package = missing_package(error)
    raise ValueError(f'TFDS needs {package} to write tfds:{name}; for this step alone: pip install {package} '
                     '(it is not needed to read the set)') from error
  except Exception as error:  # if something is missing in the folder, a builder fails in any way
    reason = str(error).strip() or type(error).__name__
    kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
    where = f' from {folder}' if folder else ''
    raise ValueError(f'tfds:{name} cannot be written{where}: {kind}{reason}') from error
  finally:
    manager.close()


@contextlib.contextmanager
def _locked(builder: Any, root: pathlib.Path) -> Iterator[None]:
  """One process at a time writes a set; what an interrupted one left is removed."""
  downloads = root / 'downloads'
  try:
    downloads.mkdir(parents=True, exist_ok=True)
    lock = open(downloads / f'{builder.name}.lock', 'w')  # the system releases it however the process ends
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
  """Raises ValueError with what to do by hand, unless both archives are in the folder."""
  if (folder / 'train').is_dir() and not (folder / 'ILSVRC2012_img_train.tar').is_file():
    raise ValueError(f'{folder} is the usual folder of ImageNet, unpacked: it needs no preparation; use '
                     f'source.name=folder:{folder} (train and val, one folder per WordNet id)')
  missing = [f'{name} ({size / 1e9:.1f} GB)' for name, size in IMAGENET_FILES.items() if not (folder / name).is_file()]
  if missing:
    raise ValueError(
        f'ImageNet has to be downloaded by hand. Missing in {folder}: {" and ".join(missing)}.\n'
        'Register at https://image-net.org, get the ILSVRC 2012 training and validation images (tasks 1 and 2) from '
        'https://image-net.org/challenges/LSVRC/2012/2012-downloads.php, put both files, not unpacked, into\n'
        f'  {root / "downloads" / "manual"}\nor give their folder with --from, and run this again. '
        'Unpacked ImageNet (train/<wnid>/*.JPEG) needs no preparation: use folder:<path> instead of tfds:imagenet2012.')
  for name, size in IMAGENET_FILES.items():
    check_archive(folder / name, size)
  # TFDS writes the records twice: as they come, then shuffled.
  check_room(root, 2 * sum((folder / name).stat().st_size for name in IMAGENET_FILES), 'writing ImageNet')


def _counts(builder: Any) -> str:
  splits = ', '.join(f'{split} {info.num_examples:,d}' for split, info in builder.info.splits.items())
  return f'{builder.data_dir} ({splits} images; {builder.info.dataset_size})'


def _compare_counts(builder: Any) -> None:
  """Warns of a set with another number of images than the published one."""
  known = SETS.get(builder.name)
  images = sum(info.num_examples for info in builder.info.splits.values())
  if known and known.images and images not in known.images:
    progress.log.warning('the published set has %s images, this one %s: is something missing?',
                         ' or '.join(f'{count:,d}' for count in known.images), f'{images:,d}')


def _log_leftovers(folders: Iterable[pathlib.Path]) -> None:
  for folder in folders:
    size = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
    if size:
      progress.log.info('no longer needed: %s (%s)', folder, in_bytes(size))
