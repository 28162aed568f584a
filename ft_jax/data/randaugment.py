"""RandAugment, random operations on a training crop as in FixMatch, and Cutout.

The operations and their strengths are those of the published PyTorch code of FixMatch (Sohn et al., NeurIPS 2020),
which Liu et al. (NeurIPS 2022) use: each is Pillow's own; geometric ones take the nearest pixel and are black outside
the image. They differ from RandAugment of Cubuk et al., which applies every operation at one strength.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import ImageEnhance, ImageOps
import PIL.Image

# The largest strength: an operation has its largest value there.
STRONGEST = 10
GREY = 127


class Operation(NamedTuple):
  """An operation on an image, and the value that it is applied with at each strength.

  Attributes:
    apply: from an image and a value to an image.
    most, least: the value at strength v is `v * most / 10 + least`.
    whole: whether `v * most / 10` is truncated to an integer.
    mirrored: whether the sign of the value is random.
  """
  apply: Callable[[PIL.Image.Image, float], PIL.Image.Image]
  most: float = 0.0
  least: float = 0.0
  whole: bool = False
  mirrored: bool = False

  def value(self, strength: int, negative: bool) -> float:
    """The value for a strength from 1 to 10."""
    above_least = strength * self.most / STRONGEST
    value = self.least + (int(above_least) if self.whole else above_least)
    return -value if self.mirrored and negative else value


def randaugment(image: np.ndarray, count: int, magnitude: int, rng: np.random.Generator) -> np.ndarray:
  """Applies random operations to an image in place, one after the other.

  Each is drawn from OPERATIONS with replacement, and applied with probability 1/2 at a strength from 1 to
  `magnitude` - 1.

  Args:
    image: uint8 `[h, w, 3]`.
    count: how many operations are drawn.
    magnitude: 2 to 10.
    rng: the source of randomness: four numbers for each operation.
  """
  operations = tuple(OPERATIONS.values())
  picture = None
  for for_kind, for_use, for_strength, for_sign in rng.random((count, 4)).tolist():
    if for_use < 0.5:
      operation = operations[int(for_kind * len(operations))]
      value = operation.value(1 + int(for_strength * (magnitude - 1)), for_sign < 0.5)
      picture = operation.apply(PIL.Image.fromarray(image) if picture is None else picture, value)
  if picture is not None:
    image[:] = np.asarray(picture)
  return image


def cutout(image: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
  """Puts a grey square on an image in place (DeVries and Taylor, 2017), centred anywhere and cut off at the borders.

  The published code differs: its square is one pixel larger, and moved inside if it crosses the left or upper border.

  Args:
    image: uint8 `[h, w, 3]`.
    fraction: side of the square as a fraction of the image's shorter side, above 0.
    rng: the source of randomness: two numbers.
  """
  height, width = image.shape[:2]
  side = int(fraction * min(height, width))
  y, x = rng.random(2).tolist()
  top, left = round(y * height - side / 2), round(x * width - side / 2)
  image[max(0, top):top + side, max(0, left):left + side] = GREY
  return image


def _affine(image: PIL.Image.Image, *coefficients: float) -> PIL.Image.Image:
  return image.transform(image.size, PIL.Image.Transform.AFFINE, coefficients)


# In the order of the published list.
OPERATIONS: dict[str, Operation] = {
    'AutoContrast': Operation(lambda image, v: ImageOps.autocontrast(image)),
    'Brightness': Operation(lambda image, v: ImageEnhance.Brightness(image).enhance(v), 0.9, 0.05),
    'Color': Operation(lambda image, v: ImageEnhance.Color(image).enhance(v), 0.9, 0.05),
    'Contrast': Operation(lambda image, v: ImageEnhance.Contrast(image).enhance(v), 0.9, 0.05),
    'Equalize': Operation(lambda image, v: ImageOps.equalize(image)),
    'Identity': Operation(lambda image, v: image),
    'Posterize': Operation(lambda image, v: ImageOps.posterize(image, int(v)), 4, 4, whole=True),  # bits kept
    'Rotate': Operation(lambda image, v: image.rotate(v), 30, whole=True, mirrored=True),  # degrees
    'Sharpness': Operation(lambda image, v: ImageEnhance.Sharpness(image).enhance(v), 0.9, 0.05),
    'ShearX': Operation(lambda image, v: _affine(image, 1, v, 0, 0, 1, 0), 0.3, mirrored=True),
    'ShearY': Operation(lambda image, v: _affine(image, 1, 0, 0, v, 1, 0), 0.3, mirrored=True),
    'Solarize': Operation(lambda image, v: ImageOps.solarize(image, 256 - int(v)), 256, whole=True),
    'TranslateX': Operation(lambda image, v: _affine(image, 1, 0, int(v * image.width), 0, 1, 0), 0.3, mirrored=True),
    'TranslateY': Operation(lambda image, v: _affine(image, 1, 0, 0, 0, 1, int(v * image.height)), 0.3, mirrored=True),
}
