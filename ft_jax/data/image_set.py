"""ImageSet: the labels, ids and class names of a set, and its images, each read when it is needed.

Where the images come from (a folder, a TFDS set, arrays, ...) is the back-ends' matter, one file each: see
`ft_jax.data.BACKENDS`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import os
from typing import NamedTuple, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from ft_jax.data.unused_files import Unused

Image = bytes | np.ndarray
Labels = Sequence[int] | Sequence[str] | np.ndarray
# The name of the only class of a set without labels, such as a pool of images.
UNLABELLED = 'unlabelled'


class Example(NamedTuple):
  """One image: encoded bytes or decoded uint8 `[h, w]` or `[h, w, 3]`; its label; its id, which never changes."""
  image: Image
  label: int
  id: str


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
  """One split of an image set. `len(images)` is the number of examples, `images[i]` reads one of them.

  Attributes:
    name: the set and the split, for messages and files.
    class_names: one name per class; a label is an index into them.
    labels: int32 `[n]`, the class of each example.
    ids: str `[n]`, a unique name for each example that is the same whenever the set is opened.
    rows: int64 `[n]`, the row of each example in the underlying store.
    read: returns the image in a row of the store. Called from several threads at once.
    fingerprint: changes with the bytes of any image, the ids, their order, the labels and the class names, and with
      nothing else: a copy in another folder or on another machine has the same.
    contents: `[n]` of dtype `contents.HASH`, a hash of the bytes or pixels of each image; None where it is not known.
    legacy_fingerprint: the fingerprint of earlier versions, made from ids and file sizes, which their
      checkpoints and selections have; '' if there is none.
    broken: ids of images that are known to be unreadable: links to files that do not exist.
    unused: files beside the examples that are not used, if the set is a folder.
  """
  name: str
  class_names: tuple[str, ...]
  labels: np.ndarray
  ids: np.ndarray
  rows: np.ndarray
  read: Callable[[int], Image]
  fingerprint: str
  contents: np.ndarray | None = None
  legacy_fingerprint: str = ''
  broken: frozenset[str] = frozenset()
  unused: 'Unused | None' = None

  def __repr__(self) -> str:
    return f'ImageSet({self.name!r}, {len(self):,d} images of {len(self.class_names):,d} classes)'

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, i: int) -> Example:
    return Example(self.read(int(self.rows[i])), int(self.labels[i]), str(self.ids[i]))

  # --- constructors ---

  @classmethod
  def from_folder(cls, path: str | os.PathLike[str], split: str = 'train') -> 'ImageSet':
    """The images of `<path>/<split>/<class>/<image>`, or of a folder without splits, `<path>/<class>/<image>`.

    Args:
      path: the folder.
      split: such as `train`, `train[:90%]` or `train+val`; a slice is taken of each class separately.

    Raises:
      ValueError: the folder or split does not exist or has no images.
    """
    from ft_jax.data import open_set
    if not isinstance(path, (str, os.PathLike)) or not isinstance(split, str):
      raise ValueError(f'path is {path!r} and split is {split!r}; expected the path of a folder and text such as train')
    path = os.fspath(path).removeprefix('folder:')
    return open_set(f'folder:{os.path.abspath(os.path.expanduser(path))}', split)

  @classmethod
  def from_tfds(cls, name: str, split: str, data_dir: str = '') -> 'ImageSet':
    """A split of a prepared TFDS set (`python -m ft_jax.data.prepare tfds:<name>`).

    Args:
      name: `<name>[/config][:version]`.
      split: as in TFDS, such as `train`, `train[:90%]` or `train+test`.
      data_dir: the folder of prepared sets; '' is TFDS's own, ~/tensorflow_datasets.

    Raises:
      ValueError: the set is not known or not prepared, or has no such split.
    """
    from ft_jax.data import open_set
    if not isinstance(name, str) or not isinstance(split, str):
      raise ValueError(f'name is {name!r} and split is {split!r}; expected text such as mnist and train')
    return open_set(f'tfds:{name.removeprefix("tfds:")}', split, data_dir)

  @classmethod
  def from_arrays(cls, images: np.ndarray | Sequence[Image], labels: Labels | None = None,
                  class_names: Sequence[str] | None = None, name: str = 'arrays') -> 'ImageSet':
    """Images in memory. Arrays are not copied, so they must not change afterwards.

    Args:
      images: uint8 `[n, h, w, 3]` (RGB) or `[n, h, w]` (grey), or a list with one image each: uint8 `[h, w, 3]` or
        `[h, w]` of any size, a Pillow image, or the bytes of an image file.
      labels: the class of each image, by number (0 is the first class) or by name. None makes one class of them, as in
        a folder without class folders: such a set can be predicted, or be the pool of methods.fixmatch.
      class_names: in the order of the numbers. None takes the names in `labels`, sorted, or '0', '1', ... for numbers.
      name: for messages and reports.

    Raises:
      ValueError: images of another shape or dtype, labels that do not fit them, or an empty set.
    """
    from ft_jax.data import arrays
    return arrays.from_arrays(images, labels, class_names, name)

  @classmethod
  def from_files(cls, paths: Sequence[str | os.PathLike[str]], labels: Labels | None = None,
                 class_names: Sequence[str] | None = None, name: str = 'files') -> 'ImageSet':
    """Image files at any paths, which are read when they are needed. The ids are the paths as they are given.

    Args:
      paths: one per image.
      labels, class_names, name: as in `from_arrays`.

    Raises:
      ValueError: a file that does not exist or cannot be opened, labels that do not fit the files, or an empty list.
    """
    from ft_jax.data import path_list
    return path_list.from_files(paths, labels, class_names, name)

  # --- parts of a set ---

  def subset(self, indices: Sequence[int] | np.ndarray) -> 'ImageSet':
    """The examples at `indices`, in that order, with the same classes."""
    indices = np.asarray(indices, np.int64)
    return dataclasses.replace(
        self, labels=self.labels[indices], ids=self.ids[indices], rows=self.rows[indices],
        fingerprint=digest(self.fingerprint, indices.tobytes()),
        contents=None if self.contents is None else self.contents[indices],
        legacy_fingerprint=digest(self.legacy_fingerprint, indices.tobytes()))

  def of_classes(self, classes: Sequence[int]) -> 'ImageSet':
    """The examples of some classes; their labels do not change."""
    return self.subset(np.flatnonzero(np.isin(self.labels, classes)))

  def without(self, names: Sequence[str | int]) -> 'ImageSet':
    """The set without some classes; the remaining classes are renumbered.

    Args:
      names: of the classes to leave out. A number stands for the class of that name.

    Raises:
      ValueError: a class that the set does not have, or all of its classes.
    """
    if not names:
      return self
    # The command line makes a number of 10, even if it is the name of a folder.
    left_out = [str(name) for name in names]
    unknown = [name for name in left_out if name not in self.class_names]
    if unknown:
      near = next((name for name in self.class_names if name.lstrip('0') == unknown[0].lstrip('0')), None)
      hint = '' if near is None else f'; if you mean {near!r}, write {(near,)!r}'
      raise ValueError(f'{self.name} has no class {unknown[0]!r} to leave out; it has {len(self.class_names)}: '
                       f'{", ".join(self.class_names[:5])}, ... (write several as (\'one\',\'two\')){hint}')
    remaining = [k for k, name in enumerate(self.class_names) if name not in left_out]
    if not remaining:
      raise ValueError(f'{self.name}: all of its classes would be left out; leave at least one')
    new_labels = np.full(len(self.class_names), -1, np.int32)
    new_labels[remaining] = np.arange(len(remaining))
    part = self.of_classes(remaining)
    return dataclasses.replace(part, labels=new_labels[part.labels],
                               class_names=tuple(self.class_names[k] for k in remaining))

  # --- look-ups ---

  def at_ids(self, ids: Sequence[str]) -> np.ndarray:
    """The positions of the examples with these ids, int64 `[len(ids)]`; raises ValueError if one is not in the set."""
    positions = {name: i for i, name in enumerate(self.ids.tolist())}
    missing = [name for name in ids if name not in positions]
    if missing:
      raise ValueError(f'{len(missing):,d} of {len(ids):,d} ids are not in {self.name}, such as {missing[0]!r}; '
                       f'its ids look like {str(self.ids[0])!r}')
    return np.array([positions[name] for name in ids], np.int64)

  def is_known_as(self, fingerprint: str) -> bool:
    """Whether a file with this fingerprint, written by this or an earlier version, was made for this set."""
    return fingerprint in (self.fingerprint, self.legacy_fingerprint or self.fingerprint)


def split_off_val(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
  """Splits a set in two, class by class: (train, val) with about `fraction` of every class in val.

  The choice depends only on the ids and the seed, not on the order of the files. A class of two or more images has at
  least one in each part; a class of one image has it in train.

  Raises:
    ValueError: `fraction` is not between 0 and 1, or val would be empty.
  """
  if not 0 < fraction < 1:
    raise ValueError(f'val_fraction is {fraction}; expected a number between 0 and 1 (or name a val split)')
  sizes = np.bincount(images.labels, minlength=len(images.class_names))
  counts = np.where(sizes > 1, np.clip(np.round(sizes * fraction), 1, np.maximum(sizes - 1, 1)), 0).astype(int)
  if not counts.any():
    raise ValueError(f'{images.name}: every class has only one image, so none can be split off for val; '
                     'add images, or name a val split')
  val, train = _take(images, counts, [digest(str(seed), i) for i in images.ids])
  return train, val


def sample_per_class(images: ImageSet, per_class: int, seed: int, fraction: float = 1.0) -> tuple[ImageSet, ImageSet]:
  """Draws `per_class` examples of every class or, if 0, a fraction of them, at least one: (the sample, the rest).

  The choice depends only on the seed and on what follows the first slash of the ids. What precedes it is the split that
  an image is stored in (the class, in a folder without splits): whether an image is drawn does not depend on its split.

  Raises:
    ValueError: a class has fewer than `per_class` images.
  """
  sizes = np.bincount(images.labels, minlength=len(images.class_names))
  small = np.flatnonzero(sizes < per_class)
  if len(small):
    others = f', and {len(small) - 1} other classes have too few' if len(small) > 1 else ''
    raise ValueError(f'{images.name}: train_per_class is {per_class}, but {images.class_names[small[0]]} has '
                     f'{sizes[small[0]]} images{others}; use a smaller number')
  if per_class:
    counts = np.full(len(sizes), per_class)
  else:
    counts = np.minimum(sizes, np.maximum(1, np.round(fraction * sizes).astype(int)))
  # An id without a slash has no split in front and counts as a whole.
  return _take(images, counts, [digest('draw', str(seed), i.partition('/')[2] or i) for i in images.ids.tolist()])


def _take(images: ImageSet, counts: np.ndarray, priorities: Sequence[str]) -> tuple[ImageSet, ImageSet]:
  """The `counts[k]` examples of class k with the lowest priorities, and the rest; both in the order of the set."""
  order = np.lexsort((np.asarray(priorities), images.labels))
  sizes = np.bincount(images.labels, minlength=len(images.class_names))
  starts = np.cumsum(sizes) - sizes
  taken = np.sort(np.concatenate([order[start:start + count] for start, count in zip(starts, counts)]))
  return images.subset(taken), images.subset(np.setdiff1d(np.arange(len(images)), taken))


def digest(*parts: str | bytes) -> str:
  """Sixteen hexadecimal digits that depend on every part and on where it ends."""
  state = hashlib.sha256()
  for part in parts:
    # File names may be of any bytes.
    data = part.encode('utf-8', 'surrogateescape') if isinstance(part, str) else part
    state.update(len(data).to_bytes(8, 'big') + data)
  return state.hexdigest()[:16]
