"""Co-Tuning: the term is the formula for hard and soft labels; the relation of classes is the paper's, whatever classes
lack images.
"""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import method_case
import numpy as np
import pytest
from scipy import special
from sklearn import linear_model

from ft_jax import methods
from ft_jax.methods import co_tuning
from ft_jax.methods.base import StepContext
from ft_jax.methods.co_tuning import CoTuning
from ft_jax.models.resnet import Outputs

K, S = 5, 8


def step_context(logits: np.ndarray, labels: np.ndarray) -> StepContext:
  return StepContext(None, {}, {}, {}, None, {'target': Outputs(None, {'pretrained': logits}, {})}, {}, labels, None,
                     None, None, None)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.floats(0.1, 10.0))
def test_term_and_gradient(seed, weight):
  """Of labels as numbers, and of mixed ones, where it is linear in them."""
  rng, count = np.random.default_rng(seed), 6
  logits, relation = 3 * rng.normal(size=(count, S)), rng.dirichlet(np.ones(S), K)
  labels, soft = rng.integers(0, K, count), rng.dirichlet(np.ones(K), count)
  term = lambda logits, targets: weight * np.mean(np.sum(-targets * special.log_softmax(logits, 1), 1))
  for given_labels, targets in ((labels, relation[labels]), (soft, soft @ relation)):
    loss = lambda logits, labels=given_labels: CoTuning(weight).loss(step_context(logits, labels),
                                                                     {'relation': relation}).loss
    with jax.enable_x64(True):
      value, gradient = jax.device_get(jax.value_and_grad(loss)(logits))
    np.testing.assert_allclose(value, term(logits, targets), rtol=1e-9)
    np.testing.assert_allclose(gradient, weight / count * (special.softmax(logits, 1) - targets), rtol=1e-6, atol=1e-9)
    step = 1e-5 * rng.normal(size=logits.shape)
    np.testing.assert_allclose(np.sum(gradient * 2 * step), term(logits + step, targets) - term(logits - step, targets),
                               rtol=1e-4, atol=1e-11)


def examples(count: int, classes: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
  """What a pre-trained network might say of images: each target class looks like two of its classes."""
  rng = np.random.default_rng(seed)
  labels = rng.choice(classes, count)
  logits = 1.5 * np.eye(S)[labels] + np.eye(S)[(3 * labels + 1) % S] + rng.normal(size=(count, S))
  return special.softmax(logits, 1), labels


def published(train, train_labels, val, val_labels):
  """The paper's procedure with scikit-learn, in float64, for classes that all have images."""
  best = None
  for c in sorted(co_tuning.STRENGTHS, reverse=True):
    fitted = linear_model.LogisticRegression(C=c, fit_intercept=False, tol=1e-8,
                                             max_iter=20000).fit(train, train_labels)
    right = fitted.score(val, val_labels)
    if best is None or right > best[0]:
      best = right, fitted.coef_.T
  scales = np.geomspace(1e-2, 1e2, 40001)
  logits = val @ best[1]
  losses = [-np.mean(special.log_softmax(a * logits, 1)[np.arange(len(val)), val_labels]) for a in scales[::100]]
  close = scales[max(0, 100 * int(np.argmin(losses)) - 100):][:201]
  losses = [-np.mean(special.log_softmax(a * logits, 1)[np.arange(len(val)), val_labels]) for a in close]
  joint = special.softmax(close[int(np.argmin(losses))] * best[1], 1).T * np.concatenate([train, val]).mean(0)
  return joint / joint.sum(1, keepdims=True)


@pytest.mark.parametrize('seed', [0, 1])
def test_calibrated_relation_is_the_papers(seed):
  train, train_labels = examples(150, list(range(K)), seed)
  val, val_labels = examples(60, list(range(K)), seed + 10)
  relation = co_tuning.calibrated(train, train_labels, val, val_labels, K)
  expected = published(train, train_labels, val, val_labels)
  assert relation.shape == (K, S) and expected.max() > 0.3  # it says something
  np.testing.assert_allclose(relation, expected, rtol=0.01, atol=2e-3)
  np.testing.assert_allclose(relation.sum(1), 1.0, rtol=1e-6)


def test_direct_relation_is_the_mean_of_each_class():
  train, labels = examples(30, [0, 1, 3], 0)
  relation = co_tuning.direct(train, labels, K)
  for k in range(K):
    np.testing.assert_allclose(relation[k], train[labels == k].mean(0) if k in labels else train.mean(0), rtol=1e-6)
  np.testing.assert_allclose(relation.sum(1), 1.0, rtol=1e-6)


def test_classes_without_images():
  """A class without training images has the mean of all; val images of such a class are left out; one image of a class
  is enough.
  """
  train, labels = examples(40, [0, 1, 3], 0)
  labels[0], labels[1:][labels[1:] == 3] = 3, 1
  val, val_labels = examples(30, [0, 1, 2, 3], 1)
  relation = co_tuning.calibrated(train, labels, val, val_labels, K)
  kept = val_labels != 2
  present = np.searchsorted([0, 1, 3], labels)
  np.testing.assert_allclose(relation.sum(1), 1.0, rtol=1e-6)
  for k in (2, 4):
    np.testing.assert_allclose(relation[k], np.concatenate([train, val]).mean(0), rtol=1e-5)
  assert np.isfinite(relation).all() and kept.any() and len(np.unique(present)) == 3
  # The others are as if there had never been more classes, but for p(s).
  without = co_tuning.calibrated(train, present, val[kept], np.searchsorted([0, 1, 3], val_labels[kept]), 3)
  prior = np.concatenate([train, val]).mean(0) / np.concatenate([train, val[kept]]).mean(0)
  expected = without * prior / (without * prior).sum(1, keepdims=True)
  np.testing.assert_allclose(relation[[0, 1, 3]], expected, rtol=1e-3, atol=1e-6)
  with pytest.raises(ValueError,
                     match=r'none is of a class with training images; use --config.methods.co_tuning.relation=direct'):
    co_tuning.calibrated(train, labels, val[~kept], val_labels[~kept], K)


def test_bad_settings():
  context = method_case.context(method_case.network())
  for method, message in ((CoTuning(1.0, 'reverse'), r"relation is 'reverse'; known: calibrated, direct"),
                          (CoTuning(1.0, scale=0.0), r'scale is 0.0; expected a number above 0')):
    with pytest.raises(ValueError, match=f'methods.co_tuning.{message}'):
      methods.check({'co_tuning': method}, context)
  with pytest.raises(ValueError,
                     match=r'methods.co_tuning needs a pre-trained classifier, but config.model.weights is empty'):
    methods.check({'co_tuning': CoTuning(1.0)}, dataclasses.replace(context, pretrained=False))
