"""The spectrum of features: which singular values a network's features have, and which of them change.

Deng et al. ("Towards Inadequately Pre-trained Models in Transfer Learning", ICCV 2023) split the feature matrix F = U S
V^T, one row an image, into a main part, its first k singular components, and the residual; k by `main_size`. V and S
come from the Gram matrix F^T F here, which is added up slice by slice in float64: the features never have to be in
memory at once.
"""

from collections.abc import Iterable, Iterator
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

# Images that are converted and multiplied at once.
SLICE = 2048
# Of the largest square of a singular value: what is below is rounding of the Gram matrix.
ROUNDING = 1e-12


class Gram(NamedTuple):
  """The second moments of features.

  Attributes:
    images: n.
    mean: float64 `[d]`.
    scatter: float64 `[d, d]`, the sum of (x - mean)(x - mean)^T over the images.
  """
  images: int
  mean: np.ndarray
  scatter: np.ndarray

  @property
  def products(self) -> np.ndarray:
    """F^T F `[d, d]`, the sum of x x^T over the images."""
    return self.scatter + self.images * np.outer(self.mean, self.mean)


class Cross(NamedTuple):
  """The second moments between two networks' features of the same images.

  Attributes:
    images: n.
    first_mean: float64 `[d]`.
    second_mean: float64 `[e]`.
    scatter: float64 `[d, e]`, the sum of (x - first_mean)(y - second_mean)^T over the images.
  """
  images: int
  first_mean: np.ndarray
  second_mean: np.ndarray
  scatter: np.ndarray


class Spectrum(NamedTuple):
  """The singular values and right singular vectors of a feature matrix, or of the centred one.

  Attributes:
    values: `[r]`, descending; r = min(n, d), centred min(n - 1, d).
    directions: `[d, r]`, orthonormal columns; the sign of a column means nothing.
    mean: `[d]`, what the features were centred by; zeros where they were not.
    images: n.
  """
  values: np.ndarray
  directions: np.ndarray
  mean: np.ndarray
  images: int

  @property
  def note(self) -> str | None:
    """A sentence on fewer images than dimensions; None where there are enough."""
    if self.images >= len(self.mean):
      return None
    return (f'{self.images} images have features of {len(self.mean)} dimensions: there are at most {len(self.values)} '
            'singular values, and sizes and ranks depend on the number of images')


class Change(NamedTuple):
  """How far the parts of the features moved, each relative to the size that it had: |after - before| / |before|,
  Frobenius norms.
  """
  main: float
  residual: float


def gram(batches: Iterable[np.ndarray]) -> Gram:
  """The second moments of features that come in batches, in float64; memory does not grow with the images.

  Squares are summed around the mean so far and corrected as it moves (Chan, Golub and LeVeque, 1983): nothing cancels,
  however large the mean is beside the spread.

  Args:
    batches: each `[b, d]`, of any sizes; or one array `[n, d]`, also memory-mapped.

  Raises:
    ValueError: no images, shapes that do not fit, or features that are not finite.
  """
  mean = _Mean()
  scatter: Any = 0.0  # an array from the first rows on
  for rows in _slices(batches):
    weight, step = mean.centre(rows)
    scatter += rows.T @ rows
    scatter += np.outer(weight * step, step)
  return Gram(mean.images, mean.value(), scatter)


def cross(first: Iterable[np.ndarray], second: Iterable[np.ndarray]) -> Cross:
  """The second moments between two networks' features of the same images in the same order; otherwise as `gram`.

  Args:
    first: batches `[b, d]`, or one array `[n, d]`.
    second: batches `[b, e]`, or one array `[n, e]`; their sizes may be others.

  Raises:
    ValueError: as of `gram`, or unequal numbers of images.
  """
  first_mean, second_mean = _Mean(), _Mean()
  scatter: Any = 0.0  # an array from the first rows on
  for x, y in itertools.zip_longest(_slices(first), _slices(second), fillvalue=np.empty((0, 0))):
    if len(x) != len(y):
      raise ValueError(f'there are features of {first_mean.images + len(x)} images of the first network and '
                       f'{second_mean.images + len(y)} of the second (or more); expected the same images in both')
    (weight, step), (_, other_step) = first_mean.centre(x), second_mean.centre(y)
    scatter += x.T @ y
    scatter += np.outer(weight * step, other_step)
  return Cross(first_mean.images, first_mean.value(), second_mean.value(), scatter)


def spectrum(gram: Gram, centred: bool) -> Spectrum:
  """Singular values and right singular vectors of F, or of F - mean: the root of the Gram matrix' eigenvalues, and its
  eigenvectors.

  The squares of the values are exact to 1e-14 of the largest square (measured up to d = 1024: 2e-15), so small values
  are less so than large ones: one at a thousandth of the largest to 1e-8 of itself. Values below a millionth of the
  largest are lost and given as 0. A mean that is large beside the spread makes a large value of the plain spectrum; the
  centred one loses nothing by it.

  Args:
    gram: of `gram`.
    centred: whether the mean is taken off; of one image nothing is left then, and `values` is empty.
  """
  squares, vectors = np.linalg.eigh(gram.scatter if centred else gram.products)
  r = min(gram.images - centred, len(squares))
  squares, vectors = squares[::-1][:r], np.ascontiguousarray(vectors[:, ::-1][:, :r])
  values = np.sqrt(np.where(squares > ROUNDING * squares.max(initial=0.0), squares, 0.0))
  return Spectrum(values, vectors, gram.mean if centred else np.zeros_like(gram.mean), gram.images)


def main_size(values: np.ndarray, threshold: float = 0.8) -> int:
  """The size k of the main part: the smallest with (sum of the first k values) / (sum of all) >= threshold (Deng et
  al., ICCV 2023).

  Values, not their squares. A tie is one in spite of rounding. 0 where all values are 0.

  Args:
    values: singular values `[r]`, descending.
    threshold: above 0, up to 1.

  Raises:
    ValueError: another threshold, or values that are not descending, finite and from 0.
  """
  if not 0 < threshold <= 1:
    raise ValueError(f'threshold is {threshold}; expected a number above 0, up to 1')
  sums = np.cumsum(_checked(values))
  if not sums.size or not sums[-1]:
    return 0
  return int(np.searchsorted(sums, threshold * sums[-1] * (1 - 1e-12))) + 1


def energy(values: np.ndarray, k: int) -> float:
  """The share of the squared norm that is in the first k components: (sum of the first k squares) / (sum of all); 0
  where all are 0.

  Raises:
    ValueError: k is not from 0 to r, or values that are not descending, finite and from 0.
  """
  squares = _scaled(values) ** 2
  _check_size(k, len(squares))
  return float(squares[:k].sum() / squares.sum()) if squares.any() else 0.0


def effective_rank(values: np.ndarray) -> float:
  """exp of the entropy of values / sum (Roy and Vetterli, "The effective rank", EUSIPCO 2007): 1 to r; 0 where all
  values are 0.

  Raises:
    ValueError: values that are not descending, finite and from 0.
  """
  values = _scaled(values)
  values = values[values > 0]
  shares = values / values.sum()
  return float(np.exp(-np.sum(shares * np.log(shares)))) if shares.size else 0.0


def stable_rank(values: np.ndarray) -> float:
  """The sum of the squares by the largest square (Rudelson and Vershynin, 2007): 1 to r; 0 where all values are 0.

  Raises:
    ValueError: values that are not descending, finite and from 0.
  """
  return float(np.sum(_scaled(values) ** 2))


def parts(features: np.ndarray, spectrum: Spectrum, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Main part and residual of features, whose sum is the features minus the spectrum's mean.

  The main part is the projection on the first k directions. Features of other images than the spectrum's can be split
  too: what lies in none of its directions is in the residual.

  Args:
    features: `[n, d]`.
    spectrum: of these features, or of the training images'.
    k: size of the main part, such as `main_size`.

  Returns:
    Two `[n, d]`, in the precision of the features, float32 at least.

  Raises:
    ValueError: k is not from 0 to r, shapes that do not fit, or features that are not finite.
  """
  features = np.asarray(features)
  _check_size(k, len(spectrum.values))
  if features.ndim != 2 or features.shape[1] != len(spectrum.mean):
    raise ValueError(f'features are {features.shape}; expected [n, {len(spectrum.mean)}] as of the spectrum')
  directions = spectrum.directions[:, :k]
  main = np.empty(features.shape, np.result_type(features.dtype, np.float32))
  residual = np.empty_like(main)
  begin = 0
  for rows in _slices(features):
    end = begin + len(rows)
    rows -= spectrum.mean
    projected = (rows @ directions) @ directions.T
    main[begin:end], residual[begin:end] = projected, rows - projected
    begin = end
  return main, residual


def principal_angles(first: Spectrum, k1: int, second: Spectrum, k2: int) -> np.ndarray:
  """The angles in degrees between the first k1 and the first k2 directions, ascending: `[min(k1, k2)]`.

  Cosines are the singular values of V1^T V2, sines those of what is left of the one in the other (Bjorck and Golub,
  "Numerical methods for computing angles between linear subspaces", 1973); by both of them small angles are as exact as
  large ones.

  Raises:
    ValueError: a size that is not from 0 to r, or features of different dimensions.
  """
  a, b = _directions(first, k1, second, k2)
  if k1 < k2:
    a, b = b, a
  overlap = a.T @ b
  cosines = np.linalg.svd(overlap, compute_uv=False)
  sines = np.linalg.svd(b - a @ overlap, compute_uv=False)[::-1]
  return np.degrees(np.arctan2(sines, cosines))


def change(first: Spectrum, k1: int, second: Spectrum, k2: int, cross: Cross) -> Change:
  """How far the main part and the residual moved from one network to another: |M' - M| / |M| for each, without the
  features.

  |M' - M|^2 = |M|^2 + |M'|^2 - 2 tr(M^T M'), where for M = F V V^T and M' = F' W W^T the trace is that of (V^T F^T F'
  W)(W^T V). The difference leaves about eight digits: a change below 1e-7 cannot be told from none; of a residual that
  is small beside the whole, below 1e-7 |F| / |residual|.

  Args:
    first, second: spectra of the same images, either both centred or both plain.
    k1, k2: sizes of their main parts.
    cross: of `cross`, first and second in this order.

  Returns:
    0 where there is nothing before nor after; infinity where something came from nothing.

  Raises:
    ValueError: sizes that are not from 0 to r, dimensions or numbers of images that differ, one spectrum plain and the
      other centred, or centred ones of other features than the products'.
  """
  _directions(first, k1, second, k2)
  if not first.images == second.images == cross.images:
    raise ValueError(f'the spectra are of {first.images} and {second.images} images, their products of {cross.images}; '
                     'expected the same images in all')
  if cross.scatter.shape != (len(first.mean), len(second.mean)):
    raise ValueError(f'products are {cross.scatter.shape}; expected {(len(first.mean), len(second.mean))} as of the '
                     'spectra')
  means = (first.mean, cross.first_mean), (second.mean, cross.second_mean)
  if any(not mean.any() and of.any() for mean, of in means) and any(mean.any() for mean, _ in means):
    raise ValueError('one spectrum is plain and the other centred; expected both alike')
  if any(mean.any() and not np.allclose(mean, of, rtol=0, atol=1e-6 * np.abs(of).max()) for mean, of in means):
    raise ValueError('the spectra have other means than the products; expected the same features, first and second in '
                     'the same order')
  main = _moved(first, slice(0, k1), second, slice(0, k2), cross)
  residual = _moved(first, slice(k1, None), second, slice(k2, None), cross)
  return Change(main, residual)


def _moved(first: Spectrum, chosen: slice, second: Spectrum, other: slice, cross: Cross) -> float:
  """|F' W W^T - F V V^T| / |F V V^T| for the chosen directions V of the first and W of the second."""
  before, after = np.sum(first.values[chosen] ** 2), np.sum(second.values[other] ** 2)
  if not before:
    return math.inf if after else 0.0
  v, w = first.directions[:, chosen], second.directions[:, other]
  # The means apart: in most directions nothing of a large one is left, where its square would drown the rest.
  mean, other_mean = v.T @ (cross.first_mean - first.mean), w.T @ (cross.second_mean - second.mean)
  between = v.T @ cross.scatter @ w + cross.images * np.outer(mean, other_mean)
  return math.sqrt(max(before + after - 2 * np.sum(between * (v.T @ w)), 0.0) / before)


class _Mean:
  """A mean that moves as slices come; kept as a difference from that of the first one, so that it is exact beside a
  small spread.
  """

  def __init__(self) -> None:
    self.images = 0
    self._first = self._step = np.zeros(())  # of shape [d] from the first rows on

  def centre(self, rows: np.ndarray) -> tuple[float, np.ndarray]:
    """Takes from the rows, in place, their own mean.

    Returns:
      That mean less the one so far, and before it the weight with which its square belongs to the scatter.
    """
    if not self.images:
      self._first = rows.mean(0)
    rows -= self._first
    own = rows.mean(0)
    rows -= own
    step, before = own - self._step, self.images
    self.images += len(rows)
    self._step = self._step + step * (len(rows) / self.images)
    return before * len(rows) / self.images, step

  def value(self) -> np.ndarray:
    """`[d]`."""
    if not self.images:
      raise ValueError('there are no features; expected at least one image')
    return self._first + self._step


def _slices(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """The rows of all batches in float64, `SLICE` at a time in one array: it is the caller's to write in, until the next
  one comes.
  """
  held, filled, images = None, 0, 0
  for batch in [batches] if getattr(batches, 'ndim', 0) == 2 else batches:
    batch = np.asarray(batch)
    if batch.ndim != 2 or not batch.shape[1] or held is not None and batch.shape[1] != held.shape[1]:
      raise ValueError(f'a batch of features is {batch.shape}; expected [images, '
                       f'{"dimensions" if held is None else held.shape[1]}]')
    held = np.empty((SLICE, batch.shape[1])) if held is None else held
    while len(batch):
      rows = held[filled:filled + len(batch)]
      rows[:], batch = batch[:len(rows)], batch[len(rows):]
      finite = np.isfinite(rows).all(1)
      if not finite.all():
        raise ValueError(f'features of image {images + int(np.argmin(finite))} (counted from 0) have values that are '
                         'not finite; the weights that made them are damaged or of a training that diverged')
      filled, images = filled + len(rows), images + len(rows)
      if filled == SLICE:
        yield held
        filled = 0
  if held is not None and filled:
    yield held[:filled]


def _checked(values: np.ndarray) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any() or (np.diff(values) > 0).any():
    raise ValueError(f'values are {values}; expected singular values: one axis, from 0, descending, finite')
  return values


def _scaled(values: np.ndarray) -> np.ndarray:
  """Parts of the largest value, whose squares neither overflow nor vanish; zeros stay."""
  values = _checked(values)
  return values / values[0] if values.any() else values


def _check_size(k: int, r: int, name: str = 'k') -> None:
  if not 0 <= k <= r:
    raise ValueError(f'{name} is {k}; expected 0 to {r}, as there are {r} singular values')


def _directions(first: Spectrum, k1: int, second: Spectrum, k2: int) -> tuple[np.ndarray, np.ndarray]:
  """The main directions of both."""
  _check_size(k1, len(first.values), 'k1')
  _check_size(k2, len(second.values), 'k2')
  if len(first.mean) != len(second.mean):
    raise ValueError(f'features have {len(first.mean)} and {len(second.mean)} dimensions; expected as many in both: '
                     'compare checkpoints of one architecture')
  return first.directions[:, :k1], second.directions[:, :k2]
