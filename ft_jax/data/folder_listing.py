"""The folders of an image set: which are splits, which are classes, and which files in them are images."""

from collections.abc import Iterator, Sequence
import os
import pathlib
from typing import NamedTuple
import zipfile

from ft_jax import parallel
from ft_jax.data.class_names import normalized, spelled_apart
from ft_jax.data.decode import IMAGE_ENDINGS
from ft_jax.data.folder_scan import Contents, Findings, has_classes, has_image, scan
from ft_jax.data.image_set import UNLABELLED
from ft_jax.data.unused_files import (
  ARCHIVES,
  BESIDE_SPLITS,
  Found,
  is_new,
  LINKED,
  OUTSIDE,
  SECOND_NAME,
  TOO_DEEP,
  Unused,
)
from ft_jax.progress import log

# What the folder of a split may be called, in upper or lower case.
SPLIT_NAMES = {'train': ('train', 'training'), 'val': ('val', 'validation', 'valid'), 'test': ('test', 'testing')}
IMAGENET_VAL = (
    '. ImageNet\'s 50,000 validation images come without folders: sort them into folders named by their WordNet ids '
    '(valprep.sh of github.com/soumith/imagenetloader.torch does), or prepare tfds:imagenet2012, which knows '
    'their classes')


class Listing(NamedTuple):
  """What `list_classes` and `list_images` find.

  Attributes:
    classes: the images of each class, by its name.
    broken: those of the images that are links to files that do not exist.
    unused: what else there is.
  """
  classes: dict[str, list[pathlib.Path]]
  broken: frozenset[pathlib.Path]
  unused: Unused


def list_classes(root: pathlib.Path, split: str, name: str) -> Listing:
  """The images of every class in `root/<split>`, or in `root` itself if its folders are classes.

  `_splits` decides whether a folder is a split or a class. Images without class folders are all of class UNLABELLED.

  Args:
    root: the folder of the set.
    split: one of SPLIT_NAMES, or any name of a folder.
    name: of the set, for messages.

  Raises:
    ValueError: the split does not exist, a folder may be a split or a class, class names look the same, or a class has
      no image; the message says what to do.
  """
  in_root = Findings(root)
  contents = scan(root, in_root, is_top=True)
  base = _base(root, contents.folders, split, name, in_root)
  in_base = in_root
  if base != root:
    in_root.add(OUTSIDE, contents.images)
    in_base = Findings(base)
    contents = scan(base, in_base, is_top=True)
  _check_names(contents.folders, base, name)
  if contents.folders:
    in_base.add(OUTSIDE, contents.images)
    classes = _class_images(base, contents.folders, in_base, name, is_split=base != root)
  elif contents.images and _split_name(base.name) != 'val':
    classes = {UNLABELLED: contents.images}
  elif contents.images:
    raise ValueError(f'{name}: {base} has no class folders but {len(contents.images):,d} images; expected '
                     '<class>/<image> in it' + IMAGENET_VAL)
  else:
    raise ValueError(f'{name}: {base} has no class folders; expected <class>/<image> in it{in_base.summary(root)}')
  return Listing(classes, frozenset(in_root.broken | in_base.broken), Unused(root, {**in_root.found, **in_base.found}))


def list_images(folder: pathlib.Path) -> Listing:
  """All images in a folder and its subfolders, in the order of their names, as one class; hidden ones are left out.

  Links to folders are followed, except to a folder that contains them.
  """
  findings = Findings(folder)
  images = list(_images_below(folder, findings))
  return Listing({UNLABELLED: images}, frozenset(findings.broken), Unused(folder, findings.found))


def _images_below(folder: pathlib.Path, findings: Findings,
                  parents: tuple[tuple[int, int], ...] = ()) -> Iterator[pathlib.Path]:
  stat = os.stat(folder)
  if (stat.st_dev, stat.st_ino) in parents:
    return
  contents = scan(folder, findings, is_top=not parents)
  files = {path.name: path for path in contents.images}
  for name in sorted([*files, *contents.folders]):
    if name in files:
      yield files[name]
    else:
      yield from _images_below(folder / name, findings, (*parents, (stat.st_dev, stat.st_ino)))


def not_a_folder(path: pathlib.Path) -> str:
  """Why a path is not a folder and what to do, in one sentence."""
  if path.is_file() and (path.name.lower().endswith(ARCHIVES) or zipfile.is_zipfile(path)):
    return f'{path} is an archive, not a folder; unpack it, and give the folder that comes out'
  if path.is_file():
    return f'{path} is a file, not a folder; give the path of a folder of <split>/<class>/<image> or <class>/<image>'
  if path.is_symlink():
    return f'{path} is a link to {os.readlink(path)}, which does not exist; give the path of a folder'
  return f'there is no folder {path}; give the path of a folder of <split>/<class>/<image> or <class>/<image>'


# --- splits ---


def _split_name(folder: str) -> str:
  """The split that a folder of this name holds, a key of SPLIT_NAMES; '' for any other name."""
  plain = normalized(folder).casefold()
  return next((split for split, names in SPLIT_NAMES.items() if plain in names), '')


def _base(root: pathlib.Path, folders: Sequence[str], split: str, name: str, findings: Findings) -> pathlib.Path:
  """The folder whose folders are the classes of a split."""
  splits = _splits(root, folders, split, name, findings)
  if not splits:
    if _split_name(split) == 'train':
      return root
    called = next((folder for folder in folders if _split_name(folder)), '')
    hint = f' ({called}/ in it has images itself, as other folders beside it do, so it is a class)' if called else ''
    raise ValueError(f'{name}: the folder has no splits (<class>/<image>), so all of it is called train{hint}: '
                     f'use slices such as train[:80%] and train[80%:] instead of {split!r}')
  same = [folder for folder in splits if _split_name(folder) and _split_name(folder) == _split_name(split)]
  if split in splits:
    findings.add(SECOND_NAME, [root / folder for folder in same if folder != split])
    return root / split
  if not same:
    raise ValueError(f'{name}: there is no split {split!r}; known: {", ".join(folders)}')
  if len(same) > 1:
    raise ValueError(f'{name}: split {split!r} may be {" or ".join(same)}; give the name of one, or remove the others')
  return root / same[0]


def _splits(root: pathlib.Path, folders: Sequence[str], split: str, name: str, findings: Findings) -> list[str]:
  """Those of the folders in `root` that are splits; none if they are classes.

  A split is a folder of class folders with a name of SPLIT_NAMES. If folders beside it have images themselves, a folder
  of such a name that has images is a class (bus/, car/, train/). A folder of any other name is a split if it is asked
  for.

  Raises:
    ValueError: one split beside folders that have images: it is not clear which of the two is meant.
  """
  named = [folder for folder in folders if _split_name(folder)]
  if split in folders and split not in named:
    return [*named, split]
  if not named:
    return []
  beside = [folder for folder in folders if folder not in named and has_image(root / folder, of_any_format=True)]
  with_classes = [folder for folder in named if has_classes(root / folder)] if beside else named
  if beside and len(with_classes) == 1:
    some = ', '.join(beside[:3]) + (f' and {len(beside) - 3} more' if len(beside) > 3 else '')
    raise ValueError(f'{name}: {with_classes[0]}/ in it has class folders, as a split does, but folders beside it have '
                     f'images, as classes do: {some}; expected <split>/<class>/<image> or <class>/<image>. Give '
                     f'folder:{root / with_classes[0]} to use that folder alone, or move it or the others elsewhere')
  if not with_classes:
    return []
  findings.add(BESIDE_SPLITS, [root / folder for folder in beside])
  return named


# --- classes ---


def _check_names(folders: Sequence[str], base: pathlib.Path, name: str) -> None:
  """Raises ValueError for class names that look the same; warns of those that differ in capitals only (letters may)."""
  known: dict[str, str] = {}
  for folder in folders:
    if (other := known.setdefault(normalized(folder), folder)) != folder:
      one, two = spelled_apart(other, folder)
      raise ValueError(f'{name}: {base} has the class folders {one} and {two}, which look the same; put their images '
                       'into one of them, or rename one')
  folded: dict[str, str] = {}
  for folder in folders:
    if (other := folded.setdefault(normalized(folder).casefold(), folder)) != folder:
      if parallel.is_main() and is_new(base, 'capitals', Found(2, base / folder)):
        log.warning('warning: %s: the class folders %r and %r in %s differ in capitals only and are two classes', name,
                    other, folder, base)


def _class_images(base: pathlib.Path, folders: Sequence[str], findings: Findings, name: str,
                  is_split: bool) -> dict[str, list[pathlib.Path]]:
  """The images of each class folder; raises ValueError if one has none."""
  contents = {folder: scan(base / folder, findings) for folder in folders}
  classes = {folder: found.images for folder, found in contents.items()}
  empty = [folder for folder, images in classes.items() if not images]
  if empty:
    raise ValueError(f'{name}: {_why_empty(base, empty, contents, is_split)}')
  for folder, found in contents.items():
    findings.add(TOO_DEEP, list(_deeper_images(base / folder, found.folders, findings)))
  return classes


def _deeper_images(folder: pathlib.Path, folders: Sequence[str], findings: Findings) -> Iterator[pathlib.Path]:
  """Images in the folders of a class folder; links to folders are reported and not followed."""
  for each in folders:
    if (folder / each).is_symlink():
      findings.add(LINKED, [folder / each])
      continue
    contents = scan(folder / each, findings)
    yield from contents.images
    yield from _deeper_images(folder / each, contents.folders, findings)


def _why_empty(base: pathlib.Path, empty: Sequence[str], contents: dict[str, Contents], is_split: bool) -> str:
  """What is wrong with class folders without images, and what to do."""
  first, others = base / empty[0], f' (and {len(empty) - 1} others)' if len(empty) > 1 else ''
  findings = Findings(first)
  inside = scan(first, findings)
  example = next(_deeper_images(first, inside.folders, findings), None)
  if example is None:
    return (f'no image in class folder {first}{others}{findings.summary(first)}; an image ends in '
            f'{", ".join(IMAGE_ENDINGS)}. Fill it or remove it')
  if len(contents) == 1:
    whole = _innermost(first)
    fix = f'move what is in {whole} to {base}' if is_split else f'give folder:{whole}'
    return (f'{base} has one folder, {empty[0]}/, and the images are not in that but in folders further down, such as '
            f'{example}; {fix}')
  return (f'no image in class folder {first}{others}, but there are some in folders further down, such as {example}; '
          'expected <class>/<image>: move the images up or, if the folders are splits, call them train, val and test')


def _innermost(folder: pathlib.Path) -> pathlib.Path:
  """The folder itself, or the first one in it that has more than a single folder without images."""
  contents = scan(folder, Findings(folder))
  if len(contents.folders) != 1 or contents.images:
    return folder
  only = folder / contents.folders[0]
  return folder if _split_name(only.name) or has_image(only) else _innermost(only)
