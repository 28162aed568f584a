"""The file of a selection: JSON, written whole or not at all. A file is untrusted: every field has the right kind, or is refused."""

import base64
from collections.abc import Mapping
import json
import os
from typing import Any

import numpy as np

from selection import storage

FORMAT_VERSION = 2
# Longer arrays are written as base64: it takes a twentieth of the time and half of the size.
READABLE = 10_000

# Fields that hold arrays: their numbers of axes, the kinds of numbers that they may have, and the type of those written as lists.
_ARRAYS = {'units': (1, 'iu', np.int64), 'scores': (1, 'f', np.float64), 'counts': (1, 'iu', np.int64), 'plan': (2, 'f', np.float32),
           'target_mass': (1, 'f', np.float64), 'rows': (1, 'iu', np.int64), 'row_units': (1, 'iu', np.int64), 'ids': (1, 'iuU', None)}
_NEEDED = ('units', 'scores')
_LISTS = ('names', 'target_names')
_PLAIN: dict[str, tuple[type, ...]] = {
    'method': (str,), 'by': (str,), 'size': (int, float), 'seed': (int,), 'parameters': (dict,), 'measure': (str,), 'ascending': (bool,),
    'solver': (dict,), 'encoder': (str,), 'source': (dict,)}


def write(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
  """Writes the fields of a `Selection`, one a line: short arrays can be read, long ones are small."""
  saved = {'format_version': FORMAT_VERSION, **{key: _value(value) for key, value in fields.items()}}
  for name in _LISTS:
    saved[name] = [str(item) for item in fields[name]]
  lines = (f'{json.dumps(key)}: {json.dumps(value, default=lambda number: number.item())}' for key, value in saved.items())
  storage.write_text(path, '{\n' + ',\n'.join(lines) + '\n}\n')


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
  """The fields of a `Selection` in a file, arrays as arrays and lists of names as tuples.

  Raises:
    OSError: it cannot be read.
    ValueError: it is of another format version, lacks a field or has an unknown one, or has one of the wrong kind.
  """
  document = _parsed(storage.located(path).read_bytes().decode())
  version = document.pop('format_version', None)
  if version != FORMAT_VERSION:
    raise ValueError(f'it has format version {version!r:.20}; this program reads {FORMAT_VERSION}')
  return _fields(document)


def _parsed(text: str) -> dict[str, Any]:
  """A JSON object.

  Raises:
    ValueError: text that is not JSON, or has a key twice.
  """
  try:
    document = json.loads(text, object_pairs_hook=_once)
  except RecursionError as error:
    raise ValueError('it is nested too deeply') from error
  if not isinstance(document, dict):
    raise ValueError(f'it is {_kind(document)}; expected an object with the fields of a selection')
  return document


def _fields(document: Mapping[str, Any]) -> dict[str, Any]:
  """Checked: arrays as arrays, and lists of names as tuples."""
  known = {*_ARRAYS, *_LISTS, *_PLAIN}
  for what, names in (('lacks', known - set(document)), ('has, which no selection has,', set(document) - known)):
    if names:
      raise ValueError(f'it {what} {min(names)!r:.40}')
  for name, kinds in _PLAIN.items():
    if type(document[name]) not in kinds:
      raise ValueError(f'{name} is {_kind(document[name])}; expected {kinds[0].__name__}')
  for name in ('parameters', 'solver', 'source'):
    if any(isinstance(value, (dict, list)) for value in document[name].values()):
      raise ValueError(f'{name} holds a list or an object; expected single values')
  if not all(isinstance(value, str) for value in document['source'].values()):
    raise ValueError('source holds what is no text')
  if document['solver'] and type(document['solver'].get('iterations')) is not int:
    raise ValueError('solver says no number of iterations')
  if type(document['solver'].get('converged', True)) is not bool or type(document['solver'].get('error', 0.0)) not in (int, float):
    raise ValueError('solver has a wrong kind of error or converged; expected a number, and true or false')
  if not 0 <= document['size'] < float('inf') or not 0 <= document['seed'] < 2**64:
    raise ValueError('size or seed is below 0 or too large')
  for name in _LISTS:
    if not isinstance(document[name], list) or not all(isinstance(value, str) for value in document[name]):
      raise ValueError(f'{name} is no list of texts')
  arrays = {name: None if document[name] is None and name not in _NEEDED else _array(name, document[name]) for name in _ARRAYS}
  return {**document, **{name: tuple(document[name]) for name in _LISTS}, **arrays}


def _value(value: Any) -> Any:
  """Arrays as lists, long ones of numbers as base64."""
  if not isinstance(value, np.ndarray):
    return value
  if value.size <= READABLE or value.dtype.kind == 'U':
    return [[float(f'{x:.7g}') for x in row] for row in value] if value.ndim == 2 else value.tolist()
  return _packed(value)


def _packed(value: np.ndarray) -> dict[str, Any]:
  """A long array as JSON holds it."""
  little = np.ascontiguousarray(value.astype(value.dtype.newbyteorder('<')))
  return {'dtype': value.dtype.name, 'shape': list(value.shape), 'base64': base64.b64encode(little.tobytes()).decode()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object of JSON; which of two values of one key counts would depend on the reader."""
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError('it says something twice')
  return found


def _array(name: str, value: Any) -> np.ndarray:
  axes, kinds, dtype = _ARRAYS[name]
  array = _unpacked(name, value, kinds) if isinstance(value, dict) else _listed(name, value, axes, kinds, dtype)
  if array.ndim != axes:
    raise ValueError(f'{name} has {array.ndim} axes; expected {axes}')
  if array.dtype.kind == 'f' and not np.isfinite(array).all():
    raise ValueError(f'{name} has numbers that are not finite')
  return array


def _listed(name: str, value: Any, axes: int, kinds: str, dtype: Any) -> np.ndarray:
  """A short array, written as a list (of lists)."""
  rows = value if axes == 2 else [value]
  if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
    raise ValueError(f'{name} is {_kind(value)}; expected a list' + (' of lists of one length' if axes == 2 else ''))
  allowed = (int, float) if kinds == 'f' else (int,)
  if not (all(type(x) in allowed for row in rows for x in row) or 'U' in kinds and all(type(x) is str for x in value)):
    raise ValueError(f'{name} holds what is no {"number" if kinds == "f" else "whole number"}')
  try:
    array = np.asarray(value, str if 'U' in kinds and value and isinstance(value[0], str) else dtype or np.int64)
  except OverflowError as error:
    raise ValueError(f'{name} has a number that is too large') from error
  return array.reshape(len(value), 0) if axes == 2 and array.ndim < 2 else array


def _unpacked(name: str, value: Mapping[str, Any], kinds: str) -> np.ndarray:
  """The reverse of `_packed`."""
  if set(value) != {'dtype', 'shape', 'base64'} or value['dtype'] not in _DTYPES or np.dtype(value['dtype']).kind not in kinds:
    raise ValueError(f'{name} is packed in a way that is not known')
  shape = value['shape']
  if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or not isinstance(value['base64'], str):
    raise ValueError(f'{name} is packed with a shape that is none')
  flat = np.frombuffer(base64.b64decode(value['base64'], validate=True), np.dtype(value['dtype']).newbyteorder('<'))
  return flat.astype(value['dtype']).reshape(shape)


def _kind(value: Any) -> str:
  return {dict: 'an object', list: 'a list', str: 'a text', bool: 'true or false', type(None): 'null'}.get(type(value), 'a number')


_DTYPES = ('float64', 'float32', 'float16', 'int64', 'int32', 'int16', 'int8', 'uint64', 'uint32', 'uint16', 'uint8')
