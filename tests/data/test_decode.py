"""Images of every format are read right, and damaged ones are named."""

import base64
import io
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL.Image
import pytest

from ft_jax.data import decode
from ft_jax.data.crop import center_crop, random_resized_crop

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def photo() -> np.ndarray:
  from sklearn import datasets
  return datasets.load_sample_images().images[0][:180, :240]


def encoded(picture: PIL.Image.Image, form: str, **options) -> bytes:
  stream = io.BytesIO()
  picture.save(stream, form, **options)
  return stream.getvalue()


def grey(photo: np.ndarray) -> np.ndarray:
  return np.asarray(PIL.Image.fromarray(photo).convert('L').convert('RGB'))


@pytest.mark.parametrize('form,mode,error,options', [
    ('JPEG', 'RGB', 4, {}), ('JPEG', 'RGB', 4, {'progressive': True}), ('JPEG', 'RGB', 4, {'subsampling': '4:4:4'}),
    ('JPEG', 'RGB', 4, {'subsampling': '4:1:1'}), ('JPEG', 'RGB', 3, {'keep_rgb': True}),
    ('JPEG', 'L', 4, {}), ('JPEG', 'CMYK', 6, {}), ('PNG', 'RGB', 0, {}), ('PNG', 'RGBA', 0, {}), ('PNG', 'L', 0, {}),
    ('PNG', 'LA', 0, {}),
    ('PNG', 'P', 30, {}), ('GIF', 'P', 30, {}), ('BMP', 'RGB', 0, {}), ('BMP', 'L', 0, {}), ('WEBP', 'RGB', 6, {}),
    ('WEBP', 'RGB', 0, {'lossless': True}), ('TIFF', 'RGB', 0, {}), ('TIFF', 'CMYK', 0, {}), ('TIFF', 'LAB', 6, {}),
    ('TIFF', 'YCbCr', 3, {}), ('TIFF', 'RGB', 0, {'compression': 'tiff_lzw'}), ('PPM', 'RGB', 0, {}),
    ('PPM', 'L', 0, {})])
def test_formats(photo, form, mode, error, options):
  """Every format gives the same picture within what it can store (a palette loses colours)."""
  picture = PIL.Image.fromarray(photo)
  picture = convert_to_lab(picture) if mode == 'LAB' else picture.convert(mode)
  data = encoded(picture, form, **options)
  image = decode.decode(data, 'train/a/1.jpg')
  assert image.shape == photo.shape and image.dtype == np.uint8 and decode.dimensions(data, 'x') == photo.shape[:2]
  assert np.abs(image.astype(int) - (grey(photo) if mode in ('L', 'LA') else photo)).mean() <= error


def convert_to_lab(picture: PIL.Image.Image) -> PIL.Image.Image:
  from PIL import ImageCms
  profiles = ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB')
  return ImageCms.applyTransform(picture, ImageCms.buildTransform(*profiles, 'RGB', 'LAB'))


def test_one_bit_images_are_black_and_white(photo):
  picture = PIL.Image.fromarray(photo).convert('1')
  for form in ('PNG', 'TIFF', 'PPM', 'BMP'):
    np.testing.assert_array_equal(decode.decode(encoded(picture, form), 'x'), np.asarray(picture.convert('RGB')))


# 16 x 8 pixels, grey 40 beside grey 200, by jpegtran -arithmetic and cjpeg -sample 4x2: forms that Pillow does not
# write.
ARITHMETIC = (
    '/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB'
    'AQEBAQEBAQEBAQEBAQH/'
    '2wBDAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQH/yQARCAAI'
    'ABADASIAAhEBAxEB/8wA'
    'CgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/APeCCMC3/9k=')
SAMPLED_4X2 = (
    '/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB'
    'AQEBAQEBAQEBAQEBAQH/'
    '2wBDAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQH/wAARCAAI'
    'ABADAUIAAhEBAxEB/8QA'
    'FgABAQEAAAAAAAAAAAAAAAAAAAoL/8QAFBABAAAAAAAAAAAAAAAAAAAAAP/EABQBAQAAAAAAAAAAAAAAAAAAAAD/xAAUEQEAAAAA'
    'AAAAAAAAAAAAAAAA/9oA'
    'DAMBAAIRAxEAPwCT9qAAAA//2Q==')


@pytest.mark.parametrize('data', [ARITHMETIC, SAMPLED_4X2])
def test_rare_forms_of_jpeg(data):
  image = decode.decode(base64.b64decode(data), 'x').astype(int)
  assert image.shape == (8, 16, 3) and np.abs(image[:, :8] - 40).max() <= 2 and np.abs(image[:, 8:] - 200).max() <= 2


def test_colours_of_printing_are_those_of_pillow(photo):
  """CMYK as Adobe writes it (inverted), and YCCK."""
  data = encoded(PIL.Image.fromarray(photo).convert('CMYK'), 'JPEG')
  assert b'Adobe' in data
  reference = PIL.Image.open(io.BytesIO(data)).convert('RGB')
  np.testing.assert_array_equal(decode.decode(data, 'x'), np.asarray(reference))


def test_an_ordinary_jpeg_is_read_as_pillow_reads_it(photo):
  """Both decoders give the same pixels."""
  for options in ({}, {'quality': 50}, {'progressive': True}, {'subsampling': 0}):
    data = encoded(PIL.Image.fromarray(photo), 'JPEG', **options)
    with PIL.Image.open(io.BytesIO(data)) as picture:
      np.testing.assert_array_equal(decode.decode(data, 'x'), np.asarray(picture))


@pytest.mark.parametrize('form,mode', [
    ('PNG', 'RGBA'), ('PNG', 'LA'), ('PNG', 'P'), ('GIF', 'P'), ('WEBP', 'RGBA'), ('TIFF', 'RGBA'), ('TIFF', 'LA')])
def test_what_is_transparent_is_white(form, mode):
  """Whatever colour is stored under transparent pixels; half transparent ones are mixed with white."""
  if mode == 'P':
    picture = PIL.Image.new('P', (24, 8), 1)
    picture.putpalette([10, 20, 30, 90, 90, 90])
    picture.paste(0, (0, 0, 8, 8))
    image = decode.decode(encoded(picture, form, transparency=0), 'x')
    assert (image[:, :8] == 255).all() and (image[:, 8:] == 90).all()
    return
  alpha = np.repeat(np.uint8([0, 128, 255]), 8)[None].repeat(8, 0)
  colour = np.full((8, 24, 1 if mode == 'LA' else 3), 90, np.uint8)
  picture = PIL.Image.fromarray(np.concatenate([colour, alpha[..., None]], -1), mode)
  image = decode.decode(encoded(picture, form, **({'lossless': True, 'exact': True} if form == 'WEBP' else {})),
                        'x').astype(int)
  assert (image[:, :8] == 255).all() and np.abs(image[:, 8:16] - 172).max() <= 1 and (image[:, 16:] == 90).all()


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_the_cameras_orientation_is_applied(form, orientation):
  """As an image viewer shows it; the four quarters differ, so that each rotation and flip is recognised."""
  upright = np.kron(np.uint8([[20, 90], [160, 240]]), np.ones((16, 32), np.uint8))[..., None].repeat(3, -1)
  stored = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
            6: np.rot90, 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x, -1)}[orientation](upright)
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  data = encoded(PIL.Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif)
  image = decode.decode(data, 'x')
  assert image.shape == upright.shape and decode.dimensions(data, 'x') == upright.shape[:2]
  assert np.abs(image.astype(int) - upright).max() <= 8


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_orientation_that_makes_no_sense_turns_nothing(photo):
  data = bytearray(encoded(PIL.Image.fromarray(photo), 'JPEG', exif=b'Exif\0\0MM\0*' + bytes(range(40))))
  assert decode.decode(bytes(data), 'x').shape == photo.shape


@pytest.mark.parametrize('form', ['GIF', 'WEBP', 'PNG'])
def test_the_first_frame_of_an_animation(form):
  frames = [PIL.Image.new('RGB', (12, 10), colour) for colour in ((200, 30, 30), (30, 200, 30), (30, 30, 200))]
  image = decode.decode(encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50), 'x')
  assert image.shape == (10, 12, 3) and np.abs(image.astype(int) - [200, 30, 30]).max() <= 6


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'TIFF', 'PPM'])
@pytest.mark.parametrize('shape', [(1, 1), (1, 40), (40, 1)])
def test_one_pixel_wide(form, shape):
  """Through decoding and the crops of training and evaluation."""
  image = decode.decode(encoded(PIL.Image.new('RGB', shape[::-1], (90, 90, 90)), form), 'x')
  assert image.shape == (*shape, 3) and np.abs(image.astype(int) - 90).max() <= 2
  random = random_resized_crop(image, 16, (0.08, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
  for crop in (center_crop(image, 16, 18), random):
    assert crop.shape == (16, 16, 3) and np.abs(crop.astype(int) - 90).max() <= 2


def test_arrays_pass_through():
  grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
  image = decode.decode(grey, 'x')
  assert image.shape == (3, 4, 3) and (image == grey[..., None]).all()


def damaged(photo: np.ndarray) -> dict[str, bytes]:
  jpeg, png = (encoded(PIL.Image.fromarray(photo), form) for form in ('JPEG', 'PNG'))
  return {'empty': b'', 'text': b'hello', 'cut jpeg': jpeg[:len(jpeg) // 2], 'cut png': png[:len(png) // 2],
          'head alone': jpeg[:20], 'script': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'}


def test_sixteen_bits_are_scaled_and_unknown_ranges_refused():
  """Such as medical images, which Pillow's own conversion makes white."""
  ramp = np.linspace(0, 65535, 40 * 60).reshape(40, 60)
  image = decode.decode(encoded(PIL.Image.fromarray(ramp.astype(np.uint16)), 'PNG'), 'x')
  assert image.shape == (40, 60, 3) and np.abs(image[..., 0] - ramp / 257).max() <= 1
  pgm = b'P5 60 40 65535\n' + ramp.astype('>u2').tobytes()
  assert np.abs(decode.decode(pgm, 'x')[..., 0] - ramp / 257).max() <= 1
  # 16 bits of each colour: Pillow cannot write that, the format is simple.
  rows = b''.join(b'\0' + row.astype('>u2').repeat(3).tobytes() for row in ramp)
  image = decode.decode(png_file(60, 40, 16, 2, rows), 'x')
  assert image.shape == (40, 60, 3) and np.abs(image - ramp[..., None] / 257).max() <= 1
  with pytest.raises(ValueError, match='x.tif cannot be read as an image .*mode F, whose range is not known'):
    decode.decode(encoded(PIL.Image.fromarray((ramp / 65535).astype(np.float32)), 'TIFF'), 'x.tif')


def png_file(width: int, height: int, bits: int, colours: int, rows: bytes) -> bytes:
  chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  head = struct.pack('>IIBBBBB', width, height, bits, colours, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def heads(width: int, height: int) -> dict[str, bytes]:
  """Files that say how large they are and hold next to nothing."""
  jpeg = bytearray(encoded(PIL.Image.new('RGB', (8, 8)), 'JPEG'))
  at = jpeg.index(b'\xff\xc0') + 5
  jpeg[at:at + 4] = struct.pack('>HH', height, width)
  tiff = bytearray(encoded(PIL.Image.new('RGB', (8, 8)), 'TIFF'))
  for tag, value in ((256, width), (257, height)):
    at = tiff.index(struct.pack('<HHI', tag, 4, 1)) + 8
    tiff[at:at + 4] = struct.pack('<I', value)
  gif = bytearray(encoded(PIL.Image.new('P', (8, 8)), 'GIF'))
  gif[6:10] = struct.pack('<HH', width, height)
  return {'JPEG': bytes(jpeg), 'PNG': png_file(width, height, 8, 2, b''), 'TIFF': bytes(tiff),
          'PPM': f'P6 {width} {height} 255\n'.encode(), 'GIF': bytes(gif)}


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'TIFF', 'PPM', 'GIF'])
def test_too_many_pixels_are_refused_by_the_head_of_the_file(form):
  """Before decoding, which would raise another error: these files have no pixels."""
  for read in (decode.decode, decode.dimensions):
    with pytest.raises(ValueError, match=r'a/big.jpg is an image of 20000 x 10001 pixels; expected at most '
                                         r'200,000,000'):
      read(heads(20_000, 10_001)[form], 'a/big.jpg')


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'TIFF', 'PPM', 'GIF'])
def test_large_images_are_read_without_a_warning(form):
  """Above the limits at which Pillow warns (89 megapixels) and refuses (179)."""
  for height, width in ((9_500, 9_600), (13_500, 14_000)):
    assert decode.dimensions(heads(width, height)[form], 'x') == (height, width)


FUZZ = """
import pathlib, random, sys
import numpy as np
from ft_jax.data import decode

seeds = [pathlib.Path(path).read_bytes() for path in sys.argv[1:]]
rng, read, refused = random.Random(0), 0, 0
for n in range(1500):
  data = bytearray(seeds[n % len(seeds)])
  at, kind = rng.randrange(len(data)), rng.randrange(6)
  if kind == 0:
    del data[at:]
  elif kind == 1:
    for _ in range(rng.choice((1, 3, 20))):
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  elif kind == 2:
    other = rng.choice(seeds)
    data[at:] = other[rng.randrange(len(other)):]
  elif kind == 3:
    del data[at:at + rng.randrange(1, 200)]
  elif kind == 4:  # sizes lie near the start
    at = rng.randrange(min(len(data), 200))
    data[at:at + 2] = rng.choice((0, 1, 0x7fff, 0xffff, 2000)).to_bytes(2, rng.choice(('big', 'little')))
  else:
    data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
  try:
    image = decode.decode(bytes(data), 'the/file', scratch=bool(n % 2))
  except ValueError as error:
    assert str(error).startswith(('the/file cannot be read as an image', 'the/file is an image of')), error
    refused += 1
  else:
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert 0 < image.size <= 3 * decode.MAX_PIXELS
    read += 1
print(read, refused)
"""


def test_damaged_files_of_all_formats_give_an_image_or_an_error(photo, tmp_path):
  """1,500 damaged copies of real files, in another process: no crash, no other exception, no warning."""
  picture = PIL.Image.fromarray(photo).resize((60, 45))
  exif = PIL.Image.Exif()
  exif[0x0112], exif[0x010F] = 6, 'maker'
  forms = [('JPEG', 'RGB', {'exif': exif}), ('JPEG', 'RGB', {'progressive': True}), ('JPEG', 'CMYK', {}),
           ('PNG', 'RGB', {'exif': exif}),
           ('PNG', 'P', {'transparency': 3}), ('GIF', 'P', {}),
           ('GIF', 'P', {'save_all': True, 'append_images': [picture]}),
           ('WEBP', 'RGB', {}), ('WEBP', 'RGBA', {'lossless': True}), ('BMP', 'RGB', {}), ('TIFF', 'RGB', {}),
           ('TIFF', 'RGB', {'compression': 'tiff_lzw'}), ('PPM', 'RGB', {}), ('PPM', '1', {}),
           *([('AVIF', 'RGB', {'exif': exif})] if 'AVIF' in decode.FORMATS else [])]
  for k, (form, mode, options) in enumerate(forms):
    (tmp_path / str(k)).write_bytes(encoded(picture.convert(mode), form, **options))
  run = subprocess.run([sys.executable, '-W', 'error', '-X', 'faulthandler', '-c', FUZZ,
                        *sorted(map(str, tmp_path.iterdir()))],
                       cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
  # libtiff's own lines about damaged files come from C and cannot be kept back.
  assert run.returncode == 0 and 'Warning' not in run.stderr and 'Error' not in run.stderr, run.stderr
  assert min(map(int, run.stdout.split())) > 300


@pytest.mark.parametrize('what', ['empty', 'text', 'cut jpeg', 'cut png', 'head alone', 'script'])
def test_damage_is_named(photo, what):
  with pytest.raises(ValueError, match='train/cat/7.jpg cannot be read as an image'):
    decode.decode(damaged(photo)[what], 'train/cat/7.jpg')


