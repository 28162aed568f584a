"""Metrics are exact: padding counts nothing, every example counts once, classes weigh the same in the mean per class."""

import jax
import numpy as np
import optax
import pytest

from ft_jax import parallel
from ft_jax.data.pipeline import EvalBatches, Transform
from ft_jax.data.sources import open_source
from ft_jax.evaluate import evaluate, Evaluation, make_predict
from ft_jax.models import resnet


def test_equals_one_pass_over_everything(photos):
  """Uneven last batches on four devices against all images in one batch on one."""
  source = open_source(f'folder:{photos}', 'test')
  transform = Transform(16, short_side=16)
  model = resnet.build('resnet18', {'target': 4}, width=4)
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
    np.testing.assert_allclose([result.loss, result.top1], [np.mean(losses[:count]), np.mean(right[:count])], rtol=1e-5)


def test_mean_per_class_weighs_classes_and_leaves_out_absent_ones():
  evaluation = Evaluation(0.0, np.array([[8, 2, 0], [1, 1, 0], [0, 0, 0]]))
  assert evaluation.top1 == 9 / 12 and evaluation.mean_per_class == pytest.approx((0.8 + 0.5) / 2)
  assert np.isnan(evaluation.per_class[2])
