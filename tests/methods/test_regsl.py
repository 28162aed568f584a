"""The configs of RegSL have the published numbers, and no fields of their own."""

from conftest import quick_main
import pytest
from test_main import fields

from configs import default, noisy, regsl

CLEAN = {  # D, radius of the head, gamma
    'indoor': (0.136810, 6.407802, 2.528838), 'aircraft': (1.183306, 5.277136, 1.276800),
    'cub': (0.204404, 23.785061, 4.738036),
    'caltech': (0.086800, 9.455294, 1.178599), 'cars': (1.334035, 8.269408, 3.476768),
    'dogs': (0.056132, 4.462818, 1.587226),
    'flowers': (0.131991, 10.767413, 4.980102)}
NOISY = {  # D, radius of the head, temperature
    '20': (7.802470, 14.077403, 2.0), '40': (8.471394, 19.019113, 2.0), '60': (10.757602, 19.815765, 2.0),
    '80': (9.203166, 6.415685, 1.5)}


def assert_published_training(config, batch=32):
  train = config.train
  assert (train.optimizer, train.learning_rate, train.weight_decay, train.batch_size, train.epochs, train.decay) == (
      'amsgrad', 1e-4, 0.0, batch, 30.0, 0.1)
  assert [round(part * 30) for part in train.milestones] == [10, 20] and train.learning_rate_groups == (('.*', 1.0),)
  assert config.target.val or config.target.val_fraction == (0.4 if config.target.train_per_class else 0.1)
  assert fields(config) == fields(default.get_config())


@pytest.mark.parametrize('name', CLEAN)
def test_clean(name):
  config = regsl.get_config(name)
  method = config.methods.layerwise
  assert (method.radius, method.head_radius, method.growth, method.distance) == (*CLEAN[name], 'frobenius')
  assert config.model.name == 'resnet101' and not config.methods.self_label.enabled and not config.noise.kind
  assert_published_training(config, 16 if name == 'flowers' else 32)


@pytest.mark.parametrize('percent', NOISY)
def test_noisy(percent):
  config = noisy.get_config(percent)
  constraints, labels = config.methods.layerwise, config.methods.self_label
  assert (constraints.radius, constraints.head_radius,
          labels.temperature) == NOISY[percent] and constraints.growth == 1.0
  assert (labels.enabled, labels.reweight_epoch, labels.correct_epoch, labels.threshold) == (True, 5, 10, 0.9)
  assert (config.noise.kind, config.noise.rate, config.model.name) == ('symmetric', int(percent) / 100, 'resnet18')
  assert_published_training(config)


@pytest.mark.parametrize('flags,words', [
    (['--config=configs/regsl.py:pets'],
     "error: unknown set 'pets'; expected :indoor, :aircraft, :cub, :caltech, :cars"),
    (['--config=configs/noisy.py:50'], "error: unknown noise '50'; expected :20, :40, :60, :80 after")])
def test_wrong_input_is_one_clear_line(tmp_path, flags, words):
  run = quick_main(*flags, f'--workdir={tmp_path / "run"}')
  assert run.returncode != 0 and words in run.stderr and 'Traceback' not in run.stderr, run.stderr
