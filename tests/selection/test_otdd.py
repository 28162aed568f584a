"""Distances of classes and of data sets against direct float64 implementations of their formulas."""

import os
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import scipy.optimize

from selection.embeddings import class_means, Embeddings
from selection.gaussians import bures, gaussians
from selection.otdd import domain_similarity, otdd


def images(sizes, d=6, seed=0, spread=1.0, apart=1.0, rank=None, dtype=np.float64):
  """Images of classes of given sizes, each with its own mean and covariance (of a given rank); rows are shuffled."""
  rng = np.random.default_rng(seed)
  features = np.concatenate([apart * rng.normal(size=d) +
                             spread * rng.normal(size=(n, rank or d)) @ rng.normal(size=(rank or d, d))
                             for n in sizes])
  order = rng.permutation(len(features))
  return Embeddings(features[order].astype(dtype), np.repeat(np.arange(len(sizes)), sizes)[order])


def rows_by_class(embeddings):
  return [embeddings.features[embeddings.labels == k] for k in range(embeddings.num_classes)]


def moments(embeddings):
  """Means and covariances (over n) of the classes."""
  return [(x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)) for x in rows_by_class(embeddings)]


def bures_by_singular_values(source, target):
  """The formula without matrix square roots, which fail for singular matrices in floating point.

  Where S = A'A and T = B'B, the trace of (S^1/2 T S^1/2)^1/2 is the sum of the singular values of A B'.
  """
  def one(a, b):
    m, n = a.mean(0), b.mean(0)
    a, b = (a - m) / np.sqrt(len(a)), (b - n) / np.sqrt(len(b))
    return ((m - n) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()

  return np.array([[one(a, b) for b in rows_by_class(target)] for a in rows_by_class(source)])


def sinkhorn(costs, epsilon, symmetric):
  """OT in the log domain with uniform marginals, until it converges; `symmetric`: both sides share one potential."""
  f, g = np.zeros(len(costs)), np.zeros(costs.shape[1])
  for _ in range(20_000):
    new = -epsilon * logmeanexp((g - costs) / epsilon, axis=1)
    new = (f + new) / 2 if symmetric else new
    g = new if symmetric else -epsilon * logmeanexp((new[:, None] - costs) / epsilon, axis=0)
    done, f = np.abs(new - f).max() < 1e-9 * costs.max(), new
    if done:
      break
  plan = np.exp((f[:, None] + g - costs) / epsilon)  # over that of independent draws
  np.testing.assert_allclose(plan.mean(1), 1, atol=1e-4)
  np.testing.assert_allclose(plan.mean(0), 1, atol=1e-4)
  return f.mean() + g.mean()  # the dual; that of the primal, at the solution


def logmeanexp(x, axis):
  peak = x.max(axis, keepdims=True)
  return np.log(np.exp(x - peak).mean(axis)) + peak.squeeze(axis)


def reference_otdd(source, target, epsilon, debiased=True):
  """The formula, for sets whose classes have at least two images each."""
  def cost(a, b):
    between = bures_by_singular_values(a, b)[np.ix_(a.labels, b.labels)]
    return (((a.features[:, None] - b.features) ** 2).sum(-1) + between) / 2

  pairs = [(source, target, 1.0), (source, source, -0.5), (target, target, -0.5)][:3 if debiased else 1]
  return sum(factor * sinkhorn(cost(a, b), epsilon, a is b) for a, b, factor in pairs)


def unit(embeddings):
  features = embeddings.features.astype(np.float64)
  return Embeddings(features / np.linalg.norm(features, axis=1, keepdims=True), embeddings.labels)


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None)
@given(source=sizes, target=sizes, d=st.integers(1, 7), rank=st.sampled_from([None, 1, 2]), seed=st.integers(0, 99))
def test_bures_is_the_formula(source, target, d, rank, seed):
  """Fewer and more images than dimensions, covariances with and without full rank."""
  a, b = images(source, d, seed, rank=rank), images(target, d, seed + 1)
  scale = max(np.trace(s) for _, s in moments(a) + moments(b)) + 1
  result = bures(gaussians(a), gaussians(b))
  # The root of a singular matrix has only half of the digits.
  np.testing.assert_allclose(result, bures_by_singular_values(a, b), rtol=1e-6, atol=1e-6 * scale)
  np.testing.assert_allclose(bures(gaussians(b), gaussians(a)).T, result, rtol=1e-10, atol=1e-12 * scale)
  assert (result >= 0).all()


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('d', [5, 40])
def test_factors_give_the_covariances(d, dtype):
  embeddings = images([1, 2, 12, 50], d, dtype=dtype)
  fitted = gaussians(embeddings)
  for (mean, covariance), fitted_mean, factor in zip(moments(embeddings), fitted.means, fitted.factors):
    digits = (1e-5 if dtype == np.float32 else 1e-13) * max(1, np.abs(covariance).max())
    np.testing.assert_allclose(fitted_mean, mean, atol=digits)
    np.testing.assert_allclose(factor @ factor.T, covariance, atol=digits)
  assert [factor.shape for factor in fitted.factors] == [(d, min(n - 1, d)) for n in (1, 2, 12, 50)]
  assert {factor.dtype for factor in fitted.factors} == {np.dtype(dtype)}


def test_bures_of_a_set_and_itself():
  """Zero for the same class; equal whether only one triangle or all is computed, in one block of factors or several."""
  a = gaussians(images([3, 30, 8, 20], 15))
  half = bures(a, a)
  whole = bures(a, a._replace(means=a.means.copy()))
  np.testing.assert_allclose(half, whole, atol=1e-12 * whole.max())
  assert (half == half.T).all() and (np.diag(half) == 0).all()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('selection.gaussians._COLUMNS', 10)
    np.testing.assert_allclose(bures(a, a), half, rtol=1e-12)
    np.testing.assert_allclose(bures(a, a._replace(means=a.means.copy())), half, rtol=1e-12, atol=1e-12 * whole.max())


def test_bures_is_accurate_for_nearly_equal_classes():
  """A class and itself scaled by 1 + h: W2^2 = h^2 tr S, far below tr S."""
  a = images([30, 9], 12, apart=0.0)
  means = class_means(a).features[a.labels].astype(np.float64)
  for h in (1e-2, 1e-4):
    b = Embeddings(means + (1 + h) * (a.features - means), a.labels)
    mean_part = [((m - n) ** 2).sum() for (m, _), (n, _) in zip(moments(a), moments(b))]
    expected = [h ** 2 * np.trace(s) + m for (_, s), m in zip(moments(a), mean_part)]
    np.testing.assert_allclose(np.diag(bures(gaussians(a), gaussians(b))), expected, rtol=1e-6)


def test_bures_without_any_overlap():
  """Covariances in different dimensions, and classes of one image."""
  a, b = np.zeros((3, 4)), np.zeros((3, 4))
  a[:, 0], b[:, 2] = (-1, 0, 1), (2, 4, 6)
  a, b = Embeddings(a, [0, 0, 0]), Embeddings(b, [0, 0, 1])
  np.testing.assert_allclose(bures(gaussians(a), gaussians(b)), [[9 + 2 / 3 + 1, 36 + 2 / 3]])


@settings(max_examples=20, deadline=None)
@given(source=sizes, target=sizes, seed=st.integers(0, 99))
def test_diagonal_bures(source, target, seed):
  """The formula for diagonal covariances."""
  a, b = images(source, 5, seed), images(target, 5, seed + 1)
  deviations = lambda side: [np.concatenate([m, np.sqrt(np.diag(s))]) for m, s in moments(side)]
  expected = [[((x - y) ** 2).sum() for y in deviations(b)] for x in deviations(a)]
  np.testing.assert_allclose(bures(gaussians(a, 'diagonal'), gaussians(b, 'diagonal')), expected, rtol=1e-9, atol=1e-12)
  # Without correlations full covariances give the same.
  if a.num_classes == b.num_classes == 1:
    axes = Embeddings(np.concatenate([np.diag(np.arange(1.0, 6)), -np.diag(np.arange(1.0, 6))]), [0] * 5 + [0] * 5)
    other = Embeddings(3 * axes.features + 1, axes.labels)
    np.testing.assert_allclose(bures(gaussians(axes), gaussians(other)),
                               bures(gaussians(axes, 'diagonal'), gaussians(other, 'diagonal')))


# Sets of 25 images each: OTT's solver is compiled for each shape.


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('normalize,epsilon', [(True, 0.1), (True, 0.01), (False, 1.0), (False, 5.0)])
def test_otdd_is_the_published_distance(normalize, epsilon, dtype):
  """With and without normalization; epsilons that are large and small relative to the costs."""
  a, b = images([9, 14, 2], seed=1, dtype=dtype), images([11, 14], seed=2, dtype=dtype)
  c, d = (unit(side) if normalize else Embeddings(side.features.astype(np.float64), side.labels) for side in (a, b))
  scale = reference_otdd(c, d, epsilon, debiased=False)
  assert otdd(a, b, epsilon=epsilon, normalize=normalize) == pytest.approx(reference_otdd(c, d, epsilon),
                                                                           abs=2e-6 * scale)
  assert otdd(a, b, epsilon=epsilon, normalize=normalize, debiased=False) == pytest.approx(scale, rel=2e-6)


def test_distance_with_diagonal_covariances():
  """With one class per side, only one constant of the cost changes."""
  a, b = unit(images([25], seed=1)), unit(images([25], seed=2))
  full, diagonal = (otdd(a, b, covariance=covariance, debiased=False) for covariance in ('full', 'diagonal'))
  spread = bures(gaussians(a), gaussians(b))[0, 0], bures(gaussians(a, 'diagonal'), gaussians(b, 'diagonal'))[0, 0]
  assert spread[0] > spread[1] + 1e-3
  assert full - diagonal == pytest.approx((spread[0] - spread[1]) / 2, abs=1e-6)


def test_distance_to_itself_is_zero_and_grows_with_the_shift():
  a = images([8, 8, 9], seed=3, spread=0.2, dtype=np.float32)
  assert otdd(a, a) == pytest.approx(0, abs=1e-6)
  more = images([20, 30, 25], seed=3, spread=0.2, dtype=np.float32)
  assert otdd(more, more, max_samples=25) == pytest.approx(0, abs=1e-6)  # the same images on both sides
  shifted = [otdd(a, Embeddings(a.features + shift, a.labels), normalize=False) for shift in (0.5, 1.0, 2.0)]
  assert 0.1 < shifted[0] < shifted[1] < shifted[2]
  # The same images with labels that mix the classes are farther away: labels count.
  assert otdd(a, Embeddings(a.features, np.random.default_rng(0).permutation(a.labels))) > 0.01


def test_distance_does_not_depend_on_the_numbers_of_classes():
  a, b = images([9, 11, 5], seed=1), images([11, 14], seed=2)
  renamed = Embeddings(b.features, 1 - b.labels)
  assert otdd(a, b) == pytest.approx(otdd(a, renamed), abs=1e-7)
  # A class of one image is left out, and so are gaps in the labels.
  more = Embeddings(np.concatenate([b.features, [np.full(6, 9.0)]]), np.concatenate([b.labels * 3, [1]]))
  assert otdd(a, more) == pytest.approx(otdd(a, b), abs=1e-7)


def test_distance_of_a_sample():
  """Drawn by the seed; classes are fitted to all of their images."""
  a, b = images([30, 20], seed=1), images([10, 40], seed=2)
  whole = otdd(a, b)
  parts = [otdd(a, b, max_samples=25, seed=seed) for seed in (0, 0, 1)]
  assert parts[0] == parts[1] != parts[2]
  assert parts == pytest.approx([whole] * 3, rel=0.4) and whole not in parts
  assert otdd(a, b, max_samples=50) == whole
  # One image of each: the distance is their cost, which includes the spread of the classes.
  between = bures(gaussians(unit(a)), gaussians(unit(b))) / 2
  assert otdd(a, b, max_samples=1, debiased=False) > between.min()


def test_small_epsilons_approach_exact_transport():
  """Costs ten thousand times epsilon: the plan costs as much as the exact one, up to epsilon log n."""
  a, b = images([10, 15], seed=1), images([13, 12], seed=2)
  costs = (((a.features[:, None] - b.features) ** 2).sum(-1) +
           bures(gaussians(a), gaussians(b))[np.ix_(a.labels, b.labels)]) / 2
  exact = costs[scipy.optimize.linear_sum_assignment(costs)].mean()
  epsilon = costs.max() / 10_000
  result = otdd(a, b, epsilon=epsilon, normalize=False, debiased=False)
  assert exact * (1 - 1e-6) <= result <= (exact + epsilon * np.log(25)) * (1 + 1e-6)


def test_not_converged_raises():
  a, b = images([20, 5], seed=1), images([10, 15], seed=2)
  with pytest.raises(
      ValueError, match='after up to 30 iterations .* of the mass is out of place, expected less than 0.001; epsilon '
                                       '0.001 is small for costs up to .* use a larger one'):
    otdd(a, b, epsilon=0.001, normalize=False, max_iterations=30)


def exact_emd(costs, a, b):
  for backend in ('PYTORCH', 'TENSORFLOW', 'JAX', 'CUPY'):
    os.environ[f'POT_BACKEND_DISABLE_{backend}'] = '1'
  import ot
  return ot.emd2(a / a.sum(), b / b.sum(), costs)


@settings(max_examples=15, deadline=None)
@given(shape=st.sampled_from([(1, 1), (1, 5), (7, 1), (12, 9), (9, 30)]), scale=st.sampled_from([0.01, 30.0]),
       seed=st.integers(0, 99))
def test_domain_similarity_is_exact(shape, scale, seed):
  """Against the exact solver of POT, from means and their numbers of images."""
  rng = np.random.default_rng(seed)
  a, b = (Embeddings(scale * rng.normal(size=(k, 5)).astype(np.float32), np.arange(k),
                     weights=rng.integers(200, 900, k)) for k in shape)
  costs = np.linalg.norm(a.features[:, None].astype(np.float64) - b.features, axis=-1)
  emd = exact_emd(costs, a.weights.astype(np.float64), b.weights.astype(np.float64))
  gamma = 0.3 / scale
  assert domain_similarity(a, b, gamma=gamma) == pytest.approx(np.exp(-gamma * emd), rel=1e-7)


def test_domain_similarity_by_hand():
  """Two of three images are at 0 and move to 1 and to 3; classes that are too small are left out."""
  source = Embeddings([[0.0], [0.0], [3.0], [99.0]], [0, 0, 1, 2], weights=[1, 1, 1, 0.5])
  target = Embeddings([[1.0], [3.0]], [0, 1], weights=[100, 200])
  assert domain_similarity(source, target, min_images=1) == pytest.approx(np.exp(-0.01 * (1 / 3 * 1 + 1 / 3 * 3)))
  assert domain_similarity(target, target, min_images=1, gamma=5) == 1.0


def test_published_class_means(shared):
  """A target whose classes are among those of the source is nearer than one with other classes."""
  source, pets, aircraft = (
      Embeddings(arrays['features'], np.arange(len(arrays['counts'])), weights=arrays['counts']) for arrays in
      (np.load(shared / 'reference' / 'class_means' / 'resnet18' / f'{name}.npz')
       for name in ('imagenet', 'pets', 'aircraft')))
  costs = np.linalg.norm(source.features[:, None].astype(np.float64) - pets.features, axis=-1)
  emd = exact_emd(costs, source.weights.astype(np.float64), pets.weights.astype(np.float64))
  assert domain_similarity(source, pets) == pytest.approx(np.exp(-0.01 * emd), rel=1e-9)
  assert domain_similarity(source, pets) > domain_similarity(source, aircraft)


def test_quiet_and_light():
  """No warnings in a new process that has not imported ott yet; it is imported only when it is used."""
  code = ('import sys, numpy as np; from selection import embeddings; from selection.otdd import domain_similarity, '
          'otdd; a = embeddings.Embeddings(np.eye(4), [0, 0, 1, 1]); '
          'domain_similarity(a, a, min_images=1); assert "ott" not in sys.modules; print(otdd(a, a))')
  result = subprocess.run([sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True, check=False)
  assert not result.stderr and abs(float(result.stdout)) < 1e-6


ROWS = np.random.default_rng(0).normal(size=(4, 3))
GOOD = Embeddings(ROWS, [0, 0, 1, 1], ['cat', 'dog'], fingerprint='f')


@pytest.mark.parametrize('function', [otdd, domain_similarity])
@pytest.mark.parametrize('other,words', [
    (ROWS, 'target is a ndarray; expected selection.Embeddings'),
    (Embeddings(ROWS), 'target has no labels; give selection.Embeddings'),
    (Embeddings(ROWS[:, :2], [0, 0, 1, 1]),
     'source features have 3 dimensions and target features 2; embed both with the same encoder'),
    (Embeddings(ROWS, [0, 0, 1, 1], fingerprint='g'), r'different encoders \(fingerprints f and g\)')])
def test_sets_that_do_not_fit(function, other, words):
  with pytest.raises(ValueError, match=words):
    function(GOOD, other)


@pytest.mark.parametrize('other,kwargs,words', [
    (Embeddings(ROWS, [0, 0, 1, 1], ['cat', 'dog'], weights=[1, 1, 1, 30]), {},
     r"target: row 3, class 'dog', stands for 30 images \(weights\); a covariance needs the features of the images"),
    (Embeddings(ROWS, [0, 1, 2, 3]), {}, 'no class of the target has two images'),
    (Embeddings(np.vstack([ROWS[:3], 0 * ROWS[:1]]), [0, 0, 1, 1]), {},
     '1 rows of target features are zero, the first is row 3'),
    (GOOD, {'epsilon': 0.0}, 'epsilon is 0.0; expected a finite number above 0'),
    (GOOD, {'epsilon': np.inf}, 'epsilon is inf'),
    (GOOD, {'max_samples': 0}, 'max_samples is 0; expected a whole number from 1'),
    (GOOD, {'max_samples': 1.5}, 'max_samples is 1.5'),
    (GOOD, {'max_iterations': 0}, 'max_iterations is 0; expected a whole number from 1'),
    (GOOD, {'covariance': 'half'}, "covariance is 'half'; expected full or diagonal")])
def test_errors_of_otdd(other, kwargs, words):
  with pytest.raises(ValueError, match=words):
    otdd(GOOD, other, **kwargs)


@pytest.mark.parametrize('kwargs,words', [
    ({}, 'none of the 2 source classes has min_images = 200 images, the largest has 2; use a lower min_images'),
    ({'gamma': -1.0}, 'gamma is -1.0; expected a finite number above 0')])
def test_errors_of_domain_similarity(kwargs, words):
  with pytest.raises(ValueError, match=words):
    domain_similarity(GOOD, GOOD, **kwargs)


def test_errors_of_gaussians():
  with pytest.raises(ValueError, match='no labels'):
    gaussians(Embeddings(ROWS))
  with pytest.raises(ValueError, match="1 of 3 classes have no image, the first is 'dog'"):
    gaussians(Embeddings(ROWS, [0, 0, 2, 2], ['cat', 'dog', 'owl']))
  with pytest.raises(ValueError, match='3 dimensions and those of the target 2'):
    bures(gaussians(GOOD), gaussians(Embeddings(ROWS[:, :2], [0, 0, 1, 1])))
  with pytest.raises(ValueError, match='one side have diagonal covariances'):
    bures(gaussians(GOOD), gaussians(GOOD, 'diagonal'))
