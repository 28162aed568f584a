"""From the bytes of an image file to pixels, to its dimensions (from the head alone), and to a thumbnail."""

from collections.abc import Callable
import io
import os
import threading
import warnings

import cv2
import numpy as np
import PIL.features
import PIL.Image
import simplejpeg

from ft_jax.data.crop import center_crop

# The threads of the pipeline are the parallelism; OpenCV's own would compete with them for the cores.
cv2.setNumThreads(0)
# Pillow warns from 89 megapixels on and refuses from 179; here MAX_PIXELS is the limit, and the error names the file.
PIL.Image.MAX_IMAGE_PIXELS = None
# Odd metadata is not worth a warning for each of ten thousand files. (A filter for one call is not thread-safe.)
warnings.filterwarnings('ignore', category=UserWarning, module=r'PIL\.')

MAX_PIXELS = 200_000_000
# The formats that are read, whatever the file's name: those that Pillow decodes without other programs, in memory and
# in bounded time. With their usual endings (without PPM's .pfm: the range of its pixels is not known).
FORMATS: dict[str, tuple[str, ...]] = {
    'JPEG': ('.jpg', '.jpeg', '.jpe', '.jfif', '.mpo'), 'PNG': ('.png', '.apng'), 'GIF': ('.gif',), 'WEBP': ('.webp',),
    'BMP': ('.bmp',), 'DIB': ('.dib',), 'TIFF': ('.tif', '.tiff'), 'PPM': ('.ppm', '.pgm', '.pbm', '.pnm'),
    # In Pillow 11.3 and later, if it was built with libavif.
    **({'AVIF': ('.avif', '.avifs')} if 'avif' in PIL.features.modules and PIL.features.check_module('avif') else {})}
IMAGE_ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)

_ORIENTATION = 0x0112  # the Exif tag
_MAX_SCRATCH = 1 << 26  # bytes: they are never freed, and few images are larger


class _Scratch(threading.local):
  """Memory of each thread that images are decoded into."""
  buffer = np.empty(0, np.uint8)


_SCRATCH = _Scratch()


def decode(image: bytes | np.ndarray, example_id: str, scratch: bool = False) -> np.ndarray:
  """Decodes an image file (or takes decoded pixels) to uint8 `[h, w, 3]`, as an image viewer shows it.

  Grey, palette, CMYK, LAB and 16-bit images become RGB; of an animation the first frame is taken; the camera's
  orientation is applied. Transparent images are put on a white background: the colours under transparent pixels are
  whatever the program left there. The format is that of the bytes, whatever the file's name says.

  Args:
    image: the bytes of the file, or uint8 `[h, w]` or `[h, w, 3]`.
    example_id: for messages.
    scratch: the result may be in memory of this thread that the next such call overwrites. Allocating memory for each
      image costs a quarter of the decoding time, and threads wait for each other there.

  Raises:
    ValueError: not an image, a damaged one, or one of more than MAX_PIXELS pixels; the message names the example.
  """
  if isinstance(image, np.ndarray):
    return np.ascontiguousarray(np.broadcast_to(image[..., None], (*image.shape, 3)) if image.ndim == 2 else image)
  if image[:2] == b'\xff\xd8':
    decoded = _decode_jpeg(image, example_id, scratch)
    if decoded is not None:
      return decoded
  with _open(image, example_id) as picture:
    return from_pillow(picture, example_id)


def from_pillow(picture: PIL.Image.Image, example_id: str) -> np.ndarray:
  """A Pillow image of any mode as uint8 `[h, w, 3]`, the same as `decode` makes of its file.

  Raises:
    ValueError: a damaged file, pixels of an unknown range, or more than MAX_PIXELS; the message names the example.
  """
  try:
    picture.load()
    _check_size(*picture.size, example_id)
    return _upright(_to_rgb(picture), _orientation(picture))
  except Exception as error:
    raise _unreadable(example_id, error) from error


def dimensions(image: bytes | np.ndarray, example_id: str) -> tuple[int, int]:
  """Height and width of what `decode` returns, from the head of the file alone.

  Raises:
    ValueError: as `decode`, as far as the head shows it.
  """
  if isinstance(image, np.ndarray):
    return image.shape[0], image.shape[1]
  with _open(image, example_id) as picture:
    width, height = picture.size
    # Pillow gives the size of a TIFF after it is rotated.
    rotated = picture.format != 'TIFF' and _orientation(picture) >= 5
    return (width, height) if rotated else (height, width)


def thumbnail(image: bytes | np.ndarray, example_id: str, size: int) -> bytes:
  """The middle of an image as a JPEG file of `size` x `size` pixels, for pages."""
  return simplejpeg.encode_jpeg(np.ascontiguousarray(center_crop(decode(image, example_id), size, size)), 85, 'RGB')


def is_image(path: str | os.PathLike[str]) -> bool:
  """Whether a file begins like an image that `decode` reads, whatever its name ends in."""
  try:
    with PIL.Image.open(path, formats=tuple(FORMATS)):
      return True
  except Exception:  # see `_open`
    return False


def _decode_jpeg(image: bytes, example_id: str, scratch: bool) -> np.ndarray | None:
  """Decodes an ordinary JPEG file faster than Pillow; None if Pillow has to read it or say what is wrong."""
  try:
    height, width, colour_space, _ = simplejpeg.decode_jpeg_header(image)
    _check_size(width, height, example_id)
    if colour_space in ('CMYK', 'YCCK'):
      return None
    decoded = simplejpeg.decode_jpeg(image, 'RGB', buffer=_scratch_buffer(3 * height * width) if scratch else None)
  except TooLargeError:
    raise
  except (ValueError, KeyError):  # KeyError: a subsampling that simplejpeg does not know, such as 4:4:1
    return None
  if not _has_metadata(image):
    return decoded
  try:
    with _open(image, example_id) as picture:
      return _upright(decoded, _orientation(picture))
  except ValueError:  # the metadata is damaged, the pixels are fine
    return decoded


def _scratch_buffer(length: int) -> np.ndarray | None:
  """Memory of this thread of at least `length` bytes; None if that is too much to keep."""
  if length > _MAX_SCRATCH:
    return None
  if len(_SCRATCH.buffer) < length:
    _SCRATCH.buffer = np.empty(length, np.uint8)
  return _SCRATCH.buffer


class TooLargeError(ValueError):
  """An image has more than MAX_PIXELS pixels."""


def _check_size(width: int, height: int, example_id: str) -> None:
  if width * height > MAX_PIXELS:
    raise TooLargeError(
        f'{example_id} is an image of {width} x {height} pixels; expected at most {MAX_PIXELS:,d}. Scale it down '
        'or move it')


def _unreadable(example_id: str, error: Exception) -> ValueError:
  if isinstance(error, TooLargeError):
    return error
  if isinstance(error, PIL.UnidentifiedImageError):
    reason = f'it has none of the formats {", ".join(FORMATS)}'
  else:
    reason = str(error) or type(error).__name__
  return ValueError(f'{example_id} cannot be read as an image ({reason}); fix or remove it')


def _open(image: bytes, example_id: str) -> PIL.Image.Image:
  """Reads the head of a file; raises ValueError if it is not an image or too large."""
  try:
    if not image:
      raise ValueError('it is empty')
    picture = PIL.Image.open(io.BytesIO(image), formats=tuple(FORMATS))
    _check_size(*picture.size, example_id)
    return picture
  except Exception as error:  # Pillow's parsers raise almost anything for damaged files: KeyError, struct.error, ...
    raise _unreadable(example_id, error) from error


def _to_rgb(picture: PIL.Image.Image) -> np.ndarray:
  """uint8 `[h, w, 3]` of a loaded image of any mode."""
  if picture.mode.startswith('I;16') or picture.mode == 'I' and picture.format == 'PPM':
    # Pillow's own conversion would clip everything above 255.
    return cv2.cvtColor((np.asarray(picture) >> 8).astype(np.uint8), cv2.COLOR_GRAY2RGB)
  if picture.mode in ('I', 'F'):
    raise ValueError(f'its pixels are of mode {picture.mode}, whose range is not known; save it with 8 or 16 bits '
                     'per channel')
  if not picture.has_transparency_data:
    return np.asarray(picture.convert('RGB'))
  layer = picture.convert('RGBA')
  page = PIL.Image.new('RGB', picture.size, 'white')
  page.paste(layer, mask=layer.getchannel('A'))
  return np.asarray(page)


def _has_metadata(image: bytes) -> bool:
  """Whether a JPEG file has an Exif or XMP segment before its pixels."""
  at = 2
  while at + 4 <= len(image) and image[at] == 0xFF:
    marker = image[at + 1]
    if marker == 0xE1:
      return True
    if marker == 0xDA:
      return False
    # A marker may be padded with more bytes of 0xFF.
    at += 1 if marker == 0xFF else 2 + int.from_bytes(image[at + 2:at + 4])
  return False


def _orientation(picture: PIL.Image.Image) -> int:
  """How the camera was held, 1 to 8; 1 if the file does not say."""
  try:
    value = picture.getexif().get(_ORIENTATION, 1)
  except Exception:  # metadata that cannot be read rotates nothing
    return 1
  return value if value in ORIENTATIONS else 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
  return image if orientation == 1 else ORIENTATIONS[orientation](image)


# How to rotate or flip an image upright, by its Exif orientation.
ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.rotate(cv2.transpose(image), cv2.ROTATE_180),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
