"""The checkpoints of a pre-training are found and put in order; what is not one run, or not this network, is refused by
name."""

import flax
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_weights import RESNET

from configs import study as study_config
from ft_jax import models
from ft_jax.models import export
from ft_jax.studies import history


def network(**fields):
  config = study_config.get_config().model
  config.update({'name': 'resnet18', 'width': 4, **fields})
  return config


def write(path, classes=3, **fields):
  """A file of random weights, with a classifier."""
  model = models.from_config(network(**fields), {'source': classes}, 32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: rng.uniform(0.1, 1.0, x.shape).astype(np.float32), shapes)
  path.parent.mkdir(exist_ok=True)
  save_file(export.state_dict(RESNET, variables, 'source'), path)
  return variables


@pytest.mark.parametrize('name, counts', [
    ('epoch_12.pth', ('epoch', 12)), ('checkpoint_0012.pth.tar', ('epoch', 12)),
    ('resnet18-epoch5-top1_71.2.pth', ('epoch', 5)),
    ('ckpt12.pt', ('epoch', 12)), ('ckpt_e12.pt', ('epoch', 12)), ('epoch_0.5.pth', ('epoch', 0.5)),
    ('step_400.safetensors', ('step', 400)), ('resnet18-7.pth', ('epoch', 7)), ('007.pth', ('epoch', 7)),
    ('Epoch 3.pth', ('epoch', 3)), ('model_best.pth', None), ('resnet18.pth', None), ('resnet18-5c106cde.pth', None),
    ('run_1_of_3.pth', None)])
def test_what_a_file_name_counts(name, counts):
  assert history._number(name) == counts


def test_files_are_found_in_order_and_read(tmp_path, caplog):
  variables = [write(tmp_path / f'epoch_{epoch}.safetensors') for epoch in (10, 2)][0]
  write(tmp_path / 'model_best.safetensors')
  (tmp_path / 'log.txt').write_text('')
  found = history.read(str(tmp_path), network())
  assert [entry.name for entry in found.checkpoints] == ['epoch 2', 'epoch 10'] and found.checkpoints[1].epoch == 10.0
  assert found.source is None
  assert [entry.name for entry in history.read(str(tmp_path), network(), (10,)).checkpoints] == ['epoch 10']
  with pytest.raises(ValueError, match='config.study.epochs has 3, and .* there are epoch 2, epoch 10'):
    history.read(str(tmp_path), network(), (3,))
  loaded = history.load(found.checkpoints[1], found.network, 32)
  np.testing.assert_array_equal(loaded.classifier['kernel'], variables['params']['heads']['source']['kernel'])
  np.testing.assert_array_equal(loaded.variables['params']['conv1']['kernel'], variables['params']['conv1']['kernel'])
  assert 'heads' not in loaded.variables['params'] and len(loaded.fingerprint) == 16


@pytest.mark.parametrize('names, words', [
    ([], 'holds no checkpoints: it is not the workdir of a run, and no file ends in'),
    (['model_best'], 'no file of .* has its epoch in its name'),
    (['a_epoch_1', 'b_epoch_2'], 'holds checkpoints of two runs, by their names: a_epoch_1.safetensors, b_epoch_2'),
    (['a_epoch_1', 'b_epoch_1'], 'two runs: a_epoch_1.safetensors and b_epoch_1.safetensors are both of epoch 1')])
def test_folders_that_are_refused(tmp_path, names, words):
  for name in names:
    (tmp_path / f'{name}.safetensors').touch()
  with pytest.raises(ValueError, match=words):
    history.read(str(tmp_path), network())


def test_no_folder(tmp_path):
  with pytest.raises(ValueError, match='config.checkpoints is empty'):
    history.read('', network())
  with pytest.raises(ValueError, match='there is no folder'):
    history.read(str(tmp_path / 'none'), network())


def test_another_network_and_damage_are_named(tmp_path):
  write(tmp_path / 'epoch_1.safetensors', width=8)
  broken = write(tmp_path / 'epoch_2.safetensors')
  broken['params']['layer1']['0']['bn1']['scale'][0] = np.nan
  save_file(export.state_dict(RESNET, flax.core.unfreeze(broken), 'source'), tmp_path / 'epoch_2.safetensors')
  (tmp_path / 'epoch_3.safetensors').write_bytes(b'no weights')
  first, second, third = history.read(str(tmp_path), network()).checkpoints
  with pytest.raises(ValueError, match='epoch 1 .*epoch_1.safetensors.*do not fit the model'):
    history.load(first, network(), 32)
  with pytest.raises(ValueError, match='epoch 2 .*not finite in params/layer1/0/bn1/scale'):
    history.load(second, network(), 32)
  with pytest.raises(ValueError, match='epoch 3 .*epoch_3.safetensors'):
    history.load(third, network(), 32)
