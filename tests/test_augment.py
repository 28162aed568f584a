"""Images are read right whatever their form, a damaged one is named, and the crops are what torchvision would cut."""

import io

import numpy as np
import PIL.Image
import pytest

from ft_jax.data import augment


@pytest.fixture(scope='module')
def photo() -> np.ndarray:
  from sklearn import datasets
  return datasets.load_sample_images().images[0][:180, :240]


def encoded(picture: PIL.Image.Image, form: str, **options) -> bytes:
  stream = io.BytesIO()
  picture.save(stream, form, **options)
  return stream.getvalue()


@pytest.mark.parametrize('form,mode,error', [
    ('JPEG', 'RGB', 4), ('JPEG', 'L', 40), ('JPEG', 'CMYK', 6), ('PNG', 'RGB', 0), ('PNG', 'RGBA', 0), ('PNG', 'P', 30),
    ('GIF', 'P', 30), ('BMP', 'RGB', 0), ('WEBP', 'RGB', 6), ('TIFF', 'RGB', 0)])
def test_formats(photo, form, mode, error):
  """Every format gives the same picture, as far as the format can (grey and palette lose colour)."""
  picture = PIL.Image.fromarray(photo).convert(mode)
  image = augment.decode(encoded(picture, form), 'x')
  assert image.shape == photo.shape and image.dtype == np.uint8
  assert np.abs(image.astype(int) - photo).mean() <= error


def test_exif_rotation_is_applied(photo):
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
  image = augment.decode(encoded(PIL.Image.fromarray(photo), 'JPEG', exif=exif, quality=95), 'x')
  assert np.abs(image.astype(int) - np.rot90(photo, -1)).mean() < 4


def test_arrays_pass_through():
  grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
  image = augment.decode(grey, 'x')
  assert image.shape == (3, 4, 3) and (image == grey[..., None]).all()


def damaged(photo: np.ndarray) -> dict[str, bytes]:
  jpeg, png = (encoded(PIL.Image.fromarray(photo), form) for form in ('JPEG', 'PNG'))
  return {'empty': b'', 'text': b'hello', 'cut jpeg': jpeg[:len(jpeg) // 2], 'cut png': png[:len(png) // 2],
          'head alone': jpeg[:20]}


def test_sixteen_bits_are_scaled_and_unknown_ranges_refused():
  """Medical images: Pillow's own conversion makes them white."""
  ramp = np.linspace(0, 65535, 40 * 60).reshape(40, 60)
  image = augment.decode(encoded(PIL.Image.fromarray(ramp.astype(np.uint16)), 'PNG'), 'x')
  assert image.shape == (40, 60, 3) and np.abs(image[..., 0] - ramp / 257).max() <= 1
  with pytest.raises(ValueError, match='x.tif is no image that can be read .*mode F, whose range is not known'):
    augment.decode(encoded(PIL.Image.fromarray((ramp / 65535).astype(np.float32)), 'TIFF'), 'x.tif')


@pytest.mark.parametrize('what', ['empty', 'text', 'cut jpeg', 'cut png', 'head alone'])
def test_damage_is_named(photo, what):
  with pytest.raises(ValueError, match='train/cat/7.jpg is no image that can be read'):
    augment.decode(damaged(photo)[what], 'train/cat/7.jpg')


def test_random_resized_crop_draws_as_torchvision():
  """Area uniform in the scale, shape log-uniform in the ratio, position uniform: read off an image of coordinates."""
  height, width = 120, 160
  y, x = np.mgrid[:height, :width].astype(np.uint8)
  image = np.stack([y, x, np.zeros_like(y)], -1)
  rng = np.random.default_rng(0)
  areas, aspects = [], []
  for _ in range(600):
    crop = augment.random_resized_crop(image, 32, (0.2, 0.6), (3 / 4, 4 / 3), rng).astype(float)
    # 31 steps between the centres of the outer pixels span 31/32 of the crop.
    h, w = ((crop[-1, 16, 0] - crop[0, 16, 0]) * 32 / 31, (crop[16, -1, 1] - crop[16, 0, 1]) * 32 / 31)
    areas.append(h * w / (height * width))
    aspects.append(np.log(w / h))
  assert abs(np.mean(areas) - 0.4) < 0.02 and 0.15 < min(areas) and max(areas) < 0.66
  assert abs(np.mean(aspects)) < 0.03 and max(np.abs(aspects)) < np.log(4 / 3) + 0.1


@pytest.mark.parametrize('side,antialias,averaged', [(48, False, False), (48, True, True), (96, False, True), (96, True, True)])
def test_a_crop_that_shrinks_is_averaged(side, antialias, averaged):
  """To 32 pixels: each is the mean over its area, beyond a factor of two always, below it on request."""
  noise = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
  crop = augment.random_resized_crop(noise, 32, (1.0, 1.0), (1.0, 1.0), np.random.default_rng(0), antialias)
  fine = noise.repeat(96 // side, 0).repeat(96 // side, 1).astype(float)
  means = fine.reshape(32, 3, 32, 3, 3).mean((1, 3))
  assert (np.abs(crop - means).max() <= 1) == averaged


def test_crop_of_an_extreme_shape_falls_back_to_the_middle():
  strip = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (4, 1, 3))
  crop = augment.random_resized_crop(strip, 8, (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
  assert crop.shape == (8, 8, 3) and 95 < crop.mean() < 105


@pytest.mark.parametrize('shape', [(180, 240), (240, 180), (300, 300), (50, 240), (1, 200)])
def test_center_crop_is_pillows(photo, shape):
  """Resize(256 / 224 of the size) and CenterCrop, bit for bit what Pillow gives."""
  image = np.resize(photo, (*shape, 3))
  crop = augment.center_crop(image, 56, 64)
  picture = PIL.Image.fromarray(image)
  ratio = 64 / min(shape)
  w, h = max(56, int(shape[1] * ratio)), max(56, int(shape[0] * ratio))
  resized = picture.resize((w, h), PIL.Image.Resampling.BILINEAR)
  left, top = round((w - 56) / 2), round((h - 56) / 2)
  np.testing.assert_array_equal(crop, np.asarray(resized.crop((left, top, left + 56, top + 56))))
