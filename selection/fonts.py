"""Text of any script in plots: system fonts for what matplotlib's font lacks, escapes for what no font has."""

from collections.abc import Callable, Iterable
import contextlib
import functools
import itertools
import logging
import os
from typing import Any
import unicodedata

_log = logging.getLogger(__name__)


def drawable(text: str) -> str:
  """The text with escapes such as `\\u4f60` for what cannot be drawn: characters that no font has, line breaks, etc."""
  return ''.join(c if c == ' ' or font else _escaped(c) for c, font in _fonts_of(text))


def labels(names: Iterable[str], most: int) -> list[str]:
  """One label of at most `most` characters per name, for matplotlib's axes; different names get different labels."""
  def shorten(name: str, ending: str) -> str:
    text, room = drawable(name), most - len(ending)
    return (text if len(text) <= room else f'{text[:room - 1].rstrip()}…') + ending

  return [label.replace('$', r'\$') for label in distinct(names, shorten)]  # otherwise matplotlib reads a formula


def distinct(names: Iterable[str], shorten: Callable[[str, str], str]) -> list[str]:
  """`shorten(name, '')` of each name, or `shorten(name, ' #2')`, with a number, for names that would look the same.

  The numbers follow the sorted names, so that they are the same in every plot of the same names.
  """
  names = [str(name) for name in names]
  short = {name: shorten(name, '') for name in names}
  alike: dict[str, set[str]] = {}
  for name, label in short.items():
    # The two encodings of accented letters look the same, and trailing spaces are invisible.
    alike.setdefault(' '.join(unicodedata.normalize('NFC', label).split()), set()).add(name)
  for group in alike.values():
    if len(group) > 1:
      short |= {name: shorten(name, f' #{k}') for k, name in enumerate(sorted(group), 1)}
  return [short[name] for name in names]


def families(texts: Iterable[str]) -> list[str]:
  """`fontfamily` for matplotlib: that of rcParams, then fonts with the characters that it lacks.

  `texts` are results of `labels` or `drawable`.
  """
  import matplotlib

  files = {font for _, font in _fonts_of(''.join(texts))} - {_own()}
  added = {name for path, name in _all_fonts().items() if path in files} if files else ()
  return [*matplotlib.rcParams['font.family'], *sorted(added)]


def runs(text: str, font: str) -> list[tuple[str, str]]:
  """A `drawable` text in pieces, each with a font file that has its characters: `font` where possible."""
  each = [(c, font if c == ' ' or path is None else path) for c, path in _fonts_of(text, font)]
  return [(''.join(c for c, _ in piece), path) for path, piece in itertools.groupby(each, lambda pair: pair[1])]


def _escaped(character: str) -> str:
  return character.encode('unicode_escape', 'surrogatepass').decode()


def _fonts_of(text: str, font: str = '') -> list[tuple[str, str | None]]:
  """Each character with the first font file that has it, or None; `font` ('': matplotlib's own) is tried first."""
  font = font or _own()
  wanted = frozenset(c for c in text if c.isprintable())
  own = _having(font, wanted)
  others = _elsewhere(wanted - own)
  return [(c, font if c in own else others.get(c)) for c in text]


# A cache of the lookups in the system's fonts: character -> the file of a font that has it, or None.
_found: dict[str, str | None] = {}


def _elsewhere(characters: frozenset[str]) -> dict[str, str | None]:
  left = characters - _found.keys()
  for path in _all_fonts() if left else ():
    here = _having(path, left)
    _found.update(dict.fromkeys(here, path))
    left -= here
    if not left:
      break
  if left and None not in _found.values():  # warn once
    _log.warning('warning: no installed font has the character U+%04X, so plots show it as %s, and others likewise; '
                 'install a font that has it, such as the packages fonts-noto-core and fonts-noto-cjk of Debian and '
                 'Ubuntu', ord(min(left)), _escaped(min(left)))
  _found.update(dict.fromkeys(left))
  return _found


@functools.cache
def _all_fonts() -> dict[str, str]:
  """Files of all fonts and their families, upright sans-serif ones of normal weight first.

  Matplotlib caches its list of fonts across runs; fonts installed since then are added.
  """
  import matplotlib
  from matplotlib import font_manager

  manager = font_manager.fontManager
  known = {entry.fname for entry in manager.ttflist}
  for path in font_manager.findSystemFonts():
    if path not in known:
      with contextlib.suppress(Exception):  # bitmap emoji or a damaged file; FreeType and fontTools raise many types
        manager.addfont(path)
  # Matplotlib's formula fonts have symbols at the code points of letters; "Last Resort" draws a box for everything.
  bundled = os.path.join(matplotlib.get_data_path(), 'fonts')
  usable = [entry for entry in manager.ttflist if not getattr(entry, 'index', 0)
            and (entry.name.startswith('DejaVu') or not entry.fname.startswith(bundled))
            and 'last resort' not in entry.name.lower()]
  return {entry.fname: entry.name for entry in sorted(usable, key=_unlikeness)}


def _unlikeness(entry: Any) -> tuple[Any, ...]:
  weight_differs = str(entry.weight) not in ('400', 'normal', 'regular')
  return entry.style != 'normal', weight_differs, 'sans' not in entry.name.lower(), entry.name


@functools.cache
def _own() -> str:
  from matplotlib import font_manager

  return str(font_manager.findfont(font_manager.FontProperties()))


def _having(path: str, characters: frozenset[str]) -> frozenset[str]:
  """The characters that a font has; none if the file is not a font."""
  try:
    face = _face(path)
  except (OSError, RuntimeError):
    return frozenset()
  return frozenset(c for c in characters if face.get_char_index(ord(c)))


@functools.lru_cache(maxsize=4)  # each is an open file
def _face(path: str) -> Any:
  from matplotlib import ft2font

  return ft2font.FT2Font(path)
