"""Scores of transferability equal the published values and plain formulas, also where those are undefined or slow."""

import itertools
import tracemalloc
import warnings

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from sklearn import covariance

from ft_jax.studies import transferability
from ft_jax.studies.transferability import correlate, h_score, leep, logme, nce, transrate


def case(n: int, d: int, classes: int, seed: int = 0, rank: int | None = None) -> tuple[np.ndarray, np.ndarray,
                                                                                        np.ndarray]:
  """Features around class means, with correlated dimensions; probabilities of seven source classes."""
  rng = np.random.default_rng(seed)
  labels = np.append(np.arange(classes), rng.integers(0, classes, n - classes))
  inner = rank or d
  features = (rng.normal(size=(classes, inner))[labels] +
              rng.normal(size=(n, inner))) @ rng.normal(size=(inner, d)) + 2.0
  return features, labels, rng.dirichlet(np.full(7, 0.3), n)


# The formulas, written plainly.

def plain_h_score(features, labels, regularised=False):
  g = np.stack([features[labels == y].mean(0) for y in labels])
  if not regularised:
    return np.trace(np.linalg.pinv(np.cov(features, rowvar=False), rcond=1e-10) @ np.cov(g, rowvar=False))
  shrunk = covariance.LedoitWolf().fit(features - features.mean(0))
  return np.trace(np.linalg.inv(shrunk.covariance_) @ ((1 - shrunk.shrinkage_) * np.cov(g, rowvar=False)))


def plain_leep(theta, labels):
  joint = np.stack([theta[labels == y].sum(0) for y in range(labels.max() + 1)]) / len(labels)
  given = joint / joint.sum(0)
  return np.mean([np.log(np.sum(given[y] * row)) for y, row in zip(labels, theta)])


def plain_nce(source, labels):
  total = 0.0
  for z, y in itertools.product(set(source), set(labels)):
    both = np.mean((source == z) & (labels == y))
    total += both * np.log(both / np.mean(source == z)) if both else 0.0
  return total


def plain_logme(features, labels):
  n, d = features.shape
  evidences = []
  for y in np.unique(labels):
    column, alpha, beta = (labels == y).astype(float), 1.0, 1.0
    for _ in range(11):
      precision = alpha * np.eye(d) + beta * features.T @ features
      m = beta * np.linalg.solve(precision, features.T @ column)
      gamma = d - alpha * np.trace(np.linalg.inv(precision))
      weight, error = m @ m, np.sum((column - features @ m) ** 2)
      before, (alpha, beta) = alpha / beta, (gamma / weight, (n - gamma) / error)
      if abs(alpha / beta - before) / before < 0.01:
        break
    determinant = np.linalg.slogdet(alpha * np.eye(d) + beta * features.T @ features)[1]
    evidences.append((d * np.log(alpha) +
                      n * np.log(beta) - determinant - beta * error - alpha * weight - n * np.log(2 * np.pi)) / 2 / n)
  return np.mean(evidences)


def plain_transrate(features, labels, epsilon=1e-4):
  rate = lambda f: np.linalg.slogdet(np.eye(f.shape[1]) + f.T @ f / (len(f) * epsilon))[1] / 2
  centred = features - features.mean(0)
  return rate(centred) - np.mean([rate(centred[labels == y]) for y in np.unique(labels)])


@pytest.mark.parametrize('i', range(3))
def test_published_values(shared, i):
  """By the functions of the Transfer-Learning-Library; case 2 has fewer images than dimensions."""
  reference = np.load(shared / 'reference/ranking/tllib_ranking.npz')
  found = transferability.scores(*(reference[f'{name}{i}'] for name in ('features', 'labels', 'source_probs')))
  for name, published in (('h_score', 'hscore'), ('leep', 'leep'), ('nce', 'nce'), ('logme', 'logme'),
                          ('transrate', 'transrate')):
    assert found[name] == pytest.approx(float(reference[f'{published}{i}']), rel=1e-6), name


@pytest.mark.parametrize(('n', 'd', 'rank'),
                         [(90, 12, None), (30, 60, None), (50, 49, None), (40, 1, None), (60, 20, 5)])
def test_formulas(n, d, rank):
  """More images than dimensions and fewer, as many as there are ways to differ, one dimension, dimensions that depend
  on others."""
  features, labels, theta = case(n, d, 6, rank=rank)
  assert h_score(features, labels) == pytest.approx(plain_h_score(features, labels) if d > 1 else
                                                    between_of_one(features[:, 0], labels), rel=1e-6)
  # Of one dimension nothing is shrunk; the covariance of Ledoit and Wolf is divided by n.
  regularised = plain_h_score(features, labels, True) if d > 1 else n / (n - 1) * between_of_one(features[:, 0], labels)
  assert h_score(features, labels, regularised=True) == pytest.approx(regularised, rel=1e-8)
  assert logme(features, labels) == pytest.approx(plain_logme(features, labels), rel=1e-6)
  assert transrate(features, labels) == pytest.approx(plain_transrate(features, labels), rel=1e-8)
  assert transrate(features, labels, 0.5) == pytest.approx(plain_transrate(features, labels, 0.5), rel=1e-8)
  assert leep(theta, labels) == pytest.approx(plain_leep(theta, labels), rel=1e-12)
  assert nce(theta.argmax(1), labels) == pytest.approx(plain_nce(theta.argmax(1), labels), rel=1e-12)
  if rank:  # what rounding adds is no dimension
    noisy = features + 1e-10 * np.abs(features).max() * np.random.default_rng(3).normal(size=features.shape)
    assert h_score(noisy, labels) == pytest.approx(h_score(features, labels), rel=1e-6)


def between_of_one(values, labels):
  """Variance of the class means over variance."""
  means = np.array([values[labels == y].mean() for y in labels])
  return means.var() / values.var()


@pytest.mark.parametrize('scale', [1.0, 1e6])
def test_logme_where_images_are_fewer_than_dimensions(scale):
  """From singular vectors that are known: nothing is outside what they explain, and residuals far below rounding
  decide."""
  rng, sizes = np.random.default_rng(0), np.array([3, 7, 10, 13, 27])
  u, v = np.linalg.qr(rng.normal(size=(60, 60)))[0], np.linalg.qr(rng.normal(size=(90, 60)))[0]
  values, labels = scale * np.geomspace(3, 0.01, 60), np.repeat(np.arange(5), sizes)
  evidences = []
  for y in range(5):
    along, alpha, beta = (u.T @ (labels == y)) ** 2, 1.0, 1.0
    for _ in range(11):
      ratio = alpha / beta
      left = ratio / (values ** 2 + ratio)
      weight, error = np.sum(along * (1 - left) ** 2 / values ** 2), np.sum(along * left ** 2)
      alpha, beta = np.sum(1 - left) / weight, np.sum(left) / error
      if abs(alpha / beta / ratio - 1) < 0.01:
        break
    evidences.append(np.mean(np.log(alpha) + np.log(beta) - np.log(alpha + beta * values ** 2) - np.log(2 * np.pi)) / 2
                     - (beta * error + alpha * weight) / 120)
  assert logme(u * values @ v.T, labels) == pytest.approx(np.mean(evidences), rel=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 10), st.sampled_from([1e-3, 1.0, 1e3]),
       st.sampled_from([0.0, 1.0, 3.0]))
def test_ledoit_and_wolf_is_scikit_learn(n, d, seed, scale, strength):
  """Of any shape and scale, with more structure or less, up to where all is shrunk."""
  rng = np.random.default_rng(seed)
  features = scale * (rng.normal(size=(n, d)) + strength * rng.normal(size=(n, 1)) * rng.normal(size=d))
  expected = covariance.ledoit_wolf_shrinkage(features)
  centred, _ = transferability._centred(features, np.zeros(n, int))
  assert transferability._shrinkage(centred) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_what_scores_do_not_depend_on():
  """Names of the classes and gaps between them, order, and for the H-score any map of the features that can be
  undone."""
  features, labels, theta = case(80, 10, 5)
  names, order = np.array([7, 0, 40, 3, 12]), np.random.default_rng(1).permutation(80)
  before = transferability.scores(features, labels, theta)
  after = transferability.scores(features[order], names[labels][order], theta[order])
  assert list(before) == list(transferability.SCORES) == list(after)
  for name, value in before.items():
    assert after[name] == pytest.approx(value, rel=1e-9), name
  mixed = features @ np.random.default_rng(2).normal(size=(10, 10)) * 50 + 9
  assert h_score(mixed, labels) == pytest.approx(before['h_score'], rel=1e-9)
  single = transferability.scores(features.astype(np.float32), labels.astype(np.int32), theta.astype(np.float32))
  for name, value in before.items():
    assert single[name] == pytest.approx(value, rel=1e-4), name
  without = transferability.scores(features, labels, None)
  assert without == {**before, 'leep': None, 'nce': None}
  assert before['h_score'] == h_score(features, labels)
  assert before['h_score_regularised'] == h_score(features, labels, True)
  assert before['transrate'] == transrate(features, labels) and before['nce'] == nce(theta.argmax(1), labels)


def test_where_formulas_have_no_value():
  """A dead network, one image, one class, source classes that are never seen: numbers, and no warning."""
  labels = np.array([0, 0, 1, 2])
  zeros = transferability.scores(np.zeros((4, 3)), labels, np.eye(4, 6)[[0, 0, 1, 2]])
  assert (zeros['h_score'], zeros['h_score_regularised'], zeros['transrate']) == (0, 0, 0)
  column = np.array([0.5, 0.25, 0.25])  # the evidence of noise alone, at its largest: variance |y|^2 / n
  assert zeros['logme'] == pytest.approx(np.mean(-0.5 - 0.5 * np.log(2 * np.pi * column)))
  assert zeros['leep'] == zeros['nce'] == 0  # each source class tells the label
  alone = transferability.scores(np.array([[1.0, 2.0]]), np.array([3]), np.array([[0.5, 0.5]]))
  assert (alone['h_score'], alone['h_score_regularised'], alone['transrate'], alone['leep'], alone['nce']) == (0, 0, 0,
                                                                                                               0, 0)
  assert np.isfinite(alone['logme'])
  features, _, theta = case(20, 4, 3)
  one = transferability.scores(features, np.zeros(20, int), theta)
  assert [one[name] for name in ('h_score', 'h_score_regularised', 'transrate', 'leep',
                                 'nce')] == pytest.approx([0] * 5, abs=1e-12)
  assert np.isfinite(one['logme'])


def test_memory_grows_with_the_images_and_not_their_pairs():
  """20,000 images of 16 dimensions: a matrix of their pairs would take 3,200 MB."""
  features, labels, theta = case(20_000, 16, 50)
  tracemalloc.start()
  transferability.scores(features, labels, theta)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 20 * features.nbytes


def test_correlations():
  """By counting pairs; None where there is nothing to order; checkpoints without one of the values are left out."""
  scores, accuracies = [0.1, 0.4, 0.3, 0.9, 0.8], [0.2, 0.3, 0.5, 0.7, 0.6]
  found = correlate(scores, accuracies)
  signs = [np.sign((scores[i] - scores[j]) * (accuracies[i] - accuracies[j]))
           for i, j in itertools.combinations(range(5), 2)]
  assert found.kendall == pytest.approx(np.mean(signs)) == pytest.approx(0.8)
  # Of each pair the weights 1 / (rank + 1) are added, ranks from 0 for the best; by scores and by accuracies, the mean
  # of both.
  taus = []
  for by in (scores, accuracies):
    weight = 1 / (np.argsort(np.argsort(-np.array(by))) + 1)
    weights = [weight[i] + weight[j] for i, j in itertools.combinations(range(5), 2)]
    taus.append(np.average(signs, weights=weights))
  assert found.weighted_kendall == pytest.approx(np.mean(taus))
  assert found.weighted_kendall != pytest.approx(found.kendall)
  assert found.pearson == pytest.approx(np.corrcoef(scores, accuracies)[0, 1])
  assert correlate([*scores, None, 5.0], [*accuracies, 0.1, None]) == found
  assert correlate([1, 2, 3], [10, 20, 40])[:2] == pytest.approx((1, 1))
  assert correlate([1, 2, 3], [3, 2, 1])[:2] == pytest.approx((-1, -1))
  for nothing in (([1, 2], [1, 2]), ([], []), ([None] * 5, accuracies), ([0.1 + 0.2, 0.3, 0.3], [1, 2, 3]),
                  ([1, 2, 3], [0, 0, 0])):
    assert correlate(*nothing) == (None, None, None)
  with pytest.raises(ValueError, match='3 scores and 2 accuracies'):
    correlate([1, 2, 3], [1, 2])
  with pytest.raises(ValueError, match='expected finite numbers'):
    correlate([1, 2, np.nan], [1, 2, 3])


def test_bad_input():
  features, labels, theta = case(20, 4, 3)
  hole = features.copy()
  hole[5, 1] = np.nan
  for call, message in (
      (lambda: h_score(features, labels[1:]),
       r'features are \(20, 4\) and labels \(19,\); expected \[n, d\] and \[n\]'),
      (lambda: logme(features[:0], labels[:0]),
       r'labels are \(0,\), int64; expected one integer an image, at least one'),
      (lambda: transrate(features[:, :0], labels), r'features are \(20, 0\)'),
      (lambda: transrate(features[:, 0], labels), r'features are \(20,\)'),
      (lambda: logme(features, labels.astype(float)), r'labels are \(20,\), float64; expected one integer'),
      (lambda: h_score(hole, labels), r'features have values that are not finite: 1 of 20 images, the first in row 5'),
      (lambda: transrate(features, labels, 0.0), r'epsilon is 0.0'),
      (lambda: leep(np.log(theta + 1e-9), labels),
       r'source_probabilities are from -.*expected probabilities, the soft-max of the logits'),
      (lambda: leep(theta * 2, labels), r'rows sum to 2 to 2'),
      (lambda: leep(theta * np.nan, labels), r'source_probabilities have values that are not finite'),
      (lambda: nce(labels[1:], labels), r'source_labels are \(19,\) and labels \(20,\)'),
      (lambda: nce(theta, labels), r'source_labels are \(20, 7\), float64')):
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
      call()
