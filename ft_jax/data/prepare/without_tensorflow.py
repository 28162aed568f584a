"""Lets TFDS's builders run without TensorFlow: replaces the few functions of it that they use.

The builders of image sets use TensorFlow to open files, to list folders, and to re-encode a handful of images (twelve
of Pets, 23 of ImageNet, the masks of CUB, all of SUN397 that OpenCV does not read). Here files are opened by
etils.epath, which TFDS itself uses elsewhere, and those images are encoded by Pillow: the bytes differ from
TensorFlow's, the pixels only as two JPEG decoders differ. Everything else that a builder asks for comes from
TensorFlow, if that is installed.
"""

from collections.abc import Iterator
import contextlib
import io
import os
from typing import Any, IO
from unittest import mock

from etils import epath
import numpy as np
import PIL.Image


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
  """Within this context, TFDS's `tensorflow` is TENSORFLOW below."""
  from tensorflow_datasets.core.utils import lazy_imports_utils

  # TFDS imports TensorFlow lazily, as one object that all of its modules share and that keeps the module here.
  with mock.patch.dict(vars(lazy_imports_utils.tensorflow), _module=TENSORFLOW):
    yield


# --- images ---


class _Array(np.ndarray):
  """An array with the method `numpy` of TensorFlow's arrays."""

  def numpy(self) -> np.ndarray:
    return np.asarray(self)


class _Bytes(bytes):
  """Bytes with the method `numpy` of TensorFlow's tensors."""

  def numpy(self) -> bytes:
    return bytes(self)


def _decode(contents: bytes, channels: int = 0) -> _Array:
  """uint8 `[h, w, c]`; 0 channels: as many as the file has."""
  image = PIL.Image.open(io.BytesIO(contents))
  own = {'1': 'L', 'L': 'L', 'LA': 'LA', 'RGBA': 'RGBA'}.get(image.mode, 'RGB')
  pixels = np.asarray(image.convert({0: own, 1: 'L', 3: 'RGB', 4: 'RGBA'}[channels or 0]))
  return (pixels[..., None] if pixels.ndim == 2 else pixels).view(_Array)


def _encode(image: np.ndarray, kind: str, **options: Any) -> _Bytes:
  pixels = np.asarray(image)
  stream = io.BytesIO()
  PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, kind, **options)
  return _Bytes(stream.getvalue())


def _encode_jpeg(image: np.ndarray, format: str = '', quality: int = 95) -> _Bytes:  # TensorFlow's names
  del format
  return _encode(image, 'JPEG', quality=quality, subsampling=2)  # TensorFlow halves the colours too


def _encode_png(image: np.ndarray) -> _Bytes:
  return _encode(image, 'PNG')


# --- files ---


def _open(path: epath.PathLike, mode: str = 'r') -> IO[Any]:
  return epath.Path(path).open(mode)


def _list(path: epath.PathLike) -> list[str]:
  """Sorted, where TensorFlow's order is the disk's: the random split of Caltech-101 depends on it."""
  return sorted(os.listdir(path))


def _walk(path: epath.PathLike) -> Iterator[tuple[str, list[str], list[str]]]:
  for folder, folders, files in os.walk(path, followlinks=True):
    folders.sort()
    yield folder, folders, sorted(files)


# --- what TFDS sees ---


class _Names:
  """Some names of a module of TensorFlow; any other name is TensorFlow's own."""

  def __init__(self, module: str, **known: Any):
    self._module = module
    self.__dict__.update(known)

  def __getattr__(self, name: str) -> Any:
    try:
      import tensorflow
    except ImportError as error:
      raise ModuleNotFoundError(f'{self._module}.{name} is not available without TensorFlow',
                                name='tensorflow') from error
    module = tensorflow
    for part in self._module.split('.')[1:]:
      module = getattr(module, part)
    return getattr(module, name)


class _Graph:
  """SUN397's builder decodes in a session of TensorFlow 1; here everything is computed at once."""

  def as_default(self) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


class _Session:
  """See `_Graph`."""

  def __init__(self, **_: Any):
    pass

  def run(self, value: Any) -> Any:
    return value

  def close(self) -> None:
    pass


_GFILE = _Names('tensorflow.io.gfile', GFile=_open, exists=os.path.exists, isdir=os.path.isdir, listdir=_list,
                walk=_walk)

TENSORFLOW = _Names(
    'tensorflow',
    io=_Names('tensorflow.io', gfile=_GFILE, encode_jpeg=_encode_jpeg),
    image=_Names('tensorflow.image', decode_image=_decode, decode_jpeg=_decode, decode_png=_decode,
                 encode_jpeg=_encode_jpeg, encode_png=_encode_png),
    compat=_Names('tensorflow.compat', v1=_Names('tensorflow.compat.v1', ConfigProto=dict, Session=_Session)),
    errors=_Names('tensorflow.errors', InvalidArgumentError=PIL.UnidentifiedImageError),
    executing_eagerly=lambda: True, shape=np.shape, Graph=_Graph)
