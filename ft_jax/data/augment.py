"""What happens to one image between its bytes and a batch: decoding, and the crops of training and of evaluation."""

import io
import math

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg

# The threads of the pipeline are the parallelism; OpenCV's own would fight them for the cores.
cv2.setNumThreads(0)


def decode(image: bytes | np.ndarray, example_id: str) -> np.ndarray:
  """Bytes of an image file (or a decoded array) to uint8 `[h, w, 3]`.

  Raises:
    ValueError: not an image, or a damaged one; names the example.
  """
  if isinstance(image, np.ndarray):
    return np.ascontiguousarray(np.broadcast_to(image[..., None], (*image.shape, 3)) if image.ndim == 2 else image)
  if image[:2] == b'\xff\xd8' and b'Exif\0' not in image[:65536]:
    try:
      return simplejpeg.decode_jpeg(image, 'RGB')
    except ValueError:
      pass  # CMYK, or damaged: Pillow reads it or says what is wrong
  try:
    with PIL.Image.open(io.BytesIO(image)) as picture:
      picture = PIL.ImageOps.exif_transpose(picture)
      if picture.mode.startswith('I;16'):  # Pillow's own conversion would cut everything above 255 off
        picture = PIL.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
      if picture.mode in ('I', 'F'):
        raise ValueError(f'its pixels are of mode {picture.mode}, whose range is not known; save it with 8 or 16 bits a channel')
      return np.asarray(picture.convert('RGB'))
  except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
    raise ValueError(f'{example_id} is no image that can be read ({error}); mend or remove it') from error


def random_resized_crop(
    image: np.ndarray, size: int, scale: tuple[float, float], ratio: tuple[float, float],
    rng: np.random.Generator, antialias: bool = False) -> np.ndarray:
  """A random part of the image at `size` x `size`, as torchvision's RandomResizedCrop draws it.

  Args:
    image: uint8 `[h, w, 3]`.
    size: pixels a side of the result.
    scale: bounds of the part's share of the area, drawn uniformly.
    ratio: bounds of width over height, drawn log-uniformly.
    rng: where the randomness comes from.
    antialias: average all pixels wherever the part shrinks; else only where it shrinks by more than two.
  """
  height, width = image.shape[:2]
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
      return _resize(image[y:y + h, x:x + w], size, antialias)
  # No part of that shape fits: the largest one in the middle whose shape is allowed.
  w = min(width, round(height * ratio[1]))
  h = min(height, round(width / ratio[0]))
  y, x = (height - h) // 2, (width - w) // 2
  return _resize(image[y:y + h, x:x + w], size, antialias)


def mirror(image: np.ndarray) -> np.ndarray:
  """Left and right exchanged; a copy of numpy's reversed view takes thirty times as long, and holds the other threads up."""
  return cv2.flip(image, 1)


def center_crop(image: np.ndarray, size: int, short_side: int) -> np.ndarray:
  """The image scaled so that its short side has `short_side` pixels (Pillow's antialiased bilinear), and the middle of it.

  At 224 and 256 this is what torchvision's weights are evaluated with.
  """
  height, width = image.shape[:2]
  ratio = short_side / min(height, width)
  w, h = max(size, int(width * ratio)), max(size, int(height * ratio))
  if (h, w) != (height, width):
    image = np.asarray(PIL.Image.fromarray(image).resize((w, h), PIL.Image.Resampling.BILINEAR))
  y, x = round((h - size) / 2), round((w - size) / 2)
  return image[y:y + size, x:x + size]


def thumbnail(image: bytes | np.ndarray, example_id: str, size: int) -> bytes:
  """The middle of an image as a JPEG file of `size` x `size` pixels, for pages."""
  return simplejpeg.encode_jpeg(np.ascontiguousarray(center_crop(decode(image, example_id), size, size)), 85, 'RGB')


def _resize(image: np.ndarray, size: int, antialias: bool) -> np.ndarray:
  """To `size` x `size`: averaging where both sides shrink enough, bilinear otherwise.

  Bilinear interpolation looks at two pixels a side, so up to a factor of two hardly any is left out; it takes a quarter of the time.
  """
  factor = min(image.shape[:2]) / size
  return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if factor > (1 if antialias else 2) else cv2.INTER_LINEAR)
