"""The head that is fitted once more at the end: it is a logistic regression, and used only if val says so."""

import numpy as np
import pytest

from configs import default
from ft_jax import logistic, trained
from ft_jax.data.image_set import ImageSet
from ft_jax.jobs import finetune
from ft_jax.training import refit
from ft_jax.training.evaluate import Evaluation


def test_the_head_is_the_logistic_regression_that_val_chooses():
  """On features as they come, whatever their mean and scale."""
  rng = np.random.default_rng(0)
  labels = np.arange(60) % 3
  features = (50 + 7 * (rng.normal(size=(60, 5)) + np.eye(5)[labels])).astype(np.float32)
  train, val = slice(0, 40), slice(40, 60)
  head, strength = refit.fit_head(features[train], labels[train], features[val], labels[val], 3, 'top1')
  mean = features[train].mean(0, dtype=np.float64)
  scale = np.sqrt(np.mean(np.sum((features[train] - mean) ** 2, 1)))
  centred = lambda logits: logits - logits.mean(1, keepdims=True)
  accuracies, found = {}, features[val] @ head['kernel'] + head['bias']
  for each in refit.STRENGTHS:
    classifier = logistic.fit(((features[train] - mean) / scale).astype(np.float32), labels[train], 3, strength=each)
    logits = (features[val] - mean) / scale @ classifier.weights + classifier.bias
    accuracies[each] = np.mean(logits.argmax(1) == labels[val])
    if each == strength:
      np.testing.assert_allclose(centred(found), centred(logits), atol=0.05)
  assert accuracies[strength] == max(accuracies.values()) > 0.5


def config(**fields):
  """A network that learns nothing, so that its head is a random one."""
  made = default.get_config()
  made.update_from_flattened_dict({
      'model.name': 'resnet18', 'model.width': 2, 'model.stages': 1, 'image_size': 16, 'train.batch_size': 8,
      'selection.method': 'none', 'target.test': 'rest', 'target.train_per_class': 8, 'target.val_fraction': 0.5,
      'train.steps': 2, 'train.learning_rate': 0.0, 'train.ema_decay': 0.5, 'refit_head': True, **fields})
  return made


@pytest.fixture(scope='module')
def target():
  """Images of class k are of another brightness."""
  labels = np.arange(45) % 3
  images = np.random.default_rng(0).integers(0, 40, (45, 16, 16, 3)) + 90 * labels[:, None, None, None]
  return {'train': ImageSet.from_arrays(images.astype(np.uint8), labels)}


def test_a_better_head_is_used_and_a_resumed_run_does_not_fit_it_again(target, tmp_path, monkeypatch):
  results = finetune.run(config(), tmp_path / 'run', target=target)
  about = results['refit_head']
  assert about['kept'] and about['val'] < about['val_refit'] == results['val']['top1'] == 1.0
  assert results['best_step'] <= 2 and results['test']['top1'] > 0.9
  run = trained.load(str(tmp_path / 'run'))
  images = np.stack([target['train'][row].image for row in range(45)])
  predictions = run.model.predict(run.variables, images).logits['target'].argmax(1)
  assert np.mean(predictions == target['train'].labels) > 0.9
  monkeypatch.setattr(refit, 'fit_head', None)
  for name in ('results.json', 'report.html'):
    (tmp_path / 'run' / name).unlink()
  again = finetune.run(config(), tmp_path / 'run', target=target)
  assert {name: again[name] for name in ('refit_head', 'val', 'test', 'best_step')} == {
      name: results[name] for name in ('refit_head', 'val', 'test', 'best_step')}


def test_a_head_that_is_no_better_is_not_used(target, tmp_path, monkeypatch):
  worse = Evaluation(9.0, np.ones((3, 3), int) - np.eye(3, dtype=int), np.zeros(6, int))
  plain = finetune.run(config(refit_head=False), tmp_path / 'plain', target=target)
  monkeypatch.setattr(refit, 'evaluate_split', lambda *_: worse)
  results = finetune.run(config(), tmp_path / 'refit', target=target)
  assert not results['refit_head']['kept'] and plain['refit_head'] is None
  assert results['test'] == plain['test'] and results['val'] == plain['val']
