"""What happens to one image between its bytes and a batch: decoding, and the crops of training and of evaluation."""

from collections.abc import Callable
import io
import math
import os
import threading
from typing import NamedTuple
import warnings

import cv2
import numpy as np
import PIL.features
import PIL.Image
import simplejpeg

# The threads of the pipeline are the parallelism; OpenCV's own would fight them for the cores.
cv2.setNumThreads(0)
# Pillow warns from 89 megapixels on and refuses from 179; here `MOST_PIXELS` is the limit, and an error names the file.
PIL.Image.MAX_IMAGE_PIXELS = None
# Odd metadata is no news to anyone who trains on ten thousand files. (A filter for one call is not safe among threads.)
warnings.filterwarnings('ignore', category=UserWarning, module=r'PIL\.')

MOST_PIXELS = 200_000_000
# What an image file may be, whatever its ending: formats that Pillow reads by itself, each in memory and in bounded time;
# and their usual endings (PPM's .pfm is left out: the range of its pixels is not known).
FORMATS: dict[str, tuple[str, ...]] = {
    'JPEG': ('.jpg', '.jpeg', '.jpe', '.jfif', '.mpo'), 'PNG': ('.png', '.apng'), 'GIF': ('.gif',), 'WEBP': ('.webp',),
    'BMP': ('.bmp',), 'DIB': ('.dib',), 'TIFF': ('.tif', '.tiff'), 'PPM': ('.ppm', '.pgm', '.pbm', '.pnm'),
    # Pillow has it from 11.3 on, where it was built with libavif.
    **({'AVIF': ('.avif', '.avifs')} if 'avif' in PIL.features.modules and PIL.features.check_module('avif') else {})}

_ORIENTATION = 0x0112  # the Exif tag
_SCRATCH = threading.local()
_MOST_SCRATCH = 1 << 26  # bytes: it is never given back, and few images are larger


def decode(image: bytes | np.ndarray, example_id: str, scratch: bool = False) -> np.ndarray:
  """Bytes of an image file (or a decoded array) to uint8 `[h, w, 3]`, as a viewer shows it.

  Grey, palette, CMYK, LAB and 16-bit images become RGB; the first frame of an animation is taken; the camera's orientation is
  applied. What is transparent is laid on white: the colours under it are whatever the writing program left there. The format is
  that of the bytes, not of the name.

  Args:
    image: the file, or uint8 `[h, w]` or `[h, w, 3]`.
    example_id: for messages.
    scratch: the result may lie in memory of this thread that the next such call overwrites. New memory for each image costs a
      quarter of the decoding, and threads wait for each other there.

  Raises:
    ValueError: not an image, a damaged one, or one of more than 200 megapixels; names the example.
  """
  if isinstance(image, np.ndarray):
    return np.ascontiguousarray(np.broadcast_to(image[..., None], (*image.shape, 3)) if image.ndim == 2 else image)
  if image[:2] == b'\xff\xd8':
    decoded = _decode_jpeg(image, example_id, scratch)
    if decoded is not None:
      return decoded
  with _open(image, example_id) as picture:
    try:
      picture.load()
      _check_size(*picture.size, example_id)
      return _upright(_to_rgb(picture), _orientation(picture))
    except Exception as error:
      raise _unreadable(example_id, error) from error


def dimensions(image: bytes | np.ndarray, example_id: str) -> tuple[int, int]:
  """Height and width of what `decode` gives, from the head of the file.

  Raises:
    ValueError: as `decode`, as far as the head tells.
  """
  if isinstance(image, np.ndarray):
    return image.shape[0], image.shape[1]
  with _open(image, example_id) as picture:
    width, height = picture.size
    # A TIFF's size is that of the turned image already.
    return (width, height) if picture.format != 'TIFF' and _orientation(picture) >= 5 else (height, width)


def is_image(path: str | os.PathLike[str]) -> bool:
  """Whether a file begins as an image does that `decode` reads, whatever its name ends in."""
  try:
    with PIL.Image.open(path, formats=tuple(FORMATS)):
      return True
  except Exception:  # see `_open`
    return False


def _decode_jpeg(image: bytes, example_id: str, scratch: bool) -> np.ndarray | None:
  """An ordinary JPEG file, by a faster decoder than Pillow's; None where Pillow has to read it or say what is wrong."""
  try:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
    _check_size(width, height, example_id)
    if colours in ('CMYK', 'YCCK'):
      return None
    decoded = simplejpeg.decode_jpeg(image, 'RGB', buffer=_scratch(3 * height * width) if scratch else None)
  except TooLarge:
    raise
  except (ValueError, KeyError):  # KeyError: a subsampling that simplejpeg does not know, such as 4:4:1
    return None
  if not _has_metadata(image):
    return decoded
  try:
    with _open(image, example_id) as picture:
      return _upright(decoded, _orientation(picture))
  except ValueError:  # damaged metadata, and good pixels
    return decoded


def _scratch(length: int) -> np.ndarray | None:
  """Memory of this thread, at least so many bytes; None where that is too much to keep."""
  if length > _MOST_SCRATCH:
    return None
  buffer = getattr(_SCRATCH, 'buffer', None)
  if buffer is None or len(buffer) < length:
    buffer = _SCRATCH.buffer = np.empty(length, np.uint8)
  return buffer


class TooLarge(ValueError):
  """More pixels than are read."""


def _check_size(width: int, height: int, example_id: str) -> None:
  if width * height > MOST_PIXELS:
    raise TooLarge(f'{example_id} is an image of {width} x {height} pixels; expected {MOST_PIXELS:,d} at most. Scale it down or move it')


def _unreadable(example_id: str, error: Exception) -> ValueError:
  if isinstance(error, TooLarge):
    return error
  reason = f'its bytes are of none of the formats {", ".join(FORMATS)}' if isinstance(error, PIL.UnidentifiedImageError) else str(error)
  return ValueError(f'{example_id} is no image that can be read ({reason or type(error).__name__}); mend or remove it')


def _open(image: bytes, example_id: str) -> PIL.Image.Image:
  """Reads the head of a file; ValueError for what is no image or too large a one."""
  try:
    if not image:
      raise ValueError('it is empty')
    picture = PIL.Image.open(io.BytesIO(image), formats=tuple(FORMATS))
    _check_size(*picture.size, example_id)
    return picture
  except Exception as error:  # a damaged file makes Pillow's parsers raise almost anything: KeyError, struct.error, zlib.error, ...
    raise _unreadable(example_id, error) from error


def _to_rgb(picture: PIL.Image.Image) -> np.ndarray:
  """uint8 `[h, w, 3]` of a loaded image of any mode."""
  if picture.mode.startswith('I;16') or picture.mode == 'I' and picture.format == 'PPM':
    # Pillow's own conversion would cut everything above 255 off.
    return cv2.cvtColor((np.asarray(picture) >> 8).astype(np.uint8), cv2.COLOR_GRAY2RGB)
  if picture.mode in ('I', 'F'):
    raise ValueError(f'its pixels are of mode {picture.mode}, whose range is not known; save it with 8 or 16 bits a channel')
  if not picture.has_transparency_data:
    return np.asarray(picture.convert('RGB'))
  layer = picture.convert('RGBA')
  page = PIL.Image.new('RGB', picture.size, 'white')
  page.paste(layer, mask=layer.getchannel('A'))
  return np.asarray(page)


def _has_metadata(image: bytes) -> bool:
  """Whether a JPEG file has a segment of Exif or XMP before its pixels."""
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
  """How the camera was held, 1 to 8; 1 where nothing sensible says so."""
  try:
    value = picture.getexif().get(_ORIENTATION, 1)
  except Exception:  # metadata that cannot be read turns nothing
    return 1
  return value if value in ORIENTATIONS else 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
  return image if orientation == 1 else ORIENTATIONS[orientation](image)


def random_resized_crop(
    image: np.ndarray, size: int, scale: tuple[float, float], ratio: tuple[float, float],
    rng: np.random.Generator, antialias: bool = False, out: np.ndarray | None = None) -> np.ndarray:
  """A random part of the image at `size` x `size`, as torchvision's RandomResizedCrop draws it.

  Args:
    image: uint8 `[h, w, 3]`.
    size: pixels a side of the result.
    scale: bounds of the part's share of the area, drawn uniformly.
    ratio: bounds of width over height, drawn log-uniformly.
    rng: where the randomness comes from.
    antialias: scale the part as Pillow and torchvision do, with the same bits; see `_resize`.
    out: where the result goes, uint8 `[size, size, 3]`; new memory where it is not given.
  """
  height, width = image.shape[:2]
  for _ in range(10):
    # One call for four numbers: each costs as much as a hundred rows of pixels.
    of_scale, of_ratio, of_y, of_x = rng.random(4).tolist()
    area = height * width * (scale[0] + of_scale * (scale[1] - scale[0]))
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** of_ratio
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      y, x = int(of_y * (height - h + 1)), int(of_x * (width - w + 1))
      return _resize(image[y:y + h, x:x + w], size, antialias, out)
  # No part of that shape fits: the largest one in the middle whose shape is allowed.
  w = max(1, min(width, round(height * ratio[1])))
  h = max(1, min(height, round(width / ratio[0])))
  y, x = (height - h) // 2, (width - w) // 2
  return _resize(image[y:y + h, x:x + w], size, antialias, out)


def mirror(image: np.ndarray) -> np.ndarray:
  """Exchanges left and right in place; a copy of numpy's reversed view takes thirty times as long, and holds the other threads up."""
  return cv2.flip(image, 1, dst=image)


def center_crop(image: np.ndarray, size: int, short_side: int) -> np.ndarray:
  """The image scaled so that its short side has `short_side` pixels (Pillow's antialiased bilinear), and the middle of it.

  At 224 and 256 this is what torchvision's weights are evaluated with: Resize(256), CenterCrop(224). Only the middle is computed.
  """
  height, width = image.shape[:2]
  shortest = min(height, width)
  rows = _middle(height, int(short_side * height / shortest), size)
  columns = _middle(width, int(short_side * width / shortest), size)
  part = PIL.Image.fromarray(image[rows.first:rows.last, columns.first:columns.last])
  box = (columns.start, rows.start, columns.stop, rows.stop)
  return np.asarray(part.resize((size, size), PIL.Image.Resampling.BILINEAR, box=box))


class _Middle(NamedTuple):
  """The middle of one side: pixels `first:last` are enough to compute it, and it is `start` to `stop` of those."""
  first: int
  last: int
  start: float
  stop: float


def _middle(length: int, scaled: int, size: int) -> _Middle:
  """Where the `size` pixels in the middle of a side come from that is scaled from `length` to `scaled` pixels."""
  factor, offset = length / scaled, round((scaled - size) / 2)
  start, stop = offset * factor, min((offset + size) * factor, length)
  reach = math.ceil(max(1.0, factor)) + 1  # of the filter on either side
  first, last = max(0, math.floor(start) - reach), min(length, math.ceil(stop) + reach)
  return _Middle(first, last, start - first, stop - first)


def thumbnail(image: bytes | np.ndarray, example_id: str, size: int) -> bytes:
  """The middle of an image as a JPEG file of `size` x `size` pixels, for pages."""
  return simplejpeg.encode_jpeg(np.ascontiguousarray(center_crop(decode(image, example_id), size, size)), 85, 'RGB')


def _resize(image: np.ndarray, size: int, antialias: bool, out: np.ndarray | None) -> np.ndarray:
  """To `size` x `size`, by Pillow's antialiased bilinear filter or by a faster way.

  Pillow's filter is what torchvision's RandomResizedCrop applies to a Pillow image: a triangle as wide as two pixels of the result, also
  where only one side shrinks. The faster way is OpenCV's bilinear interpolation, which looks at two pixels a side, and from a factor of
  two on in both sides the plain mean of the pixels under each new one. `python benchmarks/pipeline.py` measures what it saves.
  """
  if antialias:
    # Of a contiguous copy: Pillow would make one itself, more slowly.
    crop = PIL.Image.fromarray(np.ascontiguousarray(image)).resize((size, size), PIL.Image.Resampling.BILINEAR)
    if out is None:
      return np.array(crop)
    out[...] = crop
    return out
  method = cv2.INTER_AREA if min(image.shape[:2]) / size > 2 else cv2.INTER_LINEAR
  return cv2.resize(image, (size, size), dst=out, interpolation=method)


# What makes an image upright, by the Exif orientation.
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
