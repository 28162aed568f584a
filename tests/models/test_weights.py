"""Weights are read strictly: nothing missing, nothing left over, and what does not fit is named."""

import pathlib
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors
from torch_weights import load_torch, RESNET

from ft_jax.models import build, torch_pickle, weights

DATA = pathlib.Path(__file__).parents[1] / 'fixtures'


def fresh(name='resnet18', width=4, stem='7x7'):
  model = build(name, {'target': 3}, width=width, stem=stem)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)


def test_merge_takes_the_backbone_and_keeps_the_heads():
  variables, loaded = fresh(), load_torch(DATA / 'resnet18.pth')
  merged = weights.merge(RESNET, variables, loaded)
  np.testing.assert_array_equal(merged['params']['layer4']['1']['conv2']['kernel'],
                                loaded['params']['layer4']['1']['conv2']['kernel'])
  np.testing.assert_array_equal(merged['batch_stats']['bn1']['var'], loaded['batch_stats']['bn1']['var'])
  np.testing.assert_array_equal(merged['params']['heads']['target']['kernel'],
                                variables['params']['heads']['target']['kernel'])
  assert set(merged['params']['heads']) == {'target'}


@pytest.mark.parametrize('kwargs,words', [
    ({'width': 8}, r'Other shapes: .*conv1/kernel \(7, 7, 3, 4\) in the weights, \(7, 7, 3, 8\) in the model.* more'),
    ({'stem': '3x3'}, r'Other shapes: params/conv1/kernel'),
    ({'name': 'resnet34'}, r'Missing in the weights: .*layer1/2.* more'),
    ({'name': 'resnet50'}, r'Missing in the weights')])
def test_weights_that_do_not_fit_are_named(kwargs, words):
  with pytest.raises(ValueError, match=words):
    weights.merge(RESNET, fresh(**kwargs), load_torch(DATA / 'resnet18.pth'))


def save(path, **tensors):
  safetensors.save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
  return path


def state(name='resnet18.pth'):
  return torch_pickle.read(DATA / name).tensors


def narrow(value):
  """A quarter of the channels, as in tests/fixtures/make_torch_files.py."""
  return value[tuple(slice(n if n == 3 else n // 4) for n in value.shape[:2])]


def test_moco(tmp_path):
  """A file that torch wrote as MoCo's was, in the format before torch 1.6: the query encoder and its projection head
  come, bit by bit."""
  loaded, dropped, _ = weights.read(DATA / 'moco.pth.tar', RESNET)
  original = {name: narrow(value) for name, value in state().items() if not name.startswith('fc.')}
  expected = load_torch(save(tmp_path / 'narrow.safetensors', **original))
  jax.tree.map(np.testing.assert_array_equal, {key: loaded[key] for key in ('params', 'batch_stats')}, expected)
  np.testing.assert_array_equal(loaded['params']['conv1']['kernel'], original['conv1.weight'].transpose(2, 3, 1, 0))
  np.testing.assert_array_equal(loaded['projection']['0']['kernel'],
                                (np.arange(64, dtype=np.float32).reshape(8, 8) / 64 - 0.5).T)
  assert dropped['beside the network'] == ['epoch', 'arch', 'optimizer']
  assert {why: len(names) for why, names in dropped.items()} == {
      "BatchNorm's counters": 20, "MoCo's key encoder and queue": 126, 'beside the network': 3}
  weights.merge(RESNET, fresh(width=1), loaded)


def test_projection_is_the_mlp():
  """Linear, ReLU, linear; no normalisation."""
  projection = load_torch(DATA / 'moco.pth.tar')['projection']
  features = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
  w0, b0, w2, b2 = (np.arange(n, dtype=np.float64) for n in (64, 8, 32, 4))
  hidden = np.maximum(features @ (w0.reshape(8, 8) / 64 - 0.5).T + b0 / 8 - 0.4, 0)
  assert (hidden == 0).any() and (hidden > 0).any()
  np.testing.assert_allclose(weights.project(projection, features), hidden @ (w2.reshape(4, 8) / 32 - 0.5).T + b2,
                             rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kwargs,words', [
    ({'name': 'resnet50'},
     'They are of resnet18: set --config.model.name=resnet18 --config.model.width=4 --config.model.stem=7x7'),
    ({'width': 8}, 'They are of resnet18: set --config.model.name=resnet18 --config.model.width=4 '),
    ({'stem': '3x3'}, '--config.model.stem=7x7')])
def test_the_right_network_is_named(kwargs, words):
  with pytest.raises(ValueError, match=words):
    weights.merge(RESNET, fresh(**kwargs), load_torch(DATA / 'resnet18.pth'))


def test_a_wide_network_is_none_of_the_four(tmp_path):
  """Names of resnet50 and other shapes, as of wide_resnet50_2 or resnext50."""
  wide = {name: np.repeat(value, 2, axis=0) if re.search(r'layer.*conv2', name) else value
          for name, value in state('resnet50.safetensors').items()}
  with pytest.raises(ValueError,
                     match='They are of none of resnet18, .*; the nearest is resnet50 of width 4, which has 249 of '
                                       'their 265 tensors. Other shapes: .*layer1/0/conv2/kernel'):
    weights.merge(RESNET, fresh('resnet50'), load_torch(save(tmp_path / 'wide.safetensors', **wide)))


@pytest.mark.parametrize('change,words', [
    ({'conv1.0.weight': 'conv1.weight', 'conv1.1.weight': 'bn1.weight'}, 'no conv1.weight among .*conv1.0.weight'),
    ({'patch_embed.proj.weight': 'conv1.weight'}, 'holds none of resnet18, .*: there is no conv1.weight'),
    ({'layer1.0.se.fc1.weight': None}, 'they have no layer1.0.se.fc1.weight'),
    ({'fc.0.weight': None}, 'they have no fc.0.weight'),
    ({'fc.other': 'fc.bias'}, 'they have no fc.other'), ({'': 'fc.bias'}, 'holds fc.weight and lacks fc.bias')])
def test_tensors_of_other_networks_are_named(tmp_path, change, words):
  tensors = state()
  for new, old in change.items():
    value = tensors.pop(old) if old else np.zeros((2, 2), np.float32)
    tensors = {new: value, **tensors} if new else tensors
  with pytest.raises(ValueError, match=f'other.safetensors .*{words}'):
    weights.read(save(tmp_path / 'other.safetensors', **tensors), RESNET)


def test_half_precision_and_wrapped_names(tmp_path):
  """bfloat16 of safetensors, names of DataParallel; numbers come as float32. Integers are no weights."""
  plain, low = load_torch(DATA / 'resnet18.pth'), jnp.bfloat16
  data = {f'module.{name}': value if value.dtype == np.int64 else value.astype(low) for name, value in state().items()}
  loaded, dropped, notes = weights.read(save(tmp_path / 'low.safetensors', **data), RESNET)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(low).astype(np.float32)), loaded, plain)
  assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype('float32')}
  assert len(dropped["BatchNorm's counters"]) == 20
  assert notes == ('removed from names: module.', 'bfloat16 converted to float32')
  data['module.conv1.weight'] = np.ones((4, 3, 7, 7), np.int8)
  with pytest.raises(ValueError, match='conv1.weight is int8'):
    weights.read(save(tmp_path / 'low.safetensors', **data), RESNET)


def wrapped(*parts: dict[str, np.ndarray], path) -> weights.LoadedWeights:
  """What is read of a file with these tensors."""
  return weights.read(save(path / 'wrapped.safetensors',
                           **{name: value for part in parts for name, value in part.items()}), RESNET)


def under(prefix: str, change: float = 0.0) -> dict[str, np.ndarray]:
  """The network's tensors with something in front of their names."""
  return {prefix + name: value + np.asarray(change, value.dtype) for name, value in state().items()}


@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module.module.', 'model.', 'backbone.', 'encoder.', 'net.',
                                    'encoder_q.', 'teacher.',
                                    'module._orig_mod.model.', '_orig_mod.module.backbone.', 'ema.',
                                    'some.other.name.'])
def test_wrappings_are_left_out_and_told(tmp_path, prefix):
  loaded = wrapped(under(prefix), path=tmp_path)
  jax.tree.map(np.testing.assert_array_equal, {key: loaded.variables[key] for key in ('params', 'batch_stats')}
               if prefix != 'encoder_q.' else loaded.variables, expected(prefix))
  assert loaded.notes[0].startswith('removed from names: ')
  assert all(part in loaded.notes[0] for part in prefix.split('.') if part)


def expected(prefix: str) -> dict:
  """The network; of MoCo's encoder the classifier is a projection, and does not come."""
  variables = load_torch(DATA / 'resnet18.pth')
  if prefix == 'encoder_q.':
    del variables['params']['heads']
  return variables


def test_wrappers_within_names(tmp_path):
  """As where single stages were compiled, or sharded."""
  tensors = {name.replace('layer2.', 'layer2._orig_mod.').replace('bn1.', '_fsdp_wrapped_module.bn1.'): value
             for name, value in under('module.').items()}
  loaded = wrapped(tensors, path=tmp_path)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected(''))
  assert loaded.notes == ('removed from names: _fsdp_wrapped_module., _orig_mod., module.',)


@pytest.mark.parametrize('taken,other', [
    ('backbone.', 'momentum_backbone.'), ('', 'ema.module.'), ('online_encoder.', 'target_encoder.'),
    ('teacher.backbone.', 'student.backbone.'), ('model.', 'model_ema.'), ('module.', 'averaged_model.')])
def test_of_two_copies_a_known_rule_takes_one_and_says_so(tmp_path, taken, other):
  loaded = wrapped(under(other, 1.0), under(taken), path=tmp_path)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected(''))
  assert f'another network with the prefix {other!r}' in loaded.notes[-1]
  assert f'name.removeprefix({other!r})' in loaded.notes[-1]


def test_two_networks_are_not_guessed_between(tmp_path):
  with pytest.raises(ValueError,
                     match=r"holds 2 networks, with the prefixes 'one.', 'two.', .*name.removeprefix\('one.'\)"):
    wrapped(under('one.'), under('two.'), path=tmp_path)


def test_an_average_of_weights_and_what_stands_beside_a_backbone(tmp_path):
  """torch.optim.swa_utils.AveragedModel; a detector, or a self-supervised training, around a backbone."""
  loaded = wrapped(under('module.'), {'n_averaged': np.int64(7)}, path=tmp_path)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected(''))
  assert loaded.dropped['beside module'] == ['n_averaged']
  loaded = wrapped(under('backbone.'), {'projector.0.weight': np.zeros((2, 2), np.float32)}, path=tmp_path)
  assert loaded.dropped['beside backbone'] == ['projector.0.weight']


def test_parameters_alone_are_named(tmp_path):
  """As of networks with GroupNorm, or of model.parameters()."""
  tensors = {name: value for name, value in state().items() if 'running' not in name and 'tracked' not in name}
  with pytest.raises(ValueError,
                     match='has no running statistics of BatchNorm .bn1.running_mean, .*save model.state_dict'):
    wrapped(tensors, path=tmp_path)


@pytest.mark.parametrize('name,value,words', [
    ('layer1.0.conv2.weight', np.nan,
     r'not finite in params/layer1/0/conv2/kernel \(layer1.0.conv2.weight\) \(1 of 144 are NaN'),
    ('fc.bias', -np.inf, r'not finite in params/heads/source/bias \(fc.bias\)'),
    ('bn1.running_mean', np.inf, 'bn1.running_mean'),
    ('bn1.running_var', -1e-3,
     r'negative running variances in batch_stats/bn1/var \(bn1.running_var\), down to -0.001')])
def test_numbers_that_no_training_makes_are_named(name, value, words):
  tensors = load_torch(DATA / 'resnet18.pth')
  weights.check_numbers(RESNET, tensors, 'a.pth')
  changed = jax.tree.map(np.array, tensors)
  flat = {RESNET.torch_name(key): array for key, array in flax.traverse_util.flatten_dict(changed, sep='/').items()}
  flat[name].flat[0] = value
  with pytest.raises(ValueError, match=f'^a.pth has .*{words}'):
    weights.check_numbers(RESNET, changed, 'a.pth')


def test_numbers_too_large_for_float32_and_variances_of_zero(tmp_path, caplog):
  tensors = state()
  tensors['conv1.weight'] = np.full(tensors['conv1.weight'].shape, 1e300)
  with pytest.raises(ValueError, match='not finite in params/conv1/kernel'):
    weights.check_numbers(RESNET, wrapped(tensors, path=tmp_path).variables, 'a.pth')
  zero = jax.tree.map(np.array, expected(''))
  zero['batch_stats']['bn1']['var'][:] = 0
  weights.check_numbers(RESNET, zero, 'a.pth')
  assert 'a.pth: the running variance is zero in every channel of batch_stats/bn1/var' in caplog.text


def test_a_head_of_the_same_name_is_taken():
  """The classifier becomes head 'source' where the model has one, and must have as many classes."""
  loaded = load_torch(DATA / 'resnet18.pth')
  shapes = lambda classes: jax.eval_shape(build('resnet18', {'source': classes}, width=4).init, jax.random.key(0),
                                         jnp.zeros((1, 32, 32, 3), jnp.uint8))
  merged = weights.merge(RESNET, shapes(7), loaded)
  np.testing.assert_array_equal(merged['params']['heads']['source']['bias'], state()['fc.bias'])
  with pytest.raises(ValueError, match=r'heads/source/bias \(7,\) in the weights, \(8,\) in the model'):
    weights.merge(RESNET, shapes(8), loaded)
