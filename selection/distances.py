"""How far two labelled data sets are from each other: between their classes, and as a whole.

`bures` compares classes as Gaussians; `distance` is OTDD (Alvarez-Melis and Fusi, NeurIPS 2020), built on it; `domain_similarity`
compares the means of classes (Cui et al., CVPR 2018). All take features by one encoder.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import os
from typing import Any, Literal, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from selection.embeddings import class_means, Embeddings
from selection.progress import bar

Covariance = Literal['full', 'diagonal']

# Columns of target factors that are multiplied at once: a block that a cache holds, in products long enough to be fast.
_COLUMNS = 4096
# Error of a Bures distance, as a part of it, above which singular values are computed the slow way.
_TOLERANCE = 1e-7
# L1 distance of the plan's marginals (of sum 1) from the wanted ones up to which a solution counts; the cost is off by far less, because
# its error is of second order.
_MARGINAL_ERROR = 1e-3


class Gaussians(NamedTuple):
  """A Gaussian for each of k classes.

  Attributes:
    means: float64 `[k, d]`.
    factors: for each class A `[d, r]` with the covariance S = A A' and r = min(n - 1, d) for n images (in the precision of the
      features); or, for diagonal covariances, the standard deviations, float64 `[k, d]`.
  """
  means: np.ndarray
  factors: Sequence[np.ndarray] | np.ndarray


def gaussians(embeddings: Embeddings, covariance: Covariance = 'full', *, progress: bool = True) -> Gaussians:
  """The Gaussian that fits the features of each class: mean and covariance, divided by n, not by n - 1.

  The factors of full covariances are as large as the features, if classes have fewer images than the features have dimensions.

  Args:
    embeddings: of images, with labels. A class of one image has covariance zero.
    covariance: 'full', or 'diagonal' for the variances alone.
    progress: whether a bar is shown when it takes more than two seconds.

  Raises:
    ValueError: without labels, a class without an image, or rows that are means already.
  """
  if covariance not in ('full', 'diagonal'):
    raise ValueError(f'covariance is {covariance!r}; expected full or diagonal')
  labels, counts = _image_labels(embeddings, 'embeddings')
  empty = np.flatnonzero(counts == 0)
  if len(empty):
    raise ValueError(f'{len(empty)} of {len(counts)} classes have no image, the first is {_name(embeddings, empty[0])}; '
                     'leave them out (labels from 0 without gaps)')
  classes = np.split(np.argsort(labels, kind='stable'), np.cumsum(counts)[:-1])
  fits = []
  with bar('Gaussians of classes', len(counts), 'classes', shown=progress) as shown:
    for fit in _parallel(lambda rows: _fit(embeddings.features[rows], covariance), classes):
      fits.append(fit)
      shown.update()
  means, factors = np.stack([fit[0] for fit in fits]), tuple(fit[1] for fit in fits)
  if not np.isfinite(means).all():
    raise ValueError(f'features of class {_name(embeddings, np.flatnonzero(~np.isfinite(means).all(1))[0])} are not finite')
  return Gaussians(means, np.stack(factors) if covariance == 'diagonal' else factors)


def bures(source: Gaussians, target: Gaussians, *, progress: bool = True) -> np.ndarray:
  """Squared 2-Wasserstein distances between Gaussians, each of the source with each of the target.

      W2^2 = |m - m'|^2 + tr S + tr S' - 2 tr (S^1/2 S' S^1/2)^1/2

  The last trace is the sum of the singular values of A' B, for S = A A' and S' = B B', so no root of a matrix is needed. (Dowson and
  Landau, 1982.) For diagonal covariances it is |m - m'|^2 + |s - s'|^2 with the standard deviations s. The time grows with the
  smaller rank cubed: for many classes of many images on both sides, diagonal covariances are the quick way.

  Args:
    source: k Gaussians.
    target: l Gaussians in the same space; the same object as source for distances among themselves, in half the time.
    progress: whether a bar is shown when it takes more than two seconds.

  Returns:
    float64 `[k, l]`, at least 0, in units of the features squared. Rounding is below 1e-6 of each, and for factors in float32 about 1e-9
    of the traces.

  Raises:
    ValueError: different dimensions, or one side diagonal and the other not.
  """
  from scipy.spatial import distance as scipy_distance

  if source.means.shape[1] != target.means.shape[1]:
    raise ValueError(f'source Gaussians have {source.means.shape[1]} dimensions and those of the target {target.means.shape[1]}; '
                     'embed both with the same encoder')
  diagonal = isinstance(source.factors, np.ndarray)
  if diagonal != isinstance(target.factors, np.ndarray):
    raise ValueError('the Gaussians of one side have diagonal covariances and those of the other full ones; fit both alike')
  # Differences are squared as they are, so nothing cancels.
  result = scipy_distance.cdist(source.means, target.means, 'sqeuclidean')
  if diagonal:
    return result + scipy_distance.cdist(source.factors, target.factors, 'sqeuclidean')
  result += _traces(source)[:, None] + _traces(target)
  _subtract_cross_terms(result, source, target, progress)
  if source is target:
    result = np.triu(result, 1) + np.triu(result, 1).T
  return np.maximum(result, 0)


def distance(source: Embeddings, target: Embeddings, *, epsilon: float = 0.1, covariance: Covariance = 'full', normalize: bool = True,
             max_samples: int = 2000, debiased: bool = True, seed: int = 0, max_iterations: int = 20_000, progress: bool = True) -> float:
  """OTDD, the optimal transport dataset distance between two labelled sets (Alvarez-Melis and Fusi, NeurIPS 2020).

      c((x, y), (x', y')) = |x - x'|^2 / 2 + W2^2(y, y') / 2
      OT(a, b) = min over T of <T, c> + epsilon KL(T | a b'),   T 1 = a,   T' 1 = b
      S(a, b)  = OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2

  a and b are uniform over the images; W2 is the distance between the Gaussians that fit the features of the two classes, see
  `bures`. S is the debiased Sinkhorn divergence: 0 for a set and itself (to about 1e-6 of the costs).

  Args:
    source: images with labels. Classes of fewer than two images are left out, as they have no spread.
    target: images with labels, by the same encoder; the labels need not have anything to do with the source's.
    epsilon: strength of the entropy, in units of the cost. 0.1 is that of OTDD.
    covariance: of the Gaussians: 'full', or 'diagonal', which is much faster for hundreds of classes of hundreds of images.
    normalize: whether features are divided by their norm first. Costs are in units of 1 - cos then (without labels c is 1 - cos), and
      epsilon means the same for every encoder. False is OTDD's own: the features as they are, costs in their units squared.
    max_samples: images of each set that are transported, drawn by seed where there are more; classes are fitted to all of theirs.
    debiased: whether the result is S, or OT(a, b) alone.
    seed: of the draw, which is the same for a set whatever it is compared with.
    max_iterations: of Sinkhorn, for each of the three problems; small epsilons need many.
    progress: whether bars are shown for what takes more than two seconds.

  Returns:
    The distance, in units of the cost (a squared distance of features).

  Raises:
    ValueError: Sinkhorn does not converge, by how much and what to change; or embeddings that do not fit the method or each other.
  """
  if not 0 < epsilon < np.inf:
    raise ValueError(f'epsilon is {epsilon}; expected a finite number above 0')
  for name, value in (('max_samples', max_samples), ('max_iterations', max_iterations)):
    if not 0 < value < np.inf or value != int(value):
      raise ValueError(f'{name} is {value}; expected a whole number from 1')
  _check_pair(source, target)
  a, b = (_sample(side, what, covariance, normalize, int(max_samples), seed, progress)
          for side, what in ((source, 'source'), (target, 'target')))
  result = _transport_cost(_costs(a, b, progress), epsilon, False, int(max_iterations))
  if debiased:
    result -= sum(_transport_cost(_costs(side, side, progress), epsilon, True, int(max_iterations)) for side in (a, b)) / 2
  return result


def domain_similarity(source: Embeddings, target: Embeddings, *, gamma: float = 0.01, min_images: int = 200) -> float:
  """The similarity of two sets by the means of their classes: exp(-gamma EMD) (Cui et al., CVPR 2018).

      EMD = min over T of sum_ij T_ij |s_i - t_j|,   T 1 = w,   T' 1 = w'

  with s and t the mean features of classes, not normalised, and w and w' the share of images of each class. Solved exactly.

  Args:
    source: images with labels, or means of classes with `weights`, the images of each.
    target: the same, by the same encoder.
    gamma: in units of one over the features; the published 0.01 is for features whose distances are about 50.
    min_images: source classes with fewer images are left out.

  Returns:
    The similarity, from 0 to 1.

  Raises:
    ValueError: no source class has so many images, or embeddings that do not fit the method or each other.
  """
  from scipy.spatial import distance as scipy_distance

  if not 0 < gamma < np.inf:
    raise ValueError(f'gamma is {gamma}; expected a finite number above 0')
  _check_pair(source, target)
  source, target = class_means(source), class_means(target)
  kept = source.weights >= min_images
  if not kept.any():
    raise ValueError(f'none of the {len(kept)} source classes has min_images = {min_images} images, the largest has '
                     f'{source.weights.max():g}; use a lower min_images (rows that are means say by `weights` of how many images)')
  costs = scipy_distance.cdist(source.features[kept].astype(np.float64), target.features.astype(np.float64))
  return float(np.exp(-gamma * _earth_movers_distance(costs, source.weights[kept], target.weights)))


# Gaussians of classes.


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
  # The reflection of the rows that turns the vector of ones to the first axis: the first row is zero then, for rows of mean zero, and
  # the other n - 1 have the same X' X.
  rest = centred[1:] - centred[0] / (1 + np.sqrt(n))
  if len(rest) > d:
    rest = np.linalg.qr(rest, mode='r')
  return rest.T / np.sqrt(n)


def _traces(side: Gaussians) -> np.ndarray:
  return np.array([np.square(factor, dtype=np.float64).sum() for factor in side.factors])


def _subtract_cross_terms(distances: np.ndarray, source: Gaussians, target: Gaussians, progress: bool) -> None:
  """Subtracts 2 |A_i' B_j|_* from entry (i, j) of the sum of the other terms `[k, l]`; where both sides are one, for i < j alone."""
  symmetric = source is target
  total = len(distances) * (len(distances) - 1) // 2 if symmetric else distances.size
  with bar('distances of classes', total, 'pairs', shown=progress) as shown:
    for block in _blocks([factor.shape[1] for factor in target.factors]):
      columns = np.concatenate([factor.astype(np.float64) for factor in target.factors[block]], 1)
      ends = np.cumsum([factor.shape[1] for factor in target.factors[block]])[:-1]
      rows = range(block.stop if symmetric else len(distances))
      first = [max(0, i + 1 - block.start) if symmetric else 0 for i in rows]
      row = lambda i, first: _cross_terms(source.factors[i], columns, ends, distances[i, block], first)  # noqa: B023 (used at once)
      for i, terms in zip(rows, _parallel(row, rows, first)):
        distances[i, block] -= terms
        shown.update(len(terms) - first[i])


def _cross_terms(factor: np.ndarray, columns: np.ndarray, ends: np.ndarray, wholes: np.ndarray, first: int) -> np.ndarray:
  """2 |A' B_j|_* `[b]` for the factors B_j side by side in `columns`, from number `first` on and 0 before."""
  products = np.split(factor.astype(np.float64).T @ columns, ends, axis=1)
  return np.array([0.0 if j < first else 2 * _nuclear_norm(product, wholes[j]) for j, product in enumerate(products)])


def _blocks(widths: Sequence[int]) -> Iterator[slice]:
  """Consecutive factors with about `_COLUMNS` columns together."""
  first = 0
  while first < len(widths):
    size = max(1, int(np.searchsorted(np.cumsum(widths[first:]), _COLUMNS, side='right')))
    yield slice(first, min(first + size, len(widths)))
    first += size


def _nuclear_norm(matrix: np.ndarray, whole: float) -> float:
  """The sum of the singular values, for a distance of `whole` minus twice this.

  They are the roots of the eigenvalues of the smaller product of the matrix with itself, in half the time of an SVD. Squaring costs
  small ones their digits, so where that could matter the SVD has the last word.
  """
  if 0 in matrix.shape:
    return 0.0
  gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
  values = np.linalg.eigvalsh(gram)
  unsure = max(matrix.shape) * np.finfo(np.float64).eps * values[-1]
  if unsure > 0:
    roots = np.sqrt(np.maximum(values, unsure))
    if 2 * (unsure / roots).sum() < _TOLERANCE * (whole - 2 * roots.sum()):
      return float(roots.sum())
  return float(np.linalg.svd(matrix, compute_uv=False).sum())


# What is transported, and for how much.


class _Sample(NamedTuple):
  """Images that are transported: float64 `[n, d]`, the class of each, a row of the Gaussians."""
  features: np.ndarray
  classes: np.ndarray
  gaussians: Gaussians


def _sample(embeddings: Embeddings, what: str, covariance: Covariance, normalize: bool, max_samples: int, seed: int,
            progress: bool) -> _Sample:
  labels, counts = _image_labels(embeddings, what)
  rows = np.flatnonzero(counts[labels] >= 2)
  if not len(rows):
    raise ValueError(f'no class of the {what} has two images; the distance compares the spread of classes, so give it more images of each')
  if len(rows) > max_samples:
    rows = np.sort(np.random.default_rng(seed).choice(rows, max_samples, replace=False))
  # Classes of which no image was drawn need no Gaussian; those of which one was are fitted to all of their images.
  present, classes = np.unique(labels[rows], return_inverse=True)
  members = np.flatnonzero(np.isin(labels, present))
  features = embeddings.features[members]
  if normalize:
    features = _unit_rows(features, members, what)
  names = None if embeddings.class_names is None else [embeddings.class_names[k] for k in present]
  fitted = gaussians(Embeddings(features, np.searchsorted(present, labels[members]), names), covariance, progress=progress)
  return _Sample(features[np.searchsorted(members, rows)].astype(np.float64), classes, fitted)


def _unit_rows(features: np.ndarray, rows: np.ndarray, what: str) -> np.ndarray:
  features = features.astype(np.promote_types(features.dtype, np.float32))
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  if not norms.all():
    raise ValueError(f'{(norms == 0).sum()} rows of {what} features are zero, the first is row {rows[np.argmin(norms)]}; '
                     'their direction is not defined: leave them out, or use normalize=False')
  return features / norms


def _costs(a: _Sample, b: _Sample, progress: bool) -> np.ndarray:
  """c `[n, m]`, float64."""
  between = bures(a.gaussians, b.gaussians, progress=progress)
  return (_squared_distances(a.features, b.features) + between[np.ix_(a.classes, b.classes)]) / 2


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """`[n, m]` by a matrix product in float64, around the mean: what cancels is far below any epsilon."""
  centre = x.mean(0)
  x, y = x - centre, y - centre
  return np.maximum(np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T, 0)


def _transport_cost(costs: np.ndarray, epsilon: float, symmetric: bool, max_iterations: int) -> float:
  """min over T of <T, c> + epsilon KL(T | a b') for uniform a and b, from the potentials of OTT's Sinkhorn.

  The other potential and the value are computed once more in float64, so that differences of such costs keep their digits. The value
  is that of the dual: a lower bound, and off by the square of the error of the marginals.
  """
  # From an entropy that blurs all costs down to the wanted one: a small one alone takes several times as many iterations. Few different
  # starts, as each is compiled.
  start = 32.0 ** max(0, int(np.ceil(np.log(max(costs.max() / epsilon, 1)) / np.log(32))))
  # What float32 can reach: its potentials are known to a part of the costs.
  threshold = np.clip(2e-7 * costs.max() / epsilon, 1e-5, _MARGINAL_ERROR / 2)
  f = np.asarray(_potential(jnp.asarray(costs, jnp.float32), epsilon, threshold, start, symmetric, max_iterations), np.float64)
  exponents = (f[:, None] - costs) / epsilon
  peaks = exponents.max(0)
  g = -epsilon * (np.log(np.exp(exponents - peaks).mean(0)) + peaks)
  error = np.abs(np.exp(exponents + g / epsilon).mean(1) - 1).mean()
  if not error < _MARGINAL_ERROR:
    raise ValueError(
        f'Sinkhorn did not converge: after up to {max_iterations} iterations {error:.2g} of the mass is out of place, expected less than '
        f'{_MARGINAL_ERROR:g}; epsilon {epsilon:g} is small for costs up to {costs.max():.3g}: use a larger one (a hundredth of the costs, '
        'say), or more max_iterations')
  return float(f.mean() + g.mean())


@functools.partial(jax.jit, static_argnames=('start', 'symmetric', 'max_iterations'))
def _potential(costs: jax.Array, epsilon: jax.Array, threshold: jax.Array, start: float, symmetric: bool,
               max_iterations: int) -> jax.Array:
  """The first potential `[n]`; the entropy falls from start * epsilon to epsilon by a tenth in each iteration."""
  acceleration, epsilon_scheduler, geometry, linear_problem, sinkhorn = _ott()
  n, m = costs.shape
  schedule = epsilon_scheduler.Epsilon(epsilon, init=start, decay=0.9)
  problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=costs, epsilon=schedule),
                                         jnp.full(n, 1 / n, costs.dtype), jnp.full(m, 1 / m, costs.dtype))
  # Ten iterations between looks at the error. Unless the least number ends one short of a ten, OTT looks at an error that it has not
  # computed, and stops.
  least = 10 * int(np.ceil(np.log(start) / -np.log(0.9) / 10) + 1) - 1
  # A set and itself: both potentials are one, and averages of old and new ones (Feydy et al., AISTATS 2019) arrive at once.
  averaged = {'parallel_dual_updates': True, 'momentum': acceleration.Momentum(value=0.5)} if symmetric else {}
  solver = sinkhorn.Sinkhorn(threshold=threshold, inner_iterations=10, min_iterations=min(least, max_iterations),
                             max_iterations=max_iterations, **averaged)
  return solver(problem).f


def _ott() -> tuple[Any, ...]:
  # The import takes two seconds and warns that one of ott's own dependencies is not maintained any more.
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'JAXopt is no longer maintained', DeprecationWarning)
    from ott.geometry import epsilon_scheduler, geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import acceleration, sinkhorn
  return acceleration, epsilon_scheduler, geometry, linear_problem, sinkhorn


def _earth_movers_distance(costs: np.ndarray, source: np.ndarray, target: np.ndarray) -> float:
  """min over T of <T, C> with marginals in proportion to the weights `[n]` and `[m]`, as a linear program."""
  from scipy import optimize, sparse

  n, m = costs.shape
  unit = costs.max()
  if not unit > 0:
    return 0.0
  rows, columns = sparse.kron(sparse.eye_array(n), np.ones((1, m))), sparse.kron(np.ones((1, n)), sparse.eye_array(m))
  # The solver's tolerances are absolute: costs up to one and masses around one make them relative.
  masses = np.concatenate([source / source.sum(), target / target.sum()]) * n
  # Presolving finds nothing to do here, and can take a hundred times as long as the solution.
  result = optimize.linprog(costs.ravel() / unit, A_eq=sparse.vstack([rows, columns], format='csc'), b_eq=masses, method='highs-ipm',
                            options={'presolve': False})
  if not result.success:
    raise ValueError(f'the earth mover\'s distance between {n} and {m} classes could not be solved: {result.message}')
  return float(result.fun) * unit / n


# What is asked of embeddings.


def _check_pair(source: Embeddings, target: Embeddings) -> None:
  for what, side in (('source', source), ('target', target)):
    if not isinstance(side, Embeddings):
      raise ValueError(f'{what} is a {type(side).__name__}; expected selection.Embeddings(features, labels)')
    if side.labels is None:
      raise ValueError(f'{what} has no labels; give selection.Embeddings(features, labels)')
  dimensions = [side.features.shape[1] for side in (source, target)]
  if dimensions[0] != dimensions[1]:
    raise ValueError(f'source features have {dimensions[0]} dimensions and target features {dimensions[1]}; '
                     'embed both with the same encoder')
  if source.fingerprint and target.fingerprint and source.fingerprint != target.fingerprint:
    raise ValueError(f'source and target come from different encoders (fingerprints {source.fingerprint} and {target.fingerprint}); '
                     'embed both with the same one')


def _image_labels(embeddings: Embeddings, what: str) -> tuple[np.ndarray, np.ndarray]:
  """The labels, and the number of images of each class `[k]`."""
  if embeddings.labels is None:
    raise ValueError(f'{what}: no labels, which say what is a class; give selection.Embeddings(features, labels)')
  if embeddings.weights is not None and (embeddings.weights != 1).any():
    row = np.argmax(embeddings.weights != 1)
    raise ValueError(f'{what}: row {row}, class {_name(embeddings, embeddings.labels[row])}, stands for {embeddings.weights[row]:g} images '
                     '(weights); a covariance needs the features of the images themselves, not means of classes')
  return embeddings.labels, np.bincount(embeddings.labels, minlength=embeddings.num_classes)


def _name(embeddings: Embeddings, k: int) -> str:
  return str(k) if embeddings.class_names is None else repr(embeddings.class_names[k])


def _parallel(function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
  """`map` on all cores, for functions that spend their time in numpy's linear algebra.

  Each call has one thread. Matrices of a class are too small to be shared out: the threads of the BLAS would wait for each other, and
  where the machine has other work to do that takes ten times as long.
  """
  from concurrent import futures

  import threadpoolctl

  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  with threadpoolctl.threadpool_limits(1, 'blas'), futures.ThreadPoolExecutor(cores) as pool:
    yield from pool.map(function, *arguments)
