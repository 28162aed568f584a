"""What a training starts from: the rates of fresh and of pre-trained heads, and settings that are refused before
anything long.
"""

import jax
from ml_collections import ConfigDict
import numpy as np
import optax
import pytest

from configs import default
from ft_jax.jobs import finetune, pretrain
from ft_jax.models import build
from ft_jax.models.batch_norm import BatchNorm
from ft_jax.training import fit, initial_weights
from ft_jax.training.settings import Trainable, Training


def config(**fields) -> ConfigDict:
  made = default.get_config()
  made.target.name, made.source.name, made.model.weights, made.image_size = 'digits:target', 'digits:pool', 'tests', 32
  made.model.name, made.model.width, made.train.batch_size = 'resnet18', 4, 16
  made.update_from_flattened_dict({key.replace('__', '.'): value for key, value in fields.items()})
  return made


def test_fresh_heads_learn_ten_times_as_fast():
  """Those that the weights have learn like the rest; where nothing is pre-trained all learn alike."""
  model = build('resnet18', {'target': 3, 'source': 5}, width=2)
  params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8))['params']
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
  for fresh, expected in ((('target', 'source'), (10, 10, 1)), (('target',), (10, 1, 1)), ((), (1, 1, 1))):
    training = Training.from_config(config(train__momentum=0.0, train__nesterov=False, train__weight_decay=0.0).train)
    tx = training.make_optimizer(optax.constant_schedule(1.0), training.factors(model, params, fresh))
    steps, _ = tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params)
    assert (-steps['heads']['target']['bias'][0], -steps['heads']['source']['bias'][0],
            -steps['conv1']['kernel'][0, 0, 0, 0]) == expected


@pytest.mark.parametrize('fields,words', [
    ({'train__freeze': 'layr1/.*'}, "train.freeze is 'layr1/..', which no parameter matches; paths look like"),
    ({'train__freeze': '('}, r"train.freeze is '\(.*expected backbone, or a regular expression"),
    ({'train__schedule': 'linear'}, "train.schedule is 'linear'; known: milestones, cosine, constant"),
    ({'train__optimizer': 'sdg'}, "train.optimizer is 'sdg'; known: sgd, adam, adamw, amsgrad"),
    ({'train__freeze': '.*'}, "train.freeze is '..', which leaves no parameter to train"),
    ({'train__ema_decay': 1.0}, 'train.ema_decay is 1.0; expected a number from 0 to below 1'),
    ({'train__accumulate_steps': 3},
     'train.accumulate_steps is 3, into which the 4 images of a device .train.batch_size 16. cannot be cut evenly'),
    ({'train__accumulate_steps': 2, 'source_ratio': 0.75},
     'train.accumulate_steps is 2, into which the 3 images of a device .config.source_ratio'),
    ({'target__train_fraction': 0.0}, 'config.target.train_fraction is 0.0; expected a number above 0, up to 1'),
    ({'target__train_fraction': 0.5, 'target__train_per_class': 3},
     'train_fraction and config.target.train_per_class both say'),
    ({'target__test': 'rest'},
     "test is 'rest', .* config.target.train_per_class is 0 and train_fraction is 1; set either"),
    ({'methods__l2_sp__weight': 0.1, 'model__weights': ''},
     'methods.l2_sp needs pre-trained weights, but config.model.weights is empty'),
    ({'methods__bi_tuning__weight': 1.0, 'train__learning_rate_groups': (('heads/.*', 1.0),
                                                                         ('(conv|bn|layer).*', 1.0))},
     "covers no parameter 'methods/bi_tuning/"),
    ({'model__weights': 'pretrain', 'pretrain__freeze': 'layr.*'},
     "train.freeze is 'layr..', which no parameter matches"),
    ({'methods__l2_sp__weight': -0.1}, 'methods.l2_sp.weight is -0.1; expected a number above 0'),
])
def test_wrong_settings_are_refused_at_once(fields, words, monkeypatch):
  monkeypatch.setattr(initial_weights, 'check_weights', lambda config: None)
  with pytest.raises(ValueError, match=words):
    finetune.Settings.from_config(config(**fields))
  finetune.Settings.from_config(config(methods__bi_tuning__weight=1.0,
                                       train__learning_rate_groups=(('methods/.*', 10.0), ('.*', 1.0))))


@pytest.mark.parametrize('fields,refused', [
    ({}, False), ({'train__batch_size': 1}, False),  # with an image of the source they are two
    ({'train__batch_size': 1, 'selection__method': 'none'}, True),
    ({'train__batch_size': 2, 'selection__method': 'none'}, False),
    ({'train__batch_size': 4, 'train__accumulate_steps': 4, 'selection__method': 'none'}, True),
    ({'train__batch_size': 1, 'selection__method': 'none', 'image_size': 64}, False),
    ({'train__batch_size': 1, 'selection__method': 'none', 'model__stem': '3x3'}, False),
    ({'train__batch_size': 1, 'selection__method': 'none', 'model__batch_norm': 'frozen'}, False),
    ({'train__batch_size': 1, 'selection__method': 'none', 'train__freeze': 'layer4/.*'}, False),
    ({'train__batch_size': 1, 'selection__method': 'none', 'train__freeze': 'layer4/0/.*'}, True),
    ({'model__weights': 'pretrain', 'pretrain__batch_size': 1}, True)])
def test_batch_norm_over_one_value_is_refused(fields, refused, monkeypatch):
  """What it gives then does not depend on the image; torch refuses it too."""
  monkeypatch.setattr(initial_weights, 'check_weights', lambda config: None)
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  if not refused:
    finetune.Settings.from_config(config(**fields))
    return
  with pytest.raises(ValueError,
                     match='BatchNorm layer4/[01]/bn1 would see one value per channel, .* 1 image of 1x1 pixels there '
                           '.*train.batch_size [14], devices 1, train.accumulate_steps [14], image_size 32, '
                           '.*model.stem 7x7'):
    finetune.Settings.from_config(config(**fields))


@pytest.mark.parametrize('axis_name', [None, 'batch'])
def test_batch_norm_of_one_value_gives_its_bias(axis_name):
  """Why: one image of one pixel a device comes out alike, whatever is in it, unless devices share statistics."""
  layer = BatchNorm(train=True, axis_name=axis_name)
  variables = {'params': {'scale': np.ones(4), 'bias': np.arange(4.0)},
               'batch_stats': {'mean': np.zeros(4), 'var': np.ones(4)}}
  images = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 4)).astype(np.float32)
  normalised = jax.vmap(lambda x: layer.apply(variables, x, mutable=['batch_stats'])[0], axis_name=axis_name)(images)
  assert np.allclose(normalised, np.arange(4.0), atol=1e-3) == (axis_name is None)


@pytest.mark.parametrize('sync,devices,batch,refused', [(False, 4, 4, True), (True, 4, 4, False), (True, 1, 1, True),
                                                        (False, 4, 8, False)])
def test_batch_norm_on_several_devices(sync, devices, batch, refused, monkeypatch):
  """Each device has its own statistics, or all of them share one."""
  monkeypatch.setattr(jax, 'device_count', lambda: devices)
  model = build('resnet18', {'target': 2}, width=4, size=32, axis_name='batch' if sync else None)
  if not refused:
    Trainable.of(Training.from_config(config(train__batch_size=batch).train), model, batch)
    return
  with pytest.raises(ValueError, match=f'images per step {batch}, .* devices {devices}, '
                                       + ('.*, model.sync_batch_norm=true or ' if devices > 1
                                          else '.*3x3, or model.batch_norm=frozen$')):
    Trainable.of(Training.from_config(config(train__batch_size=batch).train), model, batch)


@pytest.mark.parametrize('fields,words', [
    ({}, ''), ({'train__learning_rate': 0.0}, 'train.learning_rate is 0, so nothing is learnt'),
    ({'source_weight': 0.0}, 'config.source_weight is 0: source images are read'),
    ({'train__freeze': 'backbone'}, "train.freeze is 'backbone', so source images train their own head alone"),
    ({'train__freeze': 'backbone', 'model__weights': '', 'selection__method': 'none'},
     'all parameters but the heads stay random'),
    ({'train__freeze': 'backbone', 'selection__method': 'none'}, ''),
    ({'source_weight': 0.0, 'methods__fixmatch__weight': 1.0}, '')])
def test_settings_with_which_a_run_means_nothing_are_told(fields, words, caplog, monkeypatch):
  monkeypatch.setattr(initial_weights, 'check_weights', lambda config: None)
  finetune._log_doubts(finetune.Settings.from_config(config(**fields)))
  assert words in caplog.text and bool(words) == bool(caplog.text)


def test_pre_training_refuses_what_is_for_fine_tuning(tmp_path):
  for fields, words in (({'methods__bss__weight': 0.1}, 'config.methods.bss is switched on, which is for fine-tuning'),
                        ({'noise__kind': 'symmetric', 'noise__rate': 0.5},
                         "config.noise.kind is 'symmetric', which is for the target")):
    with pytest.raises(ValueError, match=words):
      pretrain.run(config(model__weights='', **fields), tmp_path)


def test_random_weights_are_recorded_by_how_they_were_drawn():
  """On another kind of machine the last bits of drawn numbers differ; of pre-trained weights every bit counts."""
  model = build('resnet18', {'target': 3}, width=1)
  here = initial_weights.init_variables(model, 0, None)
  there = jax.tree.map(lambda x: np.nextafter(x, np.float32(np.inf)), here)
  assert initial_weights.weights_fingerprint(here) != initial_weights.weights_fingerprint(there)
  record = lambda variables, pretrained, seed=0: fit.weights_record(fit.InitialNetwork(model, variables, pretrained,
                                                                                       None), seed)
  assert record(here, {}) == record(there, {}) == {'random weights': 'drawn with seed 0'}
  assert record(here, {}, 1) != record(here, {})
  assert record(here, here) != record(there, there)
