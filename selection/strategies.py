"""Strategies: each gives one score for every source unit. All take a `Problem`, and parameters of their own by name.

C_ij is the cost between source unit i and target unit j, s_i and t_j their features.
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
  """What every strategy is given: the units of both sides, how passes are run, and where chance comes from."""
  source: Units
  target: Units
  rng: np.random.Generator
  settings: Settings = Settings()

  def costs(self, cost: str) -> Blocks:
    """All costs `[n, m]`, see `COSTS`; raises ValueError for one that is not known."""
    if cost not in COSTS:
      raise ValueError(f'cost is {cost!r}; known: {", ".join(COSTS)}')
    return COSTS[cost](self)

  def between(self, cost: Callable[[jax.Array, jax.Array], jax.Array]) -> Blocks:
    """Costs that depend on the features of the units alone."""
    target = self.target.rows.take(np.arange(len(self.target.rows)))
    check_rows(target, what='target')  # as float32, and of a file for the first time
    return Blocks(self.source.rows, target, cost, settings=self.settings)


@dataclasses.dataclass(frozen=True)
class Scores:
  """What a strategy found.

  Attributes:
    values: `[n]`.
    measure: what they are: 'share' (of the transported mass; sum 1), 'cosine', ...
    ascending: whether small values are chosen first.
    plan: (rows, groups [m, g] or None) -> `[k, g]`, what goes from those units to each group of target units, or to each of them;
      None where nothing does.
    target_mass: `[m]`, share of the mass that arrives at each target unit; None where there is none.
    solver: how the solver ended: iterations, error, converged; {} where there was none.
  """
  values: np.ndarray
  measure: str
  ascending: bool = False
  plan: Callable[[np.ndarray, np.ndarray | None], np.ndarray] | None = None
  target_mass: np.ndarray | None = None
  solver: dict[str, Any] = dataclasses.field(default_factory=dict)


def uot(problem: Problem, *, cost: str = 'cosine', epsilon: float = 0.1, rho_source: float = 0.1, rho_target: float = 10.0,
        sample: int | None = None, max_iterations: int = 2000) -> Scores:
  """The mass that unbalanced optimal transport moves from each source unit: share_i = sum_j T_ij / sum_ij T_ij.

      T = argmin <T, C> + epsilon sum T (log T - 1) + rho_source KL(T 1 | 1) + rho_target KL(T' 1 | 1)

  The source marginal holds weakly, the target's almost exactly, so units that no target unit needs keep their mass. The defaults
  are the published ones (Liu et al., NeurIPS 2022: cost (1 - cos) / 0.1, entropy 1, KL weights 1 and 100), in units of 1 - cos.

  Args:
    problem: the units.
    cost: 'cosine', 1 - cos; 'euclidean', the distance of the unit vectors (Liu et al. in a comment of their code); 'bures', half the
      squared 2-Wasserstein distance between the Gaussians of classes of unit vectors, as in OTDD (Alvarez-Melis and Fusi, NeurIPS 2020):
      1 - cos for classes of one image, and more where classes differ in their spread.
    epsilon: strength of the entropy, in units of the cost.
    rho_source, rho_target: strengths with which the marginals hold, in units of the cost.
    sample: rows of the source, drawn by the seed, to which the potentials are fitted before one pass scores all; None fits them to
      all rows, which takes a pass for each iteration.
    max_iterations: after which the solver gives up.

  Raises:
    ValueError: the solver does not converge, by how much and what to change.
  """
  if rho_source == np.inf:
    raise ValueError("rho_source is inf, so that all source units would give the same mass; use a smaller one, or method='ot'")
  costs = problem.costs(cost)
  fitted = costs if sample is None else _sampled(costs, sample, problem.rng)
  kernel, potentials = transport.solve(fitted, epsilon=epsilon, rho_source=rho_source, rho_target=rho_target, max_iterations=max_iterations)
  _check_converged('uot', potentials, f'epsilon {epsilon}, rho_source {rho_source}, rho_target {rho_target}',
                   'use a larger epsilon, smaller rhos, or more max_iterations')
  kernel = kernel if sample is None else costs.kernel(epsilon)
  return _transported(kernel, potentials)


def least(problem: Problem, *, cost: str = 'cosine', epsilon: float = 0.1, rho_source: float = 0.1, rho_target: float = 10.0,
          sample: int | None = None, max_iterations: int = 2000) -> Scores:
  """The units from which `uot` moves the least mass, for control experiments: what should not help."""
  scores = uot(problem, cost=cost, epsilon=epsilon, rho_source=rho_source, rho_target=rho_target, sample=sample,
               max_iterations=max_iterations)
  return dataclasses.replace(scores, ascending=True)


def ot(problem: Problem, *, cost: str = 'cosine', epsilon: float = 0.1, max_iterations: int = 2000) -> Scores:
  """Balanced optimal transport: the mean cost sum_j T_ij C_ij / sum_j T_ij at which a unit's mass travels; cheap units first.

      T = argmin <T, C> + epsilon sum T (log T - 1)   with   T 1 = 1 / n,   T' 1 = 1 / m     (Cuturi, NeurIPS 2013)

  Every unit must give all of its mass here, so the mass itself says nothing (all shares are 1 / n), and this baseline asks what each
  unit's mass costs. Units that no target unit needs are forced on some target unit all the same; that is what `uot` avoids.

  Args:
    problem: the units.
    cost: as in `uot`.
    epsilon: strength of the entropy, in units of the cost.
    max_iterations: after which the solver gives up.

  Raises:
    ValueError: the solver does not converge.
  """
  kernel, potentials = transport.solve(problem.costs(cost), epsilon=epsilon, rho_source=np.inf, rho_target=np.inf, threshold=1e-5,
                                       max_iterations=max_iterations)
  _check_converged('ot', potentials, f'epsilon {epsilon}', 'use a larger epsilon or more max_iterations')
  values = kernel.map(_mean_cost, np.exp(potentials.log_v - potentials.log_v.max()), epsilon)
  return dataclasses.replace(_transported(kernel, potentials, values), measure='mean cost', ascending=True)


def softmax(problem: Problem, *, cost: str = 'cosine', epsilon: float = 0.1) -> Scores:
  """Each target unit spreads one unit of mass over the source by a soft-max: share_i = 1/m sum_j exp(-C_ij / eps) / sum_k exp(-C_kj / eps).

  A closed form, near which `uot` comes with the published parameters: nearly always the same units (an ablation).

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
  """The earth mover's distance between each source unit alone and the whole target: sum_j w_j |s_i - t_j|, w_j the images of t_j.

  Near units first: the greedy choice after the domain similarity of Cui et al. (CVPR 2018), whose ground distance is that of the
  features as they are. From a single unit all mass has one way to go, so the distance is a mean.
  """
  counts = problem.target.counts
  weights = np.ones(len(problem.target.rows)) if counts is None else np.asarray(counts, np.float64)
  return Scores(problem.between(blocks.euclidean).map(_weighted_mean, weights / weights.sum()), 'mean distance', ascending=True)


def random(problem: Problem) -> Scores:
  """A random order, for control experiments."""
  return Scores(problem.rng.permutation(len(problem.source.rows)) + 1.0, 'random')


def none(problem: Problem) -> Scores:
  """No source unit at all: plain fine-tuning; `size` is not looked at."""
  return Scores(np.zeros(len(problem.source.rows)), 'none')


def defaults(method: str) -> dict[str, Any]:
  """The parameters of a strategy with their defaults; raises ValueError for one that is not known."""
  if method not in STRATEGIES:
    raise ValueError(f'selection method {method!r}; known: {", ".join(STRATEGIES)}')
  return {name: p.default for name, p in inspect.signature(STRATEGIES[method]).parameters.items() if p.kind is p.KEYWORD_ONLY}


def _transported(kernel: Blocks, potentials: transport.Potentials, values: np.ndarray | None = None) -> Scores:
  """Shares of the transported mass and the plan behind them."""
  if values is None:
    values = transport.normalised(transport.mass(kernel, potentials))
  plan = lambda rows, groups: transport.plan(kernel.of(rows), potentials, groups)
  solver = {name: getattr(potentials, name) for name in ('iterations', 'error', 'converged')} if potentials.iterations else {}
  return Scores(values, 'share', plan=plan, target_mass=transport.target_mass(potentials), solver=solver)


def _sampled(costs: Blocks, sample: int, rng: np.random.Generator) -> Blocks:
  if not isinstance(sample, numbers.Integral) or sample < 1:
    raise ValueError(f'sample is {sample!r}; expected a whole number of source rows from 1, or None for all')
  drawn = np.sort(rng.choice(costs.n, min(sample, costs.n), replace=False))
  return costs.of(drawn)


def _check_converged(method: str, potentials: transport.Potentials, settings: str, mend: str) -> None:
  if not potentials.converged:
    raise ValueError(f'{method} did not converge: error {potentials.error:.2g} after {potentials.iterations} iterations, expected less '
                     f'than {potentials.threshold:.0e} ({settings}); {mend}')


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
      raise ValueError(f"cost 'bures' compares the spread of classes, so the {what} needs its images with labels (not means, chunks or "
                       "single images); give selection.Embeddings(features, labels) and by='class' or by='cluster'")
    features = np.asarray(units.images.features, np.float32)
    check_rows(features, what=what)
    unit = dataclasses.replace(units.images, features=features / np.linalg.norm(features, axis=1, keepdims=True))
    sides.append(gaussians.gaussians(unit, progress=problem.settings.progress))
  squares = gaussians.bures(*sides, progress=problem.settings.progress)
  return Blocks(ArrayRows(squares / 2, check=False), None, blocks.given, settings=problem.settings)


COSTS: dict[str, Callable[[Problem], Blocks]] = {
    'cosine': lambda problem: problem.between(blocks.cosine),
    'euclidean': lambda problem: problem.between(blocks.unit_euclidean),
    'bures': _bures,
}

# Those whose scores are shares of the transported mass.
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
