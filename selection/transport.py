"""The entropic unbalanced optimal transport problem and its solution; with `distances`, the only file that imports ott.

    min over T >= 0 of  <T, C> + epsilon * sum T (log T - 1) + rho_source KL(T 1 | a) + rho_target KL(T' 1 | b)

with masses a and b of one for each unit (Liu et al., NeurIPS 2022; the problem and its scaling iteration: Chizat et al., 2018).
The plan is T_ij = u_i K_ij v_j with K = exp(-C / epsilon), and at the solution

    u = (1 / K v)^tau_source,   v = (1 / K' u)^tau_target,   tau = rho / (rho + epsilon),

so v alone, one number for each target unit, says everything: the mass that leaves source unit i is (K v)_i^(1 - tau_source), for units
of the problem and for any other one. That is how pools are solved that do not fit into memory, and how further images are scored.
"""

from collections.abc import Iterator
import contextlib
import functools
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from selection.blocks import Blocks, cosine, euclidean

# Problems of up to so many entries are solved by OTT on the whole kernel, larger ones chunk by chunk.
WHOLE = 1 << 22
# OTT's error is an absolute L1 norm in float32; so far it comes down for any problem, and the rest of the way is short.
# Nor does it go on for long: with large rhos it crawls along the one direction that `_iterate` solves.
COARSE, COARSE_ITERATIONS = 1e-4, 20


class Potentials(NamedTuple):
  """A solved problem.

  log_v: `[m]`, logarithms of the target's scalings.
  tau_source, tau_target: how hard the marginals hold, from 0 (not at all) to 1 (exactly).
  iterations: of the solver.
  error: the largest change of a log_v in the last iteration.
  converged: whether the error fell below the threshold.
  threshold: on the error.
  """
  log_v: np.ndarray
  tau_source: float
  tau_target: float
  iterations: int = 1
  error: float = 0.0
  converged: bool = True
  threshold: float = 0.0


def solve(costs: Blocks, *, epsilon: float, rho_source: float, rho_target: float, threshold: float = 1e-6,
          max_iterations: int = 2000, whole: int | None = None) -> tuple[Blocks, Potentials]:
  """Solves the problem.

  Args:
    costs: the costs `[n, m]`, at least 0.
    epsilon: strength of the entropy, in units of the cost.
    rho_source, rho_target: strengths with which the marginals hold, in units of the cost; infinity for both is balanced transport.
    threshold: on the error.
    max_iterations: after which it stops, converged or not.
    whole: problems of at most so many entries are solved by OTT; None is `WHOLE`.

  Returns:
    The kernel and the potentials.

  Raises:
    ValueError: a parameter that is not positive, or an epsilon so small that the kernel underflows.
  """
  kernel = costs.kernel(epsilon)
  taus = _taus(epsilon, rho_source, rho_target)
  # An iterator whose rows are not known is not counted for this.
  small = costs.pool.known_length is not None and costs.n * costs.m <= (WHOLE if whole is None else whole)
  potentials = (_solve_whole if small else _solve_chunks)(kernel, *taus, threshold, max_iterations)
  return kernel, potentials


def mass(kernel: Blocks, potentials: Potentials) -> np.ndarray:
  """log of the mass that leaves each source unit, `[n]`: (1 - tau_source) log (K v)_i."""
  shift = potentials.log_v.max()
  kv = kernel.rows(_row_sums, np.exp(potentials.log_v - shift))
  if not kv.all():
    raise ValueError(_underflow(kernel))
  # Python's floats leave long pools in float32.
  return (1 - float(potentials.tau_source)) * (np.log(kv, dtype=np.float64 if len(kv) < 1 << 20 else np.float32) + float(shift))


def target_mass(potentials: Potentials) -> np.ndarray:
  """Share of the transported mass that arrives at each target unit, `[m]`; sum 1: v_j (K' u)_j = v_j^(1 - 1 / tau_target)."""
  return normalised((1 - 1 / potentials.tau_target) * potentials.log_v)


def plan(kernel: Blocks, potentials: Potentials, groups: np.ndarray | None = None) -> np.ndarray:
  """The rows of the plan `[n, m]` for masses of one; or `[n, g]`, summed over groups of target units.

  Args:
    kernel: for the wanted rows alone, see `Blocks.of`.
    potentials: of the whole problem.
    groups: `[m, g]`, which part of each target unit belongs to each group; None keeps them apart.
  """
  shift = potentials.log_v.max()
  operands = () if groups is None else (groups,)
  rows = kernel.rows(_plan_rows, np.exp(potentials.log_v - shift), potentials.tau_source, *operands)
  rows *= np.float32(np.exp((1 - potentials.tau_source) * shift))
  return rows


def closed_form(kernel: Blocks) -> Potentials:
  """The potentials of transport whose source marginal is free and whose target marginal holds: v_j = 1 / (K' 1)_j, in one pass."""
  with np.errstate(divide='ignore'):
    log_v = -np.log(kernel.columns(_scaled_column_sums, np.ones(kernel.m), 0, name='column sums'))
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
  taus = tuple(1.0 if rho == np.inf else rho / (rho + epsilon) for rho in (rho_source, rho_target))
  if taus[0] * taus[1] == 1 and not rho_source == rho_target == np.inf:
    raise ValueError(f'rho_source {rho_source} and rho_target {rho_target} are so large that both marginals hold exactly, '
                     'which leaves nothing to choose; use smaller ones')
  return taus


def _solve_chunks(kernel: Blocks, tau_source: float, tau_target: float, threshold: float, max_iterations: int,
                  start: tuple[np.ndarray, int] | None = None) -> Potentials:
  """The scaling iteration, one pass over the pool for each: u of a chunk comes from v alone and is used at once.

  `start`: log v and the number of iterations that it took, to go on from.
  """
  journal = kernel.settings.journal
  before = journal.load('solver') if start is None else {}
  (log_v, iteration), error = start or (np.zeros(kernel.m), 0), np.inf
  if before:
    log_v, iteration, error = before['log_v'], int(before['iteration']), float(before['error'])
  if not error < threshold:
    kernel.keep()
  while iteration < max_iterations and not error < threshold:
    iteration += 1
    log_v, error = _iterate(kernel, log_v, tau_source, tau_target, iteration, error)
    journal.save('solver', log_v=log_v, iteration=iteration, error=error)
  return Potentials(log_v, tau_source, tau_target, iteration, error, error < threshold, threshold)


def _iterate(kernel: Blocks, log_v: np.ndarray, tau_source: float, tau_target: float, turn: int = 0,
             error: float = np.inf) -> tuple[np.ndarray, float]:
  """One iteration: the next log v, and the largest change.

  Multiplying v by a number s multiplies what an iteration makes of it by s^(tau_source tau_target). Along that direction, by far the
  slowest one, the iteration is not followed but solved: the same solution in about a third of the iterations.
  """
  what = f'iteration {turn}' + (f', error {error:.1g}' if error < np.inf else '')
  shift = log_v.max()
  sums = kernel.columns(_scaled_column_sums, np.exp(log_v - shift), tau_source, name='iteration', turn=turn, what=what)
  with np.errstate(divide='ignore', invalid='ignore'):
    new = -tau_target * (np.log(sums) - tau_source * shift)
  if not np.isfinite(new).all():
    raise ValueError(_underflow(kernel))
  level, damping = (new - log_v).mean(), tau_source * tau_target
  if damping == 1:  # balanced: the level of v is free
    return new - level, float(np.abs(new - log_v - level).max())
  return new + damping * level / (1 - damping), float(np.abs(new - log_v).max())


def _solve_whole(kernel: Blocks, tau_source: float, tau_target: float, threshold: float, max_iterations: int) -> Potentials:
  """OTT's Sinkhorn on the whole kernel, whose rows are spread over the devices; then the last digits, and masses of one."""
  entries, valid = kernel.array()
  coarse = min(max_iterations, COARSE_ITERATIONS)
  log_v, iterations, reachable = _sinkhorn(entries, valid, kernel.epsilon, tau_source, tau_target, coarse)
  log_v = np.asarray(log_v, np.float64)
  if not reachable or not np.isfinite(log_v).all():
    raise ValueError(_underflow(kernel))
  # At least one more iteration, which gives the error.
  return _solve_chunks(kernel, tau_source, tau_target, threshold, max_iterations, (log_v, min(int(iterations), max_iterations - 1)))


@functools.partial(jax.jit, static_argnames=('tau_source', 'tau_target', 'max_iterations'))
def _sinkhorn(kernel: jax.Array, valid: jax.Array, epsilon: float, tau_source: float, tau_target: float,
              max_iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(log v up to a factor of v, iterations, whether every row and column has an entry above zero)."""
  linear_problem, sinkhorn = _ott()
  n, m = jnp.sum(valid), kernel.shape[1]
  geometry = _kernel_geometry()(kernel_matrix=kernel, epsilon=epsilon)
  total = _total_mass(kernel, valid, tau_source, tau_target)
  a, b = jnp.where(valid, total / n, 0), jnp.full(m, total / m)
  problem = linear_problem.LinearProblem(geometry, a, b, tau_a=tau_source, tau_b=tau_target)
  solver = sinkhorn.Sinkhorn(lse_mode=False, threshold=COARSE, inner_iterations=1, max_iterations=max_iterations)
  output = solver(problem)
  reachable = jnp.all(jnp.where(valid, kernel.max(1), 1) > 0) & jnp.all(jnp.where(valid[:, None], kernel, 0).max(0) > 0)
  return output.g / epsilon, output.n_iters, reachable


def _total_mass(kernel: jax.Array, valid: jax.Array, tau_source: float, tau_target: float) -> jax.Array:
  """The total of the marginals with which the plan's mass is near one, as far as one iteration can tell; OTT's error is absolute."""
  if tau_source * tau_target == 1:
    return jnp.float32(1)
  n, m = jnp.sum(valid), kernel.shape[1]
  v = (1 / m / jnp.where(valid[:, None], kernel, 0).sum(0)) ** tau_target
  mass = jnp.sum(jnp.where(valid, (1 / n) ** tau_source * _row_sums(kernel, valid, v) ** (1 - tau_source), 0))
  # Marginals s times as large scale the fixed point u = (s a / K v)^tau_source, v = (s b / K' u)^tau_target by this power of s.
  power = (tau_source + tau_target - 2 * tau_source * tau_target) / (1 - tau_source * tau_target)
  return mass ** (-1 / power)


def _row_sums(kernel: jax.Array, valid: jax.Array, v: jax.Array) -> jax.Array:
  del valid
  return jnp.matmul(kernel, v, precision=jax.lax.Precision.HIGHEST)


def _scaled_column_sums(kernel: jax.Array, valid: jax.Array, v: jax.Array, tau_source: jax.Array) -> jax.Array:
  u = jnp.where(valid, _row_sums(kernel, valid, v) ** -tau_source, 0)
  return jnp.matmul(u, kernel, precision=jax.lax.Precision.HIGHEST)


def _plan_rows(kernel: jax.Array, valid: jax.Array, v: jax.Array, tau_source: jax.Array, groups: jax.Array | None = None) -> jax.Array:
  u = _row_sums(kernel, valid, v) ** -tau_source
  plan = u[:, None] * kernel * v
  return plan if groups is None else jnp.matmul(plan, groups, precision=jax.lax.Precision.HIGHEST)


def _underflow(kernel: Blocks) -> str:
  # Distances of unit vectors are at most 2; given costs are there to be looked at.
  highest = 2.0 if kernel.cost in (cosine, euclidean) else float(np.max([chunk.max() for _, chunk in kernel.pool.read(1 << 16)]))
  return (f'epsilon {kernel.epsilon} is too small for costs up to {highest:.3g}: exp(-cost / epsilon) is zero in float32 for whole rows or '
          f'columns; use at least {highest / 80:.2g}')


@contextlib.contextmanager
def importing_ott() -> Iterator[None]:
  """For imports of ott, which take two seconds and warn that one of its own dependencies is not maintained any more."""
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'JAXopt is no longer maintained', DeprecationWarning)
    yield


def _ott() -> tuple[Any, Any]:
  with importing_ott():
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
      left, right = (self._kernel_matrix, vec) if axis == 1 else (vec, self._kernel_matrix)
      return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)

  return KernelGeometry
