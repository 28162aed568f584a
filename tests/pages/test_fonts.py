"""Class names in any script are legible in plots: by a system font that has them, or as escapes; never as `????`."""

import io
import pathlib
import subprocess
import sys

from conftest import ROOT
from fontTools import ttLib
import matplotlib
from matplotlib import font_manager
import numpy as np
import PIL.Image
import pytest
from test_report import evaluation

from ft_jax.pages import contact_sheet, page, report
from selection import fonts, plots, Selection

CHINESE = ['\u72d7', '\u732b']
OWN = pathlib.Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / 'DejaVuSans.ttf'


@pytest.fixture
def system(monkeypatch):
  """Sets the fonts that are installed beside those of matplotlib."""
  manager = font_manager.fontManager

  def install(*paths):
    monkeypatch.setattr(manager, 'ttflist',
                        [entry for entry in manager.ttflist if entry.fname.startswith(matplotlib.get_data_path())])
    monkeypatch.setattr(font_manager, 'findSystemFonts', lambda: list(map(str, paths)))
    forget()

  def forget():
    fonts._found.clear()
    fonts._all_fonts.cache_clear()
    fonts._face.cache_clear()

  yield install
  forget()


@pytest.fixture
def chinese(tmp_path) -> pathlib.Path:
  """A font of the family `Two Signs`, with two Chinese characters."""
  font = ttLib.TTFont(OWN)
  for table in font['cmap'].tables:
    table.cmap = dict(zip(map(ord, CHINESE), ('A', 'B')))
  for record in font['name'].names:
    if record.nameID in (1, 16):
      record.string = 'Two Signs'
  font.save(tmp_path / 'signs.ttf')
  return tmp_path / 'signs.ttf'


def tiles(names) -> list[np.ndarray]:
  """What a contact sheet draws for each class."""
  image = np.zeros((8, 8, 3), np.uint8)
  drawn = []
  for name in names:
    data = contact_sheet.draw([contact_sheet.Tile(image, name, 0.5, 'x.jpg', name)], 'title', 'subtitle')
    drawn.append(np.asarray(PIL.Image.open(io.BytesIO(data))))
  return drawn


def pictures(names):
  yield report.confusion(evaluation([[3, 1], [2, 4]], names))
  yield report.per_class(evaluation([[3, 1], [2, 4]], names)['per_class'])
  yield plots.ranking(Selection.of_rows([0], names))


def test_without_a_font_characters_are_escaped_with_one_warning(system, caplog):
  system()
  assert fonts.labels(CHINESE, 20) == [r'\u72d7', r'\u732b'] and fonts.drawable('\u72d7 dog') == r'\u72d7 dog'
  for picture in pictures(CHINESE):
    page.svg(picture)  # matplotlib's warnings of missing glyphs are errors here
  assert len({drawn.tobytes() for drawn in tiles(CHINESE)}) == 2
  assert [record.levelname for record in caplog.records] == ['WARNING']
  assert 'no installed font has the character U+72D7, so plots show it as \\u72d7' in caplog.text
  assert '\n' not in caplog.records[0].getMessage()


def test_a_font_of_the_system_is_used(system, chinese, caplog):
  system(chinese)
  assert fonts.labels(CHINESE, 20) == CHINESE
  assert fonts.families(CHINESE) == [*matplotlib.rcParams['font.family'], 'Two Signs']
  assert fonts.runs('a \u72d7', str(OWN)) == [('a ', str(OWN)), ('\u72d7', str(chinese))]
  for picture in pictures(CHINESE):
    page.svg(picture)
  assert len({drawn.tobytes() for drawn in tiles(CHINESE)}) == 2 and not caplog.records
  assert fonts.families(['plain']) == matplotlib.rcParams['font.family']


def test_files_that_are_not_fonts_are_ignored(system, chinese, tmp_path):
  """Such as bitmap emoji, which FreeType does not open here."""
  (tmp_path / 'bad.ttf').write_bytes(b'no font')
  system(tmp_path / 'bad.ttf', tmp_path / 'gone.ttf', chinese)
  assert fonts.drawable(CHINESE[0]) == CHINESE[0]


@pytest.mark.parametrize('names', [
    ['a very long name of a class, one', 'a very long name of a class, two'], ['caf\u00e9', 'cafe\u0301'],
    ['cat', 'cat '],
    ['a b', 'a\u00a0b'], ['\udce9', '\udce8'], ['a\nb', 'a b'], ['$x$', '$y$'],
    ['\u4f60' * 9 + 'a', '\u4f60' * 9 + 'b'], ['', ' ']])
def test_names_that_differ_look_different(system, names):
  system()
  short = fonts.labels(names, 20)
  assert len({' '.join(label.split()) for label in short}) == 2 and all(len(label) <= 22 for label in short)
  assert short == fonts.labels(names[::-1], 20)[::-1]  # in every picture the same
  for picture in pictures(names):
    page.svg(picture)


def test_the_library_needs_no_matplotlib_until_it_draws():
  program = "import sys; import selection.fonts; assert 'matplotlib' not in sys.modules"
  subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True)
