"""Image sets of arrays and encoded files in memory; what is not an image or a label is refused with a hint."""

import io
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from ft_jax.data.decode import decode
from ft_jax.data.image_set import ImageSet

ROOT = pathlib.Path(__file__).parents[2]


def photos(count: int = 4, size: tuple[int, ...] = (9, 7, 3)) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (count, *size)).astype(np.uint8)


def encoded(image: np.ndarray, form: str = 'PNG') -> bytes:
  stream = io.BytesIO()
  PIL.Image.fromarray(image).save(stream, form)
  return stream.getvalue()


@pytest.mark.parametrize('images', [
    photos(), photos(size=(9, 7)), photos(size=(9, 7, 1)), list(photos()),
    [photos()[0], photos(2, (5, 6))[1], encoded(photos()[2]), photos()[3]],
    [encoded(image) for image in photos()], photos().astype('u1')[::-1],
    [bytearray(encoded(photos()[0]))] * 4, [PIL.Image.fromarray(image) for image in photos()]])
def test_images_of_every_kind(images):
  """One array, arrays of different sizes, encoded files, Pillow images, all of them mixed; grey and RGB."""
  made = ImageSet.from_arrays(images, [0, 1, 1, 0], ['cat', 'dog'])
  assert (len(made), made.class_names, made.labels.tolist()) == (4, ('cat', 'dog'), [0, 1, 1, 0])
  assert made.labels.dtype == np.int32
  for i in range(4):
    image = decode(made[i].image, made[i].id)
    expected = decode(bytes(images[i]), 'x') if isinstance(images[i], (bytes, bytearray)) else np.asarray(images[i])
    expected = expected if expected.ndim == 3 else expected[..., None]
    assert image.dtype == np.uint8 and image.shape[2] == 3
    np.testing.assert_array_equal(image, np.broadcast_to(expected, image.shape))


def test_fingerprints_are_those_of_the_contents():
  """Pixels, order, labels and class names change them, and nothing else: a list of the same arrays, another name,
  another process."""
  images, labels = photos(), ['b', 'a', 'b', 'a']
  made = ImageSet.from_arrays(images, labels)
  same = ImageSet.from_arrays(list(images), np.array([1, 0, 1, 0]), ('a', 'b'), name='mine')
  assert made.fingerprint == same.fingerprint and made.ids.tolist() == same.ids.tolist() and same.name == 'mine'
  changed = images.copy()
  changed[2, 3, 4, 1] ^= 1
  others = [ImageSet.from_arrays(changed, labels), ImageSet.from_arrays(images[::-1], labels),
            ImageSet.from_arrays(images, labels[::-1]), ImageSet.from_arrays(images, same.labels, ['a', 'c'])]
  assert len({each.fingerprint for each in [made, *others]}) == 5
  script = ('import pickle, sys; from ft_jax.data import ImageSet; '
            'print(ImageSet.from_arrays(*pickle.load(sys.stdin.buffer)).fingerprint)')
  run = subprocess.run([sys.executable, '-c', script], input=pickle.dumps((images, labels)), capture_output=True,
                       check=True, cwd=ROOT,
                       env={**os.environ, 'PYTHONHASHSEED': '7'})
  assert run.stdout.decode().strip() == made.fingerprint


def test_ids_are_positions_and_differ_between_sets():
  """Train and test of the same arrays share an id only if they share an image at the same place; a repeated image has
  two ids."""
  made, other = ImageSet.from_arrays(photos(8)), ImageSet.from_arrays(photos(9)[1:])
  assert [name.partition('-')[0] for name in made.ids.tolist()] == [str(i) for i in range(8)]
  assert set(made.ids.tolist()).isdisjoint(other.ids.tolist())
  assert len(set(ImageSet.from_arrays(photos(1).repeat(3, 0)).ids.tolist())) == 3


def test_without_labels_a_set_has_one_class():
  made = ImageSet.from_arrays(photos())
  assert made.class_names == ('unlabelled',) and made.labels.tolist() == [0] * 4


@pytest.mark.parametrize('labels,class_names,numbers,names', [
    ([2, 0, 2, 1], None, [2, 0, 2, 1], ('0', '1', '2')),
    (np.array([2, 0, 2, 1], np.uint8), ['c', 'b', 'a'], [2, 0, 2, 1], ('c', 'b', 'a')),
    (['dog', 'cat', 'dog', 'ape'], None, [2, 1, 2, 0], ('ape', 'cat', 'dog')),
    (['dog', 'cat', 'dog', 'cat'], ('dog', 'cat', 'ape'), [0, 1, 0, 1], ('dog', 'cat', 'ape')),
    (np.array(['b', 'a', 'b', 'a'], object), None, [1, 0, 1, 0], ('a', 'b')),
    (('10', '9', '10', '9'), None, [0, 1, 0, 1], ('10', '9'))])
def test_labels_are_numbers_or_names(labels, class_names, numbers, names):
  """Names become classes in the order of the alphabet, unless the order is given."""
  made = ImageSet.from_arrays(photos(), labels, class_names)
  assert (made.labels.tolist(), made.class_names) == (numbers, names)


@pytest.mark.parametrize('images,words', [
    (photos() / np.float32(255), r'images has dtype float32; expected uint8 .*, 0 to 255: convert them with \(255 \* '
                                 r'images\)'),
    (photos().astype(float), r'images has dtype float64; expected uint8 .*: convert them with '
                             r'images.round\(\).astype\(np.uint8\)'),
    (np.full((4, 9, 7, 3), np.nan), 'images contains NaN; expected uint8'),
    (photos().astype(np.int64), 'images has dtype int64; expected uint8'),
    (photos() > 9, 'images has dtype bool; expected uint8'),
    (photos()[0], r'images has shape \(9, 7, 3\), which is one image .* For a set of one image give images\[None\]'),
    (photos()[0, :, :, 0], r'images has shape \(9, 7\); expected uint8 \[n, h, w, 3\]'),
    (photos()[None], r'images has shape \(1, 4, 9, 7, 3\); expected uint8 \[n, h, w, 3\]'),
    (photos().transpose(0, 3, 1, 2), r'If the channels come first, give images.transpose\(0, 2, 3, 1\)'),
    (photos(size=(9, 7, 4)), r'\(4, 9, 7, 4\); .* Put a transparent image on a background first, or give '
                             r'images\[\.\.\., :3\]'),
    (photos(size=(9, 7, 2)), r'images has shape \(4, 9, 7, 2\); expected uint8 \[n, h, w, 3\], or grey \[n, h, w\]$'),
    (photos(size=(0, 7, 3)), 'has no pixels'),
    (photos(0), 'images is empty; expected at least one image'), ([], 'images is empty'),
    ('photos', 'images is of type str; .*paths of files are for ImageSet.from_files'),
    (encoded(photos()[0]), 'images is of type bytes; expected uint8 .* or a list of images'),
    ([photos()[0], photos()[1].astype(float)], r'images\[1\] has dtype float64; expected uint8 \[h, w, 3\]'),
    ([photos()[0], photos()], r'images\[1\] has shape \(4, 9, 7, 3\); expected uint8 \[h, w, 3\]'),
    ([photos()[0].transpose(2, 0, 1)], r'images\[0\] has shape .* If the channels come first, give image.transpose\(1, '
                                       r'2, 0\)'),
    ([photos(size=(9, 7, 4))[0]], r'images\[0\] .* give image\[\.\.\., :3\]'),
    ([photos()[0][:0]], r'images\[0\] has shape \(0, 7, 3\), which has no pixels'),
    ([photos()[0], 'a.jpg'], r'images\[1\] is of type str; .*paths of files are for ImageSet.from_files'),
    ([pathlib.Path('a.jpg')], r'images\[0\] is of type PosixPath; .*paths of files are for ImageSet.from_files'),
    ([None], r'images\[0\] is of type NoneType; expected uint8'),
    ([b''], r'images\[0\] has no bytes'),
    ([PIL.Image.new('F', (3, 3))], r'images\[0\] cannot be read as an image .*mode F, whose range is not known')])
def test_what_is_not_an_image(images, words):
  with pytest.raises(ValueError, match=words) as caught:
    ImageSet.from_arrays(images, None)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('labels,class_names,words', [
    ([0, 1, 0], None, r'labels has shape \(3,\), but there are 4 images; expected one label per image, \[4\]'),
    (np.eye(4, dtype=int), None, r'labels has shape \(4, 4\); .* If the rows are one-hot, give labels.argmax\(1\)'),
    (3, None, r'labels has shape \(\), but there are 4 images'),
    ('abcd', None, "labels is the string 'abcd'; expected one label per image, 4 in all"),
    ([0.0, 1.0, 0.0, 1.0], None, 'labels has dtype float64; expected integers, 0 for the first class, or the names of '
                                 'classes'),
    ([True, False, True, True], None, 'labels has dtype bool; expected integers'),
    ([0, 1, None, 1], None, 'labels has dtype object; expected integers'),
    ([[0], [1, 2], [0], [1]], None, 'labels has entries of different lengths'),
    ([0, 1, -1, 1], None, r'labels\[2\] is -1; expected numbers of 0 or more'),
    ([0, 1, 2, 1], ['a', 'b'], r'labels\[2\] is 2, but class_names has 2 names; expected labels from 0 to 1'),
    (['a', 'b', 'x', 'a'], ['a', 'b'], r"labels\[2\] is 'x', which class_names does not have; it has 2: a, b$"),
    (['a', '', 'b', 'a'], None, r'labels\[1\] is empty'),
    (['a', 1, 'b', 'a'], None, 'labels mixes strings with other values'),
    ([0, 1, 0, 1], [], 'class_names is empty'),
    ([0, 1, 0, 1], 2, 'class_names is 2; expected a list of names'),
    ([0, 1, 0, 1], 'ab', "class_names is the string 'ab'; expected a list of names"),
    ([0, 1, 0, 1], ['a', 'a'], "class_names contains 'a' twice"),
    ([0, 1, 0, 1], ['a', ''], "class_names contains ''; expected non-empty strings"),
    ([0, 1, 0, 1], ['a', 3], 'class_names contains 3; expected non-empty strings'),
    (None, ['a', 'b'], 'class_names has 2 names, but there are no labels; give labels')])
def test_what_are_not_labels(labels, class_names, words):
  with pytest.raises(ValueError, match=words) as caught:
    ImageSet.from_arrays(photos(), labels, class_names)
  assert '\n' not in str(caught.value)
