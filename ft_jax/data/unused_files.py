"""What is in the folder of an image set and is not used, such as images in the wrong place, and what to do about it."""

from collections.abc import Iterable
import dataclasses
import os
import pathlib

from ft_jax import parallel
from ft_jax.data.decode import is_image
from ft_jax.progress import log

# Endings of images in formats that are not read.
OTHER_IMAGES = (
    '.heic', '.heif', '.avif', '.avifs', '.jxl', '.jp2', '.j2k', '.jpf', '.jpx', '.svg', '.psd', '.tga', '.ico',
    '.icns', '.qoi', '.pfm', '.hdr', '.exr', '.dng', '.cr2', '.cr3', '.nef', '.arw', '.orf', '.rw2', '.raf', '.dcm')
ARCHIVES = ('.zip', '.tar', '.tgz', '.gz', '.bz2', '.tbz2', '.xz', '.txz', '.zst', '.7z', '.rar')
TABLES = ('.csv', '.tsv', '.xls', '.xlsx', '.parquet')

# Kinds of unused files; the kind of any other file is its ending.
NO_ENDING, HIDDEN, SPECIAL = 'without an ending', 'hidden', 'special (pipes or devices)'
# Kinds of images or folders in the wrong place.
TOO_DEEP, OUTSIDE = 'image in a folder inside a class folder', 'image outside the class folders'
LINKED, BESIDE_SPLITS = 'link to a folder in a class folder', 'folder of images beside the splits'
SECOND_NAME = 'folder with another name of the same split'
_MISPLACED = (TOO_DEEP, OUTSIDE, LINKED, BESIDE_SPLITS, SECOND_NAME)
# How many kinds are written out.
_MAX_KINDS = 5


@dataclasses.dataclass(frozen=True)
class Found:
  """How many of a kind were found, and the first of them by name."""
  count: int
  first: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Unused:
  """What is in the folder of a set and is not used.

  Attributes:
    root: the folder of the set.
    found: by folder (the root, or that of a split) and kind.
  """
  root: pathlib.Path
  found: dict[tuple[pathlib.Path, str], Found]

  def __add__(self, other: 'Unused') -> 'Unused':
    return Unused(self.root, {**self.found, **other.found})

  def __str__(self) -> str:
    """One clause per kind, images first, then the most frequent: `12 .heic, such as a/1.heic (<what to do>)`."""
    kinds: dict[str, Found] = {}
    for (_, kind), found in self.found.items():
      known = kinds.get(kind, Found(0, found.first))
      kinds[kind] = Found(known.count + found.count, min(known.first, found.first))
    ordered = sorted(kinds.items(), key=lambda item: (not has_images(item[0]), -item[1].count, item[0]))
    clauses = [self._clause(kind, found) for kind, found in ordered[:_MAX_KINDS]]
    if len(ordered) > _MAX_KINDS:
      more = sum(found.count for _, found in ordered[_MAX_KINDS:])
      clauses.append(f'and {more:,d} of {len(ordered) - _MAX_KINDS} other kinds')
    return '; '.join(clauses)

  def _clause(self, kind: str, found: Found) -> str:
    example = found.first.relative_to(self.root).as_posix().replace('\n', r'\n')
    advice = _advice(kind, found.first)
    in_brackets = f' ({advice})' if advice else ''
    if found.count == 1:
      return f'1 {kind}, {example}{in_brackets}'
    plural = kind.replace(' ', 's ', 1) if kind in _MISPLACED else kind
    return f'{found.count:,d} {plural}, such as {example}{in_brackets}'


def has_images(kind: str) -> bool:
  """Whether files of this kind are images, or folders with images."""
  return kind in _MISPLACED or kind.endswith(OTHER_IMAGES)


def _advice(kind: str, first: pathlib.Path) -> str:
  """What to do about unused files of a kind, '' for nothing. Reads the head of `first` if the kind says little."""
  if kind in ADVICE:
    return ADVICE[kind]
  if kind.endswith(OTHER_IMAGES):
    return 'a format that is not read: save as .jpg or .png'
  if kind.endswith(ARCHIVES):
    return 'an archive: unpack it'
  if kind.endswith(TABLES):
    return 'classes are read from the names of folders, not from a table'
  if os.path.isfile(first) and is_image(first):
    return 'an image by its contents: rename it to end in .jpg or .png'
  return ''


_LOGGED: set[tuple[pathlib.Path, str, Found]] = set()


def is_new(folder: pathlib.Path, kind: str, found: Found) -> bool:
  """Whether this process has not logged this yet; it counts as logged from now on."""
  key = (folder, kind, found)
  if key in _LOGGED:
    return False
  _LOGGED.add(key)
  return True


def log_unused(name: str, unused: Iterable[Unused | None]) -> None:
  """Logs in one line what is in a set and is not used; once per process, unless something else is found.

  Args:
    name: of the set.
    unused: of its splits.
  """
  known = [each for each in unused if each is not None and each.found]
  new = [is_new(*key, found) for each in known for key, found in each.found.items()]
  if not any(new):
    return
  merged = sum(known[1:], start=known[0])
  count = sum(found.count for found in merged.found.values())
  counted = f'{count:,d} files or folders are' if count > 1 else '1 file or folder is'
  if parallel.is_main():
    log.warning('warning: %s: %s not used: %s', name, counted, merged)


ADVICE: dict[str, str] = {
    HIDDEN: 'names that begin with a dot are not read',
    TOO_DEEP: 'expected <class>/<image>: move them up',
    OUTSIDE: 'expected <class>/<image>: their class is not known',
    LINKED: 'expected <class>/<image>',
    BESIDE_SPLITS: 'classes are folders inside a split',
    SECOND_NAME: 'put their images into one',
}
