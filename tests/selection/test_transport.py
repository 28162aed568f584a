"""Both solvers, stored and streamed, give the published plans and those of POT, and report when they cannot."""

import os

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import scipy.special

from selection import blocks, transport
from selection.blocks import Blocks
from selection.pools import ArrayRows

# Both solvers: OTT on the stored kernel, and the iteration over a pool whose kernel does not fit in memory.
SOLVERS = pytest.mark.parametrize('memory', [None, 0], ids=['stored', 'streamed'])


def costs(cost: np.ndarray, memory: int | None = None, chunk: int | None = None) -> Blocks:
  return Blocks(ArrayRows(cost, check=False), None, blocks.given, settings=blocks.Settings(memory, chunk))


def plan_of(cost, memory=None, chunk=None, **kwargs) -> tuple[np.ndarray, transport.Potentials]:
  kernel, potentials = transport.solve(costs(cost, memory, chunk), **kwargs)
  return transport.plan(kernel, potentials, np.eye(cost.shape[1])).astype(np.float64), potentials


@SOLVERS
def test_published_synthetic_problems(shared, memory):
  """Plans of the authors' own code, masses of one: within 1e-5 (they agree to 2e-7)."""
  with np.load(shared / 'reference' / 'uot' / 'synthetic_cases.npz') as cases:
    for i in range(4):
      epsilon, rho_source, rho_target = cases[f'par{i}'].tolist()
      plan, potentials = plan_of(cases[f'M{i}'], memory, epsilon=epsilon, rho_source=rho_source, rho_target=rho_target)
      assert potentials.converged
      np.testing.assert_allclose(plan, cases[f'T{i}'], rtol=0, atol=1e-5)


@SOLVERS
def test_the_problem_of_the_published_docstring(memory):
  plan, _ = plan_of(np.array([[0.0, 1.0], [1.0, 0.0]]), memory, epsilon=1.0, rho_source=1.0, rho_target=1.0)
  # The masses there are one half. Masses scaled by s scale the plan by s^(1/(1 + tau)); tau is 1/2.
  np.testing.assert_allclose(plan * 0.5 ** (1 / 1.5), [[0.51122823, 0.18807035], [0.18807035, 0.51122823]], rtol=2e-6)


@pytest.fixture(scope='module')
def pot():
  for backend in ('PYTORCH', 'TENSORFLOW', 'JAX', 'CUPY'):
    os.environ[f'POT_BACKEND_DISABLE_{backend}'] = '1'
  return pytest.importorskip('ot')


@SOLVERS
@pytest.mark.parametrize('rho', [10.0, 100.0, 1000.0])
def test_large_rhos_take_no_longer(memory, rho):
  """The fixed point is found in few iterations even if both marginals nearly hold.

  The plain iteration would converge slowly there, and POT overflows.
  """
  cost = np.random.default_rng(0).uniform(0, 2, (61, 7))
  kernel, potentials = transport.solve(costs(cost, memory), epsilon=0.1, rho_source=rho, rho_target=rho)
  assert potentials.converged and potentials.iterations < 60
  tau = rho / (rho + 0.1)
  log_u = -tau * scipy.special.logsumexp(-cost / 0.1 + potentials.log_v, axis=1)
  # Marginals of mass 61 and 7 that nearly hold: log u and log v differ by hundreds.
  np.testing.assert_allclose(-tau * scipy.special.logsumexp(-cost / 0.1 + log_u[:, None], axis=0), potentials.log_v,
                             rtol=1e-5, atol=1e-5)


@SOLVERS
@settings(max_examples=10, deadline=None)
@given(shape=st.sampled_from([(3, 2), (12, 5), (5, 30), (61, 7)]), epsilon=st.floats(0.05, 1.0),
       rho_source=st.floats(0.05, 2.0),
       rho_target=st.floats(0.05, 10.0), seed=st.integers(0, 99))
def test_equals_pot(pot, memory, shape, epsilon, rho_source, rho_target, seed):
  """Random problems against POT in float64, the whole plan, in chunks of 16 rows, the last one shorter."""
  cost = np.random.default_rng(seed).uniform(0, 2, shape)
  plan, potentials = plan_of(cost, memory, 16, epsilon=epsilon, rho_source=rho_source, rho_target=rho_target)
  assert potentials.converged
  # With masses of one, relative entropy and entropy are the same problem.
  expected = pot.unbalanced.sinkhorn_knopp_unbalanced(
      np.ones(shape[0]), np.ones(shape[1]), cost, epsilon, (rho_source, rho_target), reg_type='kl', numItermax=20_000,
      stopThr=1e-12)
  np.testing.assert_allclose(plan, expected, rtol=0, atol=2e-5 * expected.max())
  np.testing.assert_allclose(transport.target_mass(potentials), expected.sum(0) / expected.sum(), rtol=1e-4)


@SOLVERS
@settings(max_examples=6, deadline=None)
@given(shape=st.sampled_from([(3, 2), (12, 5), (5, 30)]), epsilon=st.floats(0.1, 1.0), seed=st.integers(0, 99))
def test_balanced_equals_pot(pot, memory, shape, epsilon, seed):
  cost = np.random.default_rng(seed).uniform(0, 2, shape)
  plan, potentials = plan_of(cost, memory, epsilon=epsilon, rho_source=np.inf, rho_target=np.inf, threshold=1e-5)
  assert potentials.converged
  n, m = shape
  expected = pot.sinkhorn(np.full(n, 1 / n), np.full(m, 1 / m), cost, epsilon, numItermax=20_000, stopThr=1e-12)
  np.testing.assert_allclose(plan / plan.sum(), expected, rtol=0, atol=1e-4 * expected.max())


@SOLVERS
@settings(max_examples=5, deadline=None)
@given(epsilon=st.floats(0.05, 1.0), rho_source=st.floats(0.05, 2.0), seed=st.integers(0, 99))
def test_mass_is_the_closed_form_of_the_targets_scalings(memory, epsilon, rho_source, seed):
  """mass_i = (K v)_i^(1 - tau_source), the identity that scores further images; a square root for tau 1/2."""
  cost = np.random.default_rng(seed).uniform(0, 2, (40, 6))
  kernel, potentials = transport.solve(costs(cost, memory), epsilon=epsilon, rho_source=rho_source, rho_target=10.0)
  plan = transport.plan(kernel, potentials, np.eye(6))
  np.testing.assert_allclose(np.exp(transport.mass(kernel, potentials)), plan.sum(1), rtol=1e-5)
  expected = (np.exp(-cost / epsilon) @ np.exp(potentials.log_v)) ** (1 - rho_source / (rho_source + epsilon))
  np.testing.assert_allclose(plan.sum(1), expected, rtol=1e-5)


@SOLVERS
def test_not_converged_is_reported(memory):
  cost = np.random.default_rng(0).uniform(0, 2, (40, 30))
  _, potentials = transport.solve(costs(cost, memory), epsilon=0.05, rho_source=5.0, rho_target=5.0, max_iterations=3)
  assert not potentials.converged and potentials.iterations == 3 and potentials.threshold < potentials.error < np.inf


@SOLVERS
@pytest.mark.parametrize('kwargs,words', [
    ({'epsilon': 0.001}, 'epsilon 0.001 is too small for costs up to .*use at least 0.02'),
    ({'epsilon': 0.0}, 'epsilon is 0.0'),
    ({'rho_source': -1.0}, 'rho_source is -1.0; expected a number above 0'),
    ({'rho_target': float('nan')}, 'rho_target is nan'),
    ({'rho_source': 1e18, 'rho_target': 1e18}, 'so large that both marginals hold exactly')])
def test_invalid_parameters(memory, kwargs, words):
  cost = np.full((4, 3), 2.0)
  with pytest.raises(ValueError, match=words):
    transport.solve(costs(cost, memory), **{'epsilon': 0.1, 'rho_source': 0.1, 'rho_target': 10.0, **kwargs})
