"""Back-end for images in memory: one array, or a list of arrays, Pillow images or the bytes of image files."""

from collections.abc import Iterable, Mapping, Sequence
import os

import numpy as np
import PIL.Image

from ft_jax.data import contents
from ft_jax.data.decode import from_pillow
from ft_jax.data.image_set import digest, Image, ImageSet, Labels
from ft_jax.data.labels import as_class_labels


def from_arrays(images: np.ndarray | Sequence[Image], labels: Labels | None = None,
                class_names: Sequence[str] | None = None, name: str = 'arrays') -> ImageSet:
  """Makes an image set of images in memory; see `ImageSet.from_arrays`."""
  if isinstance(images, PIL.Image.Image):
    raise ValueError('images is one Pillow image; expected a list of images: give [image]')
  if isinstance(images, (str, bytes, Mapping)) or not isinstance(images, Iterable):
    raise ValueError(f'images is of type {type(images).__name__}; expected uint8 [n, h, w, 3], or a list of images '
                     '(paths of files are for ImageSet.from_files)')
  checked = _check_images(images)
  if not len(checked):
    raise ValueError('images is empty; expected at least one image')
  numbers, names = as_class_labels(labels, class_names, len(checked))
  hashes = np.array([contents.of_image(image) for image in checked], contents.HASH)
  # The position tells the user which image it is; the hash tells the images of two sets apart.
  ids = np.asarray([f'{i}-{content[:8].decode()}' for i, content in enumerate(hashes.tolist())])
  return ImageSet(
      name, names, numbers, ids, np.arange(len(checked)),
      read=lambda row: checked[row],
      fingerprint=digest(hashes.tobytes(), numbers.tobytes(), *names),
      contents=hashes)


def _check_images(images: np.ndarray | Sequence[Image]) -> np.ndarray | list[Image]:
  # An array of dtype object is a list of images of different sizes.
  if isinstance(images, Sequence) or np.asarray(images).dtype == object:
    return [_check_image(image, i) for i, image in enumerate(images)]
  return _check_batch(np.asarray(images))


def _check_batch(array: np.ndarray) -> np.ndarray:
  """uint8 `[n, h, w, 3]` or `[n, h, w]` of an array of images."""
  expected = 'expected uint8 [n, h, w, 3], or grey [n, h, w]'
  if array.ndim == 3 and array.shape[-1] == 3:
    raise ValueError(f'images has shape {array.shape}, which is one image [h, w, 3]; {expected}. '
                     'For a set of one image give images[None]')
  if array.ndim == 3 and array.shape[-1] == 4:
    raise ValueError(f'images has shape {array.shape}, which is one image with transparency [h, w, 4]; {expected}. '
                     'Put it on a background first, or give images[None, ..., :3]')
  if array.ndim not in (3, 4):
    raise ValueError(f'images has shape {array.shape}; {expected}')
  if 0 in array.shape[1:]:
    raise ValueError(f'images has shape {array.shape}, which has no pixels; {expected}')
  _check_pixels(array, 'images', expected)
  array = array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array
  if array.ndim == 4 and array.shape[-1] != 3:
    hint = _shape_hint(array.shape[1:], 'images', '(0, 2, 3, 1)')
    raise ValueError(f'images has shape {array.shape}; {expected}{hint}')
  return array


def _check_image(image: object, i: int) -> Image:
  """One image of a list: the bytes of a file, or uint8 `[h, w, 3]` or `[h, w]`."""
  what, expected = f'images[{i}]', 'expected uint8 [h, w, 3], or grey [h, w], or the bytes of an image file'
  if isinstance(image, (bytes, bytearray, memoryview)):
    if not len(image):
      raise ValueError(f'{what} has no bytes; {expected}')
    return bytes(image)
  if isinstance(image, PIL.Image.Image):
    return from_pillow(image, what)
  if not hasattr(image, 'shape'):
    hint = '; paths of files are for ImageSet.from_files' if isinstance(image, (str, os.PathLike)) else ''
    raise ValueError(f'{what} is of type {type(image).__name__}; {expected}{hint}')
  array = np.asarray(image)
  if array.ndim not in (2, 3):
    raise ValueError(f'{what} has shape {array.shape}; {expected}')
  if not array.size:
    raise ValueError(f'{what} has shape {array.shape}, which has no pixels; {expected}')
  _check_pixels(array, what, expected)
  array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
  if array.ndim == 3 and array.shape[-1] != 3:
    hint = _shape_hint(array.shape, 'image', '(1, 2, 0)')
    raise ValueError(f'{what} has shape {array.shape}; {expected}{hint}')
  return array


def _check_pixels(array: np.ndarray, what: str, expected: str) -> None:
  """Raises ValueError for other values than uint8; the message says how to convert them."""
  if array.dtype.kind == 'f':
    if np.isnan(array).any():
      raise ValueError(f'{what} contains NaN; {expected}, 0 to 255')
    fix = 'images.round().astype(np.uint8), if they are 0 to 255'
    if 0 <= array.min(initial=0) and array.max(initial=0) <= 1:
      fix = '(255 * images).round().astype(np.uint8)'
    raise ValueError(f'{what} has dtype {array.dtype}; {expected}, 0 to 255: convert them with {fix}')
  if array.dtype != np.uint8:
    raise ValueError(f'{what} has dtype {array.dtype}; {expected}, 0 to 255')


def _shape_hint(shape: tuple[int, ...], name: str, order: str) -> str:
  """What to do about an array of another number of channels."""
  if shape[0] in (1, 3):
    return f'. If the channels come first, give {name}.transpose{order}'
  if shape[-1] == 4:
    return f'. Put a transparent image on a background first, or give {name}[..., :3]'
  return ''
