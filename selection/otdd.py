"""Distances between two labelled data sets.

`otdd` is the optimal transport dataset distance (Alvarez-Melis and Fusi, NeurIPS 2020), which compares classes as
Gaussians; `domain_similarity` compares the means of classes (Cui et al., CVPR 2018). Both take features that come from
one encoder.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from selection.embeddings import check_same_encoder, class_means, Embeddings
from selection.gaussians import bures, Covariance, Gaussians, gaussians, image_labels
from selection.transport import importing_ott

# A solution is accepted if the L1 distance of the plan's marginals (of sum 1) from the prescribed ones is below this.
# The error of the cost is much smaller, as it is of second order.
_MARGINAL_ERROR = 1e-3


def otdd(source: Embeddings, target: Embeddings, *, epsilon: float = 0.1, covariance: Covariance = 'full',
         normalize: bool = True, max_samples: int = 2000, debiased: bool = True, seed: int = 0,
         max_iterations: int = 20_000, progress: bool = True) -> float:
  """OTDD, the optimal transport dataset distance between two labelled sets (Alvarez-Melis and Fusi, NeurIPS 2020).

      c((x, y), (x', y')) = |x - x'|^2 / 2 + W2^2(y, y') / 2
      OT(a, b) = min over T of <T, c> + epsilon KL(T | a b'),   T 1 = a,   T' 1 = b
      S(a, b)  = OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2

  a and b are uniform over the images; W2 is the distance between the Gaussians that fit the features of the two
  classes, see `bures`. S is the debiased Sinkhorn divergence: 0 between a set and itself (to about 1e-6 of the costs).

  Args:
    source: images with labels. Classes of fewer than two images are left out, as they have no spread.
    target: images with labels, embedded with the same encoder; its classes need not be related to the source's.
    epsilon: strength of the entropy, in units of the cost. OTDD uses 0.1.
    covariance: of the Gaussians: 'full', or 'diagonal', which is much faster for hundreds of classes of hundreds of
      images.
    normalize: whether features are divided by their norm first. Costs are then in units of 1 - cos (without labels c is
      1 - cos), and epsilon means the same for every encoder. With False, as in OTDD, the features are used unchanged,
      and costs are in their units squared.
    max_samples: how many images of each set are transported; of a larger set this many are drawn at random. Gaussians
      are always fitted to all images of a class.
    debiased: whether to return S; otherwise OT(a, b).
    seed: of the random draw. The images drawn from a set do not depend on the other set.
    max_iterations: limit of Sinkhorn's iterations for each of the three problems; small epsilons need many.
    progress: whether to show a bar for steps that take more than two seconds.

  Returns:
    The distance, in units of the cost (a squared distance of features).

  Raises:
    ValueError: Sinkhorn does not converge; or embeddings that do not fit the method or each other.
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
    own = sum(_transport_cost(_costs(side, side, progress), epsilon, True, int(max_iterations)) for side in (a, b))
    result -= own / 2
  return result


def domain_similarity(source: Embeddings, target: Embeddings, *, gamma: float = 0.01, min_images: int = 200) -> float:
  """The similarity of two sets by the means of their classes: exp(-gamma EMD) (Cui et al., CVPR 2018).

      EMD = min over T of sum_ij T_ij |s_i - t_j|,   T 1 = w,   T' 1 = w'

  with s and t the mean features of classes, not normalised, and w and w' the share of images of each class. It is
  solved exactly.

  Args:
    source: images with labels, or means of classes whose `weights` are the numbers of images.
    target: the same, embedded with the same encoder.
    gamma: in units of one over the features; the published 0.01 is for features whose distances are about 50.
    min_images: source classes with fewer images are left out.

  Returns:
    The similarity, from 0 to 1.

  Raises:
    ValueError: no source class has `min_images` images, or embeddings that do not fit the method or each other.
  """
  from scipy.spatial import distance as scipy_distance

  if not 0 < gamma < np.inf:
    raise ValueError(f'gamma is {gamma}; expected a finite number above 0')
  _check_pair(source, target)
  source, target = class_means(source), class_means(target)
  images, target_images = _images_per_class(source), _images_per_class(target)
  enough = images >= min_images
  if not enough.any():
    raise ValueError(f'none of the {len(images)} source classes has min_images = {min_images} images, the largest has '
                     f'{images.max():g}; use a lower min_images (rows that are means need `weights`, the number of '
                     'images of each)')
  costs = scipy_distance.cdist(source.features[enough].astype(np.float64), target.features.astype(np.float64))
  return float(np.exp(-gamma * _earth_movers_distance(costs, images[enough], target_images)))


def _images_per_class(means: Embeddings) -> np.ndarray:
  assert means.weights is not None  # class_means sets them
  return means.weights


# The images that are transported, and the cost of transport.


class _Sample(NamedTuple):
  """The images that are transported: float64 `[n, d]`, the class of each, and a Gaussian for each class."""
  features: np.ndarray
  classes: np.ndarray
  gaussians: Gaussians


def _sample(embeddings: Embeddings, what: str, covariance: Covariance, normalize: bool, max_samples: int, seed: int,
            progress: bool) -> _Sample:
  labels, counts = image_labels(embeddings, what)
  rows = np.flatnonzero(counts[labels] >= 2)
  if not len(rows):
    raise ValueError(f'no class of the {what} has two images; the distance compares the spread of classes, so give '
                     'more images of each class')
  if len(rows) > max_samples:
    rows = np.sort(np.random.default_rng(seed).choice(rows, max_samples, replace=False))
  # Only classes with a drawn image need a Gaussian. It is fitted to all images of the class.
  present, classes = np.unique(labels[rows], return_inverse=True)
  members = np.flatnonzero(np.isin(labels, present))
  features = embeddings.features[members]
  if normalize:
    features = _unit_rows(features, members, what)
  names = None if embeddings.class_names is None else [embeddings.class_names[k] for k in present]
  images = Embeddings(features, np.searchsorted(present, labels[members]), names)
  fitted = gaussians(images, covariance, progress=progress)
  return _Sample(features[np.searchsorted(members, rows)].astype(np.float64), classes, fitted)


def _unit_rows(features: np.ndarray, rows: np.ndarray, what: str) -> np.ndarray:
  features = features.astype(np.promote_types(features.dtype, np.float32))
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  if not norms.all():
    raise ValueError(f'{(norms == 0).sum()} rows of {what} features are zero, the first is row '
                     f'{rows[np.argmin(norms)]}; they have no direction: leave them out, or use normalize=False')
  return features / norms


def _costs(a: _Sample, b: _Sample, progress: bool) -> np.ndarray:
  """The costs c, float64 `[n, m]`."""
  between = bures(a.gaussians, b.gaussians, progress=progress)
  return (_squared_distances(a.features, b.features) + between[np.ix_(a.classes, b.classes)]) / 2


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """`[n, m]` by a float64 matrix product of centred features: the digits that cancel are far below any epsilon."""
  centre = x.mean(0)
  x, y = x - centre, y - centre
  return np.maximum(np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T, 0)


def _transport_cost(costs: np.ndarray, epsilon: float, symmetric: bool, max_iterations: int) -> float:
  """min over T of <T, c> + epsilon KL(T | a b') for uniform a and b, from the potentials of OTT's Sinkhorn.

  The second potential and the value are computed again in float64, so that differences of such costs keep their
  digits. The value is that of the dual problem: a lower bound, with an error of the order of the squared error of the
  marginals.
  """
  # The entropy starts large enough to blur all costs and falls to epsilon, as a small epsilon from the start takes
  # several times as many iterations. The starts are powers of 32, as each different start is compiled.
  start = 32.0 ** max(0, int(np.ceil(np.log(max(costs.max() / epsilon, 1)) / np.log(32))))
  # What float32 can reach: the rounding error of the potentials is proportional to the costs.
  threshold = np.clip(2e-7 * costs.max() / epsilon, 1e-5, _MARGINAL_ERROR / 2)
  single = jnp.asarray(costs, jnp.float32)
  f = np.asarray(_potential(single, epsilon, threshold, start, symmetric, max_iterations), np.float64)
  exponents = (f[:, None] - costs) / epsilon
  peaks = exponents.max(0)
  g = -epsilon * (np.log(np.exp(exponents - peaks).mean(0)) + peaks)
  error = np.abs(np.exp(exponents + g / epsilon).mean(1) - 1).mean()
  if not error < _MARGINAL_ERROR:
    raise ValueError(
        f'Sinkhorn did not converge: after up to {max_iterations} iterations {error:.2g} of the mass is out of place, '
        f'expected less than {_MARGINAL_ERROR:g}; epsilon {epsilon:g} is small for costs up to {costs.max():.3g}: use '
        'a larger one (such as a hundredth of the costs), or more max_iterations')
  return float(f.mean() + g.mean())


@functools.partial(jax.jit, static_argnames=('start', 'symmetric', 'max_iterations'))
def _potential(costs: jax.Array, epsilon: jax.Array, threshold: jax.Array, start: float, symmetric: bool,
               max_iterations: int) -> jax.Array:
  """The first potential `[n]`; the entropy falls from start * epsilon to epsilon, by a tenth in each iteration."""
  acceleration, epsilon_scheduler, geometry, linear_problem, sinkhorn = _ott()
  n, m = costs.shape
  schedule = epsilon_scheduler.Epsilon(epsilon, init=start, decay=0.9)
  problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=costs, epsilon=schedule),
                                         jnp.full(n, 1 / n, costs.dtype), jnp.full(m, 1 / m, costs.dtype))
  # The error is computed every ten iterations. Unless the least number of iterations is one below a multiple of ten,
  # OTT reads an error that it has not computed, and stops.
  least = 10 * int(np.ceil(np.log(start) / -np.log(0.9) / 10) + 1) - 1
  # Between a set and itself both potentials are equal, and averages of the old and the new one converge in a few
  # iterations (Feydy et al., AISTATS 2019).
  averaged = {'parallel_dual_updates': True, 'momentum': acceleration.Momentum(value=0.5)} if symmetric else {}
  solver = sinkhorn.Sinkhorn(threshold=threshold, inner_iterations=10, min_iterations=min(least, max_iterations),
                             max_iterations=max_iterations, **averaged)
  return solver(problem).f


def _ott() -> tuple[Any, ...]:
  with importing_ott():
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
  rows = sparse.kron(sparse.eye_array(n), np.ones((1, m)))
  columns = sparse.kron(np.ones((1, n)), sparse.eye_array(m))
  # The solver's tolerances are absolute: costs up to one and masses around one make them relative.
  masses = np.concatenate([source / source.sum(), target / target.sum()]) * n
  # Presolving simplifies nothing here, and can take a hundred times as long as the solution.
  result = optimize.linprog(costs.ravel() / unit, A_eq=sparse.vstack([rows, columns], format='csc'), b_eq=masses,
                            method='highs-ipm', options={'presolve': False})
  if not result.success:
    raise ValueError(f"the earth mover's distance between {n} and {m} classes could not be solved: {result.message}")
  return float(result.fun) * unit / n


# Checks of the embeddings.


def _check_pair(source: Embeddings, target: Embeddings) -> None:
  for what, side in (('source', source), ('target', target)):
    if not isinstance(side, Embeddings):
      raise ValueError(f'{what} is a {type(side).__name__}; expected selection.Embeddings(features, labels)')
    if side.labels is None:
      raise ValueError(f'{what} has no labels; give selection.Embeddings(features, labels)')
  check_same_encoder((source.features.shape[1], target.features.shape[1]), (source.fingerprint, target.fingerprint))
