"""Fine-tuning: what images are compared by."""

import pathlib

import numpy as np
import pytest

from configs import default
from ft_jax.data.sources import open_source
from ft_jax.jobs import finetune, setup

DATA = pathlib.Path(__file__).parent / 'data'


def configured(photos):
  config = default.get_config()
  config.target.name = config.source.name = f'folder:{photos}'
  config.image_size, config.train.batch_size = 32, 16
  config.model.name, config.model.width, config.model.weights = 'resnet18', 1, str(DATA / 'moco.pth.tar')
  config.selection.by, config.selection.method = 'example', 'nearest'
  return config


def test_projection_features_are_the_mlp_of_the_pooled_ones(photos, tmp_path):
  """The output of MoCo-v2's projection head, per image and not normalised, in a file of its own."""
  config = configured(photos)
  weights = setup.load_weights(config.model.weights, projection=True)
  source, features = open_source(config.source.name, 'train', ''), {}
  for name in finetune.FEATURES:
    config.selection.features = name
    finetune.check(config)
    embedded = finetune._embedded(config, tmp_path, weights, source, setup.make_transform(config), 'source')
    features[name] = embedded.features.astype(np.float64), embedded.fingerprint
  (pooled, encoder), (projected, with_head) = features['pooled'], features['projection']
  w0, b0, w2, b2 = (np.arange(n, dtype=np.float64) for n in (64, 8, 32, 4))  # tests/data/make_torch_files.py
  hidden = np.maximum(pooled @ (w0.reshape(8, 8) / 64 - 0.5).T + b0 / 8 - 0.4, 0)
  np.testing.assert_allclose(projected, hidden @ (w2.reshape(4, 8) / 32 - 0.5).T + b2, rtol=1e-4, atol=1e-4)
  assert pooled.shape == (48, 8) and projected.shape == (48, 4) and np.ptp(projected, axis=0).min() > 1e-3
  assert encoder != with_head and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('weights,features,words', [
    ('', 'projection', r"features is 'projection', which config.model.weights '' do not have; give MoCo-v2's .pth.tar"),
    ('timm:resnet18.tv_in1k', 'projection', 'do not have'), ('pretrain', 'projection', 'do not have'),
    (str(DATA / 'moco.pth.tar'), '128', "features is '128'; known: pooled, projection")])
def test_features_that_cannot_be(photos, weights, features, words):
  config = configured(photos)
  config.model.weights, config.selection.features = weights, features
  with pytest.raises(ValueError, match=words):
    finetune.check(config)
