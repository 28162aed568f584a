"""The splits of a data set that is trained on: opened, checked, without images that cannot be read."""

from collections.abc import Mapping, Sequence
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


class Splits(NamedTuple):
  """The splits of a data set that is trained on; `test` is None where there is none."""
  train: ImageSet
  val: ImageSet
  test: ImageSet | None


def open_splits(config: ConfigDict, data_dir: str, seed: int) -> Splits:
  """Opens train, val (carved out of train where it has no name) and test of `config.target` or `config.source`.

  Raises:
    ValueError: a set, split or folder that is not there or has no classes, or splits of different classes or with images in common.
  """
  # The pre-training data has neither field.
  per_class, fraction, left_out = config.get('train_per_class', 0), config.get('train_fraction', 1.0), config.get('without', ())
  opened = lambda split: _labelled(open_set(config.name, split, data_dir, quiet=True)).without(left_out)
  train, rest = opened(config.train), None
  if per_class or fraction < 1:
    train, rest = sample_per_class(train, per_class, seed, fraction)
  if config.val:
    val = opened(config.val)
  else:
    train, val = split_off_val(train, config.val_fraction, seed)
  test = rest if config.test == 'rest' and rest is not None else opened(config.test) if config.test else None
  log_unused(config.name, [source.unused for source in (train, val, test) if source is not None])
  if test is not None and not len(test):
    drawn = f'train_per_class {per_class}' if per_class else f'train_fraction {fraction}'
    raise ValueError(f'{train.name}: {drawn} leaves no image for test')
  for other in (val, test):
    if other is not None and other.class_names != train.class_names:
      raise ValueError(f'{train.name} and {other.name} have different classes: '
                       + class_difference(train.name, train.class_names, other.name, other.class_names))
  for one, other in ((train, val), (train, test), (val, test)):
    if other is not None and (shared := set(one.ids.tolist()) & set(other.ids.tolist())):
      raise ValueError(f'{one.name} and {other.name} share {len(shared):,d} images, such as {min(shared)}; what is measured on images '
                       'that were trained on means nothing. Give slices that do not overlap, such as train[:80%] and train[80%:]')
  return Splits(train, val, test)


def _labelled(source: ImageSet) -> ImageSet:
  if source.class_names == (UNLABELLED,):
    raise ValueError(f'{source.name} holds no class folders but {len(source):,d} images, so their classes are not known; expected '
                     '<class>/<image> in it: classes are read from the names of folders, not from a table (docs/data.md turns a .csv into '
                     'folders). Images without classes can be a pool: config.source.name with methods.fixmatch')
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
    raise ValueError(f'{train.name} has one class, {train.class_names[0]!r}, so a classifier is always right and learns '
                     'nothing; expected at least two classes (to tell one class from everything else, add a class of other '
                     'images)')
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
  raise ValueError(f'{named} (images of {missing[0]!r}: {", ".join(counts)}); add images, use a larger slice for train, or '
                   f'leave such classes out: {leave_out}')


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


def drop_unreadable(splits: Splits, what: str, on_error: str, pool: ImageSet | None = None) -> tuple[Splits, ImageSet | None, dict[str, list[str]]]:
  """The images that can be read, and the ids of those that cannot.

  With `on_error` 'raise' nothing is tried: the first image that cannot be read ends the run when its turn comes. Links to
  files that are not there are known already, and end it here.

  Args:
    splits: of `target` or `source`, which `what` says.
    what: see `splits`.
    on_error: `config.data.on_error`.
    pool: the pre-training data that is chosen from, where it is.

  Returns:
    The splits, the pool, and the ids of such images by the name of the split: `target train`, ... `source pool`.

  Raises:
    ValueError: with 'raise' an image that is a link to a file that is not there; with 'skip' a class without an image left.
  """
  named = {**{f'{what} {split}': source for split, source in splits._asdict().items()}, 'source pool': pool}
  if on_error == 'raise':
    for source in named.values():
      _check_links(source)
    return splits, pool, {}
  tried = {name: unreadable.drop(source, name, name.endswith(('train', 'pool'))) if source is not None else (None, [])
           for name, source in named.items()}
  *kept, pool = (source for source, _ in tried.values())
  return Splits(*kept), pool, {name: ids for name, (_, ids) in tried.items() if ids}


def _check_links(source: ImageSet | None) -> None:
  broken = sorted(source.broken.intersection(source.ids.tolist())) if source is not None and source.broken else []
  if broken:
    raise ValueError(f'{source.name}: {len(broken):,d} of {len(source):,d} images are links to files that are not there, such '
                     f'as {broken[0]}; restore the files, remove the links, or skip them with --config.data.on_error=skip')


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
  kept = cached({f'{what} train': splits.train, f'{what} val': splits.val})
  return Splits(*kept.values(), splits.test)
