"""The contact sheet of job predict: a PNG of many images, each with its predicted class and probability."""

from collections.abc import Sequence
import functools
import io
import math
import pathlib
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from selection import fonts

# Pixels.
_SIDE, _GAP, _MARGIN, _TEXT, _INSIDE = 208, 22, 48, 88, 10
_COLUMNS = 10
_PAPER, _CARD, _INK, _GREY, _TRACK = '#f1f5f9', '#ffffff', '#0f172a', '#64748b', '#e2e8f0'
_BLUE, _RED = '#2563eb', '#dc2626'


class Tile(NamedTuple):
  """An image uint8 `[h, w, 3]`, its predicted class and probability, file name, and the true class if it differs."""
  image: np.ndarray
  label: str
  probability: float
  name: str
  true: str = ''


def draw(tiles: Sequence[Tile], title: str, subtitle: str) -> bytes:
  """The sheet as a PNG file.

  Args:
    tiles: at least one; they are arranged in as many columns as make the sheet about square.
    title: one line.
    subtitle: one or more lines, which are wrapped.
  """
  columns = min(_COLUMNS, max(3, math.ceil(math.sqrt(len(tiles) * (_SIDE + _TEXT) / _SIDE))))
  rows = math.ceil(len(tiles) / columns)
  width = 2 * _MARGIN + columns * (_SIDE + _GAP) - _GAP
  regular, medium = _font('DejaVuSans.ttf', 16), _font('DejaVuSans.ttf', 22)
  bold, heading = _font('DejaVuSans-Bold.ttf', 18), _font('DejaVuSans-Bold.ttf', 34)
  lines = [part for line in subtitle.split('\n') for part in _wrapped(line, medium, width - 2 * _MARGIN)]
  top = _MARGIN + 62 + 34 * len(lines) + 26
  sheet = Image.new('RGB', (width, top + rows * (_SIDE + _TEXT + _GAP) - _GAP + _MARGIN), _PAPER)
  pen = ImageDraw.Draw(sheet)
  _write(pen, (_MARGIN, _MARGIN), _short(title, heading, width - 2 * _MARGIN, keep_end=True), _INK, heading)
  for i, line in enumerate(lines):
    _write(pen, (_MARGIN, _MARGIN + 62 + 34 * i), line, _GREY, medium)
  inner = _SIDE - 2 * _INSIDE
  names = [name for tile in tiles for name in (tile.label, tile.true)]
  labels, true = _distinct(names, bold, inner), _distinct(names, regular, inner - regular.getlength('100%  is '))
  for i, tile in enumerate(tiles):
    x, y = _MARGIN + i % columns * (_SIDE + _GAP), top + i // columns * (_SIDE + _TEXT + _GAP)
    _draw_tile(sheet, pen, tile._replace(label=labels[tile.label], true=true[tile.true]), x, y, regular, bold)
  data = io.BytesIO()
  sheet.save(data, 'PNG')
  return data.getvalue()


def _draw_tile(sheet: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, x: int, y: int,
               regular: ImageFont.FreeTypeFont, bold: ImageFont.FreeTypeFont) -> None:
  color = _RED if tile.true else _BLUE
  pen.rectangle((x, y, x + _SIDE - 1, y + _SIDE + _TEXT - 1), _CARD)
  picture = _fitted(tile.image)
  sheet.paste(picture, (x + (_SIDE - picture.width) // 2, y + (_SIDE - picture.height) // 2))
  # The probability, as a bar between picture and text.
  bar = y + _SIDE
  pen.rectangle((x, bar, x + _SIDE - 1, bar + 5), _TRACK)
  pen.rectangle((x, bar, x + max(1, round(tile.probability * _SIDE)) - 1, bar + 5), color)
  left = x + _INSIDE
  _write(pen, (left, bar + 13), tile.label, color if tile.true else _INK, bold)
  percent = f'{tile.probability:.0%}'
  _write(pen, (left, bar + 38), percent, _GREY, regular)
  if tile.true:
    _write(pen, (left + regular.getlength(f'{percent}  '), bar + 38), f'is {tile.true}', _INK, regular)
  _write(pen, (left, bar + 62), _short(tile.name, regular, _SIDE - 2 * _INSIDE, keep_end=True), _GREY, regular)


def _fitted(image: np.ndarray) -> Image.Image:
  """The whole image, scaled to fit a tile. A very small one is enlarged at most eightfold, with its pixels visible."""
  picture = Image.fromarray(image)
  scale = min(_SIDE / picture.width, _SIDE / picture.height, 8.0)
  size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
  return picture.resize(size, Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS)


def _distinct(names: Sequence[str], font: ImageFont.FreeTypeFont, room: float) -> dict[str, str]:
  """Each class name, shortened to the room in pixels so that no two classes look the same."""
  def shorten(name: str, ending: str) -> str:
    return _short(name, font, room - font.getlength(ending)) + ending

  return dict(zip(names, fonts.distinct(names, shorten)))


def _short(text: str, font: ImageFont.FreeTypeFont, room: float, keep_end: bool = False) -> str:
  """The line, shortened with an ellipsis to the room in pixels; characters that no font has are written as escapes."""
  text = fonts.drawable(' '.join(text.split()))
  if _length(text, font) <= room:
    return text
  for n in range(len(text) - 1, 0, -1):
    cut = f'…{text[-n:]}' if keep_end else f'{text[:n].rstrip()}…'
    if _length(cut, font) <= room:
      return cut
  return '…'


def _length(text: str, font: ImageFont.FreeTypeFont) -> float:
  return sum(other.getlength(piece) for piece, other in _pieces(text, font))


def _write(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, color: str,
           font: ImageFont.FreeTypeFont) -> None:
  """Writes a line with its upper left corner at `place`, with fallback fonts, which Pillow itself does not have."""
  x, baseline = place[0], place[1] + font.getmetrics()[0]
  for piece, other in _pieces(text, font):
    pen.text((x, baseline), piece, color, other, anchor='ls')
    x += other.getlength(piece)


def _pieces(text: str, font: ImageFont.FreeTypeFont) -> list[tuple[str, ImageFont.FreeTypeFont]]:
  """The line split into pieces, each with a font of the same size that has its characters."""
  own = str(font.path)
  return [(piece, font if path == own else _loaded(path, font.size)) for piece, path in fonts.runs(text, own)]


def _wrapped(text: str, font: ImageFont.FreeTypeFont, room: float) -> list[str]:
  """The text wrapped at word boundaries into lines of at most `room` pixels."""
  lines = ['']
  for word in text.split():
    longer = f'{lines[-1]} {word}'.strip()
    if lines[-1] and _length(longer, font) > room:
      lines.append(word)
    else:
      lines[-1] = longer
  return [_short(line, font, room) for line in lines]


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
  # The fonts of matplotlib cover most alphabets, but not Chinese, Japanese or Korean: see `selection.fonts`.
  return _loaded(str(pathlib.Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / name), size)


@functools.lru_cache(maxsize=16)  # each holds a file open
def _loaded(path: str, size: float) -> ImageFont.FreeTypeFont:
  return ImageFont.truetype(path, size)
