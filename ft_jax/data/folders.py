"""Folders of images: which of their folders are splits and classes, and which of their files are images."""

import os
import pathlib

ALSO_CALLED = {'val': 'validation', 'validation': 'val'}  # folders with the same meaning
IMAGENET_VAL = ('. ImageNet\'s 50,000 validation images come without folders: sort them into those of their WordNet ids '
                '(valprep.sh of github.com/soumith/imagenetloader.torch does), or prepare tfds:imagenet2012, which knows their classes')
# The class of images that lie in a folder without class folders: a pool whose labels nobody knows.
UNLABELLED = 'unlabelled'
IMAGE_ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.ppm')


def list_classes(root: pathlib.Path, split: str, name: str) -> dict[str, list[pathlib.Path]]:
  """The images of every class below `root/<split>`, or below `root` itself where no split folder is there.

  Where there are images and no class folders, all are of the class UNLABELLED.
  """
  has_splits = any((root / folder).is_dir() for folder in ('train', 'val', 'test', 'validation', split))
  base = root / split if has_splits else root
  if has_splits and not base.is_dir() and split in ALSO_CALLED:
    base = root / ALSO_CALLED[split]
  if not base.is_dir():
    raise ValueError(f'{name}: there is no split {split!r}; known: {", ".join(_folders(root))}')
  if not has_splits and split != 'train':
    raise ValueError(f'{name}: the folder has no splits (<class>/<image>), so all of it is called train: '
                     f'use slices such as train[:80%] and train[80%:] instead of {split!r}')
  classes = {folder: _images(base / folder) for folder in _folders(base)}
  if not classes:
    flat = _images(base)
    if flat and base.name not in ALSO_CALLED:
      return {UNLABELLED: flat}
    raise ValueError(f'{name}: {base} holds no class folders' + (f' but {len(flat):,d} images' if flat else '')
                     + '; expected <class>/<image> in it' + (IMAGENET_VAL if flat else ''))
  empty = [folder for folder, files in classes.items() if not files]
  if empty:
    raise ValueError(f'{name}: no image in class folder {base / empty[0]}'
                     + (f' and {len(empty) - 1} others' if len(empty) > 1 else '')
                     + f'; an image ends in {", ".join(IMAGE_ENDINGS)}. Fill it or remove it')
  return classes


def _folders(path: pathlib.Path) -> list[str]:
  # Not the entry's own methods, which raise for a link to itself.
  return sorted(e.name for e in os.scandir(path) if os.path.isdir(e.path) and not e.name.startswith('.'))


def _images(path: pathlib.Path) -> list[pathlib.Path]:
  return [path / e.name for e in os.scandir(path)
          if e.name.lower().endswith(IMAGE_ENDINGS) and not e.name.startswith('.') and os.path.isfile(e.path)]
