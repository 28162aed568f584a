"""RandAugment and Cutout: Pillow's operations with the published values; the grey square is exact."""

import collections
import dataclasses

import numpy as np
from PIL import ImageEnhance, ImageOps
import PIL.Image
import pytest
from sklearn import datasets

from configs import default
from ft_jax.data import open_set, randaugment
from ft_jax.data.image_set import Example
from ft_jax.data.pipeline import make_transform, train_batches, Transform
from ft_jax.settings import check_fields


@pytest.fixture(scope='module')
def photo() -> np.ndarray:
  return np.ascontiguousarray(datasets.load_sample_images().images[0][100:148, 200:240])


def published(name: str, image: PIL.Image.Image, v: int, sign: int) -> PIL.Image.Image:
  """What FixMatch's operation of that name makes of an image at strength v, written out for each."""
  w, h = image.size
  affine = lambda *a: image.transform((w, h), PIL.Image.Transform.AFFINE, a)
  return {
      'AutoContrast': lambda: ImageOps.autocontrast(image), 'Equalize': lambda: ImageOps.equalize(image),
      'Identity': lambda: image,
      'Brightness': lambda: ImageEnhance.Brightness(image).enhance(0.09 * v + 0.05),
      'Color': lambda: ImageEnhance.Color(image).enhance(0.09 * v + 0.05),
      'Contrast': lambda: ImageEnhance.Contrast(image).enhance(0.09 * v + 0.05),
      'Sharpness': lambda: ImageEnhance.Sharpness(image).enhance(0.09 * v + 0.05),
      'Posterize': lambda: ImageOps.posterize(image, 4 + 4 * v // 10),
      'Solarize': lambda: ImageOps.solarize(image, 256 - 256 * v // 10),
      'Rotate': lambda: image.rotate(sign * 3 * v),
      'ShearX': lambda: affine(1, sign * 0.03 * v, 0, 0, 1, 0),
      'ShearY': lambda: affine(1, 0, 0, sign * 0.03 * v, 1, 0),
      'TranslateX': lambda: affine(1, 0, sign * int(0.03 * v * w), 0, 1, 0),
      'TranslateY': lambda: affine(1, 0, 0, 0, 1, sign * int(0.03 * v * h)),
  }[name]()


class Numbers:
  """Stands for a generator: gives the numbers that it was given."""

  def __init__(self, *rows):
    self.rows = np.array(rows)

  def random(self, shape):
    assert self.rows.shape == shape
    return self.rows


@pytest.mark.parametrize('name', randaugment.OPERATIONS)
def test_operations_are_pillows(photo, name):
  """Every operation, strength and sign; and nothing if the coin says so."""
  kind = (list(randaugment.OPERATIONS).index(name) + 0.5) / 14
  for v in range(1, 10):
    for sign in (-1, 1):
      numbers = (kind, 0.49, (v - 0.5) / 9, 0.5 - 0.1 * (sign < 0))
      made = randaugment.randaugment(photo.copy(), 1, 10, Numbers(numbers))
      np.testing.assert_array_equal(made, published(name, PIL.Image.fromarray(photo), v, sign),
                                    err_msg=f'{name} {v} {sign}')
  assert len(randaugment.OPERATIONS) == 14
  np.testing.assert_array_equal(randaugment.randaugment(photo.copy(), 1, 10, Numbers((kind, 0.5, 0.9, 0.1))), photo)
  # Two in a row: the second one works on what the first one made.
  first, second = (kind, 0.1, 0.99, 0.9), (13.5 / 14, 0.1, 0.99, 0.9)
  made = randaugment.randaugment(photo.copy(), 2, 5, Numbers(first, second))
  np.testing.assert_array_equal(made, published('TranslateY', published(name, PIL.Image.fromarray(photo), 4, 1), 4, 1))


def test_what_is_drawn(photo, monkeypatch):
  """Operations with equal chance, each used half of the time, strengths 1 to magnitude - 1, both signs."""
  seen = collections.Counter()
  for name, operation in list(randaugment.OPERATIONS.items()):
    note = lambda image, value, name=name: (seen.update([(name, value)]), image)[1]
    monkeypatch.setitem(randaugment.OPERATIONS, name, operation._replace(apply=note))
  rng, draws = np.random.default_rng(0), 7000
  for _ in range(draws):
    randaugment.randaugment(photo, 2, 4, rng)
  by_name = collections.Counter(name for name, _ in seen.elements())
  assert len(by_name) == 14 and all(abs(n - draws / 14) < 4 * (draws / 14) ** 0.5 for n in by_name.values())
  assert {value for name, value in seen if name == 'Rotate'} == {-9, -6, -3, 3, 6, 9}
  rotations = [seen['Rotate', value] for value in (-9, -6, -3, 3, 6, 9)]
  assert min(rotations) > 0.6 * np.mean(rotations)
  assert {value for name, value in seen if name == 'Posterize'} == {4, 5}


def test_cutout(photo):
  """A grey square of exactly the given side, centred anywhere, cut off at the borders."""
  rng, height, width = np.random.default_rng(0), *photo.shape[:2]
  covered = np.zeros((height, width))
  for _ in range(4000):
    black = np.zeros_like(photo)
    assert randaugment.cutout(black, 0.5, rng) is black
    grey = (black == 127).all(-1)
    rows, columns = np.flatnonzero(grey.any(1)), np.flatnonzero(grey.any(0))
    assert grey.sum() == len(rows) * len(columns) == (black != 0).sum() / 3  # one whole rectangle, and nothing else
    assert len(rows) == 20 or 10 <= len(rows) and (rows[0] == 0 or rows[-1] == height - 1)
    assert len(columns) == 20 or 10 <= len(columns) and (columns[0] == 0 or columns[-1] == width - 1)
    covered += grey
  # The middle of a column of pixels is covered by squares whose middle is within 10 pixels, a corner by a quarter of
  # those.
  assert covered[24, 20] / 4000 == pytest.approx(20 / 48 * 20 / 40, rel=0.1)
  assert covered[0, 0] / 4000 == pytest.approx(10 / 48 * 10 / 40, rel=0.25)


def test_training_crops(photos):
  """The same batches whatever the threads do; evaluation is unchanged, and so is training without both."""
  source = open_set(f'folder:{photos}', 'train')
  plain = Transform(32, short_side=36)
  strong = dataclasses.replace(plain, randaugment=2, cutout=0.5)

  def batches(transform, start, count, **kwargs):
    made = train_batches(source, transform, 16, stream='source', seed=0, start=start, **kwargs)
    return [next(made) for _ in range(count)]

  first, again = batches(plain, 0, 4, views={'strong': strong}), batches(plain, 2, 2, views={'strong': strong})
  for a, b in zip(first[2:], again):
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
  for a, b in zip(first, batches(plain, 0, 4)):
    np.testing.assert_array_equal(a['input'], b['input'])
  # Each strong view has its square of grey, and is another crop than the weak one.
  grey = (np.concatenate([batch['strong'] for batch in first]) == 127).all(-1).sum((1, 2))
  assert grey.min() >= 8 * 8
  example = Example((photos / 'train' / 'sky' / '0.jpg').read_bytes(), 0, 'x')
  np.testing.assert_array_equal(strong.evaluate(example), plain.evaluate(example))
  out = np.empty((32, 32, 3), np.uint8)
  made = strong.train(example, np.random.default_rng(1), out)
  assert np.shares_memory(made, out)
  np.testing.assert_array_equal(strong.train(example, np.random.default_rng(1)), out)


@pytest.mark.parametrize('field,value,words', [
    ('randaugment', -1, 'expected a whole number from 0 .*; 0 is none'),
    ('magnitude', 1, 'expected a whole number from 2 to 10'),
    ('magnitude', 11, 'expected a whole number from 2 to 10'),
    ('cutout', 1.5, 'expected a number from 0 to 1, a fraction of the side'),
    ('cutout', -0.1, 'expected a number from 0 to 1')])
def test_wrong_settings(field, value, words):
  config = default.get_config()
  config.augment[field] = value
  with pytest.raises(ValueError, match=f'augment.{field} is {value}; {words}'):
    check_fields(config)


def test_settings_reach_the_crops():
  config = default.get_config()
  config.augment.update(randaugment=3, magnitude=7, cutout=0.25)
  transform = make_transform(config.image_size, config.augment)
  assert (transform.randaugment, transform.magnitude, transform.cutout) == (3, 7, 0.25)
