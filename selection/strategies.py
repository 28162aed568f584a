"""Strategies: each computes one score for every source unit from a `Problem` and its own keyword parameters.

C_ij is the cost between source unit i and target unit j; s_i and t_j are their features.
"""

from collections.abc import Callable
import dataclasses
import inspect
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selection import blocks, gaussians, transport
from selection.blocks import Blocks, Settings
from selection.pools import ArrayRows, check_rows
from selection.units import Units


@dataclasses.dataclass(frozen=True)
class Problem:
  """The input of every strategy: the units of both sides, the settings of passes, and the random generator."""
  source: Units
  target: Units
  rng: np.random.Generator
  settings: Settings = Settings()

  def costs(self, cost: str) -> Blocks:
    """All costs `[n, m]`, by the name of one in `COSTS`; raises ValueError for an unknown name."""
    if cost not in COSTS:
      raise ValueError(f'cost is {cost!r}; known: {", ".join(COSTS)}')
    return COSTS[cost](self)

  def between(self, cost: Callable[[jax.Array, jax.Array], jax.Array]) -> Blocks:
    """Costs that depend only on the features of the units."""
    target = self.target.rows.take(np.arange(len(self.target.rows)))
    check_rows(target, what='target')  # after the conversion to float32; rows of a file were not checked before
    return Blocks(self.source.rows, target, cost, settings=self.settings)


@dataclasses.dataclass(frozen=True)
class Scores:
  """The result of a strategy.

  Attributes:
    values: `[n]`.
    measure: what the values are: 'share' (of the transported mass; sum 1), 'cosine', ...
    ascending: whether small values are chosen first.
    plan: (rows, groups `[m, g]` or None) -> `[k, g]`, the mass from those units to each group of target units, or to
      each target unit; None for strategies without a plan.
    target_mass: `[m]`, share of the mass that arrives at each target unit; None for strategies without transport.
    solver: how the solver ended: iterations, error, converged; {} for strategies without a solver.
  """
  values: np.ndarray
  measure: str
  ascending: bool = False
  plan: Callable[[np.ndarray, np.ndarray | None], np.ndarray] | None = None
  target_mass: np.ndarray | None = None
  solver: dict[str, Any] = dataclasses.field(default_factory=dict)


def uot(problem: Problem, *, cost: str = 'cosine', epsilon: float = 0.1, rho_source: float = 0.1,
        rho_target: float = 10.0, sample: int | None = None, max_iterations: int = 2000) -> Scores:
  """The mass that unbalanced optimal transport moves from each source unit: share_i = sum_j T_ij / sum_ij T_ij.

      T = argmin <T, C> + epsilon sum T (log T - 1) + rho_source KL(T 1 | 1) + rho_target KL(T' 1 | 1)

  The source marginal is enforced weakly and that of the target almost exactly, so units that no target unit needs keep
  their mass. The defaults are the published ones (Liu et al., NeurIPS 2022: cost (1 - cos) / 0.1, entropy 1, KL weights
  1 and 100), in units of 1 - cos.

  Args:
    problem: the units.
    cost: 'cosine', 1 - cos; 'euclidean', the distance of the unit vectors (from a comment in the code of Liu et al.);
      'bures', half the squared 2-Wasserstein distance between the Gaussians of classes of unit vectors, as in OTDD
      (Alvarez-Melis and Fusi, NeurIPS 2020): 1 - cos for classes of one image, and more if classes differ in spread.
    epsilon: strength of the entropy, in units of the cost.
    rho_source: strength of the penalty on the source marginal, in units of the cost.
    rho_target: strength of the penalty on the target marginal, in units of the cost.
    sample: the number of source rows, drawn by the seed, to which the potentials are fitted before one pass scores all
      rows; None fits them to all rows, which takes one pass per iteration.
    max_iterations: of the solver.

  Raises:
    ValueError: the solver does not converge; the message has the error and what to change.
  """
  if rho_source == np.inf:
    raise ValueError('rho_source is inf, so that all source units would give the same mass; use a smaller one, or '
                     "method='ot'")
  costs = problem.costs(cost)
  fitted = costs if sample is None else _sampled(costs, sample, problem.rng)
  kernel, potentials = transport.solve(fitted, epsilon=epsilon, rho_source=rho_source, rho_target=rho_target,
                                       max_iterations=max_iterations)
  _check_converged('uot', potentials, f'epsilon {epsilon}, rho_source {rho_source}, rho_target {rho_target}',
                   'use a larger epsilon, smaller rhos, or more max_iterations')
  kernel = kernel if sample is None else costs.kernel(epsilon)
  return _transported(kernel, potentials)


def least(problem: Problem, *, cost: str = 'cosine', epsilon: float = 0.1, rho_source: float = 0.1,
          rho_target: float = 10.0, sample: int | None = None, max_iterations: int = 2000) -> Scores:
  """The units from which `uot` moves the least mass: a control experiment, as these should not help."""
  scores = uot(problem, cost=cost, epsilon=epsilon, rho_source=rho_source, rho_target=rho_target, sample=sample,
               max_iterations=max_iterations)
  return dataclasses.replace(scores, ascending=True)


def ot(problem: Problem, *, cost: str = 'cosine', epsilon: float = 0.1, max_iterations: int = 2000) -> Scores:
  """Balanced optimal transport: the mean transport cost sum_j T_ij C_ij / sum_j T_ij of each unit, cheapest first.

      T = argmin <T, C> + epsilon sum T (log T - 1)   with   T 1 = 1 / n,   T' 1 = 1 / m     (Cuturi, NeurIPS 2013)

  Every unit must give all of its mass here, so the mass itself does not rank units (all shares are 1 / n), and this
  baseline ranks them by cost. Even units that no target unit needs are forced onto some target unit; `uot` avoids that.

  Args:
    problem: the units.
    cost: as in `uot`.
    epsilon: strength of the entropy, in units of the cost.
    max_iterations: of the solver.

  Raises:
    ValueError: the solver does not converge.
  """
  kernel, potentials = transport.solve(problem.costs(cost), epsilon=epsilon, rho_source=np.inf, rho_target=np.inf,
                                       threshold=1e-5, max_iterations=max_iterations)
  _check_converged('ot', potentials, f'epsilon {epsilon}', 'use a larger epsilon or more max_iterations')
  values = kernel.map(_mean_cost, np.exp(potentials.log_v - potentials.log_v.max()), epsilon)
  return dataclasses.replace(_transported(kernel, potentials, values), measure='mean cost', ascending=True)


def softmax(problem: Problem, *, cost: str = 'cosine', epsilon: float = 0.1) -> Scores:
  """Each target unit spreads a mass of one over the source by a softmax.

      share_i = 1/m sum_j exp(-C_ij / epsilon) / sum_k exp(-C_kj / epsilon)

  An ablation in closed form: with the published parameters `uot` nearly always chooses the same units.

  Args:
    problem: the units.
    cost: as in `uot`.
    epsilon: temperature, in units of the cost.
  """
  kernel = problem.costs(cost).kernel(epsilon).store()
  return _transported(kernel, transport.closed_form(kernel))


def nearest(problem: Problem) -> Scores:
  """The largest cosine to any target unit: max_j cos(s_i, t_j)."""
  costs = problem.between(blocks.cosine)
  plan = lambda rows, groups: costs.of(rows).map(_nearest_group, np.eye(costs.m) if groups is None else groups)
  return Scores(1 - costs.map(_least_cost), 'cosine', plan=plan)


def greedy_emd(problem: Problem) -> Scores:
  """The earth mover's distance between each source unit alone and the whole target, nearest first.

  It is the mean sum_j w_j |s_i - t_j|, where w_j is the fraction of the target's images in t_j: from a single source
  unit there is only one transport plan. This is the greedy choice by the domain similarity of Cui et al. (CVPR 2018),
  whose ground distance is that of the features without normalization.
  """
  counts = problem.target.counts
  weights = np.ones(len(problem.target.rows)) if counts is None else np.asarray(counts, np.float64)
  values = problem.between(blocks.euclidean).map(_weighted_mean, weights / weights.sum())
  return Scores(values, 'mean distance', ascending=True)


def random(problem: Problem) -> Scores:
  """A random order, for control experiments."""
  return Scores(problem.rng.permutation(len(problem.source.rows)) + 1.0, 'random')


def none(problem: Problem) -> Scores:
  """No source units at all: plain fine-tuning; `size` is ignored."""
  return Scores(np.zeros(len(problem.source.rows)), 'none')


def defaults(method: str) -> dict[str, Any]:
  """The parameters of a strategy with their defaults; raises ValueError for an unknown strategy."""
  if method not in STRATEGIES:
    raise ValueError(f'selection method {method!r}; known: {", ".join(STRATEGIES)}')
  parameters = inspect.signature(STRATEGIES[method]).parameters
  return {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _transported(kernel: Blocks, potentials: transport.Potentials, values: np.ndarray | None = None) -> Scores:
  """Shares of the transported mass, and the plan."""
  if values is None:
    values = transport.normalised(transport.mass(kernel, potentials))
  plan = lambda rows, groups: transport.plan(kernel.of(rows), potentials, groups)
  solver: dict[str, Any] = {}
  if potentials.iterations:
    solver = {'iterations': potentials.iterations, 'error': potentials.error, 'converged': potentials.converged}
  return Scores(values, 'share', plan=plan, target_mass=transport.target_mass(potentials), solver=solver)


def _sampled(costs: Blocks, sample: int, rng: np.random.Generator) -> Blocks:
  if not isinstance(sample, numbers.Integral) or sample < 1:
    raise ValueError(f'sample is {sample!r}; expected a whole number of source rows from 1, or None for all')
  drawn = np.sort(rng.choice(costs.n, min(sample, costs.n), replace=False))
  return costs.of(drawn)


def _check_converged(method: str, potentials: transport.Potentials, settings: str, fix: str) -> None:
  if not potentials.converged:
    raise ValueError(f'{method} did not converge: error {potentials.error:.2g} after {potentials.iterations} '
                     f'iterations, expected less than {potentials.threshold:.0e} ({settings}); {fix}')


def _mean_cost(kernel: jax.Array, valid: jax.Array, v: jax.Array, epsilon: jax.Array) -> jax.Array:
  del valid
  mass = kernel * v
  return jnp.sum(jnp.where(mass > 0, -epsilon * jnp.log(kernel), 0) * mass, 1) / jnp.sum(mass, 1)


def _least_cost(costs: jax.Array, valid: jax.Array) -> jax.Array:
  del valid
  return jnp.min(costs, 1)


def _nearest_group(costs: jax.Array, valid: jax.Array, groups: jax.Array) -> jax.Array:
  del valid
  return groups[jnp.argmin(costs, 1)]


def _weighted_mean(costs: jax.Array, valid: jax.Array, weights: jax.Array) -> jax.Array:
  del valid
  return jnp.matmul(costs, weights, precision=jax.lax.Precision.HIGHEST)


def _bures(problem: Problem) -> Blocks:
  sides = []
  for units, what in ((problem.source, 'source'), (problem.target, 'target')):
    if units.images is None or units.counts is None:
      raise ValueError(f"cost 'bures' compares the spread of classes, so the {what} needs its images with labels (not "
                       "means, chunks or single images); give selection.Embeddings(features, labels) and by='class' or "
                       "by='cluster'")
    features = np.asarray(units.images.features, np.float32)
    check_rows(features, what=what)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = dataclasses.replace(units.images, features=features / norms)
    sides.append(gaussians.gaussians(unit, progress=problem.settings.progress))
  squares = gaussians.bures(*sides, progress=problem.settings.progress)
  return Blocks(ArrayRows(squares / 2, check=False), None, blocks.given, settings=problem.settings)


COSTS: dict[str, Callable[[Problem], Blocks]] = {
    'cosine': lambda problem: problem.between(blocks.cosine),
    'euclidean': lambda problem: problem.between(blocks.unit_euclidean),
    'bures': _bures,
}

# Strategies whose scores are shares of the transported mass.
BY_SHARE = frozenset({'uot', 'softmax', 'least'})

STRATEGIES: dict[str, Callable[..., Scores]] = {
    'uot': uot,
    'ot': ot,
    'softmax': softmax,
    'nearest': nearest,
    'greedy_emd': greedy_emd,
    'random': random,
    'least': least,
    'none': none,
}
