"""Images without classes as a source: a folder with all that is below it, one image, or a list of paths."""

import os
import pathlib
from typing import NamedTuple

import numpy as np

from ft_jax.data import contents
from ft_jax.data.augment import is_image
from ft_jax.data.folders import IMAGE_ENDINGS, list_images, log_unused, OTHER_IMAGES, UNLABELLED
from ft_jax.data.image_set import digest, ImageSet, MOST_BYTES, read_file


class Files(NamedTuple):
  """Images by their paths.

  Attributes:
    names: all of them in order: paths below the folder, the image as it was given, or the lines of the list, each as often as it is there.
    source: those that are files, all of class 0, with the names as ids.
    problems: what is wrong with the others, by name.
    listed: whether they come from a list.
  """
  names: list[str]
  source: ImageSet
  problems: dict[str, str]
  listed: bool


def open_files(images: str) -> Files:
  """Opens images by their paths, in a stable order: a folder's by name, a list's as it says.

  Args:
    images: a folder, an image, or a text file of paths, one a line; relative ones start at the folder of the text file.

  Raises:
    ValueError: a path that is not there or holds no image, or a list that is no text.
  """
  if not images:
    raise ValueError('config.predict.images is empty; give a folder, an image, or a text file of paths, one a line')
  path, lines = pathlib.Path(os.path.expanduser(images)), []
  # One file that is named is known by its content too: a list of paths begins otherwise.
  one = not path.is_dir() and (path.name.lower().endswith(IMAGE_ENDINGS) or path.is_file() and is_image(path))
  if path.is_dir():
    listing = list_images(path)
    found = {file.relative_to(path).as_posix(): file for file in listing.classes[UNLABELLED]}
    if not found:
      holds = f'; it holds {listing.unused}' if listing.unused.found else ''
      raise ValueError(f'config.predict.images: no image in {images} and its subfolders{holds}; an image ends in '
                       f'{", ".join(IMAGE_ENDINGS)}')
    log_unused(images, [listing.unused])
  elif one:
    found = {images: path}
  elif path.is_file():
    lines = _listed(path, images)
    found = {line: path.parent / os.path.expanduser(line) for line in lines}
  else:
    raise ValueError(f'config.predict.images: there is no file or folder {images}')
  problems = {name: problem for name, file in found.items() if (problem := _problem(file))}
  if one and problems:
    raise ValueError(f'config.predict.images: {images}: {problems[images]}')
  files = [file for name, file in found.items() if name not in problems]
  ids = [name for name in found if name not in problems]
  hashes, _ = contents.of_files(files, str(path), images, MOST_BYTES)
  source = ImageSet(images, ('',), np.zeros(len(files), np.int32), np.asarray(ids, dtype=str), np.arange(len(files)),
                  lambda row: read_file(files[row]), digest(*ids, hashes.tobytes()), hashes)
  return Files(lines or list(found), source, problems, bool(lines))


def _listed(path: pathlib.Path, name: str) -> list[str]:
  try:
    # Editors on Windows begin a file with a mark.
    lines = [line.strip() for line in path.read_text(encoding='utf-8-sig').split('\n') if line.strip()]
  except UnicodeDecodeError as error:
    if path.name.lower().endswith(OTHER_IMAGES):
      raise ValueError(f'config.predict.images: {name} is of a format that is not read here; save it as .jpg or '
                       '.png') from error
    raise ValueError(f'config.predict.images: {name} is neither text, one path a line, nor does its name end as that of an image: '
                     f'{", ".join(IMAGE_ENDINGS)}') from error
  if not lines:
    raise ValueError(f'config.predict.images: the list {name} is empty; expected paths of images, one a line')
  return lines


def _problem(path: pathlib.Path) -> str:
  if not path.is_file():
    return f'{path} is a link to a file that is not there' if path.is_symlink() else f'there is no file {path}'
  if path.stat().st_size > MOST_BYTES:
    return f'{path} has more bytes than an image ({MOST_BYTES:,d})'
  return '' if os.access(path, os.R_OK) else f'{path} may not be read (permissions)'
