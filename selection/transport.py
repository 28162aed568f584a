"""The entropic unbalanced optimal transport problem and its solution; the only file that imports ott.

    min over T >= 0 of  <T, C> + epsilon * sum T (log T - 1) + rho_source KL(T 1 | a) + rho_target KL(T' 1 | b)

(Chizat et al., 2018, with OTT-JAX's Sinkhorn solver; this form of it for choosing pre-training data: Liu et al., NeurIPS 2022.)
"""

import functools
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np


class Transport(NamedTuple):
  """A solved problem: `plan` [n, m]; `iterations`; `error`, OTT's L1 norm of the gradient; whether it met the threshold."""
  plan: np.ndarray
  iterations: int
  error: float
  converged: bool


def solve(cost: np.ndarray, *, epsilon: float, rho_source: float, rho_target: float, threshold: float = 1e-6,
          max_iterations: int = 2000) -> Transport:
  """Solves the problem with uniform masses on both sides.

  The total of the masses is chosen so that the plan's is near one: float32 carries the error down to about 1e-7 of the plan's
  mass, so a threshold needs that. The published code has masses of one each; with other totals all of the plan changes by one
  factor, and shares of importance stay the same.

  Args:
    cost: `[n, m]`, at least 0. The kernel exp(-cost / epsilon) is stored in float32.
    epsilon: strength of the entropy, in units of the cost.
    rho_source, rho_target: strengths with which the marginals hold, in units of the cost; OTT's tau is rho / (rho + epsilon).
    threshold: on OTT's error.
    max_iterations: after which it stops, converged or not.

  Raises:
    ValueError: a parameter that is not positive, or an epsilon so small that the kernel underflows.
  """
  for name, value in (('epsilon', epsilon), ('rho_source', rho_source), ('rho_target', rho_target)):
    if not 0 < value < np.inf:
      raise ValueError(f'{name} is {value}; expected a finite number above 0')
  tau_source, tau_target = rho_source / (rho_source + epsilon), rho_target / (rho_target + epsilon)
  if tau_source * tau_target == 1:
    raise ValueError(f'rho_source {rho_source} and rho_target {rho_target} are so large that both marginals hold exactly, '
                     'which leaves nothing to choose; use smaller ones')
  kernel = np.exp(-np.asarray(cost, np.float64) / epsilon).astype(np.float32)
  if not (kernel.max(1) > 0).all() or not (kernel.max(0) > 0).all():
    raise ValueError(f'epsilon {epsilon} is too small for costs up to {np.max(cost):.3g}: exp(-cost / epsilon) is zero for whole '
                     f'rows or columns in float32; use at least {float(np.max(cost)) / 80:.2g}')
  plan, errors, iterations = _sinkhorn(jnp.asarray(kernel), epsilon, tau_source, tau_target, threshold, max_iterations)
  # Places of iterations that were not needed hold -1, and all of them do where numbers ran over.
  errors = [float(error) for error in np.asarray(errors) if error >= 0]
  error = errors[-1] if errors else float('nan')
  return Transport(np.asarray(plan), int(iterations), error, bool(np.isfinite(error) and error < threshold))


@functools.partial(jax.jit, static_argnames=('epsilon', 'tau_source', 'tau_target', 'threshold', 'max_iterations'))
def _sinkhorn(kernel: jax.Array, epsilon: float, tau_source: float, tau_target: float, threshold: float,
              max_iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  linear_problem, sinkhorn = _ott()
  geometry = _kernel_geometry()(kernel_matrix=kernel, epsilon=epsilon)
  n, m = kernel.shape
  total = _total_mass(kernel, tau_source, tau_target)
  problem = linear_problem.LinearProblem(geometry, jnp.full(n, total / n), jnp.full(m, total / m), tau_a=tau_source, tau_b=tau_target)
  solver = sinkhorn.Sinkhorn(lse_mode=False, threshold=threshold, inner_iterations=1, max_iterations=max_iterations)
  output = solver(problem)
  return output.matrix, output.errors, output.n_iters


def _total_mass(kernel: jax.Array, tau_source: float, tau_target: float) -> jax.Array:
  """The total of the marginals with which the plan's mass is near one, as far as one iteration can tell."""
  n, m = kernel.shape
  v = (1 / m / kernel.sum(0)) ** tau_target
  mass = jnp.sum((1 / n) ** tau_source * (kernel @ v) ** (1 - tau_source))
  # Marginals s times as large scale the fixed point u = (s a / K v)^tau_source, v = (s b / K' u)^tau_target by this power of s.
  power = (tau_source + tau_target - 2 * tau_source * tau_target) / (1 - tau_source * tau_target)
  return mass ** (-1 / power)


def _ott() -> tuple[Any, Any]:
  # The import takes two seconds and warns that one of ott's own dependencies is not maintained any more.
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'JAXopt is no longer maintained', DeprecationWarning)
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn
  return linear_problem, sinkhorn


@functools.cache
def _kernel_geometry() -> type:
  _ott()
  from ott.geometry import geometry

  @jax.tree_util.register_pytree_node_class
  class KernelGeometry(geometry.Geometry):
    """A geometry that applies its stored kernel as it is; ott's own raises it to a power at every use."""

    @property
    def kernel_matrix(self) -> jax.Array:
      return self._kernel_matrix

    def apply_kernel(self, vec: jax.Array, eps: float | None = None, axis: int = 0) -> jax.Array:
      del eps  # constant here
      return self._kernel_matrix @ vec if axis == 1 else vec @ self._kernel_matrix

  return KernelGeometry
