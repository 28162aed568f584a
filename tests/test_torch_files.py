"""Files of torch are read without torch, whole or not at all, and can run nothing."""

import collections
import io
import os
import pathlib
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from ft_jax.models import torch_files

DATA = pathlib.Path(__file__).parent / 'data'
BASE = np.arange(24, dtype=np.float32)


@pytest.mark.parametrize('name', ['kinds.pth', 'kinds_legacy.pth'])
def test_every_kind_of_tensor_in_both_formats(name):
  """Written by torch (tests/data/make_torch_files.py)."""
  tensors, beside = torch_files.read(DATA / name)
  expected = {
      'float32': BASE.reshape(4, 6), 'part': BASE.reshape(4, 6)[1:3, ::2], 'transposed': BASE.reshape(4, 6).T,
      'float16': np.arange(5, dtype=np.float16), 'bfloat16': np.arange(5), 'float64': np.arange(5.0), 'int64': np.int64(7),
      'int32': np.arange(3, dtype=np.int32), 'int16': np.arange(3, dtype=np.int16), 'int8': np.arange(3, dtype=np.int8),
      'uint8': np.arange(3, dtype=np.uint8), 'bool': np.array([True, False]), 'parameter': BASE[:3], 'empty': np.zeros((0, 3), np.float32)}
  assert beside == () and list(tensors) == list(expected)
  for key, value in expected.items():
    assert tensors[key].dtype == ('bfloat16' if key == 'bfloat16' else value.dtype)
    np.testing.assert_array_equal(tensors[key].astype(value.dtype), value, err_msg=key)


@pytest.mark.parametrize('name', ['kinds.pth', 'kinds_legacy.pth', 'resnet50.safetensors'])
def test_a_file_cut_short_is_an_error_that_names_it(name, tmp_path):
  data = (DATA / name).read_bytes()
  path = tmp_path / name
  for length in [*range(0, len(data), max(len(data) // 200, 1)), len(data) - 1]:
    path.write_bytes(data[:length])
    with pytest.raises(ValueError, match=name):
      torch_files.read(path)
  with pytest.raises(ValueError, match=f'{name} is (incomplete|no whole safetensors file).* again'):
    torch_files.read(path)  # one byte short


@pytest.mark.parametrize('name', ['kinds.pth', 'kinds_legacy.pth'])
def test_damage_never_gets_past_the_reader(name, tmp_path):
  """Bytes changed at random: read, or an error that names the file; no other exception, and no array of another size."""
  data, rng = (DATA / name).read_bytes(), np.random.default_rng(0)
  path, refused = tmp_path / name, 0
  for _ in range(400):
    damaged = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 4)):
      damaged[place] = rng.integers(256)
    path.write_bytes(damaged)
    try:
      assert all(value.size <= 24 for value in torch_files.read(path).tensors.values())
    except ValueError as error:
      assert name in str(error)
      refused += 1
  assert refused > 100


def text(value: str) -> bytes:
  return b'X' + len(value).to_bytes(4, 'little') + value.encode()


def number(value: int) -> bytes:
  return b'\x8a\x08' + value.to_bytes(8, 'little', signed=True)


def legacy(path, *, size=6, stored=6, view=b'N', offset=0, shape=(3,), stride=(1,),
           call=b'ctorch._utils\n_rebuild_tensor_v2\n') -> pathlib.Path:
  """A file of the format before torch 1.6 with one float32 tensor `a`, put together by hand; storage numbers count from zero."""
  pickled = lambda value: pickle.dumps(value, protocol=2)
  numbers = lambda values: b'(' + b''.join(map(number, values)) + b't'
  storage = b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text('root') + text('cpu') + number(size) + view + b'tQ'
  tensor = call + b'(' + storage + number(offset) + numbers(shape) + numbers(stride) + b'\x89ccollections\nOrderedDict\n)RtR'
  content = b'\x80\x02ccollections\nOrderedDict\n)R(' + text('a') + tensor + b'u.'
  path.write_bytes(pickled(0x1950a86a20f9469cfc6c) + pickled(1001) + pickled({'little_endian': True}) + content + pickled(['root'])
                   + stored.to_bytes(8, 'little') + np.arange(size, dtype=np.float32).tobytes())
  return path


def test_a_view_of_another_storage(tmp_path):
  """Torch of before 0.4 kept parts of a storage as (key, first, length)."""
  view = b'(' + text('part') + number(2) + number(4) + b't'
  tensors = torch_files.read(legacy(tmp_path / 'a.pth', view=view, offset=1)).tensors
  np.testing.assert_array_equal(tensors['a'], [3, 4, 5])


@pytest.mark.parametrize('wrong,words', [
    ({'offset': 4}, 'a reaches beyond its storage'), ({'shape': (7,)}, 'a reaches beyond its storage'),
    ({'shape': (2, 2), 'stride': (5, 1)}, 'a reaches beyond its storage'), ({'offset': -1}, 'offset -1'), ({'stride': (-1,)}, 'strides'),
    ({'shape': (10**6, 10**6), 'stride': (0, 0)}, 'a reaches beyond its storage'), ({'shape': (3, 1)}, 'shape'),
    ({'stored': 5}, 'storage root has 5 numbers where 6 are expected'), ({'size': -1, 'stored': 2**63 - 1}, 'describes a storage'),
    ({'view': b'(' + text('part') + number(4) + number(4) + b't'}, 'a part of storage root')])
def test_what_a_tensor_says_of_itself_is_checked(tmp_path, wrong, words):
  size = wrong.pop('size', 6)
  path = legacy(tmp_path / 'a.pth', **wrong)
  path.write_bytes(path.read_bytes().replace(number(6) + b'NtQ', number(size) + b'NtQ'))
  with pytest.raises(ValueError, match=f'a.pth is damaged: .*{words}'):
    torch_files.read(path)


class Evil:

  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return os.system, (f'touch {self.mark}',)


@pytest.mark.parametrize('legacy_format', [False, True])
def test_a_pickle_cannot_run_code(tmp_path, legacy_format):
  """A file that asks for os.system when it is unpickled is refused by name, and nothing runs."""
  mark, path = tmp_path / 'ran', tmp_path / 'evil.pth'
  evil = {'conv1.weight': Evil(mark)}
  if legacy_format:
    path.write_bytes(b''.join(pickle.dumps(part) for part in (0x1950a86a20f9469cfc6c, 1001, {'little_endian': True}, evil, [])))
  else:
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('evil/data.pkl', pickle.dumps(evil))
  with pytest.raises(ValueError, match='evil.pth is not read: it asks for .*system, which is no part of a state dict'):
    torch_files.read(path)
  assert not mark.exists()
  pickle.loads(pickle.dumps(evil))
  assert mark.exists(), 'the file was harmless: the test shows nothing'


@pytest.mark.parametrize('call', [b'ctorch._utils\n__globals__\n', b'cbuiltins\ngetattr\n', b'ctorch\nload\n', b'ctorch.nn\nLinear\n'])
def test_other_names_are_refused(tmp_path, call):
  with pytest.raises(ValueError, match='which is no part of a state dict'):
    torch_files.read(legacy(tmp_path / 'a.pth', call=call))


def test_a_pickle_cannot_change_the_reader(tmp_path):
  """Attributes that a file writes to the functions that it is given stay with that file."""
  call = b'ctorch._utils\n_rebuild_tensor_v2\nN}(' + text('__defaults__') + b'(' + number(1) + b'tu\x86b'
  torch_files.read(legacy(tmp_path / 'a.pth', call=call))
  assert torch_files._rebuild_tensor.__defaults__ is None
  call = b'ccollections\nOrderedDict\nN}(' + text('items') + b'Nu\x86b0ctorch._utils\n_rebuild_tensor_v2\n'
  with pytest.raises(ValueError, match='immutable type'):
    torch_files.read(legacy(tmp_path / 'a.pth', call=call))
  assert callable(collections.OrderedDict.items)


def test_a_compressed_zip_is_refused(tmp_path):
  """A few kilobytes could hold gigabytes; torch.save does not compress."""
  path = tmp_path / 'bomb.pth'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('bomb/data.pkl', b'\x80\x02}.' + bytes(10**7))
  with pytest.raises(ValueError, match='bomb.pth is a compressed zip file'):
    torch_files.read(path)


def test_other_files(tmp_path):
  """What is no file of torch, or none that is known, says how to convert it."""
  files = {'text.pth': b'not a pickle', 'plain.pth': pickle.dumps({'a': 1}), 'picture.pth': b'\x89PNG\r\n\x1a\n' + bytes(100)}
  with tarfile.open(tmp_path / 'ancient.pth', 'w') as archive:
    for name in ('sys_info', 'pickle', 'tensors', 'storages'):
      archive.addfile(tarfile.TarInfo(name), io.BytesIO())
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  for name in ('ancient.pth', *files):
    with pytest.raises(ValueError, match=f'{name} is not what torch.save writes .* python -c "import torch; '):
      torch_files.read(tmp_path / name)
  with pytest.raises(ValueError, match='there is no file .*none.pth'):
    torch_files.read(tmp_path / 'none.pth')
  with zipfile.ZipFile(tmp_path / 'photos.pth', 'w') as archive:
    archive.writestr('photo.txt', 'hello')
  with pytest.raises(ValueError, match='photos.pth is a zip file without one data.pkl'):
    torch_files.read(tmp_path / 'photos.pth')
  for content, words in (([1, 2], 'holds a list; expected a state dict'), ({'state_dict': {'a': 1}}, r'not a tensor: a \(int\)')):
    with zipfile.ZipFile(tmp_path / 'other.pth', 'w') as archive:
      archive.writestr('other/data.pkl', pickle.dumps(content))
    with pytest.raises(ValueError, match=words):
      torch_files.read(tmp_path / 'other.pth')
