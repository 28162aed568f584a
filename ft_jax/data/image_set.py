"""Image sets as random access to examples: `open_source('folder:photos', 'train')`, `open_source('tfds:dtd', 'train')`.

A source knows every label and every id without decoding an image; an image is read when it is asked for.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import glob
import hashlib
import os
import pathlib
import re
import shlex
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from ft_jax import progress
from ft_jax.data import contents, digits, imagenet
from ft_jax.data.disk_cache import kept
from ft_jax.data.folders import list_classes, log_unused, look_alike, not_a_folder, Unused
from ft_jax.user_cache import home_directory
from selection.storage import located

# An uncompressed image of the largest size that is read, with four channels of 16 bits, and some metadata.
MOST_BYTES = 2_000_000_000


class Example(NamedTuple):
  """One image: encoded bytes or a decoded uint8 array [h, w] or [h, w, 3]; its class; an id that stays the same."""
  image: bytes | np.ndarray
  label: int
  id: str


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """One split of an image set.

  Attributes:
    name: the set and the split, for messages and files.
    class_names: one name a class, in the order of the labels.
    labels: int32 `[n]`, the class of each example.
    ids: str `[n]`, a name for each example that stays when the set is opened again.
    rows: int64 `[n]`, where each example lies in the underlying store.
    read: gives the image of a row of the store.
    fingerprint: changes when the bytes of an image, the ids, their order, the labels or the names of the classes do, and with nothing
      else: it is the same for a copy in another folder or on another machine.
    contents: `[n]` of type `contents.HASH`, what each image is by its bytes or pixels; None where that is not known.
    legacy_fingerprint: the fingerprint that earlier versions gave the set, by ids and sizes of files; their checkpoints and selections
      carry it. '' where there is none.
    broken: ids of images that are known not to be readable: links to files that are not there.
    unused: what lies beside the examples and is not used, where the set is a folder.
  """
  name: str
  class_names: tuple[str, ...]
  labels: np.ndarray
  ids: np.ndarray
  rows: np.ndarray
  read: Callable[[int], bytes | np.ndarray]
  fingerprint: str
  contents: np.ndarray | None = None
  legacy_fingerprint: str = ''
  broken: frozenset[str] = frozenset()
  unused: Unused | None = None

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, i: int) -> Example:
    return Example(self.read(int(self.rows[i])), int(self.labels[i]), str(self.ids[i]))

  def subset(self, indices: Sequence[int] | np.ndarray) -> 'ImageSet':
    """The examples at `indices`, in that order, with the same classes."""
    indices = np.asarray(indices, np.int64)
    return dataclasses.replace(
        self, labels=self.labels[indices], ids=self.ids[indices], rows=self.rows[indices],
        fingerprint=digest(self.fingerprint, indices.tobytes()),
        contents=None if self.contents is None else self.contents[indices],
        legacy_fingerprint=digest(self.legacy_fingerprint, indices.tobytes()))

  def is_known_as(self, fingerprint: str) -> bool:
    """Whether a file that carries this fingerprint, of this version or an earlier one, was made for this set."""
    return fingerprint in (self.fingerprint, self.legacy_fingerprint or self.fingerprint)

  def of_classes(self, classes: Sequence[int]) -> 'ImageSet':
    """The examples of some classes; labels stay as they are."""
    return self.subset(np.flatnonzero(np.isin(self.labels, classes)))

  def without(self, names: Sequence[str | int]) -> 'ImageSet':
    """The source as if some classes were not in it; the labels of the others close up. A number is a name, too.

    Raises:
      ValueError: a class that is not there, or all that are there.
    """
    if not names:
      return self
    # On the command line 10 is a number, also where it is the name of a folder.
    names = [str(name) for name in names]
    unknown = [name for name in names if name not in self.class_names]
    if unknown:
      near = next((name for name in self.class_names if name.lstrip('0') == unknown[0].lstrip('0')), None)
      instead = '' if near is None else f'; is it {near!r}? Then write {(near,)!r}'
      raise ValueError(f'{self.name} has no class {unknown[0]!r} to leave out; it has {len(self.class_names)}: '
                       f'{", ".join(self.class_names[:5])}, ... (several are written (\'one\',\'two\')){instead}')
    kept = [k for k, name in enumerate(self.class_names) if name not in names]
    if not kept:
      raise ValueError(f'{self.name}: all of its classes are to be left out')
    numbers = np.full(len(self.class_names), -1, np.int32)
    numbers[kept] = np.arange(len(kept))
    part = self.of_classes(kept)
    return dataclasses.replace(part, labels=numbers[part.labels], class_names=tuple(self.class_names[k] for k in kept))

  def at_ids(self, ids: Sequence[str]) -> np.ndarray:
    """The rows of some examples by their ids, int64 `[len(ids)]`; raises ValueError for ids that are not there."""
    places = {name: row for row, name in enumerate(self.ids.tolist())}
    missing = [name for name in ids if name not in places]
    if missing:
      raise ValueError(f'{len(missing):,d} of {len(ids):,d} ids are not in {self.name}, such as {missing[0]!r}; its ids look like '
                       f'{str(self.ids[0])!r}')
    return np.array([places[name] for name in ids], np.int64)


def open_set(name: str, split: str, data_dir: str = '', quiet: bool = False) -> ImageSet:
  """Opens a split of an image set.

  Args:
    name: `tfds:<name>[/config][:version]`, `folder:<path>`, or `digits:pool` and `digits:target` (the demo's). A folder of images
      without class folders is a set of the one class UNLABELLED, good for a pool.
    split: `train`, `train[:90%]`, `train+val`. For `tfds:` this is TFDS's own slicing of the whole split; for `folder:`
      a slice is taken of each class by itself.
    data_dir: where prepared TFDS sets lie, and what a relative `folder:` path starts from.
    quiet: leaves it to the caller to log what lies in a folder and is not used (`Source.unused`).

  Raises:
    ValueError: a name, split or folder that is not there or holds nothing, with what is.
  """
  kind, _, rest = name.partition(':')
  if kind not in SOURCES or not rest:
    raise ValueError(f'data set {name!r}: expected {", ".join(f"{k}:..." for k in SOURCES)}')
  source = SOURCES[kind](rest, split, data_dir)
  if not quiet:
    log_unused(name, [source.unused])
  return source


def split_off_val(source: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
  """Splits a source in two by class: (the rest, about `fraction` of every class).

  The choice depends on the ids and the seed alone, not on the order of the files. A class of two or more gives at least
  one example and keeps at least one; a class of one keeps it.

  Raises:
    ValueError: a fraction outside (0, 1), or one that leaves the second part empty.
  """
  if not 0 < fraction < 1:
    raise ValueError(f'val_fraction is {fraction}; expected a number between 0 and 1 (or name a val split)')
  sizes = np.bincount(source.labels, minlength=len(source.class_names))
  taken = np.where(sizes > 1, np.clip(np.round(sizes * fraction), 1, np.maximum(sizes - 1, 1)), 0).astype(int)
  if not taken.any():
    raise ValueError(f'{source.name}: every class has one image, so none can be set aside for val; '
                     'add images, or name a val split')
  second, first = _parts(source, taken, [digest(str(seed), i) for i in source.ids])
  return first, second


def sample_per_class(source: ImageSet, per_class: int, seed: int, fraction: float = 1.0) -> tuple[ImageSet, ImageSet]:
  """Draws a number of examples of every class, or (`per_class` 0) a part of them, at least one: (the drawn ones, the rest).

  The choice depends on the seed and on the ids without what is before their first slash, which is the split that an image is
  stored in (in a folder without splits the class): an image is drawn or not whichever split that is.

  Raises:
    ValueError: a class that has fewer.
  """
  sizes = np.bincount(source.labels, minlength=len(source.class_names))
  if not per_class:
    counts = np.minimum(sizes, np.maximum(1, np.round(fraction * sizes).astype(int)))
    return _parts(source, counts, [_drawn_by(i, seed) for i in source.ids])
  small = np.flatnonzero(sizes < per_class)
  if len(small):
    raise ValueError(f'{source.name}: train_per_class is {per_class}, but {source.class_names[small[0]]} has {sizes[small[0]]} images'
                     + (f', and {len(small) - 1} other classes have too few' if len(small) > 1 else '') + '; draw fewer')
  return _parts(source, np.full(len(sizes), per_class), [_drawn_by(i, seed) for i in source.ids])


def _drawn_by(example_id: str, seed: int) -> str:
  """The priority of an example in a draw; an id without a slash has no split in front and counts as a whole."""
  return digest('draw', str(seed), example_id.partition('/')[2] or example_id)


def _parts(source: ImageSet, counts: np.ndarray, priorities: Sequence[str]) -> tuple[ImageSet, ImageSet]:
  """Those of each class that come first by priority, as many as `counts` says, and the rest; both in the order of the source."""
  order = np.lexsort((np.asarray(priorities), source.labels))
  sizes = np.bincount(source.labels, minlength=len(source.class_names))
  starts = np.cumsum(sizes) - sizes
  taken = np.sort(np.concatenate([order[a:a + n] for a, n in zip(starts, counts)]))
  return source.subset(taken), source.subset(np.setdiff1d(np.arange(len(source)), taken))


# --- folders ---


class SplitPart(NamedTuple):
  """One term of a split expression: a name and the bounds of its slice, each `None`, `'90%'` or `'100'`."""
  name: str
  start: str | None
  stop: str | None


def parse_split(split: str) -> list[SplitPart]:
  """Reads `train`, `train[:90%]`, `train[10:]+val`; raises ValueError for anything else."""
  parts = []
  for term in split.split('+'):
    match = re.fullmatch(r'\s*([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?\s*', term)
    if not match:
      raise ValueError(f'split {split!r}: expected a name, such as train, or a slice, such as train[:90%] or train[10:]')
    parts.append(SplitPart(*match.groups()))
  return parts


def _bound(text: str | None, size: int, default: int) -> int:
  if text is None:
    return default
  value = round(int(text[:-1]) * size / 100) if text.endswith('%') else int(text)
  # The sign is that of the text: -10% of three images is none of them, counted from the end.
  return max(0, min(size, value + size if text.startswith('-') else value))


def _open_folder(path: str, split: str, data_dir: str) -> ImageSet:
  root = pathlib.Path(os.path.expanduser(path))
  root = root if root.is_absolute() else pathlib.Path(os.path.expanduser(data_dir)) / root
  name = f'folder:{path}'
  if not root.is_dir():
    raise ValueError(f'{name}: {not_a_folder(root)}')
  parts = parse_split(split)
  listed = [list_classes(root, part.name, name) for part in parts]
  found = [listing.classes for listing in listed]
  class_names = tuple(found[0])
  for part, files in zip(parts, found):
    if tuple(files) != class_names:
      raise ValueError(f'{name}: the classes of {part.name} and {parts[0].name} differ: '
                       + class_difference(parts[0].name, class_names, part.name, tuple(files)))
  paths, labels = [], []
  for label, class_name in enumerate(class_names):
    for part, files in zip(parts, found):
      # A fixed shuffle, so that a slice is not the first frames of a burst or the first writers.
      shuffled = sorted(files[class_name], key=lambda p: digest(p.name))
      chosen = shuffled[_bound(part.start, len(shuffled), 0):_bound(part.stop, len(shuffled), len(shuffled))]
      paths += sorted(chosen)
      labels += [label] * len(chosen)
  if not paths:
    raise ValueError(f'{name}: split {split!r} holds no image; the slice is empty')
  ids = [p.relative_to(root).as_posix() for p in paths]
  broken = frozenset().union(*(listing.broken for listing in listed))
  # ImageNet's folders are sorted by WordNet id, as TFDS's labels are; the ids of the examples keep theirs.
  class_names = imagenet.human_names(class_names)
  hashes, sizes = contents.of_files(paths, str(root), f'{name} {split}', MOST_BYTES)
  return ImageSet(f'{name} {split}', class_names, np.asarray(labels, np.int32), np.asarray(ids), np.arange(len(paths)),
                lambda row: read_file(paths[row]), digest(*ids, hashes.tobytes(), *class_names), hashes,
                digest(*ids, *map(str, sizes), *class_names),
                broken=frozenset(p.relative_to(root).as_posix() for p in broken),
                unused=sum((listing.unused for listing in listed[1:]), listed[0].unused))


def read_file(path: pathlib.Path) -> bytes:
  """The bytes of an image file.

  Raises:
    ValueError: a link to a file that is not there, or more bytes than an image has: a link, or a file of nothing but holes,
      may be endless.
  """
  if path.is_symlink() and not path.exists():
    raise ValueError(f'{path} is a link to {os.readlink(path)}, which is not there; restore that file, or remove the link')
  if (size := path.stat().st_size) > MOST_BYTES:
    raise ValueError(f'{path} has {size:,d} bytes; expected {MOST_BYTES:,d} of an image at most. Scale it down or move it')
  return path.read_bytes()


def class_difference(one: str, ones: Sequence[str], other: str, others: Sequence[str], most: int = 5) -> str:
  """Which classes only one of two splits has, for messages: `only in train: cat, dog; only in test: emu`."""
  only_ones, only_others = set(ones) - set(others), set(others) - set(ones)
  pairs = look_alike(only_ones, only_others)
  parts = [f'{a} in {one} is {b} in {other}; give the folder one name' for a, b in pairs.values()][:1]
  for name, alone in ((one, only_ones - {a for a, _ in pairs}), (other, only_others - {b for _, b in pairs})):
    if alone:
      more = f' and {len(alone) - most} others' if len(alone) > most else ''
      parts.append(f'only in {name}: {", ".join(sorted(alone)[:most])}{more}')
  return '; '.join(parts) or 'the same classes in another order'


# --- TFDS ---


def prepare_command(name: str, data_dir: str) -> str:
  """The shell command that writes a TFDS set in the form that is read here."""
  return f'python -m ft_jax.data.prepare tfds:{name}' + (f' --data_dir={shlex.quote(data_dir)}' if data_dir else '')


def _open_tfds(name: str, split: str, data_dir: str) -> ImageSet:
  import tensorflow_datasets as tfds  # only where a TFDS set is used

  builder = tfds_builder(name, data_dir)
  command = prepare_command(name, data_dir)
  if not builder.is_prepared():
    raise ValueError(f'tfds:{name} is not prepared in {builder.data_dir}; prepare it with: {command}')
  if builder.info.file_format not in (tfds.core.FileFormat.ARRAY_RECORD, None):
    raise ValueError(f'tfds:{name} is stored as {builder.info.file_format.value} in {builder.data_dir}, which has no random access; '
                     f'write it as ArrayRecord (into another data_dir, or after moving that folder away) with: {command}')
  features = builder.info.features
  if not {'image', 'label'} <= set(features):
    raise ValueError(f'tfds:{name} has the features {", ".join(features)}; expected image and label')
  try:
    part = builder.info.splits[split]
  except (ValueError, KeyError) as error:  # TFDS's words for it run over several lines
    raise ValueError(f'tfds:{name}: split {split!r} does not open; known: {", ".join(builder.info.splits)}, '
                     'with slices such as train[:90%] and sums such as train+test') from error
  if not part.num_examples:
    raise ValueError(f'tfds:{name}: split {split!r} holds no image; the slice is empty')
  store = builder.as_data_source(split, decoders=_undecoded(features))
  full_name, class_names = builder.info.full_name, imagenet.human_names(_tfds_class_names(builder))
  labels, ids, hashes = _tfds_records(store, full_name, split, part.file_instructions, class_names)
  legacy = digest(full_name, '\n'.join(ids), labels.tobytes(), *class_names)
  return ImageSet(f'tfds:{full_name} {split}', class_names, labels, ids, np.arange(len(store)),
                lambda row: store[row]['image'], digest(legacy, hashes.tobytes()), hashes, legacy)


def _undecoded(features: Any) -> dict[str, Any]:
  """TFDS's decoders that leave images as they are, masks and the like too: only the image is decoded, and that later."""
  import tensorflow_datasets as tfds

  return {key: tfds.decode.SkipDecoding() for key, feature in features.items() if isinstance(feature, tfds.features.Image)}


def _tfds_class_names(builder: Any) -> list[str]:
  """The names of the labels; where they are bare numbers, as in CUB, those that the records give."""
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
  return kept('labels', digest('3', 'class names', _stamp(files)), read)['names'].tolist()


def tfds_builder(name: str, data_dir: str) -> Any:
  """TFDS's builder for `name[/config][:version]`, to be stored as ArrayRecord unless it is there in another form."""
  import tensorflow_datasets as tfds

  directory = _tfds_folder(data_dir)
  set_name = re.split('[/:]', name)[0]
  if set_name in BUILDERS:
    BUILDERS[set_name]()
  try:
    builder = tfds.builder(name, data_dir=directory)
    # A set that is there keeps its form, so that a wrong one can be named; a new one is written with random access.
    return builder if builder.is_prepared() else tfds.builder(name, data_dir=directory, file_format='array_record')
  except ImportError as error:
    package = missing_package(error)
    raise ValueError(f'TFDS needs {package} for tfds:{name}: pip install {package}') from error
  except (tfds.core.registered.DatasetNotFoundError, AssertionError, ValueError) as error:
    raise ValueError(f'tfds:{name}: {_why_not(name, error)} The sets are listed at https://www.tensorflow.org/datasets/catalog; '
                     f'a set of your own must lie prepared in data_dir (now {data_dir or "~/tensorflow_datasets"})') from None


def _tfds_folder(data_dir: str) -> epath.Path | None:
  """Where TFDS sets lie; None where TFDS's own folder does.

  Raises:
    ValueError: a name that TFDS or array_record would misread, or no home directory to hold TFDS's folder.
  """
  if not data_dir:
    if home_directory() is None and not os.environ.get('TFDS_DATA_DIR'):
      raise ValueError('there is no home directory for ~/tensorflow_datasets; give the folder of TFDS sets: --config.data_dir=... '
                       '(of ft_jax.data.prepare: --data_dir=...)')
    return None
  folder = located(data_dir)
  name = os.fspath(folder)
  problem = 'has bytes that are not UTF-8, which array_record refuses' if name.encode(errors='replace').decode() != name else \
      'has *, ? or [, which TFDS reads as a pattern' if glob.has_magic(name) else ''
  if problem:
    raise ValueError(f'data_dir is {data_dir!r}, which {problem}; give another folder, or a path through a symbolic link')
  return folder


def _why_not(name: str, error: Exception) -> str:
  """One sentence of what TFDS says of a name; its own message lists several hundred names, ends in the middle, or is empty."""
  import tensorflow_datasets as tfds

  reason = (str(error).strip() or 'there is no such set, config or version.').splitlines()[0]
  if reason.startswith('Parsing builder name string'):
    return 'expected tfds:<name>[/config][:version], such as tfds:oxford_iiit_pet or tfds:sun397/standard-part1-120k:4.0.0.'
  if re.search(r'BuilderConfig .* not found', reason):
    set_name, config = re.split('[/:]', name)[:2]
    known = [known.name for known in tfds.builder_cls(set_name).BUILDER_CONFIGS]
    return f'the set has no config {config!r}; ' + (f'known: {", ".join(known)}.' if known else f'it has none: use tfds:{set_name}.')
  return re.sub(r'^Failed to construct dataset .*?}": ', '', reason)


def _import_fgvc_aircraft() -> None:
  from ft_jax.data.prepare.builders import fgvc_aircraft  # noqa: F401, TFDS knows a set when its class is there


def missing_package(error: ImportError) -> str:
  """The package that could not be imported; TFDS wraps the error that names it in another one."""
  return error.name or getattr(error.__cause__, 'name', None) or 'another package'


def _tfds_records(store: Any, full_name: str, split: str, parts: Sequence[Any], class_names: Sequence[str],
                  chunk: int = 512) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Labels, ids and hashes of the images: one pass over the records without decoding an image.

  An id is the split that a record is stored in and its file name, or its place there: the same in every slice. `parts` are
  TFDS's file instructions of the split: which records of which files.
  """
  def read() -> dict[str, np.ndarray]:
    labels, names, hashes = np.zeros(len(store), np.int32), [], np.zeros(len(store), contents.HASH)
    starts = range(0, len(store), chunk)
    for start in progress.bar(starts, f'reading the labels of {split}', len(starts), f'x {chunk} records'):
      rows = range(start, min(start + chunk, len(store)))
      for row, record in zip(rows, store.__getitems__(list(rows))):
        labels[row] = record['label']
        hashes[row] = contents.of_bytes(record['image'])
        names.append(_file_name(record, class_names))
    splits, places = zip(*_tfds_places(parts))
    named = [f'{stored_in}/{name}' for stored_in, name in zip(splits, names)]
    ids = np.asarray(named if all(names) and len(set(named)) == len(named) else places)
    return {'labels': labels, 'ids': ids, 'hashes': hashes}

  known = kept('labels', digest('4', f'{full_name} {split}', _stamp([part.filename for part in parts])), read)
  return known['labels'], known['ids'], known['hashes']


def _file_name(record: dict[str, Any], class_names: Sequence[str]) -> str:
  """The name of an image in its set, '' where a record has none."""
  for feature, needs_class in FILE_NAME_FEATURES.items():
    if record.get(feature) and isinstance(record[feature], bytes):
      name = record[feature].decode()
      return f'{class_names[record["label"]]}/{name}' if needs_class else name
  return ''


def _stamp(files: Sequence[str | os.PathLike[str]]) -> str:
  return digest(*(contents.stat_key(os.fspath(file), os.stat(file)) for file in files))


def _tfds_places(parts: Sequence[Any]) -> Iterator[tuple[str, str]]:
  """For each record the split that it is stored in, and its place: split, shard and row."""
  from tensorflow_datasets.core import naming

  for part in parts:
    file = naming.FilenameInfo.from_str(os.path.basename(part.filename))
    for row in range(part.skip, part.skip + part.take):
      yield file.split, f'{file.split}/{file.shard_index:05d}/{row}'


# --- the demo ---


def _open_digits(name: str, split: str, data_dir: str) -> ImageSet:
  del data_dir
  images, labels, ids, class_names = digits.load(name, split)
  fingerprint = digest(images.tobytes(), labels.tobytes(), *class_names)
  hashes = np.array([contents.of_array(image) for image in images], contents.HASH)
  return ImageSet(f'digits:{name} {split}', class_names, labels, np.asarray(ids), np.arange(len(labels)),
                lambda row: images[row], fingerprint, hashes, fingerprint)


def digest(*parts: str | bytes) -> str:
  """Sixteen hexadecimal digits that depend on every part and on where one ends."""
  state = hashlib.sha256()
  for part in parts:
    # File names may be of any bytes.
    data = part.encode('utf-8', 'surrogateescape') if isinstance(part, str) else part
    state.update(len(data).to_bytes(8, 'big') + data)
  return state.hexdigest()[:16]


# Where TFDS's builders put the file name of an image, and whether it needs the class in front (Caltech-101: image_0001.jpg).
FILE_NAME_FEATURES: dict[str, bool] = {'file_name': False, 'image/filename': False, 'image/file_name': True, 'id': False}

# Builders of ours, for sets that TFDS lacks.
BUILDERS: dict[str, Callable[[], None]] = {
    'fgvc_aircraft': _import_fgvc_aircraft,
}

SOURCES: dict[str, Callable[[str, str, str], ImageSet]] = {
    'tfds': _open_tfds,
    'folder': _open_folder,
    'digits': _open_digits,
}
