"""Files of torch are read without torch, whole or not at all, and can run nothing."""

import argparse
import bz2
import collections
import datetime
import decimal
import functools
import gzip
import http
import io
import lzma
import os
import pathlib
import pickle
import random
import sys
import tarfile
import types
import uuid
import zipfile

from ml_collections import ConfigDict
import numpy as np
import pytest

from ft_jax.models import torch_pickle

DATA = pathlib.Path(__file__).parents[1] / 'fixtures'
BASE = np.arange(24, dtype=np.float32)


@pytest.mark.parametrize('name', ['kinds.pth', 'kinds_legacy.pth'])
def test_every_kind_of_tensor_in_both_formats(name):
  """Written by torch (tests/fixtures/make_torch_files.py)."""
  tensors, beside, notes = torch_pickle.read(DATA / name)
  expected = {
      'float32': BASE.reshape(4, 6), 'part': BASE.reshape(4, 6)[1:3, ::2], 'transposed': BASE.reshape(4, 6).T,
      'float16': np.arange(5, dtype=np.float16), 'bfloat16': np.arange(5), 'float64': np.arange(5.0),
      'int64': np.int64(7),
      'int32': np.arange(3, dtype=np.int32), 'int16': np.arange(3, dtype=np.int16), 'int8': np.arange(3, dtype=np.int8),
      'uint8': np.arange(3, dtype=np.uint8), 'bool': np.array([True, False]), 'parameter': BASE[:3],
      'empty': np.zeros((0, 3), np.float32)}
  assert beside == notes == () and list(tensors) == list(expected)
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
      torch_pickle.read(path)
  with pytest.raises(ValueError, match=f'{name} is (incomplete|not a complete safetensors file).* again'):
    torch_pickle.read(path)  # one byte short


@pytest.mark.parametrize('name', ['kinds.pth', 'kinds_legacy.pth'])
def test_damage_never_gets_past_the_reader(name, tmp_path):
  """Bytes changed at random: read, or an error that names the file; no other exception, and no array of another
  size."""
  data, rng = (DATA / name).read_bytes(), np.random.default_rng(0)
  path, refused = tmp_path / name, 0
  for _ in range(400):
    damaged = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 4)):
      damaged[place] = rng.integers(256)
    path.write_bytes(damaged)
    try:
      assert all(value.size <= 24 for value in torch_pickle.read(path).tensors.values())
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
  """A file of the format before torch 1.6 with one float32 tensor `a`, put together by hand; storage numbers count from
  zero."""
  pickled = lambda value: pickle.dumps(value, protocol=2)
  numbers = lambda values: b'(' + b''.join(map(number, values)) + b't'
  storage = b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text('root') + text('cpu') + number(
      size) + view + b'tQ'
  tensor = call + b'(' + storage + number(offset) + numbers(shape) + numbers(
      stride) + b'\x89ccollections\nOrderedDict\n)RtR'
  content = b'\x80\x02ccollections\nOrderedDict\n)R(' + text('a') + tensor + b'u.'
  path.write_bytes(pickled(0x1950a86a20f9469cfc6c) + pickled(1001) + pickled({'little_endian': True}) + content +
                   pickled(['root'])
                   + stored.to_bytes(8, 'little') + np.arange(size, dtype=np.float32).tobytes())
  return path


def test_a_view_of_another_storage(tmp_path):
  """Torch of before 0.4 kept parts of a storage as (key, first, length)."""
  view = b'(' + text('part') + number(2) + number(4) + b't'
  tensors = torch_pickle.read(legacy(tmp_path / 'a.pth', view=view, offset=1)).tensors
  np.testing.assert_array_equal(tensors['a'], [3, 4, 5])


@pytest.mark.parametrize('wrong,words', [
    ({'offset': 4}, 'a reaches beyond its storage'), ({'shape': (7,)}, 'a reaches beyond its storage'),
    ({'shape': (2, 2), 'stride': (5, 1)}, 'a reaches beyond its storage'), ({'offset': -1}, 'offset -1'),
    ({'stride': (-1,)}, 'strides'),
    ({'shape': (10**6, 10**6), 'stride': (0, 0)}, 'a reaches beyond its storage'), ({'shape': (3, 1)}, 'shape'),
    ({'stored': 5}, 'storage root has 5 numbers where 6 are expected'),
    ({'size': -1, 'stored': 2**63 - 1}, 'describes a storage'),
    ({'view': b'(' + text('part') + number(4) + number(4) + b't'}, 'a part of storage root')])
def test_what_a_tensor_says_of_itself_is_checked(tmp_path, wrong, words):
  size = wrong.pop('size', 6)
  path = legacy(tmp_path / 'a.pth', **wrong)
  path.write_bytes(path.read_bytes().replace(number(6) + b'NtQ', number(size) + b'NtQ'))
  with pytest.raises(ValueError, match=f'a.pth is damaged: .*{words}'):
    torch_pickle.read(path)


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
    path.write_bytes(b''.join(pickle.dumps(part)
                              for part in (0x1950a86a20f9469cfc6c, 1001, {'little_endian': True}, evil, [])))
  else:
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('evil/data.pkl', pickle.dumps(evil))
  with pytest.raises(ValueError, match='evil.pth is not read: .*system, which does not belong in a state dict'):
    torch_pickle.read(path)
  assert not mark.exists()
  pickle.loads(pickle.dumps(evil))
  assert mark.exists(), 'the file was harmless: the test shows nothing'


@pytest.mark.parametrize('call', [b'ctorch._utils\n__globals__\n', b'cbuiltins\ngetattr\n', b'ctorch\nload\n',
                                  b'ctorch.nn\nLinear\n'])
def test_other_names_are_refused(tmp_path, call):
  with pytest.raises(ValueError, match='which does not belong in a state dict'):
    torch_pickle.read(legacy(tmp_path / 'a.pth', call=call))


def test_a_pickle_cannot_change_the_reader(tmp_path):
  """Attributes that a file writes to the functions that it is given stay with that file."""
  call = b'ctorch._utils\n_rebuild_tensor_v2\nN}(' + text('__defaults__') + b'(' + number(1) + b'tu\x86b'
  torch_pickle.read(legacy(tmp_path / 'a.pth', call=call))
  assert torch_pickle._rebuild_tensor.__defaults__ is None
  call = b'ccollections\nOrderedDict\nN}(' + text('items') + b'Nu\x86b0ctorch._utils\n_rebuild_tensor_v2\n'
  with pytest.raises(ValueError, match='immutable type'):
    torch_pickle.read(legacy(tmp_path / 'a.pth', call=call))
  assert callable(collections.OrderedDict.items)


def test_a_compressed_zip_is_refused(tmp_path):
  """A few kilobytes could hold gigabytes; torch.save does not compress."""
  path = tmp_path / 'bomb.pth'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('bomb/data.pkl', b'\x80\x02}.' + bytes(10**7))
  with pytest.raises(ValueError, match='bomb.pth is a compressed zip file'):
    torch_pickle.read(path)


def tar(*names: str) -> bytes:
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode='w') as archive:
    for name in names:
      archive.addfile(tarfile.TarInfo(name), io.BytesIO())
  return stream.getvalue()


def zipped(**members: bytes) -> bytes:
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w') as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return stream.getvalue()


def saved(content) -> bytes:
  """As torch.save writes it, of what holds no tensors."""
  return zipped(**{'archive/data.pkl': pickle.dumps(content, protocol=2)})


KINDS = {
    'empty': (b'', 'is empty; copy or download it again'),
    'zeros': (bytes(9000), 'begins with zeros alone.*download it again'),
    'lfs': (b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 46807446\n',
            'pointer of Git LFS.*`git lfs pull`'),
    'annex': (b'/annex/objects/SHA256E-s46807446--4d7a.pth\n', 'pointer of git-annex.*`git annex get`'),
    'page': (b'\xef\xbb\xbf\n <!DOCTYPE html>\n<html><head><title>Log\n in</title>',
             r"is a web page \('Log in'\).*download it again"),
    'bare page': (b'<html><body>no</body></html>', 'is a web page and not weights'),
    'storage': (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
                r"error message of a storage service \('AccessDenied'\)"),
    'answer': (b'Entry not found', "is text, 'Entry not found', and not weights; download it again"),
    'json': (b'{"architectures": ["ResNet"]}', 'is JSON and not weights; expected a safetensors file or'),
    'index': (b'{"metadata": {}, "weight_map": {}}', 'is the index of weights split over several files'),
    'gzip': (gzip.compress(b'x'), 'compressed with gzip; unpack it .gunzip'),
    'bzip2': (bz2.compress(b'x'), 'compressed with bzip2'),
    'xz': (lzma.compress(b'x'), 'compressed with xz'), 'zstd': (b'\x28\xb5\x2f\xfd\x00', 'compressed with zstd'),
    'hdf5': (b'\x89HDF\r\n\x1a\n' + bytes(90), 'is an HDF5 file .*Keras'), 'gguf': (b'GGUF\x03\0\0\0', 'GGUF'),
    'npy': (b'\x93NUMPY\x01\x00v\x00', 'is a NumPy array'), 'npz': (zipped(**{'conv1.npy': b''}), 'is a NumPy archive'),
    'onnx': (b'\x08\x07\x12\x07pytorch\x1a\x052.1.0', 'such as ONNX'),
    'saved_model': (b'\x08\x01\x12\xf8\x01', 'SavedModel of TensorFlow'),
    'flax': (b'\x82\xa6params\x81\xa5conv1', 'is a msgpack file, such as Flax writes'),
    'picture': (b'\x89PNG\r\n\x1a\n' + bytes(100), 'is a PNG image'),
    'other': (b'\xfe\xed\xfa\xce' * 9, 'as no known file of weights does'),
    'ancient torch': (tar('sys_info', 'pickle', 'tensors'), 'not what torch.save writes .* python -c "import torch; '),
    'tar': (tar('resnet18.pth', 'README'), 'is a tar archive; unpack it'),
    'zip of weights': (zipped(**{'README': b'', 'net/resnet18.pth': b''}),
                       "is a zip archive; unpack it .*'net/resnet18.pth'"),
    'photos': (zipped(**{'photo.txt': b'hello'}), r"is a zip file without one data.pkl \(it holds 'photo.txt'\)"),
    'keras': (zipped(**{'config.json': b'', 'model.weights.h5': b''}), 'is a Keras model'),
    'script': (zipped(**{'net/data.pkl': b'', 'net/constants.pkl': b''}),
               'is a TorchScript program .*save its state_dict'),
    'pickle': (pickle.dumps({'a': 1}), 'is not what torch.save writes but another pickle, which could run code'),
    'list': (saved([1, 2]), 'holds a list; expected a state dict'),
    'numbers': (saved({'state_dict': {'a': 1}}), r'not a tensor: a \(int\)'),
}


@pytest.mark.parametrize('kind', KINDS)
def test_other_files_are_named_by_their_bytes(kind, tmp_path):
  """What lies where weights are expected is told for what it is, with what to do, whatever it is called, in one
  line."""
  content, words = KINDS[kind]
  for name in ('a.pth', 'A.SAFETENSORS', 'a'):
    (tmp_path / name).write_bytes(content)
    if kind == 'other' and name == 'A.SAFETENSORS':
      words = 'is not a complete safetensors file'
    with pytest.raises(ValueError, match=f'{name} .*{words}') as error:
      torch_pickle.read(tmp_path / name)
    assert '\n' not in str(error.value)
    words = KINDS[kind][1]
  with pytest.raises(ValueError, match='there is no file .*none.pth'):
    torch_pickle.read(tmp_path / 'none.pth')


@pytest.mark.parametrize('name', ['kinds.pth', 'kinds_legacy.pth', 'resnet50.safetensors'])
@pytest.mark.parametrize('ending', ['.safetensors', '.SAFETENSORS', '.pth', '.ckpt', '.bin', ''])
def test_the_ending_decides_nothing(name, ending, tmp_path):
  (tmp_path / f'weights{ending}').write_bytes((DATA / name).read_bytes())
  assert list(torch_pickle.read(tmp_path / f'weights{ending}').tensors) == list(torch_pickle.read(DATA / name).tensors)


def tensor(size: int = 2) -> bytes:
  """The pickle of a float32 tensor of the storage '0'."""
  storage = b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu') + number(size) + b'tQ'
  return b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + b'K\x00' + number(size) + b'\x85K\x01\x85\x89}tR'


def table(**entries: bytes) -> bytes:
  """The pickle of a dict whose values are pickles."""
  return b'}(' + b''.join(text(key) + value for key, value in entries.items()) + b'u'


def torch_file(path: pathlib.Path, content: bytes) -> pathlib.Path:
  path.write_bytes(zipped(**{'archive/data.pkl': b'\x80\x02' + content + b'.',
                             'archive/data/0': np.arange(2, dtype=np.float32).tobytes()}))
  return path


NETWORK = table(weight=tensor())


@pytest.mark.parametrize('content,read,others', [
    (table(epoch=b'K\x01', model_state_dict=NETWORK, optimizer_state_dict=table(state=b'}')), 'model_state_dict', []),
    (table(state_dict_ema=NETWORK, state_dict=NETWORK), 'state_dict', ['state_dict_ema']),
    (table(student=NETWORK, teacher=NETWORK, dino_loss=table(center=tensor())), 'teacher', ['student']),
    (table(ema=table(decay=b'K\x01', module=NETWORK), epoch=tensor()), 'ema.module', []),
    (table(my_net=NETWORK, epoch=b'K\x01'), 'my_net', []),
    (table(model=table(state_dict=NETWORK)), 'model.state_dict', [])])
def test_state_dicts_of_training_checkpoints(tmp_path, content, read, others):
  """What a training script saves around its state dict; of several copies a known rule takes one and says which."""
  state = torch_pickle.read(torch_file(tmp_path / 'a.pth', content))
  np.testing.assert_array_equal(state.tensors['weight'], [0, 1])
  assert list(state.tensors) == ['weight']
  if others or state.notes:
    assert f'{read} is read and not {others[0]}; to read another one save it alone' in state.notes[0]
  assert all(name not in read.split('.') for name in state.beside)


def test_two_networks_without_a_known_name_are_not_guessed_between(tmp_path):
  with pytest.raises(ValueError, match=r"holds 2 state dicts, one, two, and no rule says .*\['one'\], NEW_FILE"):
    torch_pickle.read(torch_file(tmp_path / 'a.pth', table(one=NETWORK, two=NETWORK)))


def test_dicts_that_hold_each_other_end(tmp_path):
  content = b'}q\x01(' + text('a') + b'h\x01' + text('b') + NETWORK + b'u'
  assert list(torch_pickle.read(torch_file(tmp_path / 'a.pth', content)).tensors) == ['weight']


def objects() -> list:
  """What training scripts save beside their network, as far as it is at hand."""
  return [argparse.Namespace(lr=0.1), np.float32(1), np.arange(3), datetime.datetime(2024, 1, 1),
          pathlib.PurePosixPath('runs'),
          http.HTTPStatus.OK, collections.defaultdict(list, a=[1]), collections.Counter('ab'), collections.deque([1]),
          {1, 2}, frozenset('a'), complex(1, 2), b'bytes', bytearray(b'x'), range(3),
          decimal.Decimal(1), types.SimpleNamespace(a=1), uuid.UUID(int=1),
          np.random.default_rng(0), random.Random(0), collections.OrderedDict, ConfigDict({'a': 1}),
          functools.partial(dict, a=1),
          {argparse.Namespace: 1}, ValueError('x'), np.dtype('float32'), dict]


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('item', objects(), ids=lambda item: type(item).__name__)
def test_objects_beside_the_network_are_not_made(tmp_path, item, protocol):
  """They do not keep the tensors from being read, and nothing of them is made or run."""
  pickled = pickle.dumps(item, protocol=protocol).removeprefix(bytes([0x80, protocol]))[:-1]
  state = torch_pickle.read(torch_file(tmp_path / 'a.pth', table(args=pickled, state_dict=NETWORK)))
  assert list(state.tensors) == ['weight'] and state.beside == ('args',)
  assert not state.notes or state.notes[0].startswith('objects that were not created: ')


def test_objects_that_are_not_made_cannot_take_part(tmp_path, monkeypatch):
  """Not in place of a tensor, not of a whole network; and a class that a file names is never looked up."""
  monkeypatch.setitem(sys.modules, 'trap', None)  # to import it would raise
  state = torch_pickle.read(torch_file(tmp_path / 'a.pth', table(args=b'ctrap\nA\n)R', state_dict=NETWORK)))
  assert state.notes == ('objects that were not created: trap.A',)
  spoof = text('x\nerror') + text('A') + b'\x93)R'
  state = torch_pickle.read(torch_file(tmp_path / 'a.pth', table(args=spoof, state_dict=NETWORK)))
  assert state.notes == (r"objects that were not created: 'x\nerror.A'",)  # in one line
  for content in (table(weight=tensor(), bias=b'cnumpy\nndarray\n)R'), b'ctorchvision.models.resnet\nResNet\n)\x81}b',
                  table(model=b'ctorchvision.models.resnet\nResNet\n)\x81}b', epoch=b'K\x01')):
    with pytest.raises(ValueError, match=r'asks for (numpy.ndarray|torchvision.models.resnet.ResNet), which does not '
                                         r'belong in a state dict.*save model.state_dict'):
      torch_pickle.read(torch_file(tmp_path / 'a.pth', content))


def test_a_pickle_cannot_change_what_stands_for_objects(tmp_path):
  """Attributes, entries and items that a file gives to the class itself leave no trace."""
  before = dict(vars(torch_pickle._NotMade))
  for change in (b'}(' + text('evil') + b'K\x01ub', b'N}(' + text('evil') + b'K\x01u\x86b', b'K\x01a', b'(K\x01e'):
    try:
      torch_pickle.read(torch_file(tmp_path / 'a.pth', table(args=b'cx\nA\n' + change, state_dict=NETWORK)))
    except ValueError as error:
      assert 'a.pth' in str(error)
  assert dict(vars(torch_pickle._NotMade)) == before


@pytest.mark.parametrize('name', ['os system', 'posix system', 'nt system', 'subprocess Popen', 'builtins eval',
                                  '__builtin__ exec',
                                  'builtins __import__', 'importlib import_module', 'runpy run_path', 'sys exit',
                                  'shutil rmtree'])
def test_what_only_an_attack_asks_for_is_refused(tmp_path, name):
  """Even beside the network, where it would not run: who sent such a file meant harm."""
  ask = b'c' + name.replace(' ', '\n').encode() + b'\n)R'
  expected = f'asks for {name.replace(" ", ".")}, which does not belong in a state dict. Such a file could run code'
  with pytest.raises(ValueError, match=expected):
    torch_pickle.read(torch_file(tmp_path / 'a.pth', table(args=ask, state_dict=NETWORK)))
