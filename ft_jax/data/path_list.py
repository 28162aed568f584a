"""Back-end for image files by their paths: `from_files` for Python users, `open_paths` for job predict."""

from collections.abc import Iterable, Sequence
import os
import pathlib
from typing import NamedTuple

import numpy as np

from ft_jax.data import contents
from ft_jax.data.decode import IMAGE_ENDINGS, is_image
from ft_jax.data.folder_listing import list_images
from ft_jax.data.image_set import digest, ImageSet, Labels, UNLABELLED
from ft_jax.data.labels import as_class_labels
from ft_jax.data.unused_files import log_unused, OTHER_IMAGES


class PathList(NamedTuple):
  """Images by their paths.

  Attributes:
    names: all of them in order: paths relative to the folder, the image as given, or the lines of the list.
    images: those that are files, all of one class, with the names as ids.
    problems: what is wrong with the others, by name.
    is_list: whether they come from a list of paths.
  """
  names: list[str]
  images: ImageSet
  problems: dict[str, str]
  is_list: bool


def open_paths(path: str) -> PathList:
  """Opens images by their paths, in a fixed order: those of a folder by name, those of a list in its order.

  Args:
    path: a folder, an image, or a text file of paths, one per line; relative ones start at the folder of the text file.

  Raises:
    ValueError: the path does not exist or has no images, or the list is not text.
  """
  if not path:
    raise ValueError('config.predict.images is empty; give a folder, an image, or a text file of paths, one per line')
  given = pathlib.Path(os.path.expanduser(path))
  # A single image is recognised by its contents too: a list of paths begins differently.
  looks_like_image = given.name.lower().endswith(IMAGE_ENDINGS) or given.is_file() and is_image(given)
  is_one_image = looks_like_image and not given.is_dir()
  lines: list[str] = []
  if given.is_dir():
    files = _in_folder(given, path)
  elif is_one_image:
    files = {path: given}
  elif given.is_file():
    lines = _read_list(given, path)
    files = {line: given.parent / os.path.expanduser(line) for line in lines}
  else:
    raise ValueError(f'config.predict.images: there is no file or folder {path}')
  problems = {name: problem for name, file in files.items() if (problem := file_problem(file))}
  if is_one_image and problems:
    raise ValueError(f'config.predict.images: {path}: {problems[path]}')
  readable = {name: file for name, file in files.items() if name not in problems}
  return PathList(lines or list(files), _image_set(path, readable, str(given)), problems, bool(lines))


def from_files(paths: Sequence[str | os.PathLike[str]], labels: Labels | None = None,
               class_names: Sequence[str] | None = None, name: str = 'files', argument: str = 'paths') -> ImageSet:
  """Makes an image set of image files; see `ImageSet.from_files`. Messages call the paths `argument`."""
  if isinstance(paths, (str, bytes, os.PathLike)) or not isinstance(paths, Iterable):
    raise ValueError(f'{argument} is {paths!r}; expected a list of paths (a folder is for ImageSet.from_folder)')
  given = list(paths)
  if wrong := [i for i, path in enumerate(given) if not isinstance(path, (str, os.PathLike))]:
    raise ValueError(f'{argument}[{wrong[0]}] is of type {type(given[wrong[0]]).__name__}; expected a path')
  ids = [os.fspath(path) for path in given]
  if not ids:
    raise ValueError(f'{argument} is empty; expected at least one image')
  files = [pathlib.Path(os.path.expanduser(path)) for path in ids]
  first: dict[str, int] = {}
  for i, (path, file) in enumerate(zip(ids, files)):
    if problem := file_problem(file):
      raise ValueError(f'{argument}[{i}]: {problem}')
    if first.setdefault(path, i) != i:
      raise ValueError(f'{argument}[{i}] is {path!r}, as is {argument}[{first[path]}]; give each image once')
  numbers, names = as_class_labels(labels, class_names, len(ids))
  hashes, _ = contents.of_files(files, os.path.commonpath([os.path.abspath(file) for file in files]), name)
  return ImageSet(
      name, names, numbers, np.asarray(ids), np.arange(len(ids)),
      read=lambda row: contents.read_file(files[row]),
      fingerprint=digest(*ids, hashes.tobytes(), numbers.tobytes(), *names),
      contents=hashes)


def _image_set(name: str, files: dict[str, pathlib.Path], root: str) -> ImageSet:
  """Files by their ids, as a set of one class without a name."""
  ids, paths = list(files), list(files.values())
  hashes, _ = contents.of_files(paths, root, name)
  return ImageSet(
      name, ('',), np.zeros(len(ids), np.int32), np.asarray(ids, dtype=str), np.arange(len(ids)),
      read=lambda row: contents.read_file(paths[row]),
      fingerprint=digest(*ids, hashes.tobytes()),
      contents=hashes)


def _in_folder(folder: pathlib.Path, name: str) -> dict[str, pathlib.Path]:
  listing = list_images(folder)
  files = {file.relative_to(folder).as_posix(): file for file in listing.classes[UNLABELLED]}
  if not files:
    holds = f'; it holds {listing.unused}' if listing.unused.found else ''
    raise ValueError(f'config.predict.images: no image in {name} and its subfolders{holds}; an image ends in '
                     f'{", ".join(IMAGE_ENDINGS)}')
  log_unused(name, [listing.unused])
  return files


def _read_list(path: pathlib.Path, name: str) -> list[str]:
  try:
    # Editors on Windows begin a file with a byte order mark.
    lines = [line.strip() for line in path.read_text(encoding='utf-8-sig').split('\n') if line.strip()]
  except UnicodeDecodeError as error:
    if path.name.lower().endswith(OTHER_IMAGES):
      raise ValueError(f'config.predict.images: {name} has a format that is not read; save it as .jpg or '
                       '.png') from error
    raise ValueError(f'config.predict.images: {name} is neither text, one path per line, nor does its name end '
                     f'like that of an image: {", ".join(IMAGE_ENDINGS)}') from error
  if not lines:
    raise ValueError(f'config.predict.images: the list {name} is empty; expected paths of images, one per line')
  return lines


def file_problem(path: pathlib.Path) -> str:
  """Why a path cannot be an image file, '' if it can."""
  if path.is_dir():
    return f'{path} is a folder'
  if not path.is_file():
    return f'{path} is a link to a file that does not exist' if path.is_symlink() else f'there is no file {path}'
  if path.stat().st_size > contents.MAX_FILE_BYTES:
    return f'{path} has more bytes than an image ({contents.MAX_FILE_BYTES:,d})'
  return '' if os.access(path, os.R_OK) else f'{path} cannot be read (permissions)'
