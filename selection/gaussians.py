"""A Gaussian for each class, and the distances between Gaussians."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import os
from typing import Any, Literal, NamedTuple

import numpy as np

from selection.embeddings import Embeddings
from selection.progress import bar

Covariance = Literal['full', 'diagonal']

# Columns of target factors that are multiplied at once: few enough for a CPU cache, enough for fast products.
_COLUMNS = 4096
# Relative error of a Bures distance above which singular values are computed by an SVD, which is slower.
_TOLERANCE = 1e-7


class Gaussians(NamedTuple):
  """A Gaussian for each of k classes.

  Attributes:
    means: float64 `[k, d]`.
    factors: for each class A `[d, r]` with the covariance S = A A' and r = min(n - 1, d) for n images (in the precision
      of the features); or, for diagonal covariances, the standard deviations, float64 `[k, d]`.
  """
  means: np.ndarray
  factors: Sequence[np.ndarray] | np.ndarray


def gaussians(embeddings: Embeddings, covariance: Covariance = 'full', *, progress: bool = True) -> Gaussians:
  """The Gaussian that fits the features of each class: mean and covariance, divided by n, not by n - 1.

  If classes have fewer images than the features have dimensions, the factors of full covariances take as much memory as
  the features.

  Args:
    embeddings: of images, with labels. A class of one image has covariance zero.
    covariance: 'full', or 'diagonal' for the variances only.
    progress: whether to show a bar when it takes more than two seconds.

  Raises:
    ValueError: no labels, a class without an image, or rows that are means of several images.
  """
  if covariance not in ('full', 'diagonal'):
    raise ValueError(f'covariance is {covariance!r}; expected full or diagonal')
  labels, counts = image_labels(embeddings, 'embeddings')
  empty = np.flatnonzero(counts == 0)
  if len(empty):
    raise ValueError(f'{len(empty)} of {len(counts)} classes have no image, the first is '
                     f'{_name(embeddings, empty[0])}; leave them out (labels from 0 without gaps)')
  classes = np.split(np.argsort(labels, kind='stable'), np.cumsum(counts)[:-1])
  fits = []
  with bar('Gaussians of classes', len(counts), 'classes', shown=progress) as shown:
    for fit in _parallel(lambda rows: _fit(embeddings.features[rows], covariance), classes):
      fits.append(fit)
      shown.update()
  means, factors = np.stack([fit[0] for fit in fits]), tuple(fit[1] for fit in fits)
  finite = np.isfinite(means).all(1)
  if not finite.all():
    raise ValueError(f'features of class {_name(embeddings, np.flatnonzero(~finite)[0])} are not finite; leave those '
                     'images out, or embed them again')
  return Gaussians(means, np.stack(factors) if covariance == 'diagonal' else factors)


def bures(source: Gaussians, target: Gaussians, *, progress: bool = True) -> np.ndarray:
  """Squared 2-Wasserstein distances between each Gaussian of the source and each of the target.

      W2^2 = |m - m'|^2 + tr S + tr S' - 2 tr (S^1/2 S' S^1/2)^1/2

  The last trace is the sum of the singular values of A' B, for S = A A' and S' = B B', so no root of a matrix is needed
  (Dowson and Landau, 1982). For diagonal covariances it is |m - m'|^2 + |s - s'|^2 with the standard deviations s. The
  time grows with the cube of the smaller rank: for many classes of many images on both sides, diagonal covariances are
  much faster.

  Args:
    source: k Gaussians.
    target: l Gaussians in the same space. Pass the same object as source for the distances within one set: they take
      half the time.
    progress: whether to show a bar when it takes more than two seconds.

  Returns:
    float64 `[k, l]`, at least 0, in units of the features squared. The relative rounding error is below 1e-6; factors
    in float32 add an error of about 1e-9 of the traces.

  Raises:
    ValueError: different dimensions, or one side diagonal and the other not.
  """
  from scipy.spatial import distance as scipy_distance

  if source.means.shape[1] != target.means.shape[1]:
    raise ValueError(f'source Gaussians have {source.means.shape[1]} dimensions and those of the target '
                     f'{target.means.shape[1]}; embed both with the same encoder')
  diagonal = isinstance(source.factors, np.ndarray)
  if diagonal != isinstance(target.factors, np.ndarray):
    raise ValueError('the Gaussians of one side have diagonal covariances and those of the other full ones; fit both '
                     'with the same covariance')
  # Differences are squared directly, so no digits cancel.
  result = scipy_distance.cdist(source.means, target.means, 'sqeuclidean')
  if diagonal:
    return result + scipy_distance.cdist(source.factors, target.factors, 'sqeuclidean')
  result += _traces(source)[:, None] + _traces(target)
  _subtract_cross_terms(result, source, target, progress)
  if source is target:
    result = np.triu(result, 1) + np.triu(result, 1).T
  return np.maximum(result, 0)


def _fit(features: np.ndarray, covariance: Covariance) -> tuple[np.ndarray, np.ndarray]:
  """The mean `[d]` of one class and its factor or standard deviations."""
  rows = features.astype(np.float64)
  mean = rows.mean(0)
  if covariance == 'diagonal':
    return mean, rows.std(0)
  return mean, _factor(rows - mean).astype(np.promote_types(features.dtype, np.float32))


def _factor(centred: np.ndarray) -> np.ndarray:
  """A `[d, min(n - 1, d)]` with A A' = X' X / n for centred rows X `[n, d]`."""
  n, d = centred.shape
  # A reflection that maps the vector of ones to the first axis: as the rows have mean zero, the first row becomes zero,
  # and the other n - 1 have the same X' X.
  rest = centred[1:] - centred[0] / (1 + np.sqrt(n))
  if len(rest) > d:
    rest = np.linalg.qr(rest, mode='r')
  return rest.T / np.sqrt(n)


def _traces(side: Gaussians) -> np.ndarray:
  return np.array([np.square(factor, dtype=np.float64).sum() for factor in side.factors])


def _subtract_cross_terms(distances: np.ndarray, source: Gaussians, target: Gaussians, progress: bool) -> None:
  """Subtracts 2 |A_i' B_j|_* from entry (i, j) of the other terms' sum `[k, l]`; for one set itself, only if i < j."""
  symmetric = source is target
  total = len(distances) * (len(distances) - 1) // 2 if symmetric else distances.size
  with bar('distances of classes', total, 'pairs', shown=progress) as shown:
    for block in _blocks([factor.shape[1] for factor in target.factors]):
      columns = np.concatenate([factor.astype(np.float64) for factor in target.factors[block]], 1)
      ends = np.cumsum([factor.shape[1] for factor in target.factors[block]])[:-1]
      rows = range(block.stop if symmetric else len(distances))
      first = [max(0, i + 1 - block.start) if symmetric else 0 for i in rows]
      cross_terms = functools.partial(_cross_terms, columns, ends)
      factors, totals = [source.factors[i] for i in rows], [distances[i, block] for i in rows]
      for i, terms in zip(rows, _parallel(cross_terms, factors, totals, first)):
        distances[i, block] -= terms
        shown.update(len(terms) - first[i])


def _cross_terms(columns: np.ndarray, ends: np.ndarray, factor: np.ndarray, totals: np.ndarray,
                 first: int) -> np.ndarray:
  """2 |A' B_j|_* `[b]` for the factors B_j side by side in `columns`; 0 for those before number `first`."""
  products = np.split(factor.astype(np.float64).T @ columns, ends, axis=1)
  return np.array([0.0 if j < first else 2 * _nuclear_norm(product, totals[j]) for j, product in enumerate(products)])


def _blocks(widths: Sequence[int]) -> Iterator[slice]:
  """Slices of consecutive factors that have about `_COLUMNS` columns together."""
  first = 0
  while first < len(widths):
    size = max(1, int(np.searchsorted(np.cumsum(widths[first:]), _COLUMNS, side='right')))
    yield slice(first, min(first + size, len(widths)))
    first += size


def _nuclear_norm(matrix: np.ndarray, total: float) -> float:
  """The sum of the singular values, accurate enough for a distance of `total` minus twice this sum.

  They are the roots of the eigenvalues of the smaller Gram matrix, which takes half the time of an SVD. Squaring loses
  digits of the small ones; if that could matter, the SVD is computed instead.
  """
  if 0 in matrix.shape:
    return 0.0
  gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
  values = np.linalg.eigvalsh(gram)
  unsure = max(matrix.shape) * np.finfo(np.float64).eps * values[-1]
  if unsure > 0:
    roots = np.sqrt(np.maximum(values, unsure))
    if 2 * (unsure / roots).sum() < _TOLERANCE * (total - 2 * roots.sum()):
      return float(roots.sum())
  return float(np.linalg.svd(matrix, compute_uv=False).sum())


def image_labels(embeddings: Embeddings, what: str) -> tuple[np.ndarray, np.ndarray]:
  """The labels, and the number of images of each class `[k]`."""
  if embeddings.labels is None:
    raise ValueError(f'{what}: no labels, so the classes are not known; give selection.Embeddings(features, labels)')
  if embeddings.weights is not None and (embeddings.weights != 1).any():
    row = np.argmax(embeddings.weights != 1)
    raise ValueError(f'{what}: row {row}, class {_name(embeddings, embeddings.labels[row])}, stands for '
                     f'{embeddings.weights[row]:g} images (weights); a covariance needs the features of the images '
                     'themselves, not means of classes')
  return embeddings.labels, np.bincount(embeddings.labels, minlength=embeddings.num_classes)


def _name(embeddings: Embeddings, k: int) -> str:
  return str(k) if embeddings.class_names is None else repr(embeddings.class_names[k])


def _parallel(function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
  """`map` on all cores, for functions that spend their time in numpy's linear algebra.

  Each call uses one thread. The matrices of a class are too small for several: the threads of the BLAS would wait for
  each other, which takes ten times as long on a machine that has other work to do.
  """
  from concurrent import futures

  import threadpoolctl

  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  with threadpoolctl.threadpool_limits(1, 'blas'), futures.ThreadPoolExecutor(cores) as pool:
    yield from pool.map(function, *arguments)
