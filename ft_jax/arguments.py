"""The arguments of `ft_jax.finetune` and `ft_jax.pretrain`: from them to a config, and messages that name them.

A field of a group is an entry of a dict, `train={'epochs': 20}`; the names of the two image sets and of the weights are
arguments of their own.
"""

import ast
from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import difflib
import os
import re
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from ft_jax import config_files, settings
from ft_jax.methods import METHODS

# Fields that are arguments of their own, or called otherwise.
_NAMES = {'target.name': 'target', 'source.name': 'source', 'model.weights': 'weights', 'predict.images': 'images'}

# Arguments that are no fields of a config.
_OWN = ('workdir', 'weights', 'config')

# Fields that are no arguments: of other jobs, or the call itself says it.
_NOT_HERE = ('job', 'workdir', 'checkpoints', 'compare', 'predict', 'stability', 'study')


def make_config(base: str | os.PathLike[str], job: str, given: Mapping[str, Any]) -> ConfigDict:
  """The config of a job.

  Args:
    base: the config that it starts from: a name in configs/, or a file.
    job: finetune or pretrain.
    given: values by argument; a group's is a dict, a method's also the value of its first field.

  Raises:
    TypeError: an argument that does not exist.
    ValueError: a field that does not exist, or a value that does not fit; the message names the argument.
  """
  if not isinstance(base, (str, os.PathLike)):
    raise ValueError(f'config is {base!r}; expected the name of a config, such as pets, or the path of a file')
  base = os.fspath(base)
  try:
    config = config_files.load(base)
  except (OSError, ValueError) as error:
    raise ValueError(f'config {base!r}: {error}') from error
  if config.job != job and base != 'default':
    raise ValueError(f'config {base!r} is for job {config.job}; expected one for {job}')
  config.job = job
  not_here = (*_NOT_HERE, 'target') if job == 'pretrain' else _NOT_HERE
  for name, value in given.items():
    if name not in config or name in not_here:
      known = [field for field in config if field not in not_here]
      raise TypeError(f'{job}() has no argument {name!r}{_did_you_mean(name, config)}; '
                      f'known: {", ".join((*_OWN, *known))}')
    _set(config, name, value)
  return config


def _set(config: ConfigDict, path: str, value: Any) -> None:
  """Sets a field, or the given fields of a group."""
  *groups, name = path.split('.')
  group = config
  for part in groups:
    group = group[part]
  if not isinstance(group[name], ConfigDict):
    group[name] = _checked(path, value, group[name])
    return
  if not isinstance(value, Mapping):
    if path == 'model':
      value = {'name': value}
    elif groups == ['methods']:
      switch, *_ = dataclasses.fields(METHODS[name])
      value = {switch.name: value}
    else:
      raise ValueError(f'{name} is {value!r}; expected a dict of its fields: {", ".join(group[name])}')
  for key, inner in value.items():
    if key not in group[name]:
      renamed = settings.RENAMED.get(f'{path}.{key}')
      if renamed:
        raise ValueError(f'{argument(f"{path}.{key}")} is now called {argument(renamed)}')
      raise ValueError(f'{argument(path)} has no field {key!r}{_did_you_mean(str(key), config, path)}; '
                       f'known: {", ".join(group[name])}')
    _set(config, f'{path}.{key}', inner)


def _checked(path: str, value: Any, default: Any) -> Any:
  """The value as a config holds it; raises ValueError for one of another kind."""
  if isinstance(value, os.PathLike):
    value = os.fspath(value)
  if isinstance(value, np.generic):
    value = value.item()
  if value is None and isinstance(default, str):
    value = ''
  settings.check_field(argument(path), value, settings.FIELDS.get(path) or settings.like(default))
  return _as_tuple(value)


def _as_tuple(value: Any) -> Any:
  """Lists as tuples, as configs have them."""
  return tuple(map(_as_tuple, value)) if isinstance(value, (list, tuple)) else value


def _did_you_mean(name: str, config: ConfigDict, group: str = '') -> str:
  """The field that was probably meant: of a similar name in the group, or of that name in another one."""
  inner: Any = config
  for part in group.split('.') if group else ():
    inner = inner[part]
  known = list(inner) if group else [*_OWN, *(field for field in inner if field not in _NOT_HERE)]
  if near := difflib.get_close_matches(name, known, 1):
    return f'; did you mean {near[0]!r}?'
  elsewhere = [path for path in settings.flat(config.to_dict())
               if path.rpartition('.')[2] == name and path.partition('.')[0] not in _NOT_HERE]
  elsewhere.sort(key=lambda path: path.startswith('pretrain.'))  # which has the same fields as train
  return f'; did you mean {_call(elsewhere[0], "...")}?' if elsewhere else ''


def argument(path: str) -> str:
  """How a field is written as an argument: `train['epochs']` for train.epochs, `target` for target.name."""
  if path in _NAMES:
    return _NAMES[path]
  first, *rest = path.split('.')
  return first + ''.join(f'[{name!r}]' for name in rest)


def _call(path: str, value: str) -> str:
  """How a field is given in a call: `train={'epochs': 20}`; `value` is an expression."""
  if path in _NAMES:
    return f'{_NAMES[path]}={value}'
  first, *rest = path.split('.')
  for name in reversed(rest):
    value = f'{{{name!r}: {value}}}'
  return f'{first}={value}'


def in_arguments(message: str) -> str:
  """A message of a job with arguments in place of fields of the config and of flags.

  `config.train.epochs is -1` becomes `train['epochs'] is -1`, `--config.selection.method=none`
  `selection={'method': 'none'}`.
  """
  message = _FLAG.sub(lambda found: _call(found['path'], _value(found['value'])), message)
  message = _FIELD.sub(lambda found: argument(found['path']), message)
  message = re.sub(_bare_fields(), lambda found: argument(found[0]), message)
  message = re.sub(r'(?<![\w-])--workdir(?:=(?P<value>[^\s;,)]+))?', _workdir, message)
  return message.replace('the same command', 'the same call').replace('run its command again', 'make its call again')


def as_path(name: str, value: Any) -> str:
  """The argument `name`, a path, as text; raises ValueError for anything else."""
  if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
    raise ValueError(f'{name} is {value!r}; expected a path, such as runs/photos')
  return os.fspath(value)


@contextlib.contextmanager
def errors_in_arguments() -> Iterator[None]:
  """Errors that are raised within it name arguments; see `in_arguments`."""
  try:
    yield
  except (ValueError, OSError, RuntimeError) as error:
    error.args = tuple(in_arguments(part) if isinstance(part, str) else part for part in error.args)
    raise


# A flag with its value, which may be in quotation marks; a dot or bracket behind it belongs to the sentence.
_FLAG = re.compile(r"""--config\.(?P<path>\w+(?:\.\w+)*)=(?P<value>"[^"]*"|'[^']*'|\.\.\.|[^\s;,)]*[^\s;,.)]|)""")
_FIELD = re.compile(r'(?:--)?\bconfig\.(?!json\b|py\b)(?P<path>\w+(?:\.\w+)*)')


def _workdir(found: re.Match[str]) -> str:
  return f'workdir={found["value"]!r}' if found['value'] else 'workdir'


def _value(text: str) -> str:
  """The value of a flag as a Python expression."""
  text = text.strip('"') if text.startswith('"') else text
  if text in ('true', 'false'):
    return text.capitalize()
  try:
    ast.literal_eval(text)
    return text
  except (ValueError, SyntaxError):
    return repr(text)


def _bare_fields() -> str:
  """A pattern of all fields in groups as messages name them without `config.`, such as train.epochs."""
  paths = sorted(_paths(), key=len, reverse=True)
  return rf"(?<![\w./'\[-])(?:{'|'.join(map(re.escape, paths))})(?![\w\[]|\.\w)"


def _paths() -> Iterator[str]:
  for path in settings.defaults():
    if '.' in path:
      yield path
    if path.startswith('methods.'):
      yield path.rpartition('.')[0]
