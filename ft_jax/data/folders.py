"""Folders of images: which folders are splits and classes, which files are images, and what is not used."""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import os
import pathlib
from typing import NamedTuple
import unicodedata
import zipfile

from ft_jax import parallel
from ft_jax.data.augment import FORMATS, is_image
from ft_jax.progress import log

# What the folder of a split may be called, with or without capitals.
SPLIT_NAMES = {'train': ('train', 'training'), 'val': ('val', 'validation', 'valid'), 'test': ('test', 'testing')}
IMAGENET_VAL = (
    '. ImageNet\'s 50,000 validation images come without folders: sort them into those of their WordNet ids '
    '(valprep.sh of github.com/soumith/imagenetloader.torch does), or prepare tfds:imagenet2012, which knows their classes')
# The class of images that lie in a folder without class folders: a pool whose labels nobody knows.
UNLABELLED = 'unlabelled'
IMAGE_ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)
# Endings of images that the decoder does not read.
OTHER_IMAGES = (
    '.heic', '.heif', '.avif', '.avifs', '.jxl', '.jp2', '.j2k', '.jpf', '.jpx', '.svg', '.psd', '.tga', '.ico', '.icns',
    '.qoi', '.pfm', '.hdr', '.exr', '.dng', '.cr2', '.cr3', '.nef', '.arw', '.orf', '.rw2', '.raf', '.dcm')
ARCHIVES = ('.zip', '.tar', '.tgz', '.gz', '.bz2', '.tbz2', '.xz', '.txz', '.zst', '.7z', '.rar')
TABLES = ('.csv', '.tsv', '.xls', '.xlsx', '.parquet')
# What operating systems and tools leave behind, which nobody misses.
SYSTEM_NAMES = frozenset((
    '.ds_store', '__macosx', 'thumbs.db', 'ehthumbs.db', 'desktop.ini', '$recycle.bin', 'system volume information',
    'lost+found', '.directory', '.nomedia', '.thumbnails', '.picasa.ini', 'picasa.ini', '@eadir', '.ipynb_checkpoints',
    '.cache', '.git', '.gitkeep', '.gitignore', '.gitattributes'))
# Texts about a whole set, by their names before the ending.
DOCUMENTS = ('readme', 'license', 'licence', 'copying', 'citation', 'changelog')

# Kinds of entries in a folder; any other file's kind is its ending.
_IGNORED, _IMAGE, _BROKEN, _FOLDER = 'ignored', 'image', 'broken link', 'folder'
_NO_ENDING, _HIDDEN, _SPECIAL = 'without an ending', 'hidden', 'special (pipes or devices)'
# What is found in the wrong place.
_DEEPER, _OUTSIDE = 'image in a folder inside a class folder', 'image outside the class folders'
_LINKED, _BESIDE = 'link to a folder in a class folder', 'folder of images beside the splits'
_SECOND = 'folder with another name of the same split'
_NOUNS = (_DEEPER, _OUTSIDE, _LINKED, _BESIDE, _SECOND)  # which have a plural
# So many of them are written out.
_MOST_KINDS = 5


class Found(NamedTuple):
  """How many of a kind were found, and the first of them by name."""
  count: int
  first: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Unused:
  """What lies in a set and is not used.

  Attributes:
    root: the folder of the set.
    found: by kind, for each folder that was listed: the set's own, or that of a split.
  """
  root: pathlib.Path
  found: dict[tuple[pathlib.Path, str], Found]

  def __add__(self, other: 'Unused') -> 'Unused':
    return Unused(self.root, {**self.found, **other.found})

  def __str__(self) -> str:
    """One clause a kind, images and the most frequent ones first: `12 .heic, such as a/1.heic (save as .jpg or .png)`."""
    kinds: dict[str, Found] = {}
    for (_, kind), found in self.found.items():
      known = kinds.get(kind, Found(0, found.first))
      kinds[kind] = Found(known.count + found.count, min(known.first, found.first))
    ordered = sorted(kinds.items(), key=lambda item: (not _is_of_images(item[0]), -item[1].count, item[0]))
    clauses = []
    for kind, (count, first) in ordered[:_MOST_KINDS]:
      advice = _advice(kind, first)
      example = first.relative_to(self.root).as_posix().replace('\n', r'\n')
      noun = kind.replace(' ', 's ', 1) if count > 1 and kind in _NOUNS else kind
      such_as = 'such as ' if count > 1 else ''
      clauses.append(f'{count:,d} {noun}, {such_as}{example}' + (f' ({advice})' if advice else ''))
    more = sum(found.count for _, found in ordered[_MOST_KINDS:])
    return '; '.join(clauses) + (f'; and {more:,d} of {len(ordered) - _MOST_KINDS} other kinds' if more else '')


def _is_of_images(kind: str) -> bool:
  """Whether files of this kind are images, or folders with images."""
  return kind in _NOUNS or kind.endswith(OTHER_IMAGES)


def _advice(kind: str, first: pathlib.Path) -> str:
  """What to do about a kind of unused files, '' for nothing. Reads the head of `first` where the kind says little."""
  if kind in ADVICE:
    return ADVICE[kind]
  if kind.endswith(OTHER_IMAGES):
    return 'a format that is not read here: save as .jpg or .png'
  if kind.endswith(ARCHIVES):
    return 'an archive: unpack it'
  if kind.endswith(TABLES):
    return 'classes are read from the names of folders, not from a table'
  if os.path.isfile(first) and is_image(first):
    return 'an image by its content: let its name end in .jpg or .png'
  return ''


class Listing(NamedTuple):
  """What `list_classes` and `list_images` find.

  Attributes:
    classes: the images of each class, by its name.
    broken: those of the images that are links to files that are not there.
    unused: what else there is.
  """
  classes: dict[str, list[pathlib.Path]]
  broken: frozenset[pathlib.Path]
  unused: Unused


def list_classes(root: pathlib.Path, split: str, name: str) -> Listing:
  """The images of every class below `root/<split>`, or below `root` itself where its folders are classes.

  Whether a folder is a split or a class: see `_splits`. Where there are images and no class folders, all are of the
  class UNLABELLED. A regular file is listed without a system call of its own.

  Args:
    root: the folder of the set.
    split: one of SPLIT_NAMES, or any name of a folder.
    name: of the set, for messages.

  Raises:
    ValueError: a split that is not there, a folder that may be a split or a class, class names that look the same, or
      a class without an image; says what to do.
  """
  noted = _Noted(root)
  contents = _scan(root, noted, top=True)
  base = _base(root, contents.folders, split, name, noted)
  of_base = noted
  if base != root:
    noted.add(_OUTSIDE, contents.images)
    of_base = _Noted(base)
    contents = _scan(base, of_base, top=True)
  _check_names(contents.folders, base, name)
  if contents.folders:
    of_base.add(_OUTSIDE, contents.images)
    classes = _class_images(base, contents.folders, of_base, name, is_split=base != root)
  elif contents.images and _role(base.name) != 'val':
    classes = {UNLABELLED: contents.images}
  else:
    holds = f' but {len(contents.images):,d} images' if contents.images else ''
    other = '' if holds else of_base.told(root)
    raise ValueError(f'{name}: {base} holds no class folders{holds}; expected <class>/<image> in it{other}'
                     + (IMAGENET_VAL if contents.images else ''))
  return Listing(classes, frozenset(noted.broken | of_base.broken), Unused(root, {**noted.found, **of_base.found}))


def list_images(folder: pathlib.Path) -> Listing:
  """All images in a folder and its subfolders, in the order of their names, as one class; hidden ones are left out.

  Links to folders are followed, except to those that they lie in.
  """
  noted = _Noted(folder)
  return Listing({UNLABELLED: list(_images_below(folder, noted))}, frozenset(noted.broken), Unused(folder, noted.found))


def _images_below(folder: pathlib.Path, noted: '_Noted',
                  above: tuple[tuple[int, int], ...] = ()) -> Iterator[pathlib.Path]:
  stat = os.stat(folder)
  if (stat.st_dev, stat.st_ino) in above:
    return
  contents = _scan(folder, noted, top=not above)
  files = {path.name: path for path in contents.images}
  for name in sorted([*files, *contents.folders]):
    if name in files:
      yield files[name]
    else:
      yield from _images_below(folder / name, noted, (*above, (stat.st_dev, stat.st_ino)))


_TOLD: set[tuple[pathlib.Path, str, Found]] = set()


def log_unused(name: str, unused: Iterable[Unused | None]) -> None:
  """Says in one line what lies in a set and is not used; once in a process, unless something else is found.

  Args:
    name: of the set.
    unused: of its splits.
  """
  known = [each for each in unused if each is not None and each.found]
  new = {(*key, found) for each in known for key, found in each.found.items()} - _TOLD
  if not new:
    return
  _TOLD.update(new)
  merged = sum(known[1:], start=known[0])
  count = sum(found.count for found in merged.found.values())
  counted = f'{count:,d} files or folders are' if count > 1 else '1 file or folder is'
  if parallel.is_main():
    log.warning('warning: %s: %s not used: %s', name, counted, merged)


def not_a_folder(path: pathlib.Path) -> str:
  """What is wrong with a path that is no folder, in one sentence with what to do."""
  if path.is_file() and (path.name.lower().endswith(ARCHIVES) or zipfile.is_zipfile(path)):
    return f'{path} is an archive, not a folder; unpack it, and give the folder that it makes'
  if path.is_file():
    return f'{path} is a file, not a folder; give the path of a folder of <split>/<class>/<image> or <class>/<image>'
  if path.is_symlink():
    return f'{path} is a link to {os.readlink(path)}, which is not there; give the path of a folder'
  return f'there is no folder {path}; give the path of a folder of <split>/<class>/<image> or <class>/<image>'


def look_alike(ones: Iterable[str], others: Iterable[str]) -> dict[tuple[str, str], tuple[str, str]]:
  """Pairs of different names, one of each, that look the same or differ by capitals only, and how to write them apart."""
  known = {_plain(name).casefold(): name for name in ones}
  pairs = ((known.get(_plain(other).casefold(), other), other) for other in sorted(others))
  return {(one, other): _written(one, other) for one, other in pairs if one != other}


def _plain(name: str) -> str:
  """A name without what nobody sees: surplus blanks, and how accents are stored (macOS takes them off the letters)."""
  return ' '.join(unicodedata.normalize('NFC', name).split())


def _written(one: str, other: str) -> tuple[str, str]:
  same_on_paper = unicodedata.normalize('NFC', one) == unicodedata.normalize('NFC', other)
  return (ascii(one), ascii(other)) if same_on_paper else (repr(one), repr(other))


# --- one folder ---


class _Noted:
  """What is found below one folder beside its images: what is not used, and links that lead nowhere."""

  def __init__(self, place: pathlib.Path):
    self.place = place
    self.found: dict[tuple[pathlib.Path, str], Found] = {}
    self.broken: set[pathlib.Path] = set()

  def add(self, kind: str, paths: Sequence[pathlib.Path]) -> None:
    """Some more files of a kind."""
    if paths:
      known = self.found.get((self.place, kind), Found(0, paths[0]))
      self.found[self.place, kind] = Found(known.count + len(paths), min(known.first, *paths))

  def told(self, root: pathlib.Path) -> str:
    """For the end of a message: what there is instead of images."""
    return f'; it holds {Unused(root, self.found)}' if self.found else ''


class _Contents(NamedTuple):
  """The images in a folder, in no order, and the names of the folders in it, sorted."""
  images: list[pathlib.Path]
  folders: list[str]


def _scan(folder: pathlib.Path, noted: _Noted, top: bool = False) -> _Contents:
  """Lists one folder; `top` is of the folders that hold classes, where a README is no news."""
  images, folders = [], []
  with os.scandir(folder) as entries:
    for entry in entries:
      kind = _kind(entry, top)
      if kind == _FOLDER:
        folders.append(entry.name)
      elif kind in (_IMAGE, _BROKEN):
        images.append(folder / entry.name)
        if kind == _BROKEN:
          noted.broken.add(images[-1])
      elif kind != _IGNORED:
        noted.add(kind, [folder / entry.name])
  return _Contents(images, sorted(folders))


def _kind(entry: os.DirEntry[str], top: bool = False) -> str:
  """What an entry of a folder is: one of the kinds above, or the ending of its name."""
  name, link = entry.name.lower(), entry.is_symlink()
  hidden, ends_well = name.startswith('.'), name.endswith(IMAGE_ENDINGS)
  if ends_well and not hidden and not link and entry.is_file():
    return _IMAGE
  if name in SYSTEM_NAMES or name.startswith('._'):
    return _IGNORED
  # Not the entry's own methods, which raise for a link to itself.
  if os.path.isdir(entry.path) if link else entry.is_dir():
    return _HIDDEN if hidden else _FOLDER
  if hidden:
    return _HIDDEN
  if link and not os.path.exists(entry.path):
    return _BROKEN if ends_well else pathlib.PurePath(name).suffix or _NO_ENDING
  if not os.path.isfile(entry.path):  # opening a pipe waits for ever
    return _SPECIAL
  if ends_well:
    return _IMAGE
  return _IGNORED if top and name.partition('.')[0] in DOCUMENTS else pathlib.PurePath(name).suffix or _NO_ENDING


# --- splits ---


def _role(folder: str) -> str:
  """The split that a folder of this name holds; '' for any other name."""
  plain = _plain(folder).casefold()
  return next((split for split, names in SPLIT_NAMES.items() if plain in names), '')


def _base(root: pathlib.Path, folders: Sequence[str], split: str, name: str, noted: _Noted) -> pathlib.Path:
  """The folder whose folders are the classes of a split."""
  splits = _splits(root, folders, split, name, noted)
  if not splits:
    if _role(split) == 'train':
      return root
    called = next((folder for folder in folders if _role(folder)), '')
    called = f' ({called}/ in it holds images itself beside other folders that do, so it is a class)' if called else ''
    raise ValueError(f'{name}: the folder has no splits (<class>/<image>), so all of it is called train{called}: '
                     f'use slices such as train[:80%] and train[80%:] instead of {split!r}')
  same = [folder for folder in splits if _role(folder) and _role(folder) == _role(split)]
  if split in splits:
    noted.add(_SECOND, [root / folder for folder in same if folder != split])
    return root / split
  if not same:
    raise ValueError(f'{name}: there is no split {split!r}; known: {", ".join(folders)}')
  if len(same) > 1:
    raise ValueError(f'{name}: split {split!r} may be {" or ".join(same)}; name the one that is meant, or remove the '
                     'others')
  return root / same[0]


def _splits(root: pathlib.Path, folders: Sequence[str], split: str, name: str, noted: _Noted) -> list[str]:
  """Those of the folders in `root` that are splits; none where they are classes.

  A split is a folder of class folders with a name of SPLIT_NAMES. Beside folders that hold images themselves, a folder of
  such a name that holds images is a class (bus/, car/, train/). A folder of any other name is a split where it is asked for.

  Raises:
    ValueError: one split beside folders that hold images: either might be what is meant.
  """
  named = [folder for folder in folders if _role(folder)]
  if split in folders and split not in named:
    return [*named, split]
  beside = [folder for folder in folders if folder not in named and _holds_image(root / folder, of_any_kind=True)] if named else []
  nested = [folder for folder in named if _holds_classes(root / folder)] if beside else named
  if beside and len(nested) == 1:
    some = ', '.join(beside[:3]) + (f' and {len(beside) - 3} more' if len(beside) > 3 else '')
    raise ValueError(f'{name}: {nested[0]}/ in it holds class folders, as a split does, but folders beside it hold images, '
                     f'as classes do: {some}; expected <split>/<class>/<image> or <class>/<image>. Give '
                     f'folder:{root / nested[0]} to use that folder alone, or move it or the others elsewhere')
  if nested:
    noted.add(_BESIDE, [root / folder for folder in beside])
  return named if nested else []


def _holds_image(folder: pathlib.Path, of_any_kind: bool = False) -> bool:
  """Whether images lie in a folder itself; those that are not read here, too, where `of_any_kind` says so."""
  with os.scandir(folder) as entries:
    kinds = map(_kind, entries)
    return any(kind in (_IMAGE, _BROKEN) or of_any_kind and _is_of_images(kind) for kind in kinds)


def _holds_classes(folder: pathlib.Path) -> bool:
  """Whether a folder holds folders that hold images or folders."""
  with os.scandir(folder) as entries:
    inside = (folder / entry.name for entry in entries if _kind(entry) == _FOLDER)
    return any(_holds_image(path) or _holds_folder(path) for path in inside)


def _holds_folder(folder: pathlib.Path) -> bool:
  with os.scandir(folder) as entries:
    return any(_kind(entry) == _FOLDER for entry in entries)


# --- classes ---


def _check_names(folders: Sequence[str], base: pathlib.Path, name: str) -> None:
  """Raises ValueError for class names that look the same; warns of those that differ by capitals only (letters may)."""
  seen: dict[str, str] = {}
  for folder in folders:
    if (other := seen.setdefault(_plain(folder), folder)) != folder:
      one, two = _written(other, folder)
      raise ValueError(f'{name}: {base} holds the class folders {one} and {two}, which look the same; put their images '
                       'into one of them, or rename one')
  folded: dict[str, str] = {}
  for folder in folders:
    if (other := folded.setdefault(_plain(folder).casefold(), folder)) != folder:
      key = (base, 'capitals', Found(2, base / folder))
      if parallel.is_main() and key not in _TOLD:
        _TOLD.add(key)
        log.warning('warning: %s: the class folders %r and %r in %s differ by capitals only and are two classes', name,
                    other, folder, base)


def _class_images(base: pathlib.Path, folders: Sequence[str], noted: _Noted, name: str,
                  is_split: bool) -> dict[str, list[pathlib.Path]]:
  """The images of each class folder; raises ValueError where one has none."""
  contents = {folder: _scan(base / folder, noted) for folder in folders}
  classes = {folder: found.images for folder, found in contents.items()}
  empty = [folder for folder, images in classes.items() if not images]
  if empty:
    raise ValueError(f'{name}: {_why_empty(base, empty, contents, is_split)}')
  for folder, found in contents.items():
    noted.add(_DEEPER, list(_deeper(base / folder, found.folders, noted)))
  return classes


def _deeper(folder: pathlib.Path, folders: Sequence[str], noted: _Noted) -> Iterator[pathlib.Path]:
  """Images below the folders in a class folder; links to folders are noted and not followed."""
  for each in folders:
    if (folder / each).is_symlink():
      noted.add(_LINKED, [folder / each])
      continue
    contents = _scan(folder / each, noted)
    yield from contents.images
    yield from _deeper(folder / each, contents.folders, noted)


def _why_empty(base: pathlib.Path, empty: Sequence[str], contents: dict[str, _Contents], is_split: bool) -> str:
  """What is wrong with class folders without images, and what to do."""
  first, others = base / empty[0], f' (and {len(empty) - 1} others)' if len(empty) > 1 else ''
  noted = _Noted(first)
  inside = _scan(first, noted)
  example = next(_deeper(first, inside.folders, noted), None)
  if example is None:
    return (f'no image in class folder {first}{others}{noted.told(first)}; an image ends in '
            f'{", ".join(IMAGE_ENDINGS)}. Fill it or remove it')
  if len(contents) == 1:
    whole = _innermost(first)
    instead = f'move what is in {whole} to {base}' if is_split else f'give folder:{whole}'
    return (f'{base} holds one folder, {empty[0]}/, and no image lies in that itself but in folders below it, such as '
            f'{example}; {instead}')
  return (f'no image in class folder {first}{others}, but there are in folders below it, such as {example}; expected '
          '<class>/<image>: move the images up, or, if the folders are splits, call them train, val and test')


def _innermost(folder: pathlib.Path) -> pathlib.Path:
  """The folder itself, or the first one below it that holds more than one other folder without images."""
  contents = _scan(folder, _Noted(folder))
  only = folder / contents.folders[0] if len(contents.folders) == 1 and not contents.images else None
  return folder if only is None or _role(only.name) or _holds_image(only) else _innermost(only)


ADVICE: dict[str, str] = {
    _HIDDEN: 'names that begin with a dot are not read',
    _DEEPER: 'expected <class>/<image>: move them up',
    _OUTSIDE: 'expected <class>/<image>: their class is not known',
    _LINKED: 'expected <class>/<image>',
    _BESIDE: 'classes are folders in a split',
    _SECOND: 'put their images into one',
}
