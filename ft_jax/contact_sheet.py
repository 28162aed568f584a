"""One picture of many images with a class and a probability under each."""

from collections.abc import Sequence
import functools
import io
import math
import pathlib
from typing import NamedTuple

import matplotlib
from matplotlib import ft2font
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Pixels.
_SIDE, _GAP, _MARGIN, _TEXT = 208, 22, 48, 88
_COLUMNS = 10
_PAPER, _CARD, _INK, _GREY, _TRACK = '#f1f5f9', '#ffffff', '#0f172a', '#64748b', '#e2e8f0'
_BLUE, _RED = '#2563eb', '#dc2626'


class Tile(NamedTuple):
  """An image uint8 `[h, w, 3]`, the predicted class, its probability, the file's name, and the true class if another."""
  image: np.ndarray
  label: str
  probability: float
  name: str
  true: str = ''


def draw(tiles: Sequence[Tile], title: str, subtitle: str) -> bytes:
  """The sheet as a PNG file, under a title and lines of a subtitle: at least one tile, in as many columns as make it about square."""
  columns = min(_COLUMNS, max(3, math.ceil(math.sqrt(len(tiles) * (_SIDE + _TEXT) / _SIDE))))
  rows = math.ceil(len(tiles) / columns)
  width = 2 * _MARGIN + columns * (_SIDE + _GAP) - _GAP
  regular, bold, heading = _font('DejaVuSans.ttf', 16), _font('DejaVuSans-Bold.ttf', 18), _font('DejaVuSans-Bold.ttf', 34)
  lines = [part for line in subtitle.split('\n') for part in _wrapped(line, _font('DejaVuSans.ttf', 22), width - 2 * _MARGIN)]
  top = _MARGIN + 62 + 34 * len(lines) + 26
  sheet = Image.new('RGB', (width, top + rows * (_SIDE + _TEXT + _GAP) - _GAP + _MARGIN), _PAPER)
  pen = ImageDraw.Draw(sheet)
  pen.text((_MARGIN, _MARGIN), _short(title, heading, width - 2 * _MARGIN, keep_end=True), _INK, heading)
  for i, line in enumerate(lines):
    pen.text((_MARGIN, _MARGIN + 62 + 34 * i), line, _GREY, _font('DejaVuSans.ttf', 22))
  for i, tile in enumerate(tiles):
    x, y = _MARGIN + i % columns * (_SIDE + _GAP), top + i // columns * (_SIDE + _TEXT + _GAP)
    _draw_tile(sheet, pen, tile, x, y, regular, bold)
  data = io.BytesIO()
  sheet.save(data, 'PNG')
  return data.getvalue()


def _draw_tile(sheet: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, x: int, y: int, regular: ImageFont.FreeTypeFont,
               bold: ImageFont.FreeTypeFont) -> None:
  color = _RED if tile.true else _BLUE
  pen.rectangle((x, y, x + _SIDE - 1, y + _SIDE + _TEXT - 1), _CARD)
  picture = _fitted(tile.image)
  sheet.paste(picture, (x + (_SIDE - picture.width) // 2, y + (_SIDE - picture.height) // 2))
  # The probability as a bar between picture and text.
  bar = y + _SIDE
  pen.rectangle((x, bar, x + _SIDE - 1, bar + 5), _TRACK)
  pen.rectangle((x, bar, x + max(1, round(tile.probability * _SIDE)) - 1, bar + 5), color)
  left, inner = x + 10, _SIDE - 20
  pen.text((left, bar + 13), _short(tile.label, bold, inner), color if tile.true else _INK, bold)
  percent = f'{tile.probability:.0%}'
  pen.text((left, bar + 38), percent, _GREY, regular)
  if tile.true:
    used = pen.textlength(f'{percent}  ', regular)
    pen.text((left + used, bar + 38), _short(f'is {tile.true}', regular, inner - used), _INK, regular)
  pen.text((left, bar + 62), _short(tile.name, regular, inner, keep_end=True), _GREY, regular)


def _fitted(image: np.ndarray) -> Image.Image:
  """The whole image, as large as a tile; a very small one not more than eight times its size, and with its pixels visible."""
  picture = Image.fromarray(image)
  scale = min(_SIDE / picture.width, _SIDE / picture.height, 8.0)
  size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
  return picture.resize(size, Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS)


def _short(text: str, font: ImageFont.FreeTypeFont, room: float, keep_end: bool = False) -> str:
  """As much of a line as there is room for, with dots for the rest; what the font has no picture of is a question mark."""
  known = _characters(font.path)
  text = ''.join(character if ord(character) in known else '?' for character in ' '.join(text.split()))
  if font.getlength(text) <= room:
    return text
  for n in range(len(text) - 1, 0, -1):
    cut = f'…{text[-n:]}' if keep_end else f'{text[:n].rstrip()}…'
    if font.getlength(cut) <= room:
      return cut
  return '…'


def _wrapped(text: str, font: ImageFont.FreeTypeFont, room: float) -> list[str]:
  """Lines of whole words."""
  lines = ['']
  for word in text.split():
    longer = f'{lines[-1]} {word}'.strip()
    if lines[-1] and font.getlength(longer) > room:
      lines.append(word)
    else:
      lines[-1] = longer
  return [_short(line, font, room) for line in lines]


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
  # The fonts that matplotlib brings know most alphabets, but no Chinese, Japanese or Korean.
  return ImageFont.truetype(str(pathlib.Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / name), size)


@functools.cache
def _characters(path: str) -> frozenset[int]:
  return frozenset(ft2font.FT2Font(path).get_charmap())
