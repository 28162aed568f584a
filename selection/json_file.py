"""The file of a selection: JSON, written whole or not at all. Files are untrusted, so every field is checked."""

import base64
from collections.abc import Mapping
import json
import os
from typing import Any

import numpy as np

from selection import storage

FORMAT_VERSION = 2
# Longer arrays are written as base64, which takes a twentieth of the time and half of the space.
READABLE = 10_000

# Fields that hold arrays: the number of axes, the allowed kinds of dtype, and the dtype of those written as lists.
_ARRAYS: dict[str, tuple[int, str, Any]] = {
    'units': (1, 'iu', np.int64),
    'scores': (1, 'f', np.float64),
    'counts': (1, 'iu', np.int64),
    'plan': (2, 'f', np.float32),
    'target_mass': (1, 'f', np.float64),
    'rows': (1, 'iu', np.int64),
    'row_units': (1, 'iu', np.int64),
    'ids': (1, 'iuU', None),
}
_REQUIRED = ('units', 'scores')
_LISTS = ('names', 'target_names')
_PLAIN: dict[str, tuple[type, ...]] = {
    'method': (str,),
    'by': (str,),
    'size': (int, float),
    'seed': (int,),
    'parameters': (dict,),
    'measure': (str,),
    'ascending': (bool,),
    'solver': (dict,),
    'encoder': (str,),
    'source': (dict,),
}


def write(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
  """Writes the fields of a `Selection`, one per line: short arrays as readable lists, long ones as base64."""
  saved = {'format_version': FORMAT_VERSION, **{key: _value(value) for key, value in fields.items()}}
  for name in _LISTS:
    saved[name] = [str(item) for item in fields[name]]
  lines = (f'{json.dumps(key)}: {json.dumps(value, default=lambda number: number.item())}'
           for key, value in saved.items())
  storage.write_text(path, '{\n' + ',\n'.join(lines) + '\n}\n')


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
  """The fields of a `Selection` in a file, with NumPy arrays, and tuples for lists of names.

  Raises:
    OSError: the file cannot be read.
    ValueError: it has another format version, a field is missing or unknown, or has the wrong type.
  """
  document = _parsed(storage.located(path).read_bytes().decode())
  version = document.pop('format_version', None)
  if version != FORMAT_VERSION:
    raise ValueError(f'it has format version {version!r:.20}; this program reads {FORMAT_VERSION}')
  return _fields(document)


def _parsed(text: str) -> dict[str, Any]:
  """Parses a JSON object.

  Raises:
    ValueError: the text is not JSON, or has a key twice.
  """
  try:
    document = json.loads(text, object_pairs_hook=_unique_keys)
  except RecursionError as error:
    raise ValueError('it is nested too deeply') from error
  if not isinstance(document, dict):
    raise ValueError(f'it is {_kind(document)}; expected an object with the fields of a selection')
  return document


def _fields(document: Mapping[str, Any]) -> dict[str, Any]:
  """The checked fields, with NumPy arrays, and tuples for lists of names."""
  known = {*_ARRAYS, *_LISTS, *_PLAIN}
  for problem, names in (('is missing', known - set(document)), ('is unknown', set(document) - known)):
    if names:
      raise ValueError(f'the field {min(names)!r:.40} {problem}')
  for name, kinds in _PLAIN.items():
    if type(document[name]) not in kinds:
      raise ValueError(f'{name} is {_kind(document[name])}; expected {kinds[0].__name__}')
  for name in ('parameters', 'solver', 'source'):
    if any(isinstance(value, (dict, list)) for value in document[name].values()):
      raise ValueError(f'{name} holds a list or an object; expected single values')
  if not all(isinstance(value, str) for value in document['source'].values()):
    raise ValueError('source holds values that are not strings')
  solver = document['solver']
  if solver and type(solver.get('iterations')) is not int:
    raise ValueError('solver has no number of iterations')
  if type(solver.get('converged', True)) is not bool or type(solver.get('error', 0.0)) not in (int, float):
    raise ValueError('solver has an error or converged of a wrong type; expected a number, and true or false')
  if not 0 <= document['size'] < float('inf') or not 0 <= document['seed'] < 2**64:
    raise ValueError('size or seed is below 0 or too large')
  for name in _LISTS:
    if not isinstance(document[name], list):
      raise ValueError(f'{name} is {_kind(document[name])}; expected a list of strings')
    if not all(isinstance(value, str) for value in document[name]):
      raise ValueError(f'{name} holds values that are not strings')
  missing = {name for name in _ARRAYS if document[name] is None and name not in _REQUIRED}
  arrays = {name: None if name in missing else _array(name, document[name]) for name in _ARRAYS}
  return {**document, **{name: tuple(document[name]) for name in _LISTS}, **arrays}


def _value(value: Any) -> Any:
  """Short arrays as lists, long ones of numbers as base64; other values unchanged."""
  if not isinstance(value, np.ndarray):
    return value
  if value.size > READABLE and value.dtype.kind != 'U':
    return _packed(value)
  if value.ndim == 2:
    return [[float(f'{x:.7g}') for x in row] for row in value]
  return value.tolist()


def _packed(value: np.ndarray) -> dict[str, Any]:
  """A long array as a JSON object."""
  little = np.ascontiguousarray(value.astype(value.dtype.newbyteorder('<')))
  encoded = base64.b64encode(little.tobytes()).decode()
  return {'dtype': value.dtype.name, 'shape': list(value.shape), 'base64': encoded}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object; raises ValueError for repeated keys, of which parsers may take either value."""
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError('it has a key twice')
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
  """A short array, from a list (of lists)."""
  rows = value if axes == 2 else [value]
  if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
    raise ValueError(f'{name} is {_kind(value)}; expected a list' + (' of lists of one length' if axes == 2 else ''))
  allowed = (int, float) if kinds == 'f' else (int,)
  strings = 'U' in kinds and all(type(x) is str for x in value)
  if not strings and not all(type(x) in allowed for row in rows for x in row):
    raise ValueError(f'{name} holds values that are not {"numbers" if kinds == "f" else "whole numbers"}')
  try:
    array = np.asarray(value, str if strings and value else dtype or np.int64)
  except OverflowError as error:
    raise ValueError(f'{name} has a number that is too large') from error
  return array.reshape(len(value), 0) if axes == 2 and array.ndim < 2 else array


def _unpacked(name: str, value: Mapping[str, Any], kinds: str) -> np.ndarray:
  """The reverse of `_packed`."""
  if set(value) != {'dtype', 'shape', 'base64'}:
    raise ValueError(f'{name} is an object without exactly the keys dtype, shape and base64')
  if value['dtype'] not in _DTYPES or np.dtype(value['dtype']).kind not in kinds:
    raise ValueError(f'{name} has dtype {value["dtype"]!r:.20}, which this field cannot have')
  shape = value['shape']
  if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
    raise ValueError(f'{name} has shape {shape!r:.40}; expected a list of whole numbers from 0')
  if not isinstance(value['base64'], str):
    raise ValueError(f'{name} has base64 that is {_kind(value["base64"])}; expected a string')
  flat = np.frombuffer(base64.b64decode(value['base64'], validate=True), np.dtype(value['dtype']).newbyteorder('<'))
  return flat.astype(value['dtype']).reshape(shape)


def _kind(value: Any) -> str:
  """The JSON type of a value, with its article, for error messages."""
  kinds = {dict: 'an object', list: 'a list', str: 'a string', bool: 'true or false', type(None): 'null'}
  return kinds.get(type(value), 'a number')


_DTYPES = ('float64', 'float32', 'float16', 'int64', 'int32', 'int16', 'int8', 'uint64', 'uint32', 'uint16', 'uint8')
