"""Names of classes and files are text in tables, pages and terminals, and lead to no other folder."""

import csv
import html.parser
import io
import json
import logging
import pathlib
import re
import types

import comparison_case as case
from conftest import quick_main
from etils import epath
from hostile import EXAMPLES, FUZZ, HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from ml_collections import ConfigDict
import numpy as np
import PIL.Image
import pytest

from configs import miniature as compare_config
from configs import predict as predict_config
from ft_jax import models, names, progress, trained
from ft_jax.data import label_noise
from ft_jax.data.image_set import ImageSet
from ft_jax.data.pipeline import Transform
from ft_jax.jobs import compare, export, predict
from ft_jax.pages import comparison, report, study_csv
from ft_jax.studies.comparison import summarize
import selection
from selection import plots


def test_no_cell_is_a_formula_and_every_name_comes_back(tmp_path):
  """Of predictions.csv, whose classes job label noise reads again; and of study.csv."""
  classes = tuple(f'{name}{k % 7 if name == " " else ""}' for k, name in enumerate(HOSTILE))
  ids = [f'{name}.jpg' for name in HOSTILE]
  found = predict.Predictions(ids, np.arange(len(ids))[:, None], np.full((len(ids), 1), 0.5, np.float32))
  text = predict.table(ids, found, dict.fromkeys(ids, '=problem'), classes, list(range(len(ids))))
  path = tmp_path / 'predictions.csv'
  path.write_bytes(text.encode(errors='surrogateescape'))
  cells = [value for row in csv.reader(io.StringIO(text, newline='')) for value in row]
  assert len(cells) == (len(ids) + 1) * 5
  assert not [value for value in cells if value.lstrip()[:1] in tuple('=+-@') or value[:1] in tuple('\t\r')]
  source = ImageSet('pool', classes, np.arange(len(ids), dtype=np.int32), np.asarray(ids),
                    np.arange(len(ids)), lambda row: b'', '')
  np.testing.assert_array_equal(label_noise.read_predictions(str(path), source), np.arange(len(ids)))
  assert all(names.from_cell(names.cell(name)) == name for name in HOSTILE)
  path.write_text('file,class_1\n"' + 'x' * 200_000 + '",a\n')
  with pytest.raises(ValueError, match='cannot be read as a table .field larger'):
    label_noise.read_predictions(str(path), source)
  assert study_csv.cell is names.cell  # one rule for both tables


@settings(max_examples=EXAMPLES or 100, **FUZZ)
@given(st.text())
def test_cells_of_any_text(text):
  cell = names.cell(text)
  assert names.from_cell(cell) == text and not cell.lstrip().startswith(('=', '+', '-', '@'))
  assert [*csv.reader(io.StringIO(names.csv_line([cell, 'x']), newline=''))] == [[cell, 'x']]
  shown = names.visible(text)
  assert not re.search(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]', shown)


def test_the_terminal_obeys_no_name(capfd):
  """Escape sequences in a class name are spelt out in log lines and errors."""
  handler = progress.Handler()
  handler.emit(logging.LogRecord('ft_jax', logging.INFO, '', 0, 'class %s', ('\x1b[2J\x9b1A\u202e\rtable\n  row',),
                                 None))
  assert capfd.readouterr().err == 'class \\x1b[2J\\x9b1A\\u202e\\rtable\n  row\n'
  run = quick_main('--config=configs/predict.py', '--config.predict.images=/nowhere/\x1b[2J')
  assert run.returncode == 1, run.stderr
  assert re.search(r'error: .* there is no file or folder /nowhere/\\x1b\[2J$', run.stderr.strip()), run.stderr


class Page(html.parser.HTMLParser):
  """The elements of a page with the names of their attributes, those of pictures apart; the text; what would be
  code."""

  def __init__(self, text: str):
    super().__init__(convert_charrefs=True)
    self.elements, self.drawn, self.text, self.code, self._inside = [], set(), '', [], 0
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    self._inside += tag == 'svg'
    if self._inside:
      self.drawn.add(tag)
    else:
      self.elements.append((tag, *(name for name, _ in attributes)))
    leads = ('href', 'src', 'xlink:href')
    self.code += [(tag, name) for name, value in attributes if name.startswith('on') or name in leads and not
                  re.match(r'#|data:image/|cells/[0-9a-f]+-\d/report.html$|log.txt$', value or '')]

  def handle_endtag(self, tag):
    self._inside -= tag == 'svg'
    if not self._inside and tag != 'svg':
      self.elements.append(('/' + tag,))

  def handle_data(self, data):
    if not self._inside:
      self.text += data


def evaluation(class_names: list[str]) -> dict:
  n = len(class_names)
  return {'top1': 0.5, 'mean_per_class': 0.5, 'loss': 1.0, 'images': 2 * n, 'per_class': [
      {'name': name, 'images': 2, 'right': 1} for name in class_names], 'confusion': [
      entry for k in range(n) for entry in ([k, k, 1], [k, (k + 1) % n, 1])]}


def page(folder: pathlib.Path, given: list[str]) -> Page:
  """The report of a run whose every name is one of those given."""
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps({'job': 'finetune', 'seed': 0, 'train': {},
                                                  'target': {'name': given[0]}}))
  work = types.SimpleNamespace(
      config_json=epath.Path(folder / 'config.json'), report_html=epath.Path(folder / 'report.html'),
      metrics=lambda: [{'step': 1}],
      results=lambda: {'job': 'finetune', 'metric': 'top1', 'best_step': 1, 'steps': 1, 'seed': 0, 'devices': given[0],
                       'batch_norm': '',
                       'versions': {given[0]: given[-1]}, 'command': given, 'val': evaluation(given), 'test': None,
                       'noise': None, 'skipped': {given[0]: {'images': 4, 'first': given}},
                       'target': {'train': 8, 'val': 4, 'test': 0, 'classes': 2},
                       'source': {'name': given[0], 'images': 9, 'classes': 3},
                       'selection': {'images': 1, 'units': 1, 'noun': 'classes'}})
  n = len(given)
  chosen = selection.Selection(
      method='uot', by='class', size=1.0, seed=0, parameters={}, units=np.arange(n), scores=np.full(n, 1 / n),
      measure='share',
      ascending=False, names=given, target_names=given, plan=np.eye(n), target_mass=np.full(n, 1 / n))
  units = [report.ChosenUnit(name, name, 1, [(name, 1.0)], [b'x']) for name in given]
  report.write(work, report.SelectionSection(given[0], 'class', 'classes', 'share', units, plots.overview(chosen),
                                             [(name, [b'x']) for name in given]))
  return Page((folder / 'report.html').read_bytes().decode())  # raises for what is no UTF-8


# Characters that mean something to HTML, to matplotlib or to a terminal, and any other, lone halves of pairs too.
NAMES = st.text(st.sampled_from('<>&"\'/!-$\\{}^_%=`;#]\x00\x1b\r\n\t\u202e\u05d0\u2028\udce9\ud800 ax') |
                st.characters(),
                min_size=1, max_size=24)


@pytest.mark.filterwarnings('ignore:.*Glyph:UserWarning', 'ignore:Matplotlib currently does not support:UserWarning')
@settings(max_examples=EXAMPLES or 2, **FUZZ)
@given(given=st.lists(NAMES, min_size=4, max_size=4))
def test_a_report_shows_names_and_nothing_else(tmp_path_factory, given):
  check_page(tmp_path_factory.getbasetemp() / 'page', given)


def check_page(folder: pathlib.Path, given: list[str]) -> None:
  plain, shown = page(folder, ['plain'] * len(given)), page(folder, given)
  assert shown.elements == plain.elements and not shown.code
  assert shown.drawn <= {'svg', 'defs', 'g', 'path', 'use', 'rect', 'clippath', 'style', 'metadata', 'rdf:rdf',
                         'cc:work', 'dc:type',
                         'dc:format', 'dc:creator', 'cc:agent', 'dc:title', 'image', 'text'}
  for name in given:
    spelt = name.encode(errors='backslashreplace').decode()
    # What a parser makes of line ends and zeros, which no name of a file has.
    assert '\0' in name or '\r' in name or spelt in shown.text


@pytest.mark.filterwarnings('ignore:.*Glyph:UserWarning', 'ignore:Matplotlib currently does not support:UserWarning')
def test_known_tricks_in_a_report(tmp_path):
  check_page(tmp_path / 'page', HOSTILE)


def test_names_in_a_comparison(tmp_path):
  variants = {'plain': (case.PLAIN, case.drawn(0.4, 2, 20, 1)), HOSTILE[5]: (case.UOT, case.drawn(0.6, 2, 20, 2)),
              HOSTILE[6]: ({**case.UOT, HOSTILE[4]: HOSTILE[3]}, case.drawn(0.5, 2, 20, 3))}
  table, found = case.make(variants, target=HOSTILE[6])
  for variant in table['variants']:
    for cell in variant['cells']:  # a folder's name is made safe by the job
      folder = f'cells/{variant["name"].encode().hex()}-{cell["seed"]}'
      found[folder] = found.pop(cell['folder'])
      found[folder]['classes'][0] = HOSTILE[6]
      cell['folder'] = folder
  table['variants'][1]['cells'][1] |= {'error': HOSTILE[6], 'top1': None, 'log': 'log.txt'}
  work = case.write(tmp_path / 'run', table, found)
  comparison.write(work)
  shown = Page(work.report_html.read_text())
  assert not shown.code and not {'script', 'img'} & {element[0] for element in shown.elements}
  assert HOSTILE[6] in shown.text and HOSTILE[5] in shown.text
  assert '\x1b' not in comparison.markdown(summarize(table, found))


def test_names_lead_to_no_other_folder(tmp_path, monkeypatch):
  """Classes and files of any name, in all that predict and export write: nothing lies anywhere but in the folder that
  was asked for."""
  classes = tuple(dict.fromkeys(HOSTILE))
  config = ConfigDict({'job': 'finetune', 'seed': 0, 'image_size': 16, 'train': {'batch_size': 4},
                       'target': {'name': HOSTILE[0]},
                       'model': {'name': 'resnet18', 'width': 4, 'stem': '3x3', 'dtype': 'float32',
                                 'precision': 'default',
                                 'sync_batch_norm': False, 'batch_norm': 'train'}})
  model = models.from_config(config.model, {'target': len(classes)}, config.image_size)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16, 16, 3), np.uint8))
  results = {'best_step': 1, 'val': evaluation(list(classes)), 'test': None}
  variables = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  run = trained.Trained(epath.Path(HOSTILE[2]), config, results, 'target', classes, model, variables, Transform(16))
  monkeypatch.setattr(trained, 'load', lambda *_: run)
  monkeypatch.setattr(export, 'stablehlo_file', lambda run: b'')  # holds no name
  ranked = lambda run, source, top, skip, timeout: (predict.Predictions(
      source.ids.tolist(), np.zeros((len(source), 1), np.int32), np.full((len(source), 1), 0.5, np.float32)), {})
  monkeypatch.setattr(predict, 'predict', ranked)  # of the network, which knows no names
  images = tmp_path / 'images'
  for k, name in enumerate(('CON', '=1+1', '$x$', '\x1b[2J', 'line\nbreak', 'caf\udce9', '<b>', '..x')):
    (images / name).mkdir(parents=True)
    PIL.Image.new('RGB', (20, 20), (k, k, k)).save(images / name / f'{name}.png')
  before = {path for path in tmp_path.rglob('*')}
  fields = predict_config.get_config()
  fields.workdir, fields.predict.images, fields.predict.top = 'x', str(images), 1
  predict.run(fields, tmp_path / 'out' / 'predict')
  export.run(fields, tmp_path / 'out' / 'export')
  written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*') if path not in before)
  assert written == ['out', 'out/export', *(f'out/export/{name}' for name in (
      'README.txt', 'classes.txt', 'example.py', 'model.json', 'model.safetensors', 'model.stablehlo')), 'out/predict',
      'out/predict/contact_sheet.png', 'out/predict/predictions.csv']
  lines = (tmp_path / 'out' / 'export' / 'classes.txt').read_text().split('\n')
  assert len(lines) == len(classes) + 1  # a line each, whatever breaks are in a name
  fields = compare_config.get_config()
  fields.compare.variants, fields.target.name, fields.model.weights = ('none', '../../x'), 'digits:target', ''
  with pytest.raises(ValueError, match=r"config.selection.method is '../../x'; known"):
    compare.run(fields, tmp_path / 'out' / 'compare')
  assert not (tmp_path / 'out' / 'compare').exists()
