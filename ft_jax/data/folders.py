"""Back-end for folders of images, `folder:<path>`: `<split>/<class>/<image>` or `<class>/<image>`."""

import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

from ft_jax.data import contents, imagenet
from ft_jax.data.class_names import class_difference
from ft_jax.data.folder_listing import list_classes, not_a_folder
from ft_jax.data.image_set import digest, ImageSet


class SplitPart(NamedTuple):
  """One term of a split expression: a name and the bounds of its slice, each None, `'90%'` or `'100'`."""
  name: str
  start: str | None
  stop: str | None


def parse_split(split: str) -> list[SplitPart]:
  """Reads `train`, `train[:90%]`, `train[10:]+val`; raises ValueError for anything else."""
  parts = []
  for term in split.split('+'):
    match = re.fullmatch(r'\s*([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?\s*', term)
    if not match:
      raise ValueError(f'split {split!r}: expected a name, such as train, or a slice, such as train[:90%] '
                       'or train[10:]')
    parts.append(SplitPart(*match.groups()))
  return parts


def open_folder(path: str, split: str, data_dir: str) -> ImageSet:
  """Opens a split of a folder; arguments as of `ft_jax.data.open_set`, a relative path starts at `data_dir`.

  Raises:
    ValueError: the folder or split does not exist or has no images, or its parts have different classes.
  """
  root = pathlib.Path(os.path.expanduser(path))
  root = root if root.is_absolute() else pathlib.Path(os.path.expanduser(data_dir)) / root
  name = f'folder:{path}'
  if not root.is_dir():
    raise ValueError(f'{name}: {not_a_folder(root)}')
  parts = parse_split(split)
  listings = [list_classes(root, part.name, name) for part in parts]
  folder_names = tuple(listings[0].classes)
  for part, listing in zip(parts, listings):
    if tuple(listing.classes) != folder_names:
      raise ValueError(f'{name}: the classes of {part.name} and {parts[0].name} differ: '
                       + class_difference(parts[0].name, folder_names, part.name, tuple(listing.classes)))
  paths, labels = [], []
  for label, folder_name in enumerate(folder_names):
    for part, listing in zip(parts, listings):
      chosen = _slice(listing.classes[folder_name], part)
      paths += chosen
      labels += [label] * len(chosen)
  if not paths:
    raise ValueError(f'{name}: split {split!r} has no images; the slice is empty')
  ids = [path.relative_to(root).as_posix() for path in paths]
  broken = frozenset(path.relative_to(root).as_posix() for listing in listings for path in listing.broken)
  # ImageNet's folders are sorted by WordNet id, as TFDS's labels are; the examples' ids keep the WordNet ids.
  class_names = imagenet.human_names(folder_names)
  hashes, sizes = contents.of_files(paths, str(root), f'{name} {split}')
  return ImageSet(
      f'{name} {split}', class_names, np.asarray(labels, np.int32), np.asarray(ids), np.arange(len(paths)),
      read=lambda row: contents.read_file(paths[row]),
      fingerprint=digest(*ids, hashes.tobytes(), *class_names),
      contents=hashes,
      legacy_fingerprint=digest(*ids, *map(str, sizes), *class_names),
      broken=broken,
      unused=sum((listing.unused for listing in listings[1:]), listings[0].unused))


def _slice(paths: list[pathlib.Path], part: SplitPart) -> list[pathlib.Path]:
  """The part of a class's images that a slice names, in the order of their paths."""
  # A fixed shuffle: the first files by name may be frames of one video, or the work of one writer.
  shuffled = sorted(paths, key=lambda path: digest(path.name))
  return sorted(shuffled[_bound(part.start, len(paths), 0):_bound(part.stop, len(paths), len(paths))])


def _bound(text: str | None, size: int, default: int) -> int:
  if text is None:
    return default
  value = round(int(text[:-1]) * size / 100) if text.endswith('%') else int(text)
  # The sign is that of the text, not of the value: -10% of three images is minus none, counted from the end.
  return max(0, min(size, value + size if text.startswith('-') else value))
