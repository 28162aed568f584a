"""The splits of a data set that is trained on: opened, checked, without images that cannot be read."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

from ml_collections import ConfigDict
import numpy as np

from ft_jax import parallel
from ft_jax.data import open_set, unreadable
from ft_jax.data.class_names import class_difference
from ft_jax.data.image_set import ImageSet, sample_per_class, split_off_val, UNLABELLED
from ft_jax.data.memory_cache import cached
from ft_jax.data.unused_files import log_unused
from ft_jax.names import listed
from ft_jax.progress import log

ON_ERROR = ('raise', 'skip')


@dataclasses.dataclass(frozen=True)
class SplitSettings:
  """Which images of a set are trained on and measured on: fields of `config.target` or `config.source`.

  Raises:
    ValueError: fields that contradict each other.
  """
  name: str
  train: str
  val: str
  test: str
  val_fraction: float
  train_per_class: int = 0
  train_fraction: float = 1.0
  without: tuple[str | int, ...] = ()

  def __post_init__(self) -> None:
    if self.train_fraction < 1 and self.train_per_class:
      raise ValueError('config.target.train_fraction and config.target.train_per_class both say how many images are '
                       'sampled; set one')
    if self.test == 'rest' and not self.samples:
      raise ValueError("config.target.test is 'rest', the images that are not sampled for training, but "
                       'config.target.train_per_class is 0 and train_fraction is 1; set either')

  @classmethod
  def from_config(cls, config: ConfigDict) -> 'SplitSettings':
    """Of `config.target` or `config.source`, which lacks some of the fields."""
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in config.to_dict().items() if name in known})

  def of_given(self, images: Collection[str]) -> 'SplitSettings':
    """The same for image sets that are given for some of train, val and test, under these names."""
    test = self.test if self.test == 'rest' else ''
    return dataclasses.replace(
        self, train='train', val='val' if 'val' in images else '', test='test' if 'test' in images else test)

  @property
  def samples(self) -> bool:
    """Whether only some of the images are trained on."""
    return self.train_per_class > 0 or self.train_fraction < 1


@dataclasses.dataclass(frozen=True)
class Reading:
  """How images are read: the fields of `config.data`.

  Raises:
    ValueError: an `on_error` that is not known.
  """
  on_error: str
  timeout: float
  cache: bool

  def __post_init__(self) -> None:
    if self.on_error not in ON_ERROR:
      raise ValueError(f'config.data.on_error is {self.on_error!r}; known: {", ".join(ON_ERROR)}')

  @classmethod
  def from_config(cls, config: ConfigDict) -> 'Reading':
    """Of the fields of `config.data`."""
    return cls(config.on_error, config.timeout, config.cache)


# Image sets that a Python caller gives, by the name of their split.
Given = Mapping[str, ImageSet]


class Splits(NamedTuple):
  """The splits of a data set that is trained on; `test` is None where there is none."""
  train: ImageSet
  val: ImageSet
  test: ImageSet | None


def open_splits(settings: SplitSettings, data_dir: str, seed: int, images: Given | None = None, group: str = 'target',
                labelled: bool = True) -> Splits:
  """Opens train, val (split off from train where it has no name) and test of an image set.

  Args:
    settings: which images they are.
    data_dir: where prepared sets are.
    seed: of the images that are sampled or split off.
    images: image sets in place of what `settings` names: train, and val and test if there are any; test may also be
      'rest'.
    group: the group of the config that `settings` is from, for messages.
    labelled: whether labels are needed, which a folder without class folders does not have.

  Raises:
    ValueError: a set, split or folder that does not exist or has no classes, or splits of different classes or with
      images in common.
  """
  named = settings if images is None else settings.of_given(images)

  def opened(split: str) -> ImageSet:
    found = open_set(named.name, split, data_dir, quiet=True) if images is None else images[split]
    return (_labelled(found) if labelled else found).without(named.without)

  def opened_as(field: str, split: str) -> ImageSet:
    try:
      return opened(split)
    except ValueError as error:  # train could be opened, so it is this field that is wrong
      raise ValueError(f'config.{group}.{field} is {split!r}: {error}') from error

  train = opened(named.train)
  rest = None
  if named.samples:
    train, rest = sample_per_class(train, named.train_per_class, seed, named.train_fraction)
  if named.val:
    val = opened_as('val', named.val)
  else:
    train, val = split_off_val(train, named.val_fraction, seed)
  test = None
  if named.test:
    test = rest if named.test == 'rest' else opened_as('test', named.test)
  log_unused(named.name, [split.unused for split in (train, val, test) if split is not None])
  if test is not None and not len(test):
    sampled = f'train_fraction {named.train_fraction}'
    if named.train_per_class:
      sampled = f'train_per_class {named.train_per_class}'
    raise ValueError(f'{train.name}: {sampled} leaves no image for test')
  for other in (val, test):
    if other is not None and other.class_names != train.class_names:
      raise ValueError(f'{train.name} and {other.name} have different classes: '
                       + class_difference(train.name, train.class_names, other.name, other.class_names))
  for one, other in ((train, val), (train, test), (val, test)):
    if other is not None and (shared := set(one.ids.tolist()) & set(other.ids.tolist())):
      raise ValueError(f'{one.name} and {other.name} share {len(shared):,d} images, such as {min(shared)}; what is '
                       'measured on images that were trained on means nothing. Give slices that do not overlap, such '
                       'as train[:80%] and train[80%:]')
  return Splits(train, val, test)


def unsampled_sets(settings: SplitSettings, data_dir: str, images: Given | None = None) -> list[ImageSet]:
  """All images that `open_splits` may sample from or open, whatever the seed; [] where it samples none."""
  if not settings.samples:
    return []
  if images is not None:
    return list(images.values())
  names = [name for name in (settings.train, settings.val, settings.test) if name and name != 'rest']
  return [open_set(settings.name, name, data_dir, quiet=True) for name in dict.fromkeys(names)]


def _labelled(source: ImageSet) -> ImageSet:
  if source.class_names == (UNLABELLED,):
    raise ValueError(f'{source.name} holds no class folders but {len(source):,d} images, so their classes are not '
                     'known; expected <class>/<image> in it: classes are read from the names of folders, not from a '
                     'table (docs/data.md turns a .csv into folders). Images without classes can be a pool: '
                     'config.source.name with methods.fixmatch')
  return source


def check_classes(splits: Splits, without: str = '') -> None:
  """Raises ValueError for splits that no classifier can be learnt from.

  Args:
    splits: what is trained on, after slices, draws and unreadable images.
    without: the field that leaves classes out, where a class without training images is refused: its test images are
      never right. '' warns instead, as for a pre-training, whose classifier is rarely used.

  Raises:
    ValueError: there is one class only, whose classifier is always right; or a class without training images, by name.
  """
  train = splits.train
  if len(train.class_names) < 2:
    raise ValueError(f'{train.name} has one class, {train.class_names[0]!r}, so a classifier is always right and '
                     'learns nothing; expected at least two classes (to tell one class from everything else, add a '
                     'class of other images)')
  if not (missing := _classes_without_images(train)):
    return
  named = f'{train.name}: no training image of {_class_list(missing)}'
  if not without:
    log.warning('warning: %s, so nothing is learnt of it', named)
    return
  first = train.class_names.index(missing[0])
  counts = [f'{split} {np.sum(source.labels == first)}' for split, source in splits._asdict().items()
            if source is not None]
  leave_out = f"--config.{without}=\"({', '.join(map(repr, missing[:5]))},)\""
  raise ValueError(f'{named} (images of {missing[0]!r}: {", ".join(counts)}); add images, use a larger slice for '
                   f'train, or leave such classes out: {leave_out}')


def log_classes_not_evaluated(splits: Splits) -> None:
  """Warns of classes that val or test has no image of: nothing is measured on them."""
  for split, source in (('val', splits.val), ('test', splits.test)):
    if source is not None and (missing := _classes_without_images(source)):
      log.warning('warning: %s: no %s image of %s: mean_per_class is the mean over the other %d classes', source.name,
                  split, _class_list(missing), len(source.class_names) - len(missing))


def _classes_without_images(source: ImageSet) -> list[str]:
  counts = np.bincount(source.labels, minlength=len(source.class_names))
  return [source.class_names[k] for k in np.flatnonzero(counts == 0).tolist()]


def _class_list(names: Sequence[str]) -> str:
  return f'class {names[0]!r}' if len(names) == 1 else f'{len(names)} classes: {listed(map(repr, names))}'


def drop_unreadable(splits: Splits, what: str, on_error: str,
                    pool: ImageSet | None = None) -> tuple[Splits, ImageSet | None, dict[str, list[str]]]:
  """The images that can be read, and the ids of those that cannot.

  With `on_error` 'raise' nothing is tried: the first image that cannot be read ends the run when its turn comes. Links
  to files that are not there are known already, and end it here.

  Args:
    splits: of `target` or `source`, which `what` says.
    what: see `splits`.
    on_error: `config.data.on_error`.
    pool: the pre-training data that is chosen from, where it is.

  Returns:
    The splits, the pool, and the ids of such images by the name of the split: `target train`, ... `source pool`.

  Raises:
    ValueError: with 'raise' an image that is a link to a file that is not there; with 'skip' a class without an image
      left.
  """
  named = {**{f'{what} {split}': source for split, source in splits._asdict().items()}, 'source pool': pool}
  if on_error == 'raise':
    for source in named.values():
      _check_links(source)
    return splits, pool, {}
  readable: dict[str, ImageSet] = {}
  skipped: dict[str, list[str]] = {}
  for name, images in named.items():
    if images is not None:
      readable[name], ids = unreadable.drop(images, name, name.endswith(('train', 'pool')))
      if ids:
        skipped[name] = ids
  left = Splits(readable[f'{what} train'], readable[f'{what} val'], readable.get(f'{what} test'))
  return left, readable.get('source pool'), skipped


def _check_links(source: ImageSet | None) -> None:
  if source is None or not source.broken:
    return
  if broken := sorted(source.broken.intersection(source.ids.tolist())):
    raise ValueError(f'{source.name}: {len(broken):,d} of {len(source):,d} images are links to files that are not '
                     f'there, such as {broken[0]}; restore the files, remove the links, or skip them with '
                     '--config.data.on_error=skip')


def split_fingerprints(splits: Splits) -> dict[str, str | None]:
  """What results.json says of the images, their order and their labels, by split."""
  return {name: None if source is None else source.fingerprint for name, source in splits._asdict().items()}


def check_same_images(splits: Splits, pool: ImageSet | None = None) -> None:
  """Raises ValueError, on every process, where one reads other images than process 0."""
  named = {**splits._asdict(), 'pool': pool}
  parallel.check_same({name: source.fingerprint for name, source in named.items() if source is not None}, 'images')


def skipped_summary(skipped: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
  """What results.json says of images that cannot be read: how many of each split, and the ids of a hundred."""
  return {name: {'images': len(ids), 'first': ids[:100]} for name, ids in skipped.items()}


def cache_in_memory(splits: Splits, what: str, wanted: bool) -> Splits:
  """Where that is wanted, the splits with their decoded images kept in memory; test is read once and is not kept."""
  if not wanted:
    return splits
  train, val = cached({f'{what} train': splits.train, f'{what} val': splits.val}).values()
  return Splits(train, val, splits.test)
