"""The first stages of a network are a network of their own: its features, its answers and its weights."""

import collections
import pathlib
import tarfile

import jax
import numpy as np
import pytest

from ft_jax.data import open_set
from ft_jax.data.pipeline import EvalBatches, Transform
from ft_jax.models import build
from ft_jax.training import initial_weights

DATA = pathlib.Path(__file__).parents[1] / 'fixtures'
WHOLE = DATA / 'resnet18.pth'


@pytest.fixture(scope='module')
def whole():
  """Torch's outputs, and those here, of a whole network."""
  with np.load(DATA / 'resnet_outputs.npz') as recorded:
    images, taps = recorded['images'], {name: recorded[f'resnet18/layer{name}'] for name in (1, 2, 3, 4)}
  return images, taps


@pytest.mark.parametrize('stages,dimension', [(1, 4), (2, 8), (3, 16), (4, 32), (0, 32)])
def test_features_are_the_mean_of_the_last_stage(whole, stages, dimension):
  """Of torch's outputs, over the pixels."""
  images, taps = whole
  network = build('resnet18', {}, width=4, stages=stages)
  weights = initial_weights.load_weights(str(WHOLE), network)
  variables = initial_weights.init_variables(network, 0, weights.variables)
  features = jax.jit(network.predict)(variables, images).features
  expected = taps[stages or 4].mean((1, 2))
  assert features.shape[1] == network.features_dim == dimension
  np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_answers_of_the_first_stages():
  """What layer-wise methods, layer decay and DELTA ask for."""
  network = build('resnet18', {'target': 2}, width=4, stages=3)
  assert network.stage_names == ('layer1', 'layer2', 'layer3')
  assert network.stage_layers[-1] == 'layer3/1/conv2' and network.stage('layer3/0/conv1/kernel') == 3
  paths = ('heads/target', 'layer3/1/conv2', 'layer1/0/conv1', 'conv1')
  assert [network.depth(f'{path}/kernel') for path in paths] == [0, 1, 6, 7]
  assert network.shapes()['params']['heads']['target']['kernel'].shape == (16, 2)
  assert not network.torch_constructor('resnet18', 2), 'torchvision has no such network'
  with pytest.raises(ValueError, match='model.stages is 5; expected 1 to 4, or 0 for all'):
    build('resnet18', {}, stages=5)


def test_weights_of_later_stages_are_dropped_by_name(caplog):
  caplog.set_level('INFO', 'ft_jax')
  network = build('resnet18', {}, width=4, stages=3)
  weights = initial_weights.load_weights(str(WHOLE), network)
  assert not any(name.startswith('layer4') for tree in weights.variables.values() for name in tree)
  assert 'layer4.0.conv1.weight' in caplog.text and '(after stage 3)' in caplog.text
  with pytest.raises(ValueError, match=r'reads 32 features and the network has 16 \(model.stages 3\)'):
    initial_weights.load_weights(str(WHOLE), network, classes=7)


def test_weights_of_fewer_stages_say_how_to_use_them():
  fewer = initial_weights.load_weights(str(WHOLE), build('resnet18', {}, width=4, stages=3)).variables
  with pytest.raises(ValueError, match='They are of resnet18: set .*--config.model.stages=3'):
    initial_weights.init_variables(build('resnet18', {}, width=4), 0, fewer)


def test_imagenets_stages_know_classes_they_have_never_seen(shared, tmp_path):
  """Nearest class means on Caltech-101, by the real weights of three stages; by random ones 6 % are right."""
  with tarfile.open(shared / 'data' / 'caltech101.tar.gz') as archive:
    chosen = _first_of_each_class(archive.getnames())
    archive.extractall(tmp_path, [archive.getmember(name) for name in chosen], filter='data')
  network = build('resnet18', {}, size=96, stages=3)
  file = shared / 'weights' / 'resnet18_in1k_stages123.safetensors'
  weights = initial_weights.load_weights(str(file), network)
  variables = initial_weights.init_variables(network, 0, weights.variables)
  features, labels = {}, {}
  run = jax.jit(network.predict)
  for split in ('train', 'test'):
    images = open_set(f'folder:{tmp_path / "caltech101"}', split)
    batches = EvalBatches(images, Transform(96, short_side=96), 64)
    found = [np.asarray(run(variables, batch['input']).features)[batch['mask']] for batch in batches]
    features[split], labels[split] = np.concatenate(found), images.labels
  means = np.stack([features['train'][labels['train'] == k].mean(0) for k in range(101)])
  cosines = _unit(features['test']) @ _unit(means).T
  accuracy = np.mean(cosines.argmax(1) == labels['test'])
  assert features['test'].shape[1] == 256
  assert accuracy > 0.4, accuracy


def _first_of_each_class(names):
  """The first three images of each class in train, and two in test."""
  by_class = collections.defaultdict(list)
  for name in sorted(name for name in names if name.endswith('.jpg')):
    by_class[name.rpartition('/')[0]].append(name)
  return [name for folder, found in by_class.items() for name in found[:3 if '/train/' in folder else 2]]


def _unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_shapes_are_found_once_for_each_network():
  """And whoever changes them has changed a copy."""
  network = build('resnet18', {'target': 3}, size=32, width=1)
  first = network.shapes()
  first['params']['heads'].pop('target')
  assert network.shapes()['params']['heads']['target']['kernel'].shape[1] == 3
  assert network.clone(heads={'target': 5}).shapes()['params']['heads']['target']['kernel'].shape[1] == 5
