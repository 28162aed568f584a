"""One folder of an image set: which entries are images, which are folders, and what else is in it."""

from collections.abc import Sequence
import os
import pathlib
from typing import NamedTuple

from ft_jax.data.decode import IMAGE_ENDINGS
from ft_jax.data.unused_files import Found, has_images, HIDDEN, NO_ENDING, SPECIAL, Unused

# What operating systems and tools leave behind, and nobody misses.
SYSTEM_NAMES = frozenset((
    '.ds_store', '__macosx', 'thumbs.db', 'ehthumbs.db', 'desktop.ini', '$recycle.bin', 'system volume information',
    'lost+found', '.directory', '.nomedia', '.thumbnails', '.picasa.ini', 'picasa.ini', '@eadir', '.ipynb_checkpoints',
    '.cache', '.git', '.gitkeep', '.gitignore', '.gitattributes'))
# Texts about a whole set, by their names without the ending.
DOCUMENTS = ('readme', 'license', 'licence', 'copying', 'citation', 'changelog')

# Kinds of entries; those of unused files are in unused_files.py.
_IGNORED, _IMAGE, _BROKEN, _FOLDER = 'ignored', 'image', 'broken link', 'folder'


class Findings:
  """What a folder has apart from its images: files that are not used, and links to images that do not exist."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.found: dict[tuple[pathlib.Path, str], Found] = {}
    self.broken: set[pathlib.Path] = set()

  def add(self, kind: str, paths: Sequence[pathlib.Path]) -> None:
    """Adds files of a kind."""
    if paths:
      known = self.found.get((self.folder, kind), Found(0, paths[0]))
      self.found[self.folder, kind] = Found(known.count + len(paths), min(known.first, *paths))

  def summary(self, root: pathlib.Path) -> str:
    """For the end of a message: what there is instead of images."""
    return f'; it holds {Unused(root, self.found)}' if self.found else ''


class Contents(NamedTuple):
  """The images in a folder, in no particular order, and the names of the folders in it, sorted."""
  images: list[pathlib.Path]
  folders: list[str]


def scan(folder: pathlib.Path, findings: Findings, is_top: bool = False) -> Contents:
  """Lists one folder. `is_top`: it contains the class folders, and a README in it is not worth a warning."""
  images, folders = [], []
  with os.scandir(folder) as entries:
    for entry in entries:
      kind = _kind(entry, is_top)
      if kind == _FOLDER:
        folders.append(entry.name)
      elif kind in (_IMAGE, _BROKEN):
        images.append(folder / entry.name)
        if kind == _BROKEN:
          findings.broken.add(images[-1])
      elif kind != _IGNORED:
        findings.add(kind, [folder / entry.name])
  return Contents(images, sorted(folders))


def has_image(folder: pathlib.Path, of_any_format: bool = False) -> bool:
  """Whether a folder itself has images; with `of_any_format`, also ones that cannot be read here."""
  with os.scandir(folder) as entries:
    kinds = map(_kind, entries)
    return any(kind in (_IMAGE, _BROKEN) or of_any_format and has_images(kind) for kind in kinds)


def has_classes(folder: pathlib.Path) -> bool:
  """Whether a folder has folders that have images or folders."""
  with os.scandir(folder) as entries:
    inside = (folder / entry.name for entry in entries if _kind(entry) == _FOLDER)
    return any(has_image(path) or _has_folder(path) for path in inside)


def _has_folder(folder: pathlib.Path) -> bool:
  with os.scandir(folder) as entries:
    return any(_kind(entry) == _FOLDER for entry in entries)


def _kind(entry: os.DirEntry[str], is_top: bool = False) -> str:
  """What an entry of a folder is: one of the kinds above, or the ending of its name.

  A regular image needs no system call: a pool may have a million files on a slow disk.
  """
  name, is_link = entry.name.lower(), entry.is_symlink()
  is_hidden, is_named_image = name.startswith('.'), name.endswith(IMAGE_ENDINGS)
  if is_named_image and not is_hidden and not is_link and entry.is_file():
    return _IMAGE
  if name in SYSTEM_NAMES or name.startswith('._'):
    return _IGNORED
  # The entry's own methods raise for a link to itself.
  is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
  if is_hidden:
    return HIDDEN
  if is_folder:
    return _FOLDER
  ending = pathlib.PurePath(name).suffix or NO_ENDING
  if is_link and not os.path.exists(entry.path):
    return _BROKEN if is_named_image else ending
  if not os.path.isfile(entry.path):  # opening a pipe would wait for ever
    return SPECIAL
  if is_named_image:
    return _IMAGE
  is_document = is_top and name.partition('.')[0] in DOCUMENTS
  return _IGNORED if is_document else ending
