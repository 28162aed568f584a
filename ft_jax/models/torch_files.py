"""State dicts in files of torch, and safetensors, to numpy arrays; without torch, and without running what a file says."""

import collections
from collections.abc import Callable
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

# How torch.save begins a file of before torch 1.6, and the only protocol of such files that there was.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950a86a20f9469cfc6c, 1001
_ZIP_MAGIC = b'PK\x03\x04'
# A ResNet-101 with the state of its optimizer has about 50,000.
_MOST_OBJECTS = 2_000_000
# How often the numbers of a file may be in its tensors.
_MOST_SHARED = 8
# Where a training script keeps its model's state dict.
_STATE_KEYS = ('state_dict', 'model')


class StateDict(NamedTuple):
  """The tensors of a model by name, and the names of what the file holds beside them (epoch, optimizer, ...)."""
  tensors: dict[str, np.ndarray]
  beside: tuple[str, ...]


def read(path: str | os.PathLike[str]) -> StateDict:
  """Reads `.safetensors`, a zip file of torch 1.6 or newer, or the format before that.

  Raises:
    ValueError: no such file, one that is incomplete or damaged, one that asks for anything but tensors, or one that holds no
      state dict; says which.
  """
  path = pathlib.Path(os.path.expanduser(path))
  if not path.is_file():
    raise ValueError(f'model.weights: there is no file {path}')
  if path.suffix == '.safetensors':
    return StateDict(_read_safetensors(path), ())
  try:
    with path.open('rb') as stream:
      begin = stream.read(4)
      return _read_zip(path) if begin == _ZIP_MAGIC else _read_legacy(path, stream)
  except _Unreadable as error:
    raise ValueError(f'{path} {error}') from error
  except EOFError as error:
    raise ValueError(f'{path} {_INCOMPLETE}') from error
  except Exception as error:  # whatever a damaged zip file or pickle makes the libraries raise
    reason = f'{type(error).__name__}: {error}'
    raise ValueError(f'{path} {_INCOMPLETE if "truncated" in reason else f"cannot be read as a state dict ({reason})"}') from error


class _Unreadable(Exception):
  """What is wrong with a file, as the rest of a sentence that begins with its name."""


_INCOMPLETE = 'is incomplete: it ends too early. Copy or download it again'


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  import safetensors

  try:
    found = safetensors.deserialize(path.read_bytes())
  except safetensors.SafetensorError as error:
    raise ValueError(f'{path} is no whole safetensors file ({error}); copy or download it again') from error
  other = sorted({tensor['dtype'] for _, tensor in found} - set(_SAFETENSORS_DTYPES))
  if other:
    raise ValueError(f'{path} holds tensors of type {", ".join(other)}; known: {", ".join(_SAFETENSORS_DTYPES)}')
  try:
    return {name: np.frombuffer(tensor['data'], _SAFETENSORS_DTYPES[tensor['dtype']]).reshape(tensor['shape'])
            for name, tensor in sorted(found, key=lambda item: item[0])}
  except ValueError as error:  # of no numbers at all, in a shape that cannot be
    raise ValueError(f'{path} has a tensor of a shape that cannot be ({error}); copy or download it again') from error


def _read_zip(path: pathlib.Path) -> StateDict:
  """torch 1.6 and newer: `<name>/data.pkl`, and the numbers of each storage in `<name>/data/<key>`, not compressed."""
  if not zipfile.is_zipfile(path):
    raise _Unreadable(_INCOMPLETE)  # the table of contents is at the end
  with zipfile.ZipFile(path) as archive:
    names = set(archive.namelist())
    pickles = [name for name in names if name.endswith('/data.pkl')]
    if len(pickles) != 1:
      raise _Unreadable('is a zip file without one data.pkl; expected what torch.save writes')
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
      raise _Unreadable('is a compressed zip file, which torch.save does not write')
    # Parts that lie on each other: a small file could hold any number of gigabytes.
    if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
      raise _Unreadable('is damaged: its parts are larger than the file. Copy or download it again')
    root = pickles[0].removesuffix('data.pkl')
    if f'{root}byteorder' in names and archive.read(f'{root}byteorder') != b'little':
      raise _Unreadable(f'has its numbers in big-endian order. {_convert(path)}')
    content = _load(io.BytesIO(archive.read(pickles[0]))).content

    def numbers(key: str) -> bytes:
      if f'{root}data/{key}' not in names:
        raise _Unreadable(f'is incomplete: its storage {key} is missing. Copy or download it again')
      return archive.read(f'{root}data/{key}')

    return _state_dict(content, numbers, path.stat().st_size)


def _read_legacy(path: pathlib.Path, stream: BinaryIO) -> StateDict:
  """Before torch 1.6: five pickles (magic number, protocol, system, object, keys of storages), then each storage with its length."""
  stream.seek(0)
  try:
    known = _load(stream).content == _LEGACY_MAGIC
  except (EOFError, _Unreadable):
    raise
  except Exception:  # no pickle at all
    known = False
  if not known:
    raise _Unreadable(f'is not what torch.save writes (the tar files of before torch 0.1.10 are not read). {_convert(path)}')
  if (protocol := _load(stream).content) != _LEGACY_PROTOCOL:
    raise _Unreadable(f'has protocol {reprlib.repr(protocol)} of torch.save; known: {_LEGACY_PROTOCOL}. {_convert(path)}')
  if not _load(stream).content.get('little_endian'):
    raise _Unreadable(f'has its numbers in big-endian order. {_convert(path)}')
  content, storages = _load(stream)
  places, end = {}, path.stat().st_size
  for key in _load(stream).content:
    length = int.from_bytes(_exactly(stream, 8), 'little', signed=True)
    dtype, size = storages.get(key, (None, None))
    if length != size:
      raise _Unreadable(f'is damaged: storage {_text(key)} has {length} numbers where {size} are expected. Copy or download it again')
    places[key] = (stream.tell(), length * dtype.itemsize)
    if sum(places[key]) > end:
      raise _Unreadable(_INCOMPLETE)
    stream.seek(sum(places[key]))

  def numbers(key: str) -> bytes:
    if key not in places:
      raise _Unreadable(f'is incomplete: its storage {key} is missing. Copy or download it again')
    stream.seek(places[key][0])
    return _exactly(stream, places[key][1])

  return _state_dict(content, numbers, end)


def _exactly(stream: BinaryIO, size: int) -> bytes:
  data = stream.read(size)
  if len(data) != size:
    raise EOFError
  return data


def _convert(path: pathlib.Path) -> str:
  # Quoted, as somebody will paste it: a file may be called anything.
  return ('If it is a file of torch that you trust, convert it where torch is installed: python -c "import torch; from sys import argv; '
          'torch.save(torch.load(argv[1], map_location=\'cpu\', weights_only=False), argv[2])" '
          f'{shlex.quote(str(path))} {shlex.quote(f"{path}.new.pth")}')


def _state_dict(content: Any, numbers: Callable[[str], bytes], file_size: int) -> StateDict:
  """The tensors of what was unpickled; `numbers` gives the bytes of a storage."""
  if not isinstance(content, dict):
    raise _Unreadable(f'holds a {type(content).__name__.lstrip("_")}; expected a state dict, as model.state_dict() gives it')
  # dict's own methods: the object may carry attributes of the file's choice.
  entries, beside = dict(dict.items(content)), ()
  key = next((key for key in _STATE_KEYS if isinstance(entries.get(key), dict)), None)
  if key is not None:
    beside = tuple(_text(name) for name in entries if name != key)
    entries = dict(dict.items(entries[key]))
  other = [f'{_text(name)} ({type(value).__name__})' for name, value in entries.items() if not isinstance(value, _Tensor)]
  if other:
    raise _Unreadable(f'holds no state dict: not a tensor: {", ".join(other[:4])}{f" and {len(other) - 4} more" if len(other) > 4 else ""}')
  read: dict[str, bytes] = {}
  tensors, total = {}, 0
  for name, tensor in entries.items():
    storage = tensor.storage
    if storage.key not in read:
      read[storage.key] = numbers(storage.key)
    if len(read[storage.key]) != storage.whole * storage.dtype.itemsize:
      raise _Unreadable(f'is damaged: {name} has {len(read[storage.key])} bytes where {storage.whole * storage.dtype.itemsize} are '
                        'expected. Copy or download it again')
    if not isinstance(name, str):
      raise _Unreadable(f'is damaged: a tensor is called {reprlib.repr(name)}')
    tensors[name] = _array(name, tensor, np.frombuffer(read[storage.key], storage.dtype))
    # Tensors may share a storage; but a thousand views of one would be copied one by one where they are converted.
    total += tensors[name].nbytes
    if total > _MOST_SHARED * file_size:
      raise _Unreadable(f'is not read: its tensors have more than {_MOST_SHARED} times the numbers of the file')
  return StateDict(tensors, beside)


def _text(key: Any) -> str:
  """A key of the file for messages: what is no text may be nested without end."""
  return key if isinstance(key, str) else reprlib.repr(key)


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
  return np.lib.stride_tricks.as_strided(own[offset:], shape, [s * storage.dtype.itemsize for s in stride], writeable=False)


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


class _Loaded(NamedTuple):
  """What a pickle holds, and the storages that it speaks of: type and size by key."""
  content: Any
  storages: dict[str, tuple[np.dtype, int]]


def _load(stream: BinaryIO) -> _Loaded:
  """Unpickles what comes next in a stream."""
  begin = stream.tell()
  _check_size(stream)
  stream.seek(begin)
  unpickler = _Unpickler(stream)
  return _Loaded(unpickler.load(), unpickler.storages)


def _check_size(stream: BinaryIO) -> None:
  """Raises _Unreadable for a pickle that would take memory or time out of all proportion; it is read through, and nothing is made.

  A few bytes name a place of the memo far away, and all the places before it are made; or they put a tuple twice into a tuple, and that
  again, sixty times, whose hash or text takes for ever.
  """
  # Of each object on the stack and in the memo, how many there are in it, counted as often as they are in it. Lists and dicts may grow
  # later; they have no hash, and nothing that a pickle may call makes a tuple of what is in them.
  stack: list[int | None] = []  # None is a mark
  memo: dict[int, int] = {}
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


class _Unpickler(pickle.Unpickler):
  """Knows what a state dict is made of and refuses every other class, so that a pickle can run no code."""

  def __init__(self, stream: BinaryIO):
    super().__init__(stream)
    self.storages: dict[str, tuple[np.dtype, int]] = {}

  def find_class(self, module: str, name: str) -> Any:
    if module in ('torch', 'torch.storage') and name in _STORAGE_DTYPES:
      return name  # and not the dtype: a pickle may write to what it is given
    if (module, name) not in _ALLOWED:
      raise _Unreadable(f'is not read: it asks for {module}.{name}, which is no part of a state dict. Such a file could run code; save '
                        'model.state_dict() alone')
    found = _ALLOWED[module, name]
    # The types are immutable; of the functions it gets one of its own.
    return found if isinstance(found, type) else lambda *args: found(*args)

  def persistent_load(self, pid: Any) -> _Storage:
    kind, name, key, _, size, *view = pid
    if kind != 'storage' or name not in _STORAGE_DTYPES or not isinstance(key, str) or not isinstance(size, int) or size < 0:
      raise _Unreadable(f'is damaged: it describes a storage as {reprlib.repr(pid)}')
    dtype = np.dtype(_STORAGE_DTYPES[name])
    if self.storages.setdefault(key, (dtype, size)) != (dtype, size):
      raise _Unreadable(f'is damaged: it describes storage {key} in two ways')
    start, length = (view[0][1], view[0][2]) if view and view[0] is not None else (0, size)
    if not isinstance(start, int) or not isinstance(length, int) or not 0 <= start <= start + length <= size:
      raise _Unreadable(f'is damaged: it describes a part of storage {key} as {reprlib.repr(view[0])}')
    return _Storage(key, dtype, start, length, size)


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> _Tensor:
  """`torch._utils._rebuild_tensor_v2`; what follows is about gradients."""
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

_STORAGE_DTYPES: dict[str, Any] = {
    'FloatStorage': np.float32, 'HalfStorage': np.float16, 'BFloat16Storage': jnp.bfloat16, 'DoubleStorage': np.float64,
    'LongStorage': np.int64, 'IntStorage': np.int32, 'ShortStorage': np.int16, 'CharStorage': np.int8, 'ByteStorage': np.uint8,
    'BoolStorage': np.bool_,
}

_SAFETENSORS_DTYPES: dict[str, Any] = {
    'F32': np.float32, 'F16': np.float16, 'BF16': jnp.bfloat16, 'F64': np.float64, 'I64': np.int64, 'I32': np.int32, 'I16': np.int16,
    'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_,
}
