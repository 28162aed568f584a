"""The network is torchvision's: numbers of parameters, layer names, features, taps and logits."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from torch_record import error, Record
from torch_weights import load_torch, RESNET

from ft_jax.models import build, export, NETWORKS
from ft_jax.models.batch_norm import BatchNorm
from ft_jax.models.network import IMAGENET_MEAN, IMAGENET_STD

DATA = pathlib.Path(__file__).parents[1] / 'fixtures'


@pytest.mark.parametrize('name,parameters', [
    ('resnet18', 11_689_512), ('resnet34', 21_797_672), ('resnet50', 25_557_032), ('resnet101', 44_549_160)])
def test_number_of_parameters(name, parameters):
  """Torchvision's documented counts, with 1000 classes."""
  model = build(name, {'source': 1000})
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3), jnp.uint8))
  assert sum(x.size for x in jax.tree.leaves(shapes['params'])) == parameters


@pytest.mark.parametrize('name,file_name', [('resnet18', 'resnet18.pth'), ('resnet50', 'resnet50.safetensors')])
def test_equals_torch(name, file_name):
  """Recorded by tests/fixtures/make_torch_resnet.py: features, taps and logits of torch in eval mode."""
  model = build(name, {'source': 7}, width=4)
  with np.load(DATA / 'resnet_outputs.npz') as recorded:
    outputs = jax.jit(model.apply)(load_torch(DATA / file_name), recorded['images'])
    for key, value in {'features': outputs.features, 'logits': outputs.logits['source'], **outputs.taps}.items():
      expected = recorded[f'{name}/{key}']
      np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('name', list(NETWORKS))
def test_equals_torch_in_eval_and_training_mode(name, tmp_path):
  """Features, taps and logits; outputs with the batch's own statistics, the running statistics after it, and all
  gradients."""
  record = Record(name)
  variables = record.variables(tmp_path)
  model = build(name, {'source': 7}, width=2)

  def loss_fn(params):
    outputs, updates = model.apply({**variables, 'params': params}, record.images, train=True, mutable=['batch_stats'])
    return optax.softmax_cross_entropy_with_integer_labels(outputs.logits['source'], record.labels).mean(), (outputs,
                                                                                                             updates)

  # Compiled at once, with less effort: the time of this test is the compiler's.
  compute = jax.jit(lambda: (model.apply(variables, record.images[:2]),
                             jax.grad(loss_fn, has_aux=True)(variables['params'])),
                    compiler_options={'xla_backend_optimization_level': 0})
  evaluated, (gradients, (trained, updates)) = compute()
  for mode, outputs in (('eval', evaluated), ('train', trained)):
    values = {'features': outputs.features, 'logits': outputs.logits['source'], **outputs.taps}
    errors = {key: error(values[key], expected) for key, expected in record.outputs(mode).items()}
    assert {'features', 'logits'} <= set(errors) and max(errors.values()) < 1e-4, errors
  for kind, values in (('statistics', updates), ('gradients', {'params': gradients})):
    values = export.state_dict(RESNET, values, 'source')
    errors = {key: error(values[key], expected) for key, expected in record.tensors(kind).items()}
    assert len(errors) == sum('num_batches' not in key for key in values) and max(errors.values()) < 1e-4, errors


def test_running_variance_is_torchs():
  """Times n / (n - 1), with n the pixels of all devices that share statistics; normalised with the variance itself."""
  x = np.random.default_rng(0).normal(3, 2, (4, 2, 2, 2, 5)).astype(np.float32)
  flat = x.reshape(-1, 5)
  for norm, images, n in ((BatchNorm(train=True, momentum=0.9, axis_name='d'), x, 32),
                          (BatchNorm(train=True, momentum=0.9), x.reshape(1, 8, 2, 2, 5), 32)):
    variables = norm.init(jax.random.key(0), images[0])
    apply = lambda images, norm=norm, variables=variables: norm.apply(variables, images, mutable=['batch_stats'])
    y, updates = jax.jit(jax.vmap(apply, axis_name='d'))(images)
    np.testing.assert_allclose(updates['batch_stats']['var'][0], 0.9 + 0.1 * flat.var(0) * n / (n - 1), rtol=1e-5)
    np.testing.assert_allclose(updates['batch_stats']['mean'][0], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(y).reshape(-1, 5), (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5),
                               rtol=1e-3, atol=1e-4)


def test_heads_and_stem():
  """Any set of heads, by name, on the same features; the 3x3 stem keeps the resolution."""
  model = build('resnet18', {'target': 3, 'source': 5}, width=4, stem='3x3')
  images = jnp.zeros((2, 16, 16, 3), jnp.uint8)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  outputs = jax.jit(model.apply)(variables, images)
  assert {name: logits.shape for name, logits in outputs.logits.items()} == {'target': (2, 3), 'source': (2, 5)}
  assert outputs.taps['layer1'].shape == (2, 16, 16, 4) and outputs.taps['layer4'].shape == (2, 2, 2, 32)
  features, head = outputs.features, variables['params']['heads']['source']
  np.testing.assert_allclose(outputs.logits['source'], features @ head['kernel'] + head['bias'], rtol=1e-6, atol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
  model = build('resnet18', {'target': 3}, width=4, dtype=jnp.bfloat16)
  images = jnp.zeros((1, 32, 32, 3), jnp.uint8)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  outputs = jax.jit(model.apply)(variables, images)
  assert outputs.taps['layer1'].dtype == jnp.bfloat16
  assert outputs.features.dtype == outputs.logits['target'].dtype == jnp.float32


@pytest.mark.parametrize('kwargs,words', [
    ({'name': 'resnet19'}, 'resnet18, resnet34'), ({'name': 'resnet18', 'stem': '5x5'}, '7x7, 3x3'),
    ({'name': 'resnet18', 'width': 0}, '1 or more'),
    ({'name': 'resnet18', 'batch_norm': 'eval'}, "batch_norm is 'eval'; known: train, frozen")])
def test_errors(kwargs, words):
  with pytest.raises(ValueError, match=words):
    build(heads={}, **kwargs)


def test_normalize():
  """ImageNet's mean becomes zero and one standard deviation more becomes one."""
  normalize = build('resnet18', {}).input.normalize
  pixel = np.asarray(IMAGENET_MEAN) * 255
  assert np.abs(normalize(jnp.asarray(pixel.round()[None, None, None], jnp.uint8))).max() < 0.01
  white = normalize(jnp.full((1, 1, 1, 3), 255, jnp.uint8))
  np.testing.assert_allclose(white[0, 0, 0], (1 - np.asarray(IMAGENET_MEAN)) / IMAGENET_STD, rtol=1e-5)
