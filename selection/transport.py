"""The entropic unbalanced optimal transport problem and its solution. Only this file and otdd.py import ott.

    min over T >= 0 of  <T, C> + epsilon * sum T (log T - 1) + rho_source KL(T 1 | a) + rho_target KL(T' 1 | b)

with masses a and b of one for each unit (Liu et al., NeurIPS 2022; the problem and its scaling iteration: Chizat et
al., 2018). The plan is T_ij = u_i K_ij v_j with K = exp(-C / epsilon), and at the solution

    u = (1 / K v)^tau_source,   v = (1 / K' u)^tau_target,   tau = rho / (rho + epsilon),

so v, one number for each target unit, determines everything: the mass of source unit i is (K v)_i^(1 - tau_source), for
units of the problem and for any other one. This makes it possible to solve for pools that do not fit in memory, and to
score images that were not part of the problem.

**Which solver?** A kernel that fits in `settings.memory` is stored, and OTT's Sinkhorn solves the whole problem. A
kernel that does not fit is streamed: `_solve_streamed` reads the pool once in each iteration. One step is added to
OTT's loop, `_recentred`: in its kernel mode OTT does not recentre the potentials, and needs over 2,000 iterations if
both marginals are enforced strongly (docs/selection.md).
"""

from collections.abc import Iterator
import contextlib
import functools
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from selection.blocks import Blocks, cosine, row_sums, StoredKernel, unit_euclidean

# OTT computes its error, which costs as much as an iteration, once in this many iterations. After twice as many it
# chooses its momentum from the error.
INNER_ITERATIONS = 5


class Potentials(NamedTuple):
  """A solved problem.

  log_v: `[m]`, logarithms of the target's scalings.
  tau_source, tau_target: how strongly the marginals are enforced, from 0 (not at all) to 1 (exactly).
  iterations: number of iterations of the solver.
  error: for a stored kernel the L1 norm of the gradient as a fraction of the mass (OTT's); for a streamed kernel the
    largest change of a log_v.
  converged: whether the error fell below the threshold.
  threshold: the threshold of the error.
  """
  log_v: np.ndarray
  tau_source: float
  tau_target: float
  iterations: int = 1
  error: float = 0.0
  converged: bool = True
  threshold: float = 0.0


def solve(costs: Blocks, *, epsilon: float, rho_source: float, rho_target: float, threshold: float = 1e-6,
          max_iterations: int = 2000) -> tuple[Blocks, Potentials]:
  """Solves the problem.

  Args:
    costs: the costs `[n, m]`, at least 0. OTT solves the problem if its kernel fits in `settings.memory`; otherwise the
      pool is streamed.
    epsilon: strength of the entropy, in units of the cost.
    rho_source, rho_target: how strongly the marginals are enforced, in units of the cost; infinity for both is balanced
      transport.
    threshold: the solver has converged if its error is below this, see `Potentials`.
    max_iterations: the solver stops after this many, converged or not.

  Returns:
    The kernel and the potentials.

  Raises:
    ValueError: a parameter that is not positive, or an epsilon so small that the kernel underflows.
  """
  kernel = costs.kernel(epsilon)
  taus = _taus(epsilon, rho_source, rho_target)
  solver = _solve_stored if kernel.store().is_stored else _solve_streamed
  return kernel, solver(kernel, *taus, threshold, max_iterations)


def mass(kernel: Blocks, potentials: Potentials) -> np.ndarray:
  """log of the mass that leaves each source unit, `[n]`: (1 - tau_source) log (K v)_i."""
  shift = potentials.log_v.max()
  kv = kernel.map(row_sums, np.exp(potentials.log_v - shift))
  if not kv.all():
    raise ValueError(_underflow(kernel))
  # Long pools stay in float32, which Python's floats do not change.
  log_kv = np.log(kv, dtype=np.float64 if len(kv) < 1 << 20 else np.float32)
  return (1 - float(potentials.tau_source)) * (log_kv + float(shift))


def target_mass(potentials: Potentials) -> np.ndarray:
  """Share of the transported mass that arrives at each target unit, `[m]`, sum 1.

  The mass is v_j (K' u)_j = v_j^(1 - 1 / tau_target).
  """
  return normalised((1 - 1 / potentials.tau_target) * potentials.log_v)


def plan(kernel: Blocks, potentials: Potentials, groups: np.ndarray | None = None) -> np.ndarray:
  """The rows of the plan `[n, m]` for masses of one; or `[n, g]`, summed over groups of target units.

  Args:
    kernel: the kernel of the wanted rows only, see `Blocks.of`.
    potentials: the solution of the whole problem.
    groups: `[m, g]`, the fraction of each target unit that belongs to each group; None gives a column to each unit.
  """
  shift = potentials.log_v.max()
  operands = () if groups is None else (groups,)
  rows = kernel.map(_plan_rows, np.exp(potentials.log_v - shift), potentials.tau_source, *operands)
  rows *= np.float32(np.exp((1 - potentials.tau_source) * shift))
  return rows


def closed_form(kernel: Blocks) -> Potentials:
  """The potentials for a free source marginal and an exact target marginal: v_j = 1 / (K' 1)_j, in one pass."""
  with np.errstate(divide='ignore'):
    log_v = -np.log(kernel.sum(_scaled_column_sums, np.ones(kernel.m), 0, name='column sums'))
  if not np.isfinite(log_v).all():
    raise ValueError(_underflow(kernel))
  return Potentials(log_v, 0.0, 1.0, iterations=0)


def normalised(logs: np.ndarray) -> np.ndarray:
  """exp(logs) divided by its sum."""
  weights = np.exp(logs - logs.max())
  return weights / weights.dtype.type(weights.sum(dtype=np.float64))


def _taus(epsilon: float, rho_source: float, rho_target: float) -> tuple[float, float]:
  for name, value in (('rho_source', rho_source), ('rho_target', rho_target)):
    if not value > 0:
      raise ValueError(f'{name} is {value}; expected a number above 0')
  tau_source, tau_target = (1.0 if rho == np.inf else rho / (rho + epsilon) for rho in (rho_source, rho_target))
  if tau_source * tau_target == 1 and not rho_source == rho_target == np.inf:
    raise ValueError(f'rho_source {rho_source} and rho_target {rho_target} are so large that both marginals hold '
                     'exactly, which leaves nothing to choose; use smaller ones')
  return tau_source, tau_target


def _solve_streamed(kernel: Blocks, tau_source: float, tau_target: float, threshold: float,
                    max_iterations: int) -> Potentials:
  """The scaling iteration, in one pass over the pool each: u of a chunk is computed from v and used immediately."""
  journal = kernel.settings.journal
  log_v, iteration, error = np.zeros(kernel.m), 0, np.inf
  before = journal.load('solver')
  if before:
    log_v, iteration, error = before['log_v'], int(before['iteration']), float(before['error'])
  while iteration < max_iterations and not error < threshold:
    iteration += 1
    log_v, error = _iterate(kernel, log_v, tau_source, tau_target, iteration, error)
    journal.save('solver', log_v=log_v, iteration=iteration, error=error)
  return Potentials(log_v, tau_source, tau_target, iteration, error, error < threshold, threshold)


def _iterate(kernel: Blocks, log_v: np.ndarray, tau_source: float, tau_target: float, turn: int = 0,
             error: float = np.inf) -> tuple[np.ndarray, float]:
  """One streamed iteration: the next log v, and the largest change.

  If v is multiplied by s, its next value is multiplied by s^(tau_source tau_target). Along this direction, in which the
  iteration converges most slowly, the fixed point is computed directly: the same solution in about a third of the
  iterations.
  """
  what = f'iteration {turn}' + (f', error {error:.1g}' if error < np.inf else '')
  shift = log_v.max()
  sums = kernel.sum(_scaled_column_sums, np.exp(log_v - shift), tau_source, name='iteration', turn=turn, what=what)
  with np.errstate(divide='ignore', invalid='ignore'):
    new = -tau_target * (np.log(sums) - tau_source * shift)
  if not np.isfinite(new).all():
    raise ValueError(_underflow(kernel))
  level, damping = (new - log_v).mean(), tau_source * tau_target
  if damping == 1:  # balanced: the level of v is free
    return new - level, float(np.abs(new - log_v - level).max())
  return new + damping * level / (1 - damping), float(np.abs(new - log_v).max())


def _solve_stored(kernel: Blocks, tau_source: float, tau_target: float, threshold: float,
                  max_iterations: int) -> Potentials:
  """OTT's Sinkhorn on the stored kernel, whose rows are spread over the devices."""
  inner = min(INNER_ITERATIONS, max_iterations)
  stored = kernel.stored()
  result = _sinkhorn(stored, jnp.float32(threshold), tau_source, tau_target, inner, max_iterations // inner * inner)
  log_v, total, iterations, error, converged = (np.asarray(value, np.float64) for value in result)
  if not np.isfinite(log_v).all() or not converged and _has_empty_rows_or_columns(kernel):
    raise ValueError(_underflow(kernel))
  if tau_source * tau_target < 1:  # from masses total / n and total / m to masses of one
    n, damping = kernel.n, tau_source * tau_target
    log_v = log_v - tau_target * (np.log(total / kernel.m) - tau_source * np.log(total / n)) / (1 - damping)
  return Potentials(log_v, tau_source, tau_target, int(iterations), float(error), bool(converged), threshold)


@functools.partial(jax.jit, static_argnames=('tau_source', 'tau_target', 'inner', 'max_iterations'))
def _sinkhorn(kernel: StoredKernel, threshold: jax.Array, tau_source: float, tau_target: float, inner: int,
              max_iterations: int) -> tuple[jax.Array, ...]:
  """(log v for masses total / n and total / m, the total, iterations, error, converged).

  The total is the sum of the kernel: u = v = 1 is then a good start, and the plan has about that mass. OTT's error, the
  L1 norm of the gradient, is divided by it, and by epsilon / rho if that is above one, as the gradient magnifies the
  rounding of u and v by that factor.
  """
  acceleration, linear_problem, sinkhorn, geometry = _ott()
  ones = kernel.valid()
  total = jnp.sum(kernel.column_sums(ones))
  n, m = jnp.sum(ones), kernel.shape[1]
  a, b = ones * total / n, jnp.full(m, total / m)
  problem = linear_problem.LinearProblem(geometry(kernel_matrix=kernel, epsilon=1.0), a, b, tau_a=tau_source,
                                         tau_b=tau_target)
  unit = total * max(1.0, 1 / tau_source - 1, 1 / tau_target - 1)
  solver = sinkhorn(lse_mode=False, threshold=threshold * unit, inner_iterations=inner, max_iterations=max_iterations,
                    momentum=acceleration.Momentum(start=2 * inner))
  output = solver(problem)
  last = jnp.sum(output.errors >= 0) - 1
  return output.g, total, output.n_iters, output.errors[last] / unit, output.converged


def _has_empty_rows_or_columns(kernel: Blocks) -> bool:
  ones = np.ones(kernel.m)
  return not kernel.map(row_sums, ones).all() or not kernel.sum(_scaled_column_sums, ones, 0, name='sums').all()


def _scaled_column_sums(kernel: jax.Array, valid: jax.Array, v: jax.Array, tau_source: jax.Array) -> jax.Array:
  u = jnp.where(valid, row_sums(kernel, valid, v) ** -tau_source, 0)
  return jnp.matmul(u, kernel, precision=jax.lax.Precision.HIGHEST)


def _plan_rows(kernel: jax.Array, valid: jax.Array, v: jax.Array, tau_source: jax.Array,
               groups: jax.Array | None = None) -> jax.Array:
  u = row_sums(kernel, valid, v) ** -tau_source
  plan = u[:, None] * kernel * v
  return plan if groups is None else jnp.matmul(plan, groups, precision=jax.lax.Precision.HIGHEST)


def _underflow(kernel: Blocks) -> str:
  highest = 2.0  # of costs between unit vectors
  if kernel.cost not in (cosine, unit_euclidean):
    highest = float(np.max([chunk.max() for _, chunk in kernel.pool.read(1 << 16)]))
  return (f'epsilon {kernel.epsilon} is too small for costs up to {highest:.3g}: exp(-cost / epsilon) is zero in '
          f'float32 for whole rows or columns; use at least {highest / 80:.2g}')


@contextlib.contextmanager
def importing_ott() -> Iterator[None]:
  """Hides the warning of ott, when it is imported, that one of its own dependencies is no longer maintained."""
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'JAXopt is no longer maintained', DeprecationWarning)
    yield


@functools.cache
def _ott() -> tuple[Any, ...]:
  """ott's modules, and its solver and geometry with our changes; cached, as the import takes two seconds."""
  with importing_ott():
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import acceleration, sinkhorn

  @jax.tree_util.register_pytree_node_class
  class KernelGeometry(geometry.Geometry):
    """A geometry with a `StoredKernel`, applied block by block; ott's own raises its kernel to a power at each use."""

    @property
    def _kernel(self) -> StoredKernel:
      kernel: Any = self._kernel_matrix
      return kernel

    @property
    def shape(self) -> tuple[int, int]:
      return self._kernel.shape

    @property
    def dtype(self) -> Any:
      return jnp.float32

    def apply_kernel(self, vec: jax.Array, eps: float | None = None, axis: int = 0) -> jax.Array:
      del eps  # constant here
      return self._kernel.row_sums(vec) if axis == 1 else self._kernel.column_sums(vec)

  @jax.tree_util.register_pytree_node_class
  class RecentredSinkhorn(sinkhorn.Sinkhorn):
    """ott's solver, with potentials that are recentred in kernel mode too."""

    def kernel_step(self, ot_prob: Any, state: Any, iteration: int) -> Any:
      state = super().kernel_step(ot_prob, state, iteration)
      u, v = state.potentials
      return state.set(potentials=_recentred(u, v, ot_prob.a, ot_prob.b, ot_prob.tau_a, ot_prob.tau_b))

  return acceleration, linear_problem, RecentredSinkhorn, KernelGeometry


def _recentred(u: jax.Array, v: jax.Array, a: jax.Array, b: jax.Array, tau_a: float,
               tau_b: float) -> tuple[jax.Array, jax.Array]:
  """u s and v / s with the best s, in closed form (Sejourne, Vialard and Peyre, AISTATS 2022, proposition 2)."""
  power_a, power_b = 1 / tau_a - 1, 1 / tau_b - 1  # epsilon / rho
  if power_a + power_b == 0:  # balanced: every s is equally good
    return u, v
  of_a = jnp.sum(jnp.where(a > 0, a * u**-power_a, 0))  # rows that pad a chunk have no mass
  # The ratio is near one: its logarithm keeps digits that a difference of two logarithms would lose.
  level = jnp.log(of_a / jnp.sum(b * v**-power_b)) / (power_a + power_b)
  # Smaller values are mostly rounding of the sums; the iteration itself converges from there.
  level = jnp.where(jnp.abs(level) > 1e-5, level, 0)
  return u * jnp.exp(level), v * jnp.exp(-level)
