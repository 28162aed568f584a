"""Logistic regression: its minimum is scikit-learn's, also in float32, of classes without examples and from another
start."""

import jax
import numpy as np
import pytest
from sklearn import linear_model

from ft_jax import logistic

N, D, K = 90, 7, 4


@pytest.fixture(autouse=True)
def _compiled_as_users_do():
  """How many iterations float32 takes at the minimum depends on the last bits."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Overlapping classes, features with a large mean and of several scales; class 2 has no example."""
  rng = np.random.default_rng(seed)
  labels = rng.choice([0, 1, 3], N)
  features = rng.normal(size=(K, D))[labels] + rng.normal(size=(N, D)) + 5.0
  return features * np.geomspace(0.1, 3.0, D), labels


def objective(features: np.ndarray, labels: np.ndarray, weights: np.ndarray, bias: np.ndarray,
              strength: float) -> float:
  logits = features.astype(np.float64) @ weights + bias
  return float(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]) +
               strength / 2 * np.sum(weights ** 2))


@pytest.mark.parametrize('bias', [True, False])
def test_minimum_is_that_of_scikit_learn(bias):
  """In float64 the weights agree; in float32 the loss does."""
  features, labels = problem()
  present = np.searchsorted([0, 1, 3], labels)
  strength = 0.02
  other = linear_model.LogisticRegression(C=1 / (strength * N), fit_intercept=bias, solver='newton-cg',
                                          tol=1e-10).fit(features, present)
  lowest = objective(features, present, other.coef_.T, other.intercept_, strength)
  with jax.enable_x64(True):
    found = logistic.fit(features, present, 3, strength=strength, bias=bias, tolerance=1e-10)
  assert found.converged and found.weights.dtype == np.float64
  np.testing.assert_allclose(found.weights, other.coef_.T, atol=1e-6)
  np.testing.assert_allclose(found.bias - found.bias.mean(), other.intercept_ - other.intercept_.mean(), atol=1e-5)
  np.testing.assert_allclose([found.loss, objective(features, present, found.weights, found.bias, strength)], lowest,
                             rtol=1e-9)
  single = logistic.fit(features.astype(np.float32), present, 3, strength=strength, bias=bias)
  assert single.converged and single.weights.dtype == np.float32
  assert objective(features, present, single.weights.astype(np.float64), single.bias, strength) <= lowest * (1 + 1e-4)
  again = logistic.fit(features.astype(np.float32), present, 3, strength=strength, bias=bias, start=single)
  assert again.iterations <= 2 < single.iterations and again.loss <= single.loss * (1 + 1e-6)


def test_ends_and_says_so():
  """Few iterations are not enough; classes without examples are never told; without a penalty the loss goes to zero
  where it can."""
  features, labels = problem()
  given = features.astype(np.float32)
  short, whole = logistic.fit(given, labels, K, strength=1e-3, max_iterations=3), logistic.fit(given, labels, K,
                                                                                               strength=1e-3)
  assert not short.converged and short.iterations == 3 and short.loss > whole.loss and whole.converged
  assert 2 not in np.argmax(given @ whole.weights + whole.bias, 1)
  separable = np.eye(K, D, dtype=np.float32)[labels]
  free = logistic.fit(separable, labels, K, strength=0.0)
  assert free.converged and free.loss < 1e-4 and np.isfinite(free.weights).all()


def test_bad_input():
  features, labels = np.ones((4, 2), np.float32), np.array([0, 1, 1, 2])
  for args, strength, message in (
      ((features, labels[:3], 3), 1.0, r'features are \(4, 2\) and labels \(3,\); expected'),
      ((features, labels, 2), 1.0, r'labels are 0 to 2; expected 0 to 1, as there are 2 classes'),
      ((features * np.nan, labels, 3), 1.0, r'not finite'),
      ((features, labels, 3), -1.0, r'strength is -1.0; expected a number from 0')):
    with pytest.raises(ValueError, match=message):
      logistic.fit(*args, strength=strength)
