"""Crops of an image at the network's input size: random ones for training, the middle for evaluation."""

import math
from typing import NamedTuple

import cv2
import numpy as np
import PIL.Image

# The threads of the pipeline are the parallelism; OpenCV's own would compete with them for the cores.
cv2.setNumThreads(0)


def random_resized_crop(
    image: np.ndarray, size: int, scale: tuple[float, float], ratio: tuple[float, float],
    rng: np.random.Generator, antialias: bool = False, out: np.ndarray | None = None) -> np.ndarray:
  """A random crop of the image, resized to `size` x `size`, drawn as by torchvision's RandomResizedCrop.

  Args:
    image: uint8 `[h, w, 3]`.
    size: pixels per side of the result.
    scale: bounds of the crop's area as a fraction of the image's, drawn uniformly.
    ratio: bounds of width / height, drawn log-uniformly.
    rng: the source of randomness.
    antialias: resize as Pillow and torchvision do, bit for bit; see `_resize`.
    out: where to write the result, uint8 `[size, size, 3]`; None allocates it.
  """
  height, width = image.shape[:2]
  for _ in range(10):
    # One call for four numbers: each call costs as much as a hundred rows of pixels.
    for_scale, for_ratio, for_y, for_x = rng.random(4).tolist()
    area = height * width * (scale[0] + for_scale * (scale[1] - scale[0]))
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** for_ratio
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      y, x = int(for_y * (height - h + 1)), int(for_x * (width - w + 1))
      return _resize(image[y:y + h, x:x + w], size, antialias, out)
  # No such crop fits: take the largest central one with an allowed ratio.
  w = max(1, min(width, round(height * ratio[1])))
  h = max(1, min(height, round(width / ratio[0])))
  y, x = (height - h) // 2, (width - w) // 2
  return _resize(image[y:y + h, x:x + w], size, antialias, out)


def mirror(image: np.ndarray) -> np.ndarray:
  """Flips an image left to right in place.

  Copying numpy's reversed view takes thirty times as long, and blocks the other threads.
  """
  return cv2.flip(image, 1, dst=image)


def center_crop(image: np.ndarray, size: int, short_side: int) -> np.ndarray:
  """Resizes the image to a short side of `short_side` pixels (Pillow's antialiased bilinear) and crops the middle.

  With 224 and 256 this is how torchvision evaluates its weights: Resize(256), CenterCrop(224). Only the middle is
  computed.

  Args:
    image: uint8 `[h, w, 3]`.
    size: pixels per side of the result.
    short_side: pixels of the short side before the crop.
  """
  height, width = image.shape[:2]
  shortest = min(height, width)
  rows = _middle(height, int(short_side * height / shortest), size)
  columns = _middle(width, int(short_side * width / shortest), size)
  part = PIL.Image.fromarray(image[rows.first:rows.last, columns.first:columns.last])
  box = (columns.start, rows.start, columns.stop, rows.stop)
  return np.asarray(part.resize((size, size), PIL.Image.Resampling.BILINEAR, box=box))


class _Middle(NamedTuple):
  """The middle of one side: pixels `first:last` are enough to compute it, and it spans `start` to `stop` of those."""
  first: int
  last: int
  start: float
  stop: float


def _middle(length: int, scaled: int, size: int) -> _Middle:
  """Where the middle `size` pixels of a side come from that is resized from `length` to `scaled` pixels."""
  factor, offset = length / scaled, round((scaled - size) / 2)
  start, stop = offset * factor, min((offset + size) * factor, length)
  reach = math.ceil(max(1.0, factor)) + 1  # of the filter on either side
  first, last = max(0, math.floor(start) - reach), min(length, math.ceil(stop) + reach)
  return _Middle(first, last, start - first, stop - first)


def _resize(image: np.ndarray, size: int, antialias: bool, out: np.ndarray | None) -> np.ndarray:
  """Resizes to `size` x `size`, with Pillow's antialiased bilinear filter or faster.

  Pillow's filter is what torchvision's RandomResizedCrop applies to a Pillow image: a triangle as wide as two pixels of
  the result, even if only one side shrinks. The faster way is OpenCV's bilinear interpolation, which reads two pixels
  per side, and where both sides shrink by more than a factor of two, the mean of the pixels under each new one. `python
  benchmarks/pipeline.py` measures what it saves.
  """
  if antialias:
    # A contiguous copy: Pillow would make one itself, more slowly.
    resized = PIL.Image.fromarray(np.ascontiguousarray(image)).resize((size, size), PIL.Image.Resampling.BILINEAR)
    if out is None:
      return np.array(resized)
    out[...] = resized
    return out
  method = cv2.INTER_AREA if min(image.shape[:2]) / size > 2 else cv2.INTER_LINEAR
  return cv2.resize(image, (size, size), dst=out, interpolation=method)
