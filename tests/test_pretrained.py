"""Weights are read strictly and safely: nothing missing, nothing left over, no code run."""

import os
import pathlib
import pickle
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax.models import pretrained, resnet

DATA = pathlib.Path(__file__).parent / 'data'


def fresh(name='resnet18', width=4, stem='7x7'):
  model = resnet.build(name, {'target': 3}, width=width, stem=stem)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)


def test_merge_takes_the_backbone_and_keeps_the_heads():
  variables, loaded = fresh(), pretrained.load_torch(DATA / 'resnet18.pth')
  merged = pretrained.merge(variables, loaded)
  np.testing.assert_array_equal(merged['params']['layer4']['1']['conv2']['kernel'], loaded['params']['layer4']['1']['conv2']['kernel'])
  np.testing.assert_array_equal(merged['batch_stats']['bn1']['var'], loaded['batch_stats']['bn1']['var'])
  np.testing.assert_array_equal(merged['params']['heads']['target']['kernel'], variables['params']['heads']['target']['kernel'])
  assert set(merged['params']['heads']) == {'target'}


@pytest.mark.parametrize('kwargs,words', [
    ({'width': 8}, r'other shapes: .*conv1/kernel \(7, 7, 3, 4\) in the weights, \(7, 7, 3, 8\) in the model.* more'),
    ({'stem': '3x3'}, r'other shapes: params/conv1/kernel'),
    ({'name': 'resnet34'}, r'missing in the weights: .*layer1/2.* more'),
    ({'name': 'resnet50'}, r'missing in the weights')])
def test_weights_that_do_not_fit_are_named(kwargs, words):
  with pytest.raises(ValueError, match=words):
    pretrained.merge(fresh(**kwargs), pretrained.load_torch(DATA / 'resnet18.pth'))


def test_moco_names():
  """The query encoder of a MoCo checkpoint is read; its key encoder, queue and projection head are left."""
  with zipfile.ZipFile(DATA / 'resnet18.pth') as archive:
    names = archive.namelist()
    content = {name: archive.read(name) for name in names}
  # The state dict's pickle has its names as plain text: every one gets MoCo's prefix, the classifier becomes its projection.
  root = next(name for name in names if name.endswith('data.pkl'))
  state = pretrained.load_torch(DATA / 'resnet18.pth')
  pickled = content[root]
  for old, new in ((b'fc.weight', b'fc.2.weight'), (b'fc.bias', b'fc.2.bias')):
    pickled = pickled.replace(b'X' + len(old).to_bytes(4, 'little') + old, b'X' + len(new).to_bytes(4, 'little') + new)
  pickled = re.sub(rb'X(....)((?:conv|bn|layer|fc)[\w.]+)', lambda m: b'X' + (int.from_bytes(m[1], 'little') + 17).to_bytes(4, 'little')
                   + b'module.encoder_q.' + m[2], pickled, flags=re.DOTALL)
  content[root] = pickled
  path = pathlib.Path(os.environ['XDG_CACHE_HOME']) / 'moco.pth.tar'
  with zipfile.ZipFile(path, 'w') as archive:
    for name in names:
      archive.writestr(name, content[name])
  moco = pretrained.load_torch(path)
  assert 'heads' in state['params'] and 'heads' not in moco['params']
  np.testing.assert_array_equal(moco['params']['conv1']['kernel'], state['params']['conv1']['kernel'])
  assert len(jax.tree.leaves(moco)) == len(jax.tree.leaves(state)) - 2


def test_a_pickle_cannot_run_code(tmp_path):
  """A file that asks for os.system when it is unpickled is refused, and nothing runs."""
  mark = tmp_path / 'ran'

  class Evil:
    def __reduce__(self):
      return os.system, (f'touch {mark}',)

  path = tmp_path / 'evil.pth'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('evil/data.pkl', pickle.dumps({'conv1.weight': Evil()}))
  with pytest.raises(ValueError, match='system, which is no part of a state dict'):
    pretrained.load_torch(path)
  assert not mark.exists()


def test_other_files(tmp_path):
  (tmp_path / 'old.pth').write_bytes(pickle.dumps({'a': 1}))
  with pytest.raises(ValueError, match='torch 1.6 or newer'):
    pretrained.load_torch(tmp_path / 'old.pth')
  with pytest.raises(ValueError, match='there is no file'):
    pretrained.load_torch(tmp_path / 'none.pth')
  (tmp_path / 'cut.safetensors').write_bytes((DATA / 'resnet50.safetensors').read_bytes()[:1000])
  with pytest.raises(ValueError, match='safetensors'):
    pretrained.load_torch(tmp_path / 'cut.safetensors')
  (tmp_path / 'cut.pth').write_bytes((DATA / 'resnet18.pth').read_bytes()[:5000])
  with pytest.raises(ValueError, match='zip'):
    pretrained.load_torch(tmp_path / 'cut.pth')
