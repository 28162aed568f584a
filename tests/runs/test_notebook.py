"""The notebooks run from top to bottom in kernels of their own, offline and without a warning; they are committed
clean."""

import ast
import json
import pathlib
import re

import nbclient
import nbformat
import pytest

import ft_jax
import selection

ROOT = pathlib.Path(__file__).parents[2]
SELECTION, FINETUNE = ROOT / 'colabs' / 'selection.ipynb', ROOT / 'colabs' / 'finetune.ipynb'
FIELDS = {SELECTION: {'REPOSITORY', 'SOURCE_FOLDER', 'TARGET_FOLDER', 'WEIGHTS', 'NETWORK', 'IMAGE_SIZE', 'SIZE'},
          FINETUNE: {'REPOSITORY', 'TARGET', 'SOURCE', 'WEIGHTS', 'NETWORK', 'SIZE', 'EPOCHS', 'WORKDIR'}}
# What part 2 of the notebook of selection needs, and its own cells.
OWN = ('install', 'imports', 'helpers', 'form', 'own-embed', 'own-pictures')

# Runs in the kernel before the notebook: every warning is printed, and the test finds it. (As errors some would be
# caught on their way.) matplotlib says on stderr when it makes its font cache.
BEFORE = "import warnings\n\nimport matplotlib.font_manager\n\nwarnings.simplefilter('always')"


@pytest.fixture
def kernel(monkeypatch, tmp_path):
  """An environment for kernels: nothing of the user's, nothing beyond this machine, everything that is written below
  tmp_path."""
  for name in ('IPYTHONDIR', 'JUPYTER_CONFIG_DIR', 'JUPYTER_RUNTIME_DIR', 'TMPDIR'):
    (tmp_path / name).mkdir()
    monkeypatch.setenv(name, str(tmp_path / name))
  monkeypatch.delenv('PYTHONPATH', raising=False)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  for name in ('http_proxy', 'https_proxy'):
    monkeypatch.setenv(name, 'http://127.0.0.1:9')  # nobody listens


def read(path, **form):
  """A notebook; `form` replaces what its form fields hold."""
  notebook = nbformat.read(path, as_version=4)
  found = set()

  def filled(field):
    name, default = field.groups()
    found.add(name)
    return f'{name} = {form.get(name, ast.literal_eval(default))!r}'

  for cell in notebook.cells:
    cell.source = re.sub(r'(?m)^([A-Z_]+) = (.*?)(?=  # @param)', filled, cell.source)
  assert found == FIELDS[path] >= set(form)
  return notebook


def execute(notebook, folder, *after):
  """Runs the cells and then the expressions `after`; returns (outputs by cell id, values of the expressions)."""
  new = nbformat.v4.new_code_cell
  cells = [new(BEFORE), *notebook.cells, new(f'import json\nprint(json.dumps([{", ".join(after)}]))')]
  executed = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
  nbclient.NotebookClient(executed, timeout=300, resources={'metadata': {'path': str(folder)}}).execute()
  outputs = {cell.id: cell.outputs for cell in executed.cells[1:-1] if cell.cell_type == 'code'}
  return outputs, json.loads(text(executed.cells[-1].outputs))


def text(outputs, stream='stdout'):
  return ''.join(output.text for output in outputs if output.output_type == 'stream' and output.name == stream)


def complaints(outputs):
  """What is on stderr beside progress bars, which show on a slow machine."""
  return [line for line in re.split(r'(?:[\r\n]|\x1b\[A)+', text(outputs, 'stderr')) if line.strip()
          and not re.search(r'\d+%\|', line)]


def pictures(outputs):
  return sum('image/png' in output.get('data', {}) for output in outputs)


@pytest.mark.slow
def test_selection_runs_from_top_to_bottom(kernel, monkeypatch, tmp_path):
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  folder = tmp_path / 'cwd'
  folder.mkdir()
  outputs, (names, counted, exported, of_means) = execute(
      read(SELECTION), folder, 'chosen.class_names', 'count', '(work / "chosen.txt").read_text().splitlines()',
      'from_means.class_names')
  assert sorted(names) == [f'digit {i}' for i in range(10)] and of_means == names
  assert len(exported) == counted == 1157
  assert all(re.fullmatch(r'train/digit \d/digits-\d+\.png', name) for name in exported)
  shown = {cell: pictures(output) for cell, output in outputs.items() if pictures(output)}
  assert shown == {'pictures': 2, 'plot': 1, 'pairs': 1, 'example': 1, 'cluster': 1}
  assert {cell: complaints(output) for cell, output in outputs.items() if complaints(output)} == {}
  assert text(outputs['select']).startswith('uot: 10 of 26 source classes')
  assert 'nothing to install' in text(outputs['install'])
  assert 'skipped' in text(outputs['own-embed']) and not outputs['own-pictures']
  assert not list(folder.iterdir())


@pytest.mark.slow
def test_a_folder_and_a_network_of_ones_own(kernel, photos, pool, tmp_path):
  weights = ROOT / 'tests' / 'fixtures' / 'resnet18.pth'
  notebook = read(SELECTION, SOURCE_FOLDER=str(pool), TARGET_FOLDER=str(photos), WEIGHTS=str(weights),
                  NETWORK='resnet18', IMAGE_SIZE=32, SIZE=3)
  notebook.cells = [cell for cell in notebook.cells if cell.id in OWN]
  # A checkout is found from its colabs/, where nothing is installed.
  folder = tmp_path / 'checkout' / 'colabs'
  folder.mkdir(parents=True)
  for package in ('selection', 'ft_jax'):
    (tmp_path / 'checkout' / package).symlink_to(ROOT / package)
  outputs, (names, count) = execute(notebook, folder, 'own_chosen.class_names', 'count')
  assert len(names) == 3 and set(names) < set('abcdef')
  assert str(tmp_path / 'checkout' / 'selection') in text(outputs['install'])
  exported = (folder / 'chosen.txt').read_text().splitlines()
  assert len(exported) == count == 30 and {name[0] for name in exported} == set(names)
  assert pictures(outputs['own-embed']) == 1 and pictures(outputs['own-pictures']) == 1
  assert text(outputs['own-embed']).startswith('uot: 3 of 6 source classes')
  assert not any(map(complaints, outputs.values()))


@pytest.mark.slow
def test_finetune_runs_from_top_to_bottom(kernel, monkeypatch, tmp_path):
  """On the digits, with a training that is too short to be good."""
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  folder = tmp_path / 'cwd'
  folder.mkdir()
  outputs, (chosen, top1, wrong, exported) = execute(
      read(FINETUNE, EPOCHS=2, SIZE=8), folder, 'len(run.selection.units)', '[run.test.top1, plain.test.top1]',
      'len(wrong)', 'sorted(path.name for path in (run.workdir / "export").iterdir())')
  assert chosen == 8 and len(top1) == 2 and wrong == round((1 - top1[0]) * 252)
  shown = {cell: pictures(output) for cell, output in outputs.items() if pictures(output)}
  assert shown == {'images': 1, 'curves': 1, 'selection': 1, 'mistakes': 1, 'features': 1}
  assert {cell: complaints(output) for cell, output in outputs.items() if complaints(output)} == {}
  assert '<iframe' in outputs['report'][-1].data['text/html'] and 'model.safetensors' in exported
  assert 'step' in text(outputs['train']) and text(outputs['plain']).count('test top-1') == 2


@pytest.mark.slow
def test_finetune_on_folders_of_ones_own(kernel, monkeypatch, photos, pool, trained_run, tmp_path):
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  form = {'TARGET': str(photos), 'SOURCE': str(pool), 'WEIGHTS': str(trained_run), 'SIZE': 2, 'EPOCHS': 2,
          'WORKDIR': str(tmp_path / 'run')}
  outputs, (classes, network) = execute(read(FINETUNE, **form), tmp_path, 'run.class_names', 'run.config.model.width')
  assert classes == ['blossom', 'roof', 'sky', 'wall'] and network == 4
  assert {cell: complaints(output) for cell, output in outputs.items() if complaints(output)} == {}


@pytest.mark.parametrize('path', FIELDS, ids=lambda path: path.stem)
def test_it_is_committed_clean(path):
  notebook = json.loads(path.read_text(encoding='utf-8'))
  nbformat.validate(notebook)
  assert notebook['metadata'] == {
      'colab': {'name': path.name, 'provenance': []},
      'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
      'language_info': {'name': 'python'}}
  ids = [cell['id'] for cell in notebook['cells']]
  assert len(set(ids)) == len(ids) and all(re.fullmatch(r'[a-z0-9-]+', name) for name in ids)
  assert all(cell['metadata'] == {} for cell in notebook['cells'])
  code = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
  assert all(cell['outputs'] == [] and cell['execution_count'] is None for cell in code)


def syntax(path):
  """The nodes of the code of a notebook."""
  code = [cell.source for cell in read(path).cells if cell.cell_type == 'code']
  return list(ast.walk(ast.parse('\n'.join(re.sub(r'(?m)^(\s*)%.*', r'\1pass', cell) for cell in code))))


def test_finetune_uses_what_ft_jax_offers():
  attributes = [node for node in syntax(FINETUNE) if isinstance(node, ast.Attribute)]
  used = {node.attr for node in attributes if ast.unparse(node.value) == 'ft_jax'}
  assert {'finetune', 'pretrain', 'ImageSet'} <= used <= set(ft_jax.__all__)


def test_selection_uses_what_selection_offers():
  nodes = syntax(SELECTION)
  used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == 'selection'}
  assert used <= set(selection.__all__)
  assert used >= {'select', 'embed', 'class_means', 'embed_class_means', 'Embeddings', 'otdd', 'domain_similarity',
                  'Selection'}
  modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
  assert not [module for module in modules
              if module.startswith('selection')], 'only the names of selection itself are public'
