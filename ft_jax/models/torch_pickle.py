"""State dicts in files of torch, and safetensors, to numpy arrays; without torch, and without running what a file says.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import io
import math
import os
import pathlib
import pickle
import pickletools
import reprlib
import shlex
from typing import Any, BinaryIO, NamedTuple
import zipfile

import jax.numpy as jnp
import numpy as np

from ft_jax.models import file_kinds

# How torch.save begins a file of before torch 1.6, and the only protocol of such files that there was.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950a86a20f9469cfc6c, 1001
# A ResNet-101 with the state of its optimizer has about 50,000.
_MOST_OBJECTS = 2_000_000
# How often the numbers of a file may be in its tensors.
_MOST_SHARED = 8
# What names of files of weights often end in; their bytes decide.
ENDINGS = ('.safetensors', '.pth', '.pth.tar', '.pt', '.ckpt', '.bin')
# Where a training script keeps its model's state dict. Of several in a file the first one here is read: the trained
# network rather than a moving average of it, and DINO's teacher, which its authors publish.
_STATE_KEYS = (
    'state_dict', 'model_state_dict', 'model_state', 'model', 'net', 'network', 'backbone', 'encoder', 'module',
    'weights', 'params', 'teacher', 'student', 'state_dict_ema', 'model_state_dict_ema', 'ema_state_dict', 'model_ema',
    'ema_model', 'ema', 'swa_model')
# How many levels of nested dicts are searched for one.
_DEEPEST = 3


class StateDict(NamedTuple):
  """What a file holds.

  Attributes:
    tensors: of a model, by name.
    beside: names of what there is beside them (epoch, optimizer, ...).
    notes: which of several state dicts was read, and which objects were not created.
  """
  tensors: dict[str, np.ndarray]
  beside: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()


def read(path: str | os.PathLike[str]) -> StateDict:
  """Reads safetensors, a zip file of torch 1.6 or newer, or the format before that, as its bytes say.

  Raises:
    ValueError: no such file, one that is incomplete, damaged or of another kind, or one that holds no state dict; says
      which and what to do.
  """
  path = pathlib.Path(os.path.expanduser(path))
  check(path)
  try:
    with path.open('rb') as stream:
      head = stream.read(file_kinds.HEAD_SIZE)
      if head.startswith(file_kinds.ZIP_MAGIC):
        return _read_zip(path)
      return _read_legacy(path, stream) if file_kinds.is_pickle(head) else StateDict(_read_safetensors(path))
  except _Unreadable as error:
    raise ValueError(f'{path} {error}') from error
  except EOFError as error:
    raise ValueError(f'{path} {_INCOMPLETE}') from error
  except Exception as error:  # whatever a damaged zip file or pickle makes the libraries raise
    reason = f'{type(error).__name__}: {error}'
    problem = _INCOMPLETE if 'truncated' in reason else f'cannot be read as a state dict ({reason})'
    raise ValueError(f'{path} {problem}') from error


def check(path: str | os.PathLike[str]) -> None:
  """Raises ValueError for a file that is not there or does not begin as weights do; says what it is and what to do."""
  path = pathlib.Path(os.path.expanduser(path))
  if not path.is_file():
    raise ValueError(f'model.weights: there is no file {path}')
  with path.open('rb') as stream:
    head = stream.read(file_kinds.HEAD_SIZE)
  if head.startswith(file_kinds.ZIP_MAGIC) or file_kinds.is_pickle(head) or file_kinds.is_safetensors(head):
    return
  if file_kinds.is_ancient_torch(head):
    raise ValueError(f'{path} is not what torch.save writes (the tar files of before torch 0.1.10 are not read). '
                     f'{_convert(path)}')
  reason = file_kinds.explain(head)
  if reason is None and path.suffix.lower() == '.safetensors':  # a damaged one, which has an error of its own
    return
  unknown = f'begins with {head[:8]!r}, as no known file of weights does; {file_kinds.EXPECTED}'
  raise ValueError(f'{path} {reason or unknown}')


class _Unreadable(Exception):
  """What is wrong with a file, as the rest of a sentence that begins with its name."""


_INCOMPLETE = 'is incomplete: it ends too early. Copy or download it again'


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  import safetensors

  try:
    found = safetensors.deserialize(path.read_bytes())
  except safetensors.SafetensorError as error:
    raise _Unreadable(f'is not a complete safetensors file ({error}); copy or download it again') from error
  other = sorted({tensor['dtype'] for _, tensor in found} - set(_SAFETENSORS_DTYPES))
  if other:
    raise _Unreadable(f'holds tensors of type {", ".join(other)}; known: {", ".join(_SAFETENSORS_DTYPES)}')
  try:
    return {name: np.frombuffer(tensor['data'], _SAFETENSORS_DTYPES[tensor['dtype']]).reshape(tensor['shape'])
            for name, tensor in sorted(found, key=lambda item: item[0])}
  except ValueError as error:  # of no numbers at all, in a shape that cannot be
    raise _Unreadable(f'has a tensor of a shape that cannot be ({error}); copy or download it again') from error


def _read_zip(path: pathlib.Path) -> StateDict:
  """torch 1.6 and newer: `<name>/data.pkl`, and the numbers of each storage in `<name>/data/<key>`, not compressed."""
  if not zipfile.is_zipfile(path):
    raise _Unreadable(_INCOMPLETE)  # the table of contents is at the end
  with zipfile.ZipFile(path) as archive:
    names = set(archive.namelist())
    if reason := file_kinds.explain_zip(names):
      raise _Unreadable(reason)
    pickles = [name for name in names if name.endswith('/data.pkl')]
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
      raise _Unreadable('is a compressed zip file, which torch.save does not write')
    # Parts that lie on each other: a small file could hold any number of gigabytes.
    if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
      raise _Unreadable('is damaged: its parts are larger than the file. Copy or download it again')
    root = pickles[0].removesuffix('data.pkl')
    if f'{root}byteorder' in names and archive.read(f'{root}byteorder') != b'little':
      raise _Unreadable(f'has its numbers in big-endian order. {_convert(path)}')
    loaded = _load(io.BytesIO(archive.read(pickles[0])))

    def numbers(key: str) -> bytes:
      if f'{root}data/{key}' not in names:
        raise _Unreadable(f'is incomplete: its storage {key} is missing. Copy or download it again')
      return archive.read(f'{root}data/{key}')

    return _state_dict(loaded, numbers, path.stat().st_size)


def _read_legacy(path: pathlib.Path, stream: BinaryIO) -> StateDict:
  """Before torch 1.6: five pickles (magic number, protocol, system, object, keys of storages), then each storage with
  its length.
  """
  stream.seek(0)
  try:
    known = _load(stream).content == _LEGACY_MAGIC
  except (EOFError, _Unreadable):
    raise
  except Exception:  # no pickle at all
    known = False
  if not known:
    raise _Unreadable('is not what torch.save writes but another pickle, which could run code; load it with the '
                      'program '
                      'that wrote it, and save its tensors with torch.save or as safetensors')
  if (protocol := _load(stream).content) != _LEGACY_PROTOCOL:
    raise _Unreadable(f'has protocol {reprlib.repr(protocol)} of torch.save; known: {_LEGACY_PROTOCOL}. '
                      f'{_convert(path)}')
  if not _load(stream).content.get('little_endian'):
    raise _Unreadable(f'has its numbers in big-endian order. {_convert(path)}')
  loaded = _load(stream)
  places, end = {}, path.stat().st_size
  for key in _load(stream).content:
    length = int.from_bytes(_exactly(stream, 8), 'little', signed=True)
    dtype, size = loaded.storages.get(key, (None, None))
    if dtype is None or length != size:
      raise _Unreadable(f'is damaged: storage {_text(key)} has {length} numbers where {size} are expected. Copy or '
                        'download it again')
    places[key] = (stream.tell(), length * dtype.itemsize)
    if sum(places[key]) > end:
      raise _Unreadable(_INCOMPLETE)
    stream.seek(sum(places[key]))

  def numbers(key: str) -> bytes:
    if key not in places:
      raise _Unreadable(f'is incomplete: its storage {key} is missing. Copy or download it again')
    stream.seek(places[key][0])
    return _exactly(stream, places[key][1])

  return _state_dict(loaded, numbers, end)


def _exactly(stream: BinaryIO, size: int) -> bytes:
  data = stream.read(size)
  if len(data) != size:
    raise EOFError
  return data


def _convert(path: pathlib.Path) -> str:
  # Quoted, as somebody will paste it: a file may be called anything.
  return ('If it is a file of torch that you trust, convert it where torch is installed: python -c "import torch; from '
          'sys import argv; '
          'torch.save(torch.load(argv[1], map_location=\'cpu\', weights_only=False), argv[2])" '
          f'{shlex.quote(str(path))} {shlex.quote(f"{path}.new.pth")}')


def _state_dict(loaded: '_Unpickled', numbers: Callable[[str], bytes], file_size: int) -> StateDict:
  """The tensors of what was unpickled; `numbers` gives the bytes of a storage."""
  if not isinstance(loaded.content, dict):
    kind = type(loaded.content).__name__.lstrip('_')
    raise _Unreadable(f'holds a {kind}; expected a state dict, as model.state_dict() gives it')
  path, copies = _choose(loaded.content)
  # dict's own methods: the object may carry attributes of the file's choice.
  entries, beside = dict(dict.items(loaded.content)), []
  for depth, key in enumerate(path):
    beside += [_joined((*path[:depth], name)) for name in entries if name != key]
    entries = dict(dict.items(entries[key]))
  found = {name: value for name, value in entries.items() if isinstance(value, _Tensor)}
  other = {_text(name): value for name, value in entries.items() if not isinstance(value, _Tensor)}
  if loaded.not_made and (not found or any(isinstance(value, _NotMade) for value in other.values())):
    raise _Unreadable(_refusal(_first(loaded.not_made)))
  if other:
    kinds = [f'{name} ({type(value).__name__})' for name, value in other.items()]
    raise _Unreadable(f'holds no state dict: not a tensor: {_first(kinds)}')
  notes = [f'objects that were not created: {_first(loaded.not_made)}'] if loaded.not_made else []
  if copies:
    notes.append(f'{_joined(path)} is read and not {_first([_joined(copy) for copy in copies])}; to read another one '
                 f'{_save_alone(copies[0])}')
  return StateDict(_arrays(found, numbers, file_size), tuple(beside), tuple(notes))


def _choose(content: dict[Any, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
  """The keys that lead to the state dict that is read, and those of other copies; `_STATE_KEYS` decides.

  Raises:
    _Unreadable: of several state dicts none has a known name.
  """
  rank = lambda path: [_STATE_KEYS.index(key) if key in _STATE_KEYS else len(_STATE_KEYS) for key in path]
  sizes = dict(_state_dicts(content, (), set()))
  first, *others = sorted(sizes, key=rank) or [()]
  if not sizes:  # to say what is there in place of tensors
    return next(((key,) for key in _STATE_KEYS if isinstance(dict.get(content, key), dict)), ()), []
  if others and len(_STATE_KEYS) in rank(first):
    raise _Unreadable(f'holds {len(sizes)} state dicts, {_first([_joined(path) for path in sizes])}, and no rule says '
                      'which '
                      f'one is meant; to read one of them {_save_alone(first)}')
  return first, [path for path in others if 2 * sizes[path] >= sizes[first]]  # a head is no copy


def _state_dicts(
    content: dict[Any, Any], path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], int]]:
  """The keys that lead to each dict with a tensor called ...weight, and how many entries that dict has.

  Each dict is looked at once: they may hold each other.
  """
  seen.add(id(content))
  if any(isinstance(value, _Tensor) and isinstance(key, str) and key.endswith('weight')
         for key, value in dict.items(content)):
    yield path, len(content)
    return
  for key, value in dict.items(content) if len(path) < _DEEPEST else ():
    if isinstance(key, str) and isinstance(value, dict) and id(value) not in seen:
      yield from _state_dicts(value, (*path, key), seen)


def _save_alone(path: Sequence[str]) -> str:
  """What to do to read another state dict of a file."""
  keys = ''.join(f'[{key[:60]!r}]' for key in path)
  return f'save it alone, if you trust the file: torch.save(torch.load(FILE, weights_only=False){keys}, NEW_FILE)'


def _joined(path: Iterable[Any]) -> str:
  """Keys that lead to something, for messages."""
  return '.'.join(map(_text, path))


def _first(names: Sequence[str], most: int = 4) -> str:
  """The first few names, and how many more there are."""
  return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def _refusal(names: str) -> str:
  return (f'is not read: it asks for {names}, which does not belong in a state dict. Such a file could run code; save '
          'model.state_dict() alone')


def _arrays(of: Mapping[Any, '_Tensor'], numbers: Callable[[str], bytes], file_size: int) -> dict[str, np.ndarray]:
  """The numbers of tensors."""
  read: dict[str, bytes] = {}
  tensors, total = {}, 0
  for name, tensor in of.items():
    storage = tensor.storage
    if storage.key not in read:
      read[storage.key] = numbers(storage.key)
    if len(read[storage.key]) != storage.whole * storage.dtype.itemsize:
      raise _Unreadable(f'is damaged: {name} has {len(read[storage.key])} bytes where '
                        f'{storage.whole * storage.dtype.itemsize} are '
                        'expected. Copy or download it again')
    if not isinstance(name, str):
      raise _Unreadable(f'is damaged: a tensor is called {reprlib.repr(name)}')
    tensors[name] = _array(name, tensor, np.frombuffer(read[storage.key], storage.dtype))
    # Tensors may share a storage; but a thousand views of one would be copied one by one where they are converted.
    total += tensors[name].nbytes
    if total > _MOST_SHARED * file_size:
      raise _Unreadable(f'is not read: its tensors have more than {_MOST_SHARED} times the numbers of the file')
  return tensors


def _text(key: Any) -> str:
  """A name in the file for messages, in one line: what is not text may be nested without end."""
  return key if isinstance(key, str) and key.isprintable() and len(key) <= 200 else reprlib.repr(key)


def _array(name: str, tensor: '_Tensor', numbers: np.ndarray) -> np.ndarray:
  """A tensor as a view of its storage; nothing that it says of itself is believed."""
  storage, offset, shape, stride = tensor
  own = numbers[storage.start:storage.start + storage.size]
  sizes = [offset, *shape, *stride]
  if len(shape) != len(stride) or any(not isinstance(n, int) or n < 0 for n in sizes) or len(own) != storage.size:
    raise _Unreadable(f'is damaged: {name} has offset {reprlib.repr(offset)}, shape {reprlib.repr(shape)}, '
                      f'strides {reprlib.repr(stride)}')
  if not math.prod(shape):
    return np.zeros(shape, storage.dtype)
  # The second condition keeps a few bytes from being spread over terabytes.
  if offset + sum((n - 1) * s for n, s in zip(shape, stride)) >= len(own) or math.prod(shape) > len(own):
    raise _Unreadable(f'is damaged: {name} reaches beyond its storage')
  strides = [s * storage.dtype.itemsize for s in stride]
  return np.lib.stride_tricks.as_strided(own[offset:], shape, strides, writeable=False)


class _Storage(NamedTuple):
  """Where numbers are: `size` of them from `start` on, in a storage of `whole`."""
  key: str
  dtype: np.dtype
  start: int
  size: int
  whole: int


class _Tensor(NamedTuple):
  """A tensor whose numbers are not read yet; offset and strides in numbers."""
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  stride: tuple[int, ...]


class _Unpickled(NamedTuple):
  """What a pickle holds, its storages (type and size by key), and the names of classes whose objects were not created.
  """
  content: Any
  storages: dict[str, tuple[np.dtype, int]]
  not_made: list[str]


def _load(stream: BinaryIO) -> _Unpickled:
  """Unpickles what comes next in a stream."""
  begin = stream.tell()
  _check_size(stream)
  stream.seek(begin)
  unpickler = _Unpickler(stream)
  return _Unpickled(unpickler.load(), unpickler.storages, list(unpickler.not_made))


def _check_size(stream: BinaryIO) -> None:
  """Raises _Unreadable for a pickle that would take memory or time out of all proportion; it is read through, and
  nothing is made.

  A few bytes name a place of the memo far away, and all the places before it are made; or they put a tuple twice into a
  tuple, and that again, sixty times, whose hash or text takes for ever.
  """
  # Of each object on the stack and in the memo, how many there are in it, counted as often as they are in it. Lists and
  # dicts may grow later; they have no hash, and nothing that a pickle may call makes a tuple of what is in them.
  stack: list[int | None] = []  # None is a mark
  memo: dict[Any, int] = {}  # by the argument of the opcode that put it there
  for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
    inside, taken = 1, opcode.stack_before
    if pickletools.markobject in taken:
      while stack and (top := stack.pop()) is not None:
        inside += top
      taken = taken[:taken.index(pickletools.markobject)]
    for _ in range(min(len(taken), len(stack))):
      inside += stack.pop() or 0
    if opcode.name in ('GET', 'BINGET', 'LONG_BINGET'):
      inside = memo.get(argument, 1)
    stack += [None if kind is pickletools.markobject else inside for kind in opcode.stack_after]
    place = 0
    if opcode.name in ('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
      place = len(memo) if argument is None else argument
      memo[place] = stack[-1] or 0 if stack else 0
    if place > count or max(inside, count) > _MOST_OBJECTS:
      raise _Unreadable('is not read: its pickle would take far more memory or time than a state dict')


class _NotMade(dict):
  """An inert placeholder for an object that no state dict has, such as a training script's settings.

  Whatever a pickle does to it runs nothing and is dropped, except for the entries of dict-like objects, which may hold
  tensors. It is compared and hashed by identity, and its repr is short, however deep it is nested.
  """
  __slots__ = ()
  __eq__, __ne__ = object.__eq__, object.__ne__
  __hash__ = object.__hash__  # type: ignore[assignment]  # dict declares it as None

  def __new__(cls, *_: Any, **__: Any) -> '_NotMade':
    return super().__new__(cls)

  def __init__(self, *_: Any, **__: Any):
    super().__init__()

  def __setstate__(self, *_: Any) -> None:
    pass

  append = extend = add = __setstate__

  def __repr__(self) -> str:
    return 'an object'


class _Unpickler(pickle.Unpickler):
  """Knows what a state dict is made of, and imports and calls nothing else, so that a pickle can run no code.

  Other objects become placeholders (`_NotMade`); a file that asks for what only an attack would is refused.
  """

  def __init__(self, stream: BinaryIO):
    super().__init__(stream)
    self.storages: dict[str, tuple[np.dtype, int]] = {}
    self.not_made: dict[str, None] = {}

  def find_class(self, module: str, name: str) -> Any:
    if module in ('torch', 'torch.storage') and name in _STORAGE_DTYPES:
      return name  # and not the dtype: a pickle may write to what it is given
    if (module, name) not in _ALLOWED:
      if module.partition('.')[0] in _HOSTILE or module in ('builtins', '__builtin__') and name in _HOSTILE_BUILTINS:
        raise _Unreadable(_refusal(_text(f'{module}.{name}')))
      self.not_made[_text(f'{module}.{name}')] = None
      return _NotMade
    found = _ALLOWED[module, name]
    # The types are immutable; of the functions it gets one of its own.
    return found if isinstance(found, type) else lambda *args: found(*args)

  def persistent_load(self, pid: Any) -> _Storage | _NotMade:
    kind, name, key, _, size, *view = pid
    if kind == 'storage' and name is _NotMade:  # of numbers of another type, such as complex ones
      return _NotMade()
    is_sized = isinstance(size, int) and size >= 0
    if kind != 'storage' or name not in _STORAGE_DTYPES or not isinstance(key, str) or not is_sized:
      raise _Unreadable(f'is damaged: it describes a storage as {reprlib.repr(pid)}')
    dtype = np.dtype(_STORAGE_DTYPES[name])
    if self.storages.setdefault(key, (dtype, size)) != (dtype, size):
      raise _Unreadable(f'is damaged: it describes storage {key} in two ways')
    start, length = (view[0][1], view[0][2]) if view and view[0] is not None else (0, size)
    if not isinstance(start, int) or not isinstance(length, int) or not 0 <= start <= start + length <= size:
      raise _Unreadable(f'is damaged: it describes a part of storage {key} as {reprlib.repr(view[0])}')
    return _Storage(key, dtype, start, length, size)


def _rebuild_tensor(storage: _Storage | _NotMade, offset: int, shape: tuple[int, ...], stride: tuple[int, ...],
                    *_: Any) -> _Tensor | _NotMade:
  """`torch._utils._rebuild_tensor_v2`; what follows is about gradients."""
  if isinstance(storage, _NotMade):
    return storage
  if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
    raise _Unreadable(f'is damaged: it describes a tensor as {reprlib.repr((storage, offset, shape, stride))}')
  return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _size(numbers: tuple[int, ...] = ()) -> tuple[int, ...]:
  """`torch.Size`."""
  if not isinstance(numbers, (tuple, list)) or not all(isinstance(n, int) for n in numbers):
    raise _Unreadable(f'is damaged: it describes a size as {reprlib.repr(numbers)}')
  return tuple(numbers)


def _rebuild_parameter(data: _Tensor, *_: Any) -> _Tensor:
  return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ('collections', 'OrderedDict'): collections.OrderedDict,
    ('torch', 'Size'): _size,
    ('torch._utils', '_rebuild_tensor'): _rebuild_tensor,
    ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
    ('torch._utils', '_rebuild_parameter'): _rebuild_parameter,
}

# Modules that run programs, open files or import: no training script saves them. (A placeholder would be harmless, but
# the file is an attack.)
_HOSTILE = frozenset((
    'os', 'posix', 'nt', 'ntpath', 'posixpath', 'sys', 'subprocess', 'commands', 'shutil', 'socket', 'importlib', 'imp',
    'pip', 'runpy', 'ctypes', 'pty', 'webbrowser', 'code', 'codeop', 'pickle', '_pickle', 'marshal', 'dill',
    'cloudpickle', 'joblib', 'pdb', 'bdb', 'timeit', 'cProfile', 'profile', 'doctest', 'io', '_io'))
# Likewise of the builtins; `getattr` is not among them, as some versions of Python save members of an Enum by it.
_HOSTILE_BUILTINS = frozenset((
    '__import__', 'breakpoint', 'compile', 'delattr', 'eval', 'exec', 'execfile', 'file', 'globals', 'input', 'locals',
    'open', 'reload', 'setattr', 'vars'))

_STORAGE_DTYPES: dict[str, Any] = {
    'FloatStorage': np.float32, 'HalfStorage': np.float16, 'BFloat16Storage': jnp.bfloat16, 'DoubleStorage': np.float64,
    'LongStorage': np.int64, 'IntStorage': np.int32, 'ShortStorage': np.int16, 'CharStorage': np.int8,
    'ByteStorage': np.uint8, 'BoolStorage': np.bool_,
}

_SAFETENSORS_DTYPES: dict[str, Any] = {
    'F32': np.float32, 'F16': np.float16, 'BF16': jnp.bfloat16, 'F64': np.float64, 'I64': np.int64, 'I32': np.int32,
    'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_,
}
