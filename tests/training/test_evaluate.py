"""Metrics are exact: padding counts nothing, every example counts once, classes weigh the same in the mean per class.
"""

import dataclasses
import types

import jax
import method_case
import numpy as np
import optax
import pytest

from ft_jax import parallel
from ft_jax.data import open_set
from ft_jax.data.pipeline import EvalBatches, Transform
from ft_jax.jobs import predict
from ft_jax.models import build
from ft_jax.studies.stability import curvatures
from ft_jax.training.evaluate import evaluate, Evaluation, make_predict


def test_equals_one_pass_over_everything(photos):
  """Uneven last batches on four devices against all images in one batch on one."""
  source = open_set(f'folder:{photos}', 'test')
  transform = Transform(16, short_side=16)
  model = build('resnet18', {'target': 4}, width=4)
  images = np.stack([transform.evaluate(source[i]) for i in range(len(source))])
  variables = jax.device_get(jax.jit(model.init)(jax.random.key(1), images))
  logits = np.asarray(jax.jit(model.apply)(variables, images).logits['target'])
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, source.labels)
  right = logits.argmax(-1) == source.labels

  predict, copies = make_predict(model, 'target'), parallel.replicate(variables)
  for count in (1, 8, 19):
    result = evaluate(predict, copies, EvalBatches(source.subset(range(count)), transform, 8), 4)
    expected = np.zeros((4, 4), int)
    np.add.at(expected, (source.labels[:count], logits[:count].argmax(-1)), 1)
    np.testing.assert_array_equal(result.confusion, expected)
    np.testing.assert_array_equal(result.predictions, logits[:count].argmax(-1))
    np.testing.assert_allclose([result.loss, result.top1], [np.mean(losses[:count]), np.mean(right[:count])], rtol=1e-5)


def _evaluated(batches):
  return evaluate(jax.pmap(lambda batch: batch), None, batches, 4)


def _teacher(batches):
  model = method_case.network()
  context = method_case.context(model, method_case.start_of(model))
  return dataclasses.replace(context, batches=lambda split: batches).teacher_outputs('train')


def _probed(batches):
  model = method_case.network()
  return list(curvatures(model, 'target', None, batches, seed=0, numbers=(0,)))


def _predicted(batches):
  run = types.SimpleNamespace(model=None, head='target', variables={}, transform=None, config=types.SimpleNamespace(
      train=types.SimpleNamespace(batch_size=4)))
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(predict, 'EvalBatches', lambda *args: Batches(batches))
    return predict.predict(run, Batches(range(12), ids=np.arange(12)), 1, False)


class Batches(list):
  """With what else is asked of them."""

  def __init__(self, batches, **attributes):
    super().__init__(batches)
    self.__dict__.update(attributes)


@pytest.mark.parametrize('run', [_evaluated, _teacher, _probed, _predicted])
def test_a_batch_is_read_while_the_next_one_is_under_way(run, monkeypatch):
  """In every pass over a split: evaluation, the teacher's, the Hessian's, predictions. No device waits until the host
  has read a batch.
  """
  events, copies = [], parallel.unreplicate
  row = lambda k: np.arange(4 * k, 4 * k + 4, dtype=np.int32)
  of_images = lambda batch: {**batch, 'prediction': batch['label'], 'loss': batch['label'] + 0.5,
                             'features': batch['label'][:, None],
                             'classes': batch['label'][:, None], 'probabilities': batch['label'][:, None] + 0.5}
  result = of_images if run is not _probed else lambda batch: {'products': {'w': np.float32(1)},
                                                               'examples': np.float32(4)}

  def mapped(function, **kwargs):
    def dispatch(*args):
      batch = next(arg for arg in args if isinstance(arg, dict) and 'label' in arg)
      events.append('dispatched')
      return parallel.replicate(result({key: value.reshape(-1) for key, value in batch.items()}))
    return dispatch

  monkeypatch.setattr(jax, 'pmap', mapped)
  monkeypatch.setattr(parallel, 'unreplicate', lambda tree: events.append('read') or copies(tree))
  batches = [{'label': np.arange(4, dtype=np.int32), 'row': row(k), 'mask': np.ones(4, bool)} for k in range(3)]
  run([{**batch, 'input': np.zeros(4, np.uint8)} for batch in batches])
  assert events == ['dispatched', 'dispatched', 'read', 'dispatched', 'read', 'read']


def test_mean_per_class_weighs_classes_and_leaves_out_absent_ones():
  evaluation = Evaluation(0.0, np.array([[8, 2, 0], [1, 1, 0], [0, 0, 0]]), np.zeros(0, np.int32))
  assert evaluation.top1 == 9 / 12 and evaluation.mean_per_class == pytest.approx((0.8 + 0.5) / 2)
  assert np.isnan(evaluation.per_class[2])
