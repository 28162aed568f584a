"""One picture of many images with a class and a probability under each."""

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
  _write(pen, (_MARGIN, _MARGIN), _short(title, heading, width - 2 * _MARGIN, keep_end=True), _INK, heading)
  for i, line in enumerate(lines):
    _write(pen, (_MARGIN, _MARGIN + 62 + 34 * i), line, _GREY, _font('DejaVuSans.ttf', 22))
  inner = _SIDE - 2 * _INSIDE
  names = [name for tile in tiles for name in (tile.label, tile.true)]
  labels, true = _distinct(names, bold, inner), _distinct(names, regular, inner - regular.getlength('100%  is '))
  for i, tile in enumerate(tiles):
    x, y = _MARGIN + i % columns * (_SIDE + _GAP), top + i // columns * (_SIDE + _TEXT + _GAP)
    _draw_tile(sheet, pen, tile._replace(label=labels[tile.label], true=true[tile.true]), x, y, regular, bold)
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
  left = x + _INSIDE
  _write(pen, (left, bar + 13), tile.label, color if tile.true else _INK, bold)
  percent = f'{tile.probability:.0%}'
  _write(pen, (left, bar + 38), percent, _GREY, regular)
  if tile.true:
    _write(pen, (left + regular.getlength(f'{percent}  '), bar + 38), f'is {tile.true}', _INK, regular)
  _write(pen, (left, bar + 62), _short(tile.name, regular, _SIDE - 2 * _INSIDE, keep_end=True), _GREY, regular)


def _fitted(image: np.ndarray) -> Image.Image:
  """The whole image, as large as a tile; a very small one not more than eight times its size, and with its pixels visible."""
  picture = Image.fromarray(image)
  scale = min(_SIDE / picture.width, _SIDE / picture.height, 8.0)
  size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
  return picture.resize(size, Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS)


def _distinct(names: Sequence[str], font: ImageFont.FreeTypeFont, room: float) -> dict[str, str]:
  """Of each name of a class as much as there is room for; no two classes look the same."""
  return dict(zip(names, fonts.distinct(names, lambda name, ending: _short(name, font, room - font.getlength(ending)) + ending)))


def _short(text: str, font: ImageFont.FreeTypeFont, room: float, keep_end: bool = False) -> str:
  """As much of a line as there is room for, with dots for the rest; what no font has a picture of is spelt out."""
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


def _write(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, color: str, font: ImageFont.FreeTypeFont) -> None:
  """Writes a line whose upper left corner in `font` is `place`; Pillow itself writes with one font."""
  x, baseline = place[0], place[1] + font.getmetrics()[0]
  for piece, other in _pieces(text, font):
    pen.text((x, baseline), piece, color, other, anchor='ls')
    x += other.getlength(piece)


def _pieces(text: str, font: ImageFont.FreeTypeFont) -> list[tuple[str, ImageFont.FreeTypeFont]]:
  """A line in pieces, each with a font of the same size that has its characters."""
  return [(piece, font if path == font.path else _loaded(path, font.size)) for piece, path in fonts.runs(text, font.path)]


def _wrapped(text: str, font: ImageFont.FreeTypeFont, room: float) -> list[str]:
  """Lines of whole words."""
  lines = ['']
  for word in text.split():
    longer = f'{lines[-1]} {word}'.strip()
    if lines[-1] and _length(longer, font) > room:
      lines.append(word)
    else:
      lines[-1] = longer
  return [_short(line, font, room) for line in lines]


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
  # The fonts that matplotlib brings know most alphabets, but no Chinese, Japanese or Korean: see `selection.fonts`.
  return _loaded(str(pathlib.Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / name), size)


@functools.lru_cache(maxsize=16)  # each is an open file
def _loaded(path: str, size: float) -> ImageFont.FreeTypeFont:
  return ImageFont.truetype(path, size)
