"""Scores of how well a network's features suit a target, without training, and how well they foretell what training
gives.

Each is as in the Transfer-Learning-Library (thuml, tllib/ranking), from which the constants come, in float64; classes
are those that have an image. Arrays in, numbers out; larger is better for all of them.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import NamedTuple

import numpy as np

# Of the largest eigenvalue of a covariance: those below are none.
RCOND = 1e-15
# Of the fixed point of LogME.
LOGME_STEPS, LOGME_TOLERANCE = 11, 0.01


def h_score(features: np.ndarray, labels: np.ndarray, regularised: bool = False) -> float:
  """H-score: tr(cov(f)^-1 cov(g)), where g_n is the mean feature of image n's class.

  Bao et al., "An Information-Theoretic Approach to Transferability in Task Transfer Learning" (ICIP 2019). It is from 0
  to min(classes - 1, rank of cov(f)), and at that bound whenever there are as many dimensions as images: then take the
  regularised one, with the covariance of Ledoit and Wolf, shrunk by alpha, and (1 - alpha) cov(g): Ibrahim et al.,
  "Newer is not always better: Rethinking transferability metrics, their peculiarities, stability and performance"
  (2021).

  Args:
    features: `[n, d]`.
    labels: int `[n]`.
    regularised: whether cov(f) is shrunk.

  Raises:
    ValueError: arrays that do not fit each other, empty ones, or features that are not finite.
  """
  centred, groups = _centred(features, labels)
  return _h_score_regularised(centred, groups) if regularised else _h_score(centred, groups)


def leep(source_probabilities: np.ndarray, labels: np.ndarray) -> float:
  """LEEP: mean_n log sum_z P(y_n | z) theta(x_n)_z, with P(y, z) = sum_{n: y_n = y} theta(x_n)_z / N. At most 0.

  Nguyen et al., "LEEP: A New Measure to Evaluate Transferability of Learned Representations" (ICML 2020).

  Args:
    source_probabilities: `[n, Z]`, theta: what the pre-trained classifier makes of the target's images, after soft-max.
    labels: int `[n]`, of the target.

  Raises:
    ValueError: as of `h_score`, or rows that are no probabilities.
  """
  theta, groups = _probabilities(source_probabilities, labels)
  joint = groups.sums(theta)
  totals = joint.sum(0)
  # A class that is never seen adds nothing.
  given = np.divide(joint, totals, out=np.zeros_like(joint), where=totals > 0)
  return float(np.mean(np.log(np.concatenate([rows @ given[k] for k, rows in enumerate(groups.split(theta))]))))


def nce(source_labels: np.ndarray, labels: np.ndarray) -> float:
  """NCE: -H(Y | Z), the entropy (in nats) of the target's label given the source's, over the images. At most 0.

  Tran et al., "Transferability and Hardness of Supervised Classification Tasks" (ICCV 2019).

  Args:
    source_labels: int `[n]`, Z; such as the likeliest class of the pre-trained classifier.
    labels: int `[n]`, Y, of the target.

  Raises:
    ValueError: labels that are no integers, none, or not as many.
  """
  source, target = _integers('source_labels', source_labels), _integers('labels', labels)
  if source.shape != target.shape:
    raise ValueError(f'source_labels are {source.shape} and labels {target.shape}; expected one of each an image')
  pairs, counts = np.unique(np.stack([source, target], 1), axis=0, return_counts=True)
  _, z = np.unique(pairs[:, 0], return_inverse=True)
  return float(np.sum(counts * np.log(counts / np.bincount(z, counts)[z])) / len(target))


def logme(features: np.ndarray, labels: np.ndarray) -> float:
  """LogME: the largest log evidence of Bayesian linear regression, over N, on average over the classes (one against the
  others).

  You et al., "LogME: Practical Assessment of Pre-trained Models for Transfer Learning" (ICML 2021): weights N(0, 1 /
  alpha), noise N(0, 1 / beta); alpha and beta by fixed-point iteration from 1, at most 11 steps, until alpha / beta
  changes by less than a hundredth. Everything is done along the singular vectors of the features, for all classes at
  once.

  Arguments and errors are those of `h_score`.
  """
  features, groups = _grouped(features, labels)
  u, values, _ = np.linalg.svd(features, full_matrices=False)
  (n, rank), sizes = u.shape, groups.sizes.astype(np.float64)
  squares = (values ** 2)[:, None]
  along = groups.sums(u).T ** 2  # squared coordinates of each class's column of zeros and ones
  # What no weights can explain; with n vectors there is nothing.
  outside = np.maximum(sizes - along.sum(0), 0) if rank < n else np.zeros(len(sizes))
  alpha, beta, weight, error = np.ones(len(sizes)), np.ones(len(sizes)), np.zeros(len(sizes)), sizes
  going = np.ones(len(sizes), bool)
  for _ in range(LOGME_STEPS):
    ratio = alpha / beta
    left = ratio / (squares + ratio)
    weight = np.where(going, np.sum(along * squares / (squares + ratio) ** 2, 0), weight)  # |m|^2
    error = np.where(going, outside + np.sum(along * left ** 2, 0), error)  # |y - F m|^2
    # Features of zeros have no weights, and a prior that matters to nothing; an error of 0 has no largest evidence.
    new_alpha = np.divide(np.sum(1 - left, 0), weight, out=alpha.copy(), where=going & (weight > 0))
    new_beta = np.divide(n - rank + np.sum(left, 0), error, out=beta.copy(), where=going & (error > 0))
    alpha, beta = new_alpha, new_beta
    going &= np.abs(alpha / beta - ratio) >= LOGME_TOLERANCE * ratio
  evidence = (rank * np.log(alpha) + n * np.log(beta) - np.sum(np.log(alpha + beta * squares), 0) - beta * error
              - alpha * weight - n * np.log(2 * np.pi)) / 2
  return float(np.mean(evidence / n))


def transrate(features: np.ndarray, labels: np.ndarray, epsilon: float = 1e-4) -> float:
  """TransRate: R(f) - mean_c R(f_c), with R(f) = log det(I + f'f / (n epsilon)) / 2, the rate that codes n features,
  centred over all.

  Huang et al., "Frustratingly Easy Transferability Estimation" (ICML 2022); but as in the library the mean over the
  classes is a plain one. It depends on the scale of the features.

  Args:
    features: `[n, d]`.
    labels: int `[n]`.
    epsilon: the squared distortion.

  Raises:
    ValueError: as of `h_score`, or an epsilon that is not above 0.
  """
  if not epsilon > 0:
    raise ValueError(f'epsilon is {epsilon}; expected a number above 0')
  return _transrate(*_centred(features, labels), epsilon)


# On what `scores` computes once.

class _Groups(NamedTuple):
  """Which images are of one class."""
  order: np.ndarray  # [n], images sorted by class
  begins: np.ndarray  # [C], where each class begins among them
  sizes: np.ndarray  # [C]

  def sums(self, rows: np.ndarray) -> np.ndarray:
    """Over each class, `[C, d]` of `[n, d]`."""
    return np.add.reduceat(rows[self.order], self.begins, axis=0)

  def split(self, rows: np.ndarray) -> list[np.ndarray]:
    """The rows of each class."""
    return np.split(rows[self.order], self.begins[1:])


class _Centred(NamedTuple):
  """f - mean(f) = u diag(values) (an orthogonal matrix that no score depends on)."""
  u: np.ndarray  # [n, r]
  values: np.ndarray  # [r], descending
  dimensions: int


def _centred(features: np.ndarray, labels: np.ndarray) -> tuple[_Centred, _Groups]:
  features, groups = _grouped(features, labels)
  u, values, _ = np.linalg.svd(features - features.mean(0), full_matrices=False)
  return _Centred(u, values, features.shape[1]), groups


def _between(centred: _Centred, groups: _Groups) -> np.ndarray:
  """Sum over the images of the squared class means of u, `[r]`: u' P u, where P takes the mean over each class."""
  return np.sum(groups.sums(centred.u) ** 2 / groups.sizes[:, None], 0)


def _h_score(centred: _Centred, groups: _Groups) -> float:
  # cov(g) = V S u' P u S V' / (n - 1), and cov(f)^-1 takes S and V away. Where a value is none, so is its vector.
  kept = centred.values > np.sqrt(RCOND) * centred.values[0]
  return float(np.sum(_between(centred, groups)[kept]))


def _h_score_regularised(centred: _Centred, groups: _Groups) -> float:
  n, squares = len(centred.u), centred.values ** 2
  alpha = _shrinkage(centred)
  variances = (1 - alpha) * squares / n + alpha * squares.sum() / (n * centred.dimensions)
  kept = variances > RCOND * variances[0]
  between = (1 - alpha) * squares * _between(centred, groups) / max(n - 1, 1)
  return float(np.sum(between[kept] / variances[kept]))


def _shrinkage(centred: _Centred) -> float:
  """How far the covariance is drawn to a multiple of I: Ledoit and Wolf, "A well-conditioned estimator for
  large-dimensional covariance matrices" (2004); 0 to 1.
  """
  n, d, squares = len(centred.u), centred.dimensions, centred.values ** 2
  lengths = np.sum((centred.u * centred.values) ** 2, 1)
  apart = np.sum(squares ** 2) / n ** 2 - squares.sum() ** 2 / (n ** 2 * d)  # |S - m I|^2
  noise = (np.sum(lengths ** 2) / n - np.sum(squares ** 2) / n ** 2) / n  # of S
  return 0.0 if noise <= 0 or apart <= 0 else float(min(noise / apart, 1.0))


def _transrate(centred: _Centred, groups: _Groups, epsilon: float = 1e-4) -> float:
  import threadpoolctl

  rows = centred.u * centred.values  # the features, turned: of the same singular values, also those of a class
  with threadpoolctl.threadpool_limits(1):  # for small matrices several threads take longer
    of_classes = [_rate(np.linalg.svd(part, compute_uv=False), len(part), epsilon) for part in groups.split(rows)]
  return _rate(centred.values, len(rows), epsilon) - float(np.mean(of_classes))


def _rate(values: np.ndarray, n: int, epsilon: float) -> float:
  return float(np.sum(np.log1p(values ** 2 / (n * epsilon)))) / 2


# What is given.

def _grouped(features: np.ndarray, labels: np.ndarray, name: str = 'features') -> tuple[np.ndarray, _Groups]:
  """Features in float64, and the classes."""
  features, labels = np.asarray(features), _integers('labels', labels)
  if features.ndim != 2 or len(features) != len(labels) or not features.shape[1]:
    raise ValueError(f'{name} are {features.shape} and labels {labels.shape}; expected [n, d] and [n]')
  wrong = ~np.isfinite(features).all(1)
  if wrong.any():
    raise ValueError(f'{name} have values that are not finite: {wrong.sum()} of {len(features)} images, the first in '
                     'row '
                     f'{np.argmax(wrong)}; the weights that made them are damaged or of a training that diverged')
  _, begins, sizes = np.unique(np.sort(labels), return_index=True, return_counts=True)
  return features.astype(np.float64), _Groups(np.argsort(labels, kind='stable'), begins, sizes)


def _integers(name: str, labels: np.ndarray) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f'{name} are {labels.shape}, {labels.dtype}; expected one integer an image, at least one')
  return labels


def _probabilities(source_probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, _Groups]:
  theta, groups = _grouped(source_probabilities, labels, 'source_probabilities')
  sums = theta.sum(1)
  if theta.min() < 0 or np.abs(sums - 1).max() > 1e-2:  # such as those of bfloat16
    raise ValueError(f'source_probabilities are from {theta.min():.3g}, and rows sum to {sums.min():.3g} to '
                     f'{sums.max():.3g}; expected probabilities, the soft-max of the logits')
  return theta, groups


# All of them.

@dataclasses.dataclass(frozen=True)
class _Target:
  """What scores are made of; what several of them take is made once."""
  features: np.ndarray
  labels: np.ndarray
  source_probabilities: np.ndarray | None

  @functools.cached_property
  def centred(self) -> tuple[_Centred, _Groups]:
    return _centred(self.features, self.labels)

  @property
  def of_classifier(self) -> np.ndarray:
    """`source_probabilities`, for the scores that need them."""
    assert self.source_probabilities is not None  # `scores` leaves these scores out then
    return self.source_probabilities


class TransferabilityScore(NamedTuple):
  """A score.

  Attributes:
    needs: 'features', or 'source_probabilities' of the pre-trained classifier.
    of: the score of a target.
  """
  needs: str
  of: Callable[[_Target], float]


def scores(features: np.ndarray, labels: np.ndarray,
           source_probabilities: np.ndarray | None) -> dict[str, float | None]:
  """All of SCORES by name, from what `h_score` and `leep` take; None where a score needs the classifier and there is
  none.

  Raises:
    ValueError: as of the scores.
  """
  target = _Target(features, labels, source_probabilities)
  return {name: None if getattr(target, score.needs) is None else score.of(target) for name, score in SCORES.items()}


class Correlation(NamedTuple):
  """How well scores foretell accuracies, each from -1 to 1; None where it cannot be said.

  Attributes:
    kendall: tau-b, of the order alone.
    weighted_kendall: the same with more weight on the best ones (Vigna, "A weighted correlation index for rankings with
      ties", WWW 2015: hyperbolic, additive, the mean of ranking by either).
    pearson: of the values.
  """
  kendall: float | None
  weighted_kendall: float | None
  pearson: float | None


def correlate(scores: Sequence[float | None], accuracies: Sequence[float | None]) -> Correlation:
  """Over checkpoints, those left out that lack one of both; None with fewer than three, or where all values of one kind
  are the same.

  Raises:
    ValueError: not as many scores as accuracies, or values that are not finite.
  """
  if len(scores) != len(accuracies):
    raise ValueError(f'{len(scores)} scores and {len(accuracies)} accuracies; expected one of each a checkpoint')
  pairs = np.array([pair for pair in zip(scores, accuracies) if None not in pair], np.float64).reshape(-1, 2)
  if not np.isfinite(pairs).all():
    raise ValueError(f'scores {list(scores)} and accuracies {list(accuracies)}; expected finite numbers, or None where '
                     'there is none')
  # Values that differ by rounding have no order.
  if len(pairs) < 3 or (np.ptp(pairs, axis=0) <= 1e-12 * np.abs(pairs).max(0)).any():
    return Correlation(None, None, None)
  import scipy.stats

  return Correlation(*(float(function(*pairs.T)[0]) for function in (
      scipy.stats.kendalltau, scipy.stats.weightedtau, scipy.stats.pearsonr)))


SCORES = {
    'h_score': TransferabilityScore('features', lambda target: _h_score(*target.centred)),
    'h_score_regularised': TransferabilityScore('features', lambda target: _h_score_regularised(*target.centred)),
    'leep': TransferabilityScore(
        'source_probabilities', lambda target: leep(target.of_classifier, target.labels)),
    'nce': TransferabilityScore(
        'source_probabilities', lambda target: nce(np.argmax(target.of_classifier, 1), target.labels)),
    'logme': TransferabilityScore('features', lambda target: logme(target.features, target.labels)),
    'transrate': TransferabilityScore('features', lambda target: _transrate(*target.centred)),
}
