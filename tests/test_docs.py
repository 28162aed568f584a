"""README.md, CONTRIBUTING.md and docs/: what they name exists, and what exists they name."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import json
import pathlib
import re
import shlex
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags
import pytest

from configs import default
import ft_jax
from ft_jax import config_files, settings
from ft_jax.methods import METHODS
from ft_jax.workdir import Workdir
import main  # noqa: F401  # defines the flags
import selection

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').glob('*.md')])
FOLDERS = ('ft_jax', 'selection', 'configs', 'docs', 'tests', 'benchmarks', 'colabs', '.github', '.ci')

each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)


class Blocks(NamedTuple):
  """A page in two parts: its code blocks, and the prose between them."""
  code: list[str]
  prose: str


def blocks(page: pathlib.Path) -> Blocks:
  """Code is fenced, or indented by four spaces after an empty line; a list item is not."""
  text = page.read_text()
  fenced = re.findall(r'^```\w*\n(.*?)^```$', text, re.M | re.S)
  text = re.sub(r'^```\w*\n.*?^```$', '', text, flags=re.M | re.S)
  indented = re.findall(r'(?:^\n)((?:^ {4}.*\n|^\n(?= {4}))+)', text, re.M)
  for block in indented:
    text = text.replace(block, '')
  return Blocks([*fenced, *(re.sub('^ {4}', '', block, flags=re.M) for block in indented)], text)


def commands(page: pathlib.Path) -> list[str]:
  """Shell commands of the code blocks, one a line, without comments and continuation marks."""
  lines = '\n'.join(blocks(page).code).replace('\\\n', ' ').splitlines()
  return [re.sub(r'\s+#\s.*$', '', line).strip() for line in lines]


def quoted(page: pathlib.Path) -> list[str]:
  """What stands in `backticks` in the prose."""
  return re.findall(r'`([^`\n]+)`', blocks(page).prose)


def expanded(path: str) -> list[str]:
  """`configs/{pets,cub}.py` as two paths."""
  parts = [part.split(',') for part in re.split(r'[{}]', path)]
  return [''.join(chosen) for chosen in itertools.product(*parts)]


def main_commands(page: pathlib.Path) -> list[list[str]]:
  """The arguments of each `python main.py ...` or `ft-jax ...`."""
  found = [re.search(r'(?:python main\.py|ft-jax) (--.*?)(?:$|&&)', text) for text in [*commands(page), *quoted(page)]]
  return [shlex.split(match[1].rstrip("' ").replace('...', '')) for match in found if match]


def test_readme_is_short():
  """Everything else has a page in docs/."""
  assert len((ROOT / 'README.md').read_text().splitlines()) <= 200


@pytest.mark.filterwarnings('ignore:the load_module.. method is deprecated')  # ml_collections reads configs with it
@each_page
def test_commands_can_be_run(page, monkeypatch):
  """Each command for main.py has a config that is there and flags that are accepted."""
  monkeypatch.chdir(ROOT)
  for given in main_commands(page):
    known = flags.FlagValues()
    for name in ('workdir', 'traceback', 'coordinator', 'num_processes', 'process_id', 'workers'):
      known[name] = flags.FLAGS[name]
    argv = ['main.py', *(re.sub(r'(?<=^--config=).*', lambda name: config_files.find(name[0]), flag) for flag in given)]
    config_flags.DEFINE_config_file('config', flag_values=known, sys_argv=argv)
    assert known(argv) == ['main.py'], given
    assert known.config is not None, given
    settings.check_fields(known.config)


def test_commands_are_found():
  """The test above has something to test."""
  found = [given for page in PAGES for given in main_commands(page)]
  assert len(found) > 30
  assert any('--config=configs/pets.py' in given for given in found)


@each_page
def test_other_commands_exist(page):
  """Modules after `python -m`, scripts after `python`, targets of `make`."""
  targets = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.M)
  for command in [*commands(page), *quoted(page)]:
    if module := re.search(r'python -m (ft_jax[\w.]*)', command):
      assert importlib.util.find_spec(module[1]), command
    if script := re.search(r'python ([\w/]+\.py)', command):
      assert (ROOT / script[1]).is_file(), command
    if target := re.match(r'make ([a-z-]+)', command):
      assert target[1] in targets, command


@each_page
def test_fields_exist(page):
  """Fields of the config: in prose as `config.group.field`, `group.field` or `group.field=value`, in commands flags."""
  fields = settings.flat(default.get_config().to_dict())
  known = {'.'.join(name.split('.')[:k]) for name in fields for k in range(1, name.count('.') + 2)}
  groups = '|'.join(name for name in known if '.' not in name and name not in fields)
  named = {name for text in [*quoted(page), *commands(page)]
           for name in re.findall(r'(?<![\w/])config\.((?:\w+\.)*\w+)', text)}
  named |= {found[1] for text in quoted(page) if (found := re.match(rf'((?:{groups})\.[a-z_.]*[a-z_])(?:=.*)?$', text))}
  known.add('methods.features.weight')  # the example of a new method
  for name in named - known:
    assert name.rpartition('.')[2] in OTHER_NAMES, name


# What follows a dot and is no field: endings of files, and functions of `selection` and `jax.export`.
OTHER_NAMES = {'json', 'py', 'csv', 'html', 'safetensors', 'stablehlo', *selection.__all__, 'storage', 'init', 'apply'}


@each_page
def test_paths_exist(page):
  """Files and folders of this repository, wherever a page names them."""
  for text in [*quoted(page), *commands(page)]:
    for path in re.findall(rf'(?<![\w/.])((?:{"|".join(FOLDERS)})/[\w/.{{}},-]*\w)', text):
      for each in expanded(path):
        assert (ROOT / each).exists(), each


def anchors(page: pathlib.Path) -> set[str]:
  """Of the headings, as GitHub makes them."""
  headings = re.findall(r'^#+ (.*)$', re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.M | re.S), re.M)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@each_page
def test_links_resolve(page):
  """Files, and headings in them."""
  links = re.findall(r'\]\(([^)\s]+)\)', page.read_text())
  for link in links:
    if link.startswith('http'):
      continue
    file, _, anchor = link.partition('#')
    there = page.parent / file if file else page
    assert there.exists(), link
    assert not anchor or anchor in anchors(there), link


def test_every_page_is_in_the_index():
  """And in the README, where one begins to read."""
  for index in (ROOT / 'docs' / 'README.md', ROOT / 'README.md'):
    links = re.findall(r'\]\(([^)#\s]+)', index.read_text())
    linked = {(index.parent / link).resolve() for link in links if '://' not in link}
    missing = {page.name for page in PAGES if page.name != 'README.md' and page.resolve() not in linked}
    assert not missing, index


def test_every_config_is_in_the_readme():
  """And every name in its table is a config."""
  text = (ROOT / 'README.md').read_text()
  named = {each for path in re.findall(r'`configs/([\w{},]+)\.py`', text) for each in expanded(path)}
  assert named == {path.stem for path in (ROOT / 'configs').glob('*.py')} - {'__init__'}


def test_arguments_of_configs_exist():
  """`:mocov2` and the like, in the README's table."""
  rows = re.findall(r'^\| (`configs/.*?) \| (.*) \|$', (ROOT / 'README.md').read_text(), re.M)
  for names, what in rows:
    stems = [each for path in re.findall(r'`configs/([\w{},]+)\.py`', names) for each in expanded(path)]
    for argument in re.findall(r'`:(\w+)`', what):
      accepted = []
      for stem in stems:
        try:
          accepted.append(importlib.import_module(f'configs.{stem}').get_config(argument))
        except (TypeError, ValueError, KeyError):
          continue
      assert accepted, argument


def test_every_file_of_a_workdir_is_described():
  """Of those that `Workdir` names."""
  text = (ROOT / 'docs' / 'workdir.md').read_text()
  for name, value in vars(Workdir).items():
    if isinstance(value, property):
      path = value.fget(Workdir.__new__(Workdir)) if name == 'path' else value.fget(_At())
      assert f'`{path.name}' in text, name


class _At:
  """Stands for a workdir whose files are asked for."""
  path = pathlib.PurePath('runs')


def test_every_method_is_described():
  """With the published setting that switches it on, and its other fields."""
  table = (ROOT / 'docs' / 'methods.md').read_text().partition('\n## Other switches')[0]
  rows = re.findall(r'^\| `(\w+)\.(\w+)=([\w.]+)` (.*)$', table, re.M)
  assert sorted(name for name, *_ in rows) == sorted(METHODS)
  for name, switch, value, row in rows:
    published = METHODS[name].published[switch]
    assert value == published if isinstance(published, str) else json.loads(value) == published, name
    for field in dataclasses.fields(METHODS[name])[1:]:
      assert re.search(rf'\b{field.name}\b', row), (name, field.name)


def test_the_map_is_complete():
  """Whoever reads docs/design.md finds the file of any function; `study_*.py` and `<method>.py` stand for several."""
  text = (ROOT / 'docs' / 'design.md').read_text()
  named = set(re.findall(r'`(?:\w+/)*(\w+)\.py`', text))
  modules = {path.stem: path for package in ('ft_jax', 'selection') for path in (ROOT / package).rglob('*.py')}
  for name, path in modules.items():
    one_of_many = name in METHODS or name.startswith('study_') or {'prepare', 'templates', 'jobs'} & set(path.parts)
    assert one_of_many or name in named | {'__init__'}, path
  assert named <= {*modules, *(path.stem for path in (ROOT / 'tests').rglob('*.py'))}


def test_every_strategy_is_described():
  text = (ROOT / 'docs' / 'selection.md').read_text()
  for name in selection.STRATEGIES:
    assert name == 'none' or f'`{name}`' in text, name


def test_benchmarks_are_on_one_page():
  """So that a number has one place where it is brought up to date."""
  for page in PAGES:
    text = page.read_text()
    if page.name not in ('speed.md', 'scaling.md', 'CONTRIBUTING.md'):
      assert 'python benchmarks/' not in text, page.name


def python_examples(page: pathlib.Path) -> list[str]:
  """Blocks that show how to call the packages; those that a test runs have a name."""
  return re.findall(r'^```python\n(.*?)^```$', page.read_text(), re.M | re.S)


@each_page
def test_python_examples_use_what_exists(page):
  """Functions with the arguments that they take, attributes of a run and of a selection."""
  from ft_jax import arguments

  for code in python_examples(page):
    kinds: dict[str, Any] = {'ft_jax': ft_jax, 'run': ft_jax.Run, 'again': ft_jax.Run, 'selection': selection,
                             'chosen': selection.Selection}
    for node in ast.walk(ast.parse(code)):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in kinds:
        kind = kinds[node.value.id]
        assert hasattr(kind, node.attr) or node.attr in kind.__annotations__, f'{node.value.id}.{node.attr}'
      if isinstance(node, ast.Call) and ast.unparse(node.func) == 'ft_jax.finetune':
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        bound = inspect.signature(ft_jax.finetune).bind(**given)
        arguments.make_config('default', 'finetune', bound.arguments.get('settings', {}))


def test_the_python_page_has_the_whole_interface():
  """What `ft_jax` offers, and what a run does."""
  text = (ROOT / 'docs' / 'python.md').read_text()
  for name in ft_jax.__all__:
    assert f'ft_jax.{name}' in text or name == 'Run', name
  public = {*vars(ft_jax.Run), *ft_jax.Run.__annotations__}
  for name in {name for name in public if not name.startswith('_')}:
    assert re.search(rf'`run\.{name}\b', text), name
