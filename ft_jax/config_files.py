"""The files in configs/ by name: 'pets', 'pets:mocov2', 'configs/pets.py' or a file of your own."""

from collections.abc import Iterator
import contextlib
import difflib
import importlib.util
import os
import pathlib
import sys
import types

from ml_collections import ConfigDict

_PACKAGE = pathlib.Path(__file__).parent
# Inside an installed package; in the repository, the folder at its top level.
FOLDER = _PACKAGE / 'configs' if (_PACKAGE / 'configs').is_dir() else _PACKAGE.parent / 'configs'


def find(name: str) -> str:
  """The path of a config file, with the argument after the colon if there is one.

  Args:
    name: a name in configs/ such as `pets`, or the path of a file; `configs/pets.py` is found from any folder.

  Raises:
    ValueError: there is no such file.
  """
  path, colon, argument = name.partition(':')
  known = {file.stem: file for file in sorted(FOLDER.glob('*.py'))}
  if not os.path.isfile(path):
    short = path.removeprefix('configs/').removesuffix('.py') if path.startswith('configs/') else path
    if short not in known:
      near = difflib.get_close_matches(short, list(known), 1)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      raise ValueError(f'there is no file {path}{hint}; known configs: {", ".join(known)}')
    path = str(known[short])
  return f'{path}{colon}{argument}'


def load(name: str) -> ConfigDict:
  """The config that a file defines; see `find`.

  Raises:
    ValueError: there is no such file, or its `get_config` does not take that argument.
  """
  path, _, argument = find(name).partition(':')
  spec = importlib.util.spec_from_file_location('config_file', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  with importable():
    spec.loader.exec_module(module)
    get_config = module.get_config
    if argument and not get_config.__code__.co_argcount:
      raise ValueError('this config takes no argument after a colon')
    return get_config(argument) if argument else get_config()


@contextlib.contextmanager
def importable() -> Iterator[None]:
  """Within it, `from configs import pets` finds this project's configs, whatever else is installed under that name.

  Files in configs/, and those of users, import each other this way. Installed, the folder lies inside of this package.
  """
  before = _pop_configs()
  configs = types.ModuleType('configs')
  configs.__path__ = [str(FOLDER)]
  sys.modules['configs'] = configs
  try:
    yield
  finally:
    _pop_configs()
    sys.modules.update(before)


def _pop_configs() -> dict[str, types.ModuleType]:
  """Removes `configs` and its modules from the imported ones; returns them."""
  return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition('.')[0] == 'configs'}
