"""Back-end for TFDS sets, `tfds:<name>[/config][:version]`: stored as ArrayRecord, and read without TensorFlow."""

from collections.abc import Callable, Iterator, Sequence
import glob
import os
import re
import shlex
from typing import Any

from etils import epath
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming

from ft_jax import progress
from ft_jax.data import contents, imagenet
from ft_jax.data.disk_cache import cached_arrays
from ft_jax.data.image_set import digest, ImageSet
from ft_jax.user_cache import home_directory
from selection.storage import located

# How many records are read at a time.
_CHUNK = 512


def open_tfds(name: str, split: str, data_dir: str) -> ImageSet:
  """Opens a split of a prepared set; arguments as of `ft_jax.data.open_set`.

  Raises:
    ValueError: the set is not known, not prepared or not stored as ArrayRecord, has no image and label, or has no such
      split.
  """
  builder = tfds_builder(name, data_dir)
  command = prepare_command(name, data_dir)
  if not builder.is_prepared():
    raise ValueError(f'tfds:{name} is not prepared in {builder.data_dir}; prepare it with: {command}')
  if builder.info.file_format not in (tfds.core.FileFormat.ARRAY_RECORD, None):
    raise ValueError(f'tfds:{name} is stored as {builder.info.file_format.value} in {builder.data_dir}, which has no '
                     'random access; write it as ArrayRecord (to another data_dir, or after moving that folder away) '
                     f'with: {command}')
  features = builder.info.features
  if not {'image', 'label'} <= set(features):
    raise ValueError(f'tfds:{name} has the features {", ".join(features)}; expected image and label')
  try:
    info = builder.info.splits[split]
  except (ValueError, KeyError) as error:  # TFDS's own message has several lines
    raise ValueError(f'tfds:{name} has no split {split!r}; it has {", ".join(builder.info.splits)}, '
                     'with slices such as train[:90%] and sums such as train+test') from error
  if not info.num_examples:
    raise ValueError(f'tfds:{name}: split {split!r} has no images; the slice is empty')
  store = builder.as_data_source(split, decoders=_undecoded(features))
  full_name, class_names = builder.info.full_name, imagenet.human_names(_class_names(builder))
  labels, ids, hashes = _records(store, full_name, split, info.file_instructions, class_names)
  legacy_fingerprint = digest(full_name, '\n'.join(ids), labels.tobytes(), *class_names)
  return ImageSet(
      f'tfds:{full_name} {split}', class_names, labels, ids, np.arange(len(store)),
      read=lambda row: store[row]['image'],
      fingerprint=digest(legacy_fingerprint, hashes.tobytes()),
      contents=hashes,
      legacy_fingerprint=legacy_fingerprint)


def prepare_command(name: str, data_dir: str) -> str:
  """The shell command that writes a TFDS set in the form that is read here."""
  return f'python -m ft_jax.data.prepare tfds:{name}' + (f' --data_dir={shlex.quote(data_dir)}' if data_dir else '')


# --- builders ---


def tfds_builder(name: str, data_dir: str) -> Any:
  """TFDS's builder of `name[/config][:version]`. It writes ArrayRecord, unless the set exists in another format.

  Raises:
    ValueError: no set of that name, a package that its builder needs is missing, or `data_dir` cannot be used.
  """
  directory = _tfds_folder(data_dir)
  set_name = re.split('[/:]', name)[0]
  if set_name in BUILDERS:
    BUILDERS[set_name]()
  try:
    builder = tfds.builder(name, data_dir=directory)
    # A set that exists keeps its format, so that a wrong one can be named; a new one is written with random access.
    return builder if builder.is_prepared() else tfds.builder(name, data_dir=directory, file_format='array_record')
  except ImportError as error:
    package = missing_package(error)
    raise ValueError(f'TFDS needs {package} for tfds:{name}: pip install {package}') from error
  except (tfds.core.registered.DatasetNotFoundError, AssertionError, ValueError) as error:
    raise ValueError(f'tfds:{name}: {_reason(name, error)} The sets are listed at '
                     'https://www.tensorflow.org/datasets/catalog; a set of your own must be prepared in data_dir '
                     f'(now {data_dir or "~/tensorflow_datasets"})') from None


def _tfds_folder(data_dir: str) -> epath.Path | None:
  """The folder of TFDS sets; None stands for TFDS's own.

  Raises:
    ValueError: TFDS or array_record would misread the name, or there is no home directory for TFDS's own folder.
  """
  if not data_dir:
    if home_directory() is None and not os.environ.get('TFDS_DATA_DIR'):
      raise ValueError('there is no home directory for ~/tensorflow_datasets; give the folder of TFDS sets: '
                       '--config.data_dir=... (for ft_jax.data.prepare: --data_dir=...)')
    return None
  folder = located(data_dir)
  name = os.fspath(folder)
  if name.encode(errors='replace').decode() != name:
    problem = 'has bytes that are not UTF-8, which array_record refuses'
  elif glob.has_magic(name):
    problem = 'contains *, ? or [, which TFDS reads as a pattern'
  else:
    return folder
  raise ValueError(f'data_dir is {data_dir!r}, which {problem}; give another folder, or a path through a symbolic link')


def _reason(name: str, error: Exception) -> str:
  """Why TFDS refuses a name, in one sentence; its own message lists several hundred names, is cut off, or is empty."""
  reason = (str(error).strip() or 'there is no such set, config or version.').splitlines()[0]
  if reason.startswith('Parsing builder name string'):
    return ('expected tfds:<name>[/config][:version], such as tfds:oxford_iiit_pet or '
            'tfds:sun397/standard-part1-120k:4.0.0.')
  if re.search(r'BuilderConfig .* not found', reason):
    set_name, config = re.split('[/:]', name)[:2]
    known = [known.name for known in tfds.builder_cls(set_name).BUILDER_CONFIGS]
    hint = f'known: {", ".join(known)}.' if known else f'it has none: use tfds:{set_name}.'
    return f'the set has no config {config!r}; {hint}'
  return re.sub(r'^Failed to construct dataset .*?}": ', '', reason)


def missing_package(error: ImportError) -> str:
  """The package that could not be imported; TFDS wraps the error that names it in another one."""
  cause = error.__cause__
  return error.name or (cause.name if isinstance(cause, ImportError) else None) or 'another package'


def _import_fgvc_aircraft() -> None:
  from ft_jax.data.prepare.builders import fgvc_aircraft  # noqa: F401, TFDS knows a set once its class is defined


# --- records ---


def _undecoded(features: Any) -> dict[str, Any]:
  """TFDS decoders that leave every image as it is, masks and the like too: only `image` is decoded, later."""
  return {key: tfds.decode.SkipDecoding() for key, feature in features.items()
          if isinstance(feature, tfds.features.Image)}


def _class_names(builder: Any) -> list[str]:
  """The names of the labels; where they are bare numbers, as in CUB, those that the records have."""
  features = builder.info.features
  names = features['label'].names
  if 'label_name' not in features or not all(name.isdigit() for name in names):
    return names

  def read() -> dict[str, np.ndarray]:
    found = list(names)
    for split in builder.info.splits:
      store = builder.as_data_source(split, decoders=_undecoded(features))
      for record in progress.bar(store, f'reading the class names of {split}', len(store), 'record'):
        found[record['label']] = record['label_name'].decode()
    return {'names': np.asarray(found if len(set(found)) == len(found) else names)}

  files = [path for split in builder.info.splits.values() for path in split.filepaths]
  return cached_arrays('labels', digest('3', 'class names', _stamp(files)), read)['names'].tolist()


def _records(store: Any, full_name: str, split: str, instructions: Sequence[Any],
             class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Labels, ids and hashes of the images, from one pass over the records that decodes no image.

  An id is the split that a record is stored in and its file name (or its place in that split): the same in every slice.
  `instructions` are TFDS's file instructions of the split: which records of which files.
  """
  def read() -> dict[str, np.ndarray]:
    labels, hashes = np.zeros(len(store), np.int32), np.zeros(len(store), contents.HASH)
    names = []
    starts = range(0, len(store), _CHUNK)
    for start in progress.bar(starts, f'reading the labels of {split}', len(starts), f'x {_CHUNK} records'):
      rows = range(start, min(start + _CHUNK, len(store)))
      for row, record in zip(rows, store.__getitems__(list(rows))):
        labels[row] = record['label']
        hashes[row] = contents.of_bytes(record['image'])
        names.append(_file_name(record, class_names))
    splits, places = zip(*_places(instructions))
    named = [f'{stored_in}/{name}' for stored_in, name in zip(splits, names)]
    ids = np.asarray(named if all(names) and len(set(named)) == len(named) else places)
    return {'labels': labels, 'ids': ids, 'hashes': hashes}

  key = digest('4', f'{full_name} {split}', _stamp([instruction.filename for instruction in instructions]))
  known = cached_arrays('labels', key, read)
  return known['labels'], known['ids'], known['hashes']


def _file_name(record: dict[str, Any], class_names: Sequence[str]) -> str:
  """The file name of an image in its set, '' if the record has none."""
  for feature, needs_class in FILE_NAME_FEATURES.items():
    if record.get(feature) and isinstance(record[feature], bytes):
      name = record[feature].decode()
      return f'{class_names[record["label"]]}/{name}' if needs_class else name
  return ''


def _stamp(files: Sequence[str | os.PathLike[str]]) -> str:
  """Changes when any of the files does."""
  return digest(*(contents.stat_key(os.fspath(file), os.stat(file)) for file in files))


def _places(instructions: Sequence[Any]) -> Iterator[tuple[str, str]]:
  """For each record the split that it is stored in, and its place: split, shard and row."""
  for instruction in instructions:
    file = naming.FilenameInfo.from_str(os.path.basename(instruction.filename))
    for row in range(instruction.skip, instruction.skip + instruction.take):
      yield file.split, f'{file.split}/{file.shard_index:05d}/{row}'


# Where TFDS's builders put the file name of an image, and whether it needs the class in front (as image_0001.jpg of
# Caltech-101).
FILE_NAME_FEATURES: dict[str, bool] = {
    'file_name': False,
    'image/filename': False,
    'image/file_name': True,
    'id': False,
}

# Our own builders, for sets that TFDS does not have.
BUILDERS: dict[str, Callable[[], None]] = {
    'fgvc_aircraft': _import_fgvc_aircraft,
}
