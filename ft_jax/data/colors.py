"""Random changes of colour and sharpness of a training crop, as in self-supervised pre-training.

The definitions are torchvision's (ColorJitter, RandomGrayscale, GaussianBlur, RandomSolarize); results are rounded,
where Pillow truncates. OpenCV computes them without holding up other threads.
"""

from collections.abc import Sequence

import cv2
import numpy as np

# The threads of the pipeline are the parallelism; OpenCV's own would compete with them for the cores.
cv2.setNumThreads(0)

# Red, green and blue in the luminance of ITU-R 601-2, which Pillow and torchvision use.
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
_LEVELS = np.arange(256, dtype=np.float32)
_SOLARIZED = np.where(np.arange(256) < 128, np.arange(256), 255 - np.arange(256)).astype(np.uint8)
# Sigmas of the blur are given in pixels of a crop of this side, that of the published experiments.
REFERENCE_SIZE = 224


def jitter(image: np.ndarray, strengths: Sequence[float], rng: np.random.Generator) -> np.ndarray:
  """Changes brightness, contrast, saturation and hue, in random order (torchvision's ColorJitter).

  Args:
    image: uint8 `[h, w, 3]`; it is not changed.
    strengths: of brightness, contrast and saturation, whose factors are drawn from [max(0, 1 - s), 1 + s], and of hue,
      whose shift is drawn from [-s, s] turns.
    rng: the source of randomness: eight numbers.
  """
  numbers = rng.random(8).tolist()
  *factors, hue = (_drawn(number, strength) for number, strength in zip(numbers[:4], strengths))
  operations = (lambda x: brightness(x, factors[0]), lambda x: contrast(x, factors[1]),
                lambda x: saturation(x, factors[2]), lambda x: shift_hue(x, hue - 1))
  for k in sorted(range(4), key=lambda k: numbers[4 + k]):
    if strengths[k]:
      image = operations[k](image)
  return image


def _drawn(number: float, strength: float) -> float:
  """A factor around 1 from a number in [0, 1)."""
  least = max(0.0, 1 - strength)
  return least + number * (1 + strength - least)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
  """The image `[h, w, 3]` times a factor."""
  return cv2.LUT(image, _rounded(factor * _LEVELS))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
  """The difference of the image `[h, w, 3]` from its mean luminance times a factor."""
  mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
  return cv2.LUT(image, _rounded(mean + factor * (_LEVELS - mean)))


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
  """The difference of the image `[h, w, 3]` from its luminance times a factor."""
  return cv2.transform(image, factor * np.eye(3, dtype=np.float32) + (1 - factor) * _LUMINANCE)


def shift_hue(image: np.ndarray, turns: float) -> np.ndarray:
  """The image `[h, w, 3]` with its hue, as an angle, shifted by so many turns."""
  hsv = cv2.cvtColor(image * np.float32(1 / 255), cv2.COLOR_RGB2HSV)
  hsv[..., 0] = hsv[..., 0] + np.float32(360 * (turns % 1))
  return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), alpha=255)


def grey(image: np.ndarray) -> np.ndarray:
  """The luminance of the image `[h, w, 3]` in all three channels."""
  return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
  """The image `[h, w, 3]` blurred by a Gaussian of a standard deviation of `sigma` pixels.

  Its kernel is a tenth of the image's side (23 pixels of 224, as in SimCLR and BYOL); borders are reflected.
  """
  side = 2 * max(1, round(min(image.shape[:2]) / 20)) + 1
  return cv2.GaussianBlur(image, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)


def random_blur(image: np.ndarray, sigmas: Sequence[float], rng: np.random.Generator) -> np.ndarray:
  """The image `[h, w, 3]` blurred by a sigma between two bounds, in pixels of a side of `REFERENCE_SIZE`."""
  sigma = sigmas[0] + rng.random() * (sigmas[1] - sigmas[0])
  return blur(image, sigma * min(image.shape[:2]) / REFERENCE_SIZE)


def solarize(image: np.ndarray) -> np.ndarray:
  """The image `[h, w, 3]` with the values from 128 on inverted."""
  return cv2.LUT(image, _SOLARIZED)


def _rounded(values: np.ndarray) -> np.ndarray:
  return np.clip(values + 0.5, 0, 255).astype(np.uint8)
