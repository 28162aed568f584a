"""Strategies: each gives one score for every source unit. All take (source, target, rng, parameters of their own).

`source` and `target` are float `[n, d]` and `[m, d]`: features of the units (class means, say).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from selection import transport


class Scores(NamedTuple):
  """`shares` [n], at least 0, sum 1, more is better; `plan` [n, m], who draws whom; whether and how the solver ended."""
  shares: np.ndarray
  plan: np.ndarray | None = None
  converged: bool = True
  solver: dict[str, Any] = {}


def uot(source: np.ndarray, target: np.ndarray, rng: np.random.Generator, *, epsilon: float = 0.1,
        rho_source: float = 0.1, rho_target: float = 10.0) -> Scores:
  """The mass that unbalanced optimal transport moves from each source unit: importance_i = sum_j T_ij.

  Cost 1 - cos; the source marginal holds weakly, the target's almost exactly, so units that no target unit needs keep their
  mass. The defaults are the published ones (Liu et al., NeurIPS 2022: cost (1 - cos) / 0.1, entropy 1, KL weights 1 and 100),
  in units of 1 - cos.

  Raises:
    ValueError: Sinkhorn does not converge, by how much and what to change.
  """
  del rng
  solution = transport.solve(1.0 - cosine(source, target), epsilon=epsilon, rho_source=rho_source, rho_target=rho_target)
  if not solution.converged:
    raise ValueError(f'uot did not converge: error {solution.error:.2g} after {solution.iterations} iterations '
                     f'(epsilon {epsilon}, rho_source {rho_source}, rho_target {rho_target}); use a larger epsilon or smaller rhos')
  importance = solution.plan.astype(np.float64).sum(1)
  return Scores(importance / importance.sum(), solution.plan, solution.converged,
                {'iterations': solution.iterations, 'error': solution.error})


def random(source: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Scores:
  """A random order, for control experiments; the shares say nothing but this order."""
  del target
  draw = rng.permutation(len(source)) + 1.0
  return Scores(draw / draw.sum())


def none(source: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Scores:
  """No source unit at all: plain fine-tuning; `size` is not looked at."""
  del target, rng
  return Scores(np.full(len(source), 1.0 / len(source)))


def cosine(source: np.ndarray, target: np.ndarray) -> np.ndarray:
  """Cosines `[n, m]` between rows, in float64."""
  source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
  return (source / np.linalg.norm(source, axis=1, keepdims=True)) @ (target / np.linalg.norm(target, axis=1, keepdims=True)).T


STRATEGIES: dict[str, Callable[..., Scores]] = {
    'uot': uot,
    'random': random,
    'none': none,
}
