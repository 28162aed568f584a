"""Crops are those of torchvision, bit for bit with antialias."""

import numpy as np
import PIL.Image
import pytest

from ft_jax.data import crop
from ft_jax.data.crop import center_crop, random_resized_crop
from ft_jax.data.decode import decode


def test_random_resized_crop_draws_as_torchvision():
  """Area uniform, ratio log-uniform, position uniform, as read off crops of an image of coordinates."""
  height, width = 120, 160
  y, x = np.mgrid[:height, :width].astype(np.uint8)
  image = np.stack([y, x, np.zeros_like(y)], -1)
  rng = np.random.default_rng(0)
  areas, aspects = [], []
  for _ in range(600):
    found = random_resized_crop(image, 32, (0.2, 0.6), (3 / 4, 4 / 3), rng).astype(float)
    # 31 steps between the centres of the outer pixels span 31/32 of the crop.
    h, w = ((found[-1, 16, 0] - found[0, 16, 0]) * 32 / 31, (found[16, -1, 1] - found[16, 0, 1]) * 32 / 31)
    areas.append(h * w / (height * width))
    aspects.append(np.log(w / h))
  assert abs(np.mean(areas) - 0.4) < 0.02 and 0.15 < min(areas) and max(areas) < 0.66
  assert abs(np.mean(aspects)) < 0.03 and max(np.abs(aspects)) < np.log(4 / 3) + 0.1


def drawn_part(height, width, random_crop, monkeypatch):
  """(left, top, right, bottom) of the part that `random_crop` takes of an image of that size."""
  coordinates = np.stack([*np.mgrid[:height, :width], np.zeros((height, width))], -1)
  with monkeypatch.context() as patched:
    patched.setattr(crop, '_resize', lambda part, *_: part)
    part = random_crop(coordinates).astype(int)
  return part[0, 0, 1], part[0, 0, 0], part[-1, -1, 1] + 1, part[-1, -1, 0] + 1


@pytest.mark.parametrize('height,width,size', [
    (375, 500, 224), (375, 500, 32), (60, 80, 96), (427, 640, 300), (40, 400, 64), (400, 40, 64)])
def test_an_antialiased_crop_is_pillows(height, width, size, tmp_path, monkeypatch):
  """Bit for bit from the bytes of a JPEG file: Pillow's decoder, crop and antialiased bilinear filter.

  Crops that grow, shrink a little, shrink much, and shrink in one direction only; without antialias they differ.
  """
  from sklearn import datasets
  photo = PIL.Image.fromarray(datasets.load_sample_images().images[0]).resize((width, height))
  photo.save(tmp_path / 'photo.jpg', quality=92)
  image = decode((tmp_path / 'photo.jpg').read_bytes(), 'photo.jpg')

  def random_crop(image, antialias=True):
    return random_resized_crop(image, size, (0.3, 0.9), (3 / 4, 4 / 3), np.random.default_rng(size), antialias)

  part = PIL.Image.open(tmp_path / 'photo.jpg').crop(drawn_part(height, width, random_crop, monkeypatch))
  expected = np.asarray(part.resize((size, size), PIL.Image.Resampling.BILINEAR))
  np.testing.assert_array_equal(random_crop(image), expected)
  assert (random_crop(image, antialias=False) != expected).any()


@pytest.mark.parametrize('side,averaged', [(48, False), (96, True)])
def test_a_crop_that_shrinks_much_is_averaged(side, averaged):
  """To 32 pixels without antialias: beyond a factor of two each pixel is the mean over its area."""
  noise = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
  found = random_resized_crop(noise, 32, (1.0, 1.0), (1.0, 1.0), np.random.default_rng(0))
  fine = noise.repeat(96 // side, 0).repeat(96 // side, 1).astype(float)
  means = fine.reshape(32, 3, 32, 3, 3).mean((1, 3))
  assert (np.abs(found - means).max() <= 1) == averaged


def test_crop_of_an_extreme_shape_falls_back_to_the_middle():
  strip = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (4, 1, 3))
  found = random_resized_crop(strip, 8, (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
  assert found.shape == (8, 8, 3) and 95 < found.mean() < 105


@pytest.mark.parametrize('size,short_side', [(224, 256), (56, 64), (64, 64)])
def test_center_crop_is_that_of_the_weights(size, short_side):
  """Pillow's antialiased Resize and CenterCrop with torchvision's rounding; here only the middle is computed."""
  from sklearn import datasets
  photographs = datasets.load_sample_images().images
  rng = np.random.default_rng(0)
  images = [photographs[k % 2][:h, :w] for k, (h, w) in enumerate(rng.integers(40, (427, 640), (12, 2)))]
  shapes = (1, 1), (1, 300), (300, 1), (2, 500), (700, 7), (size, size)
  images += [np.resize(photographs[0], (*shape, 3)) for shape in shapes]
  for image in images:
    height, width = image.shape[:2]
    h, w = int(short_side * height / min(height, width)), int(short_side * width / min(height, width))
    top, left = int(round((h - size) / 2)), int(round((w - size) / 2))
    whole = PIL.Image.fromarray(image).resize((w, h), PIL.Image.Resampling.BILINEAR)
    expected = np.asarray(whole.crop((left, top, left + size, top + size)), int)
    difference = np.abs(center_crop(image, size, short_side) - expected)
    # The box is in single precision, so that a half is rounded the other way now and then.
    assert difference.mean() < 0.25 and difference.max() <= 1


def test_center_crop_of_a_strip_computes_the_square_alone():
  """Resized as a whole, this image would have 256 x 12,800,000 pixels: ten gigabytes."""
  strip = np.zeros((1, 50_000, 3), np.uint8)
  strip[:, 24_000:26_000] = 200
  assert (center_crop(strip, 224, 256) == 200).all()
