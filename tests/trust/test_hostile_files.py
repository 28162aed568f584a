"""Files from elsewhere are data: they cannot run code, fill the memory or write elsewhere."""

import copy
import dataclasses
import json
import os
import pathlib
import random
import struct
import subprocess
import tarfile
import zipfile
import zlib

from hostile import EXAMPLES, FUZZ
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from ft_jax import selecting, trained
from ft_jax.data import contents, decode, open_set
from ft_jax.data.path_list import open_paths
from ft_jax.models import torch_pickle
import selection

# --- weights ---


def torch_zip(path, content: bytes, **storages: bytes) -> pathlib.Path:
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a/data.pkl', content)
    for key, data in storages.items():
      archive.writestr(f'a/data/{key}', data)
  return path


TWICE = b'2\x86'  # the object on top, and a tuple of both


@pytest.mark.parametrize('content', [
    b'}r\xff\xff\xff\x7f.',  # place 2**31 of the memo, for which all before it are made: 32 GB
    b'}p999999999\n.',
    b'}(K\x01\x85' + 60 * TWICE + b'K\x01u.',  # a key whose hash takes 2**60 steps
    # the same by the memo
    b'}(K\x01\x85q\x00' + b''.join(b'h%ch%c\x86q%c' % (k, k, k + 1) for k in range(60)) + b'K\x01u.',
    b'K\x01\x85' + 60 * TWICE + b'Q.'],  # named in an error it would be 2**60 words
    ids=['memo', 'memo as text', 'hash', 'hash by memo', 'text'])
def test_a_pickle_cannot_take_all_memory_or_time(tmp_path, content):
  with pytest.raises(ValueError,
                     match='a.pth is not read: its pickle would take far more memory or time than a state dict'):
    torch_pickle.read(torch_zip(tmp_path / 'a.pth', b'\x80\x02' + content))


def test_a_size_is_made_of_numbers(tmp_path):
  """Else a list that grows after it was counted would become a tuple of tuples, twenty times over."""
  levels = b''.join(b']q%c(h%ch%ce0ctorch\nSize\nh%c\x85Rq%c' % (2 * k + 1, 2 * k, 2 * k, 2 * k + 1, 2 * k + 2)
                    for k in range(24))
  content = b'\x80\x02}(K\x01\x85q\x00' + levels + b'K\x01u.'
  with pytest.raises(ValueError, match='a.pth is damaged: it describes a size as'):
    torch_pickle.read(torch_zip(tmp_path / 'a.pth', content))


def tensor(name: bytes, size: int) -> bytes:
  """Of `size` float16 numbers of the storage '0', in the pickle of a state dict."""
  text = lambda value: b'X' + len(value).to_bytes(4, 'little') + value
  number = lambda value: b'J' + value.to_bytes(4, 'little')
  storage = b'(' + text(b'storage') + b'ctorch\nHalfStorage\n' + text(b'0') + text(b'cpu') + number(size) + b'tQ'
  return text(name) + b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + b'K\x00' + number(
      size) + b'\x85K\x01\x85\x89}tR'


def test_a_small_file_cannot_hold_many_numbers(tmp_path):
  """Neither by a thousand tensors of one storage, nor by parts of a zip file that lie on each other, nor by a size that
  is only said."""
  size, data = 5000, bytes(10_000)
  state = lambda *tensors: b'\x80\x02}(' + b''.join(tensors) + b'u.'
  path = torch_zip(tmp_path / 'a.pth', state(tensor(b'a', size), tensor(b'b', size)), **{'0': data})
  assert list(torch_pickle.read(path).tensors) == ['a', 'b']
  torch_zip(path, state(*(tensor(b'%d' % k, size) for k in range(1000))), **{'0': data})
  with pytest.raises(ValueError, match='its tensors have more than 8 times the numbers of the file'):
    torch_pickle.read(path)
  torch_zip(path, state(tensor(b'a', 2**30)), **{'0': data})
  with pytest.raises(ValueError, match='a has 10000 bytes where 2147483648 are expected'):
    torch_pickle.read(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a/data.pkl', state(tensor(b'a', size)))
    archive.writestr('a/data/0', data)
    for k in range(1, 50):  # further names of the same bytes
      info = copy.copy(archive.getinfo('a/data/0'))
      info.filename = f'a/data/{k}'
      archive.filelist.append(info)
    archive._didModify = True
  with pytest.raises(ValueError, match='its parts are larger than the file'):
    torch_pickle.read(path)


def test_a_zip_file_writes_nothing(tmp_path):
  """Names that lead out of a folder, and links, are names: nothing is unpacked."""
  path = tmp_path / 'in' / 'a.pth'
  path.parent.mkdir()
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('../../a/data.pkl', b'\x80\x02}(' + tensor(b'a', 2) + b'u.')
    archive.writestr('../../a/data/0', bytes(4))
    archive.writestr('../../evil', b'x')
  assert torch_pickle.read(path).tensors['a'].tolist() == [0, 0]
  assert [file.name for file in tmp_path.rglob('*') if file.is_file()] == ['a.pth']


@pytest.mark.parametrize('header, data, length', [
    ({'a': ('F32', [2], [0, 8])}, 8, 2**62), ({'a': ('F32', [2], [0, 8])}, 4, None),
    ({'a': ('F32', [2], [8, 16])}, 8, None),
    ({'a': ('F32', [2], [0, 8]), 'b': ('F32', [2], [4, 12])}, 12, None),
    ({'a': ('F32', [2**31, 2**31], [0, 8])}, 8, None),
    ({'a': ('F32', [0, 2**62, 2**62], [0, 0])}, 0, None), ({'a': ('F32', [1] * 100, [0, 4])}, 4, None),
    (b'{"a":' * 9999, 0, None)],
    ids=['length', 'cut', 'outside', 'overlap', 'overflow', 'shape', 'axes', 'depth'])
def test_a_header_of_safetensors_that_lies(tmp_path, header, data, length):
  if isinstance(header, dict):
    header = json.dumps({name: dict(zip(('dtype', 'shape', 'data_offsets'), of))
                         for name, of in header.items()}).encode()
  path = tmp_path / 'a.safetensors'
  path.write_bytes(struct.pack('<Q', length or len(header)) + header + bytes(data))
  with pytest.raises(ValueError,
                     match='a.safetensors (is not a complete safetensors file|has a tensor of a shape that cannot be)'):
    torch_pickle.read(path)


def test_a_command_to_be_pasted_is_quoted(tmp_path):
  path = tmp_path / '$(touch x);\'`id`.pth'
  with tarfile.open(path, 'w') as archive:
    archive.addfile(tarfile.TarInfo('sys_info'))  # of before torch 0.1.10
  with pytest.raises(ValueError) as refused:
    torch_pickle.read(path)
  command = str(refused.value).split('argv[2])" ')[1]
  assert subprocess.run(['sh', '-c', f'printf "%s\\n" {command}'], capture_output=True, text=True, check=True,
                        cwd=tmp_path).stdout == \
      f'{path}\n{path}.new.pth\n'


# --- selections ---


def embeddings(n: int, classes: int, what: str) -> selection.Embeddings:
  rng = np.random.default_rng(n)
  return selection.Embeddings(rng.normal(size=(n, 8)).astype(np.float32), np.arange(n) % classes,
                              [f'{what} {k}' for k in range(classes)],
                              np.array([f'train/{what}/{i}.jpg' for i in range(n)]))


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> pathlib.Path:
  """The file of a selection with everything that one can have."""
  path = tmp_path_factory.mktemp('selection') / 'selection.json'
  chosen = selection.select(embeddings(60, 6, 'pool'), embeddings(20, 4, 'target'), 3)
  dataclasses.replace(chosen, source={'name': 'pool', 'fingerprint': 'abc'}).save(path)
  return path


def told(chosen: selection.Selection) -> str:
  """Everything that a selection says."""
  return repr([chosen.table(), chosen.target_table(), chosen.explain(),
               [value.tolist() if isinstance(value, np.ndarray) else value
                                                                         for value in vars(chosen).values()]])


SCALARS = st.none() | st.booleans() | st.integers(-3, 70) | st.integers() | st.floats() | st.text(
    max_size=5) | st.sampled_from(
    [10**30, 1e308, '../../etc/passwd', 'class', {'dtype': 'object', 'shape': [6], 'base64': ''}, [], {}, [[1], [2, 3]],
     {'dtype': 'int64', 'shape': [-1], 'base64': 'AAAAAAAAAAA='},
     {'dtype': 'V999999999999', 'shape': [1], 'base64': ''}]).map(copy.deepcopy)  # they are changed
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6)


def check_load(path: pathlib.Path, text: str, original: str) -> bool:
  """Loads a text as a selection: whether it was taken; raises for anything but a selection that can be used or a line
  of an error."""
  path.write_text(text, encoding='utf-8', errors='surrogatepass')
  try:
    chosen = selection.Selection.load(path)
  except ValueError as error:
    assert '\n' not in str(error) and str(error).startswith(str(path))
    return False
  told(chosen)
  chosen.save(path)  # what was taken is a selection: it comes back as it was
  assert told(selection.Selection.load(path)) == told(chosen)
  return told(chosen) == original


@settings(max_examples=EXAMPLES or 150, **FUZZ)
@given(st.data())
def test_a_selection_file_is_read_as_it_was_or_refused(saved, tmp_path_factory, data):
  """Any part of a valid file replaced by anything: another selection that is one, or a line that says why not."""
  document = json.loads(saved.read_text())
  original, path = told(selection.Selection.load(saved)), saved.with_name('changed.json')
  for _ in range(data.draw(st.integers(1, 3))):
    name = data.draw(st.sampled_from(sorted(document) or ['units']))
    value = document.get(name)
    deeper = isinstance(value, (list, dict)) and len(value) and data.draw(st.booleans())
    if deeper:
      keys = sorted(value) if isinstance(value, dict) else range(len(value))
      value[data.draw(st.sampled_from(keys))] = data.draw(JSON)
    elif data.draw(st.integers(0, 5)):
      document[name] = data.draw(JSON)
    else:
      del document[name]
  check_load(path, json.dumps(document), original)


@settings(max_examples=EXAMPLES or 60, **FUZZ)
@given(st.data())
def test_a_damaged_selection_file_is_refused(saved, data):
  """Text cut, doubled or replaced anywhere."""
  text, path = saved.read_text(), saved.with_name('damaged.json')
  at, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 20))
  check_load(path, text[:at] + data.draw(st.text(max_size=8)) + text[at + length:],
             told(selection.Selection.load(saved)))


@pytest.mark.parametrize('change, words', [
    ({'units': [0.5, 1, 2]}, 'units holds values that are not whole numbers'),
    ({'units': ['0', '1', '2']}, 'not whole numbers'),
    ({'units': [True, 0, 2]}, 'not whole numbers'), ({'units': [10**30, 1, 2]}, 'units has a number that is too large'),
    ({'scores': [float('nan')] * 6}, 'scores has numbers that are not finite'),
    ({'names': 'abcdef'}, 'names is a string; expected a list of strings'),
    ({'rows': [-1] * 30}, 'its rows are not those of the chosen units'),
    ({'source': 5}, 'source is a number; expected dict'),
    ({'rows': [10**9] * 30}, 'its rows are not those'), ({'solver': {'x': 1}}, 'solver has no number of iterations'),
    ({'seed': None}, 'seed is null'), ({'size': float('nan')}, 'size or seed'),
    ({'evil': 1}, "the field 'evil' is unknown")])
def test_kinds_of_wrong_fields(saved, change, words):
  document = json.loads(saved.read_text())
  path = saved.with_name('wrong.json')
  path.write_text(json.dumps({**document, **change}))
  with pytest.raises(ValueError, match=words):
    selection.Selection.load(path)


@pytest.mark.parametrize('text, words', [
    ('[' * 100_000, 'nested too deeply'), ('{"a":' * 9999 + '1' + '}' * 9999, 'nested too deeply'),
    ('[]', 'it is a list'),
    ('{"format_version": 2, "units": [1], "units": [2]}', 'it has a key twice'),
    ('{"format_version": ' + '9' * 5000 + '}', 'digits'),
    ('{"format_version": "2"}', "format version '2'"), ('\x00', 'Expecting value'), ('', 'Expecting value')])
def test_texts_that_are_no_selection(saved, text, words):
  path = saved.with_name('text.json')
  path.write_text(text)
  with pytest.raises(ValueError, match=words):
    selection.Selection.load(path)


def test_ids_of_a_selection_open_no_file(photos, saved, tmp_path):
  """An id is looked up among those of the pool; whatever path it looks like, nothing is opened."""
  pool = open_set(f'folder:{photos}', 'train')
  for name in ('../../etc/passwd', '/etc/passwd', f'{photos}/train/sky/0.jpg', '../train/sky/0.jpg'):
    listed = tmp_path / 'ids.txt'
    listed.write_text(f'{name}\n')
    with pytest.raises(ValueError, match='1 of 1 ids are not in folder'):
      selecting.read(str(listed), pool)
  document = json.loads(saved.read_text())
  wrong = tmp_path / 'selection.json'
  # of another pool, whatever it says
  wrong.write_text(json.dumps({**document, 'source': {'fingerprint': pool.fingerprint}}))
  with pytest.raises(ValueError, match='says that it was made for folder:.*, but its classes are not those of it'):
    selecting.read(str(wrong), pool)


class Evil:

  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return os.mkdir, (str(self.mark),)


def test_embeddings_run_nothing_and_are_no_larger_than_they_are(tmp_path):
  mark, path = tmp_path / 'ran', tmp_path / 'e.npz'
  refused = pytest.raises(ValueError, match='e.npz cannot be read as embeddings')
  np.savez(path, features=np.array([[Evil(mark)]], object))
  with refused:
    selection.Embeddings.load(path)
  assert not mark.exists()
  np.savez_compressed(path, features=np.zeros((100_000, 64), np.float32))
  with refused:
    selection.Embeddings.load(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('features.npy', b'\x93NUMPY\x01\x00\x46\x00'
                     b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 99), }\n")
  with refused:
    selection.Embeddings.load(path)
  embeddings(20, 4, 'x').save(path)
  data, rng = path.read_bytes(), random.Random(0)
  for _ in range(EXAMPLES or 100):
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
      damaged[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(damaged)
    try:
      selection.Embeddings.load(path)
    except ValueError as error:
      assert str(path) in str(error)


# --- runs of others ---


@pytest.mark.parametrize('config, results', [
    ('[' * 100_000, '{}'), ('{"job": "finetune", "seed": 0, "train": 1}', '[' * 100_000),
    ('{"job": "finetune", "seed": 0, "train": 1}', '[]'),
    ('{"job": "finetune", "seed": 0, "train": 1, "model": 5}', '{"val": {"per_class": [{"name": 1}]}}'),
    ('null', 'null'),
    ('{"job": ["finetune"], "seed": 0, "train": 1}', '{}'),
    ('{"job": "finetune", "seed": NaN, "train": {}}', '{"val": {"per_class": 7}}')])
def test_the_files_of_a_run_may_be_anything(tmp_path, config, results):
  (tmp_path / 'config.json').write_text(config)
  (tmp_path / 'results.json').write_text(results)
  # A field without its group is one that this version does not know.
  with pytest.raises(ValueError, match='^config.workdir: |newer version .*this one does not know config.train'):
    trained.load(str(tmp_path))


# --- images ---


def png(width: int, height: int) -> bytes:
  """A file that says so large and holds a line."""
  chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
          + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))


NO_IMAGE = 'x cannot be read as an image'


@pytest.mark.parametrize('data, words', [
    (png(50_000, 50_000), 'x is an image of 50000 x 50000 pixels; expected at most 200,000,000'),
    (png(2**31 - 1, 1), 'pixels'),
    (b'P6 999999999 999999999 255\n', 'pixels'), (png(300, 300), NO_IMAGE), (png(0, 0), NO_IMAGE),
    (png(9, 9)[:40], NO_IMAGE), (b'GIF89a' + b'\xff' * 100, NO_IMAGE), (b'\xff\xd8\xff\xe1\xff\xff', NO_IMAGE),
    (b'BM' + b'\xff' * 60, NO_IMAGE), (b'II*\0\x08\0\0\0' + b'\xff' * 200, NO_IMAGE),
    (b'RIFF\xff\xff\xff\xffWEBPVP8X' + b'\xff' * 50, NO_IMAGE),
    (b'%PDF-1.4', NO_IMAGE), (b'<svg xmlns="http://www.w3.org/2000/svg"/>', NO_IMAGE), (b'', 'it is empty')])
def test_images_that_are_none_or_too_large(data, words):
  for read in (decode.decode, decode.dimensions):
    if not (read is decode.dimensions and data == png(300, 300)):  # its head is right
      with pytest.raises(ValueError, match=words):
        read(data, 'x')


def test_what_lies_in_a_folder_of_images(photos, tmp_path):
  """Names with line breaks, other endings, links out of the folder, pipes and files of holes: read as images, or an
  error with a name."""
  folder, photo = tmp_path / 'in' / 'a\nclass', (photos / 'train' / 'sky' / '0.jpg').read_bytes()
  folder.mkdir(parents=True)
  (folder / 'with\nbreak\x1b[2J.png').write_bytes(photo)  # a JPEG file by its bytes
  (folder / 'link.jpg').symlink_to('/etc/passwd')
  (folder / 'loop.jpg').symlink_to('loop.jpg')
  (folder / 'none.jpg').symlink_to('/nonexistent')
  (folder / 'zero.jpg').symlink_to('/dev/zero')
  os.mkfifo(folder / 'pipe.jpg')
  with open(folder / 'holes.jpg', 'wb') as stream:
    stream.truncate(contents.MAX_FILE_BYTES + 1)
  source = open_set(f'folder:{tmp_path / "in"}', 'train')
  named = ['holes.jpg', 'link.jpg', 'loop.jpg', 'none.jpg', 'with\nbreak\x1b[2J.png']
  assert sorted(name.rpartition('/')[2] for name in source.ids) == named
  assert [found.count for found in source.unused.found.values()] == [2]  # pipe.jpg and zero.jpg, which may never end
  read = {}
  for i in range(5):
    name = source.ids[i].rpartition('/')[2]
    try:
      read[name] = decode.decode(source[i].image, source.ids[i]).shape
    except ValueError as error:
      assert name in str(error) and 'root:' not in str(error)
  assert list(read) == ['with\nbreak\x1b[2J.png']
  found = open_paths(str(tmp_path / 'in'))
  assert sorted(name.rpartition('/')[2] for name in found.problems) == ['holes.jpg', 'loop.jpg', 'none.jpg']
