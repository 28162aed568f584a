"""Jitter, grey, blur and solarization are torchvision's: against Pillow, the kernel written out, and colorsys."""

import colorsys
import math

import numpy as np
from PIL import ImageEnhance, ImageOps
import PIL.Image
import pytest
from sklearn import datasets

from ft_jax.data import colors
from ft_jax.data.image_set import Example
from ft_jax.data.pipeline import Transform


@pytest.fixture(scope='module')
def photo() -> np.ndarray:
  return np.ascontiguousarray(datasets.load_sample_images().images[1][100:148, 200:240])


def difference(image: np.ndarray, expected) -> float:
  return np.abs(image.astype(float) - np.asarray(expected, float)).max()


@pytest.mark.parametrize('factor', [0.0, 0.6, 1.0, 1.4, 3.0])
def test_brightness_contrast_and_saturation_are_pillows(photo, factor):
  """Pillow truncates where these round."""
  picture = PIL.Image.fromarray(photo)
  for own, pillows in ((colors.brightness, ImageEnhance.Brightness), (colors.contrast, ImageEnhance.Contrast),
                       (colors.saturation, ImageEnhance.Color)):
    # At a factor of 3 a luminance that is rounded otherwise counts twice.
    assert difference(own(photo, factor), pillows(picture).enhance(factor)) <= (1 if factor <= 2 else 2), own
  assert difference(colors.grey(photo), picture.convert('L').convert('RGB')) <= 1
  assert difference(colors.solarize(photo), ImageOps.solarize(picture, 128)) == 0


@pytest.mark.parametrize('turns', [0.1, -0.1, 0.5, -0.37, 0.0])
def test_hue_is_shifted_in_hsv(photo, turns):
  """As torchvision's for tensors; the one for Pillow images has a hue of 256 levels, and is near."""
  expected = np.empty(photo.shape)
  for place in np.ndindex(photo.shape[:2]):
    h, s, v = colorsys.rgb_to_hsv(*(photo[place] / 255))
    expected[place] = colorsys.hsv_to_rgb((h + turns) % 1, s, v)
  assert difference(colors.shift_hue(photo, turns), 255 * expected) <= 0.51
  hsv = np.array(PIL.Image.fromarray(photo).convert('HSV'))
  hsv[..., 0] += np.uint8(int(turns * 255) % 256)
  pillows = np.asarray(PIL.Image.fromarray(hsv, 'HSV').convert('RGB'), float)
  assert np.abs(colors.shift_hue(photo, turns) - pillows).mean() < 3


@pytest.mark.parametrize('sigma', [0.1, 0.5, 2.0])
def test_blur_is_a_gaussian_with_reflected_borders(photo, sigma):
  """The kernel is a tenth of the shorter side: 5 pixels of 40, 23 of 224."""
  radius = 2
  kernel = np.array([math.exp(-x * x / (2 * sigma**2)) for x in range(-radius, radius + 1)])
  kernel /= kernel.sum()
  padded = np.pad(photo.astype(float), [(radius, radius), (radius, radius), (0, 0)], mode='reflect')
  rows = sum(weight * padded[k:k + photo.shape[0]] for k, weight in enumerate(kernel))
  expected = sum(weight * rows[:, k:k + photo.shape[1]] for k, weight in enumerate(kernel))
  assert difference(colors.blur(photo, sigma), expected) <= 1
  line = np.zeros((224, 224, 3), np.uint8)
  line[:, 112] = 255
  assert np.flatnonzero(colors.blur(line, 100.0)[112, :, 0]).tolist() == list(range(101, 124))


class Numbers:
  """Stands for a generator: gives the numbers that it was given, in turn."""

  def __init__(self, *numbers):
    self.numbers = list(numbers)

  def random(self, count=None):
    taken, self.numbers = self.numbers[:count or 1], self.numbers[count or 1:]
    return np.array(taken) if count else taken[0]


def test_jitter_draws_factors_and_an_order(photo):
  """The factors from [max(0, 1 - s), 1 + s], the shift from [-s, s], in the order of the other four numbers; a
  strength of zero leaves its operation out."""
  drawn = colors.jitter(photo, (0.4, 0.8, 2.0, 0.1), Numbers(0.0, 1.0, 0.5, 0.75, 0.4, 0.3, 0.2, 0.1))
  expected = colors.brightness(
      colors.contrast(colors.saturation(colors.shift_hue(photo, 0.05), 1.5), 1.8), 0.6)
  assert difference(drawn, expected) <= 1
  before = photo.copy()
  one = colors.jitter(photo, (0.0, 0.4, 0.0, 0.0), Numbers(0.1, 0.25, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1))
  np.testing.assert_array_equal(one, colors.contrast(photo, 0.8))
  np.testing.assert_array_equal(photo, before)


def test_the_sigma_of_the_blur_grows_with_the_crop(photo):
  square = np.ascontiguousarray(photo[:40, :40])
  np.testing.assert_array_equal(colors.random_blur(square, (2.0, 10.0), Numbers(0.5)),
                                colors.blur(square, 6.0 * 40 / 224))


def test_a_transform_applies_each_as_often_as_it_says(photo):
  """And a transform without them draws the numbers that it drew before there were any."""
  example = Example(photo, 0, 'photo')
  still = dict(size=32, scale=(1.0, 1.0), ratio=(0.8, 0.8), flip=False)
  plain = Transform(**still).train(example, np.random.default_rng(0))

  def changed(**fields) -> float:
    transform, rng = Transform(**still, **fields), np.random.default_rng(0)
    return np.mean([not np.array_equal(transform.train(example, rng), plain) for _ in range(200)])

  for fields in ({'grey': 0.3}, {'blur': 0.3, 'blur_sigma': (5.0, 9.0)}, {'solarize': 0.3},
                 {'jitter': (0.9, 0.9, 0.9, 0.4), 'jitter_probability': 0.3}):
    assert 0.2 < changed(**fields) < 0.4, fields
  always = Transform(**still, grey=1.0, solarize=1.0).train(example, np.random.default_rng(0))
  np.testing.assert_array_equal(always, colors.solarize(colors.grey(plain)))
  one, other = np.random.default_rng(5), np.random.default_rng(5)
  Transform(32, scale=(0.5, 0.5), ratio=(1.0, 1.0)).train(example, one)  # such a crop fits at once
  other.random(5)
  assert one.random() == other.random()
