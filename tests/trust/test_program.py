"""The program itself loads no code from data, asks only its own repository, and bounds its requirements."""

import ast
from collections.abc import Iterator
import pathlib
import pickle
import re
import subprocess
import tomllib

from ft_jax import environment
from ft_jax.models import torch_pickle

ROOT = pathlib.Path(__file__).parents[2]
PRODUCT = [*ROOT.glob('ft_jax/**/*.py'), *ROOT.glob('selection/**/*.py'), ROOT / 'main.py']


def test_only_its_own_repository_is_asked(tmp_path, monkeypatch):
  """Installed inside another project, the program names no commit of that, and runs nothing that its settings name."""
  git = ['git', '-c', 'user.name=x', '-c', 'user.email=x', '-C']
  run = lambda folder, *words: subprocess.run([*git, str(folder), *words], check=True, capture_output=True,
                                              text=True).stdout.strip()
  mark, site = tmp_path / 'ran', tmp_path / 'project' / 'site-packages'
  (site / 'ft_jax').mkdir(parents=True)
  (site / 'ft_jax' / 'environment.py').write_text('')

  def repository(folder: pathlib.Path) -> str:
    run(folder, 'init', '-q')
    run(folder, 'add', '.')
    run(folder, 'commit', '-q', '-m', 'x')
    run(folder, 'config', 'core.fsmonitor', f'touch {mark};')
    return run(folder, 'rev-parse', 'HEAD')

  repository(tmp_path / 'project')
  monkeypatch.setattr(environment, '__file__', str(site / 'ft_jax' / 'environment.py'))
  assert environment.commit() is None and not mark.exists()
  run(tmp_path / 'project', 'status')
  assert mark.exists(), 'the repository was harmless: the test shows nothing'
  mark.unlink()
  own = repository(site)
  mark.unlink(missing_ok=True)
  monkeypatch.setenv('GIT_DIR', str(tmp_path / 'project' / '.git'))
  assert environment.commit() == own and not mark.exists()


# What may be used where: a restricted unpickler and its opcodes, git with fixed arguments, the check whether a package
# of a table is installed, and the config file that the user names.
ALLOWED = {('pickle', 'ft_jax/models/torch_pickle.py'), ('subprocess', 'ft_jax/environment.py'),
           ('importlib', 'selection/storage.py'), ('importlib', 'ft_jax/config_files.py'),
           ('importlib', 'ft_jax/progress.py')}
CODE = {'eval', 'exec', 'compile', '__import__', 'execfile', 'breakpoint'}
MODULES = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'marshal', 'shelve', 'subprocess', 'importlib',
           'runpy', 'imp', 'ctypes',
           'code', 'codeop', 'pty', 'yaml', 'torch'}
CALLS = {'system', 'popen', 'load_module', 'import_module', 'spawnl', 'spawnv', 'execv', 'execl', 'unsafe_load'}


def findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
  """Lines that load code or run programs, and with what."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name.partition('.')[0]) for alias in node.names
                  if alias.name.partition('.')[0] in MODULES and alias.name != 'importlib.metadata')
    if isinstance(node, ast.ImportFrom) and (node.module or '').partition(
        '.')[0] in MODULES and node.module != 'importlib.metadata':
      yield node.lineno, node.module
    if isinstance(node, ast.Call):
      name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func,
                                                                                               ast.Attribute) else ''
      if isinstance(node.func, ast.Name) and name in CODE or isinstance(node.func, ast.Attribute) and name in CALLS:
        yield node.lineno, name
      for keyword in node.keywords:
        if keyword.arg in ('shell', 'allow_pickle') and not (isinstance(keyword.value, ast.Constant)
                                                             and keyword.value.value is False):
          yield node.lineno, keyword.arg


def test_no_code_comes_from_data():
  """No eval, no unpickling but the restricted one, no shell, in all of the product."""
  assert len(PRODUCT) > 80
  found = {(what, str(path.relative_to(ROOT)), line) for path in PRODUCT
           for line, what in findings(ast.parse(path.read_text()))}
  assert not [entry for entry in sorted(found) if entry[:2] not in ALLOWED]
  assert {entry[:2] for entry in found} == ALLOWED  # and the walk does find things
  bad = '\n'.join(('import pickle', 'from torch import load', 'eval(x)', 'os.system(x)',
                   'np.load(x, allow_pickle=True)', 'subprocess.run(x, shell=yes)'))
  assert [line for line, _ in sorted(findings(ast.parse(bad)))] == [1, 2, 3, 4, 5, 6]
  for path in ('selection/storage.py', 'ft_jax/progress.py'):  # these only ask whether a package is installed
    assert re.findall(r'importlib\.[\w.]+\(', (ROOT / path).read_text()) == ['importlib.util.find_spec(']
  unpickler = (ROOT / 'ft_jax/models/torch_pickle.py').read_text()
  assert re.findall(r'pickle\.(\w+)', unpickler) == ['Unpickler']
  assert pickle.Unpickler in torch_pickle._Unpickler.__mro__ and 'find_class' in vars(torch_pickle._Unpickler)


def test_every_requirement_is_bounded():
  """From both sides, so that a later release comes in when it was tested."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  lines = [line for name in ('requirements.txt', 'requirements-dev.txt')
           for line in (ROOT / name).read_text().splitlines()]
  lines += project['build-system']['requires']
  wanted = [line.partition(';')[0].strip() for line in lines if line.strip() and not line.startswith('#')]
  assert len(wanted) > 30
  assert not [line for line in wanted if not re.fullmatch(r'[\w.-]+(\[[\w,]+\])?>=[\d.]+,<[\d.]+', line)]
