"""The solver gives the published plans, and says when it cannot."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from selection import transport


def scaling_iteration(cost, epsilon, rho_source, rho_target):
  """The published algorithm (generalised Sinkhorn with masses of one), in float64, run to its fixed point."""
  kernel = np.exp(-cost / epsilon)
  u, v = np.ones(len(cost)), np.ones(cost.shape[1])
  for _ in range(5000):
    before = u
    u = (1 / (kernel @ v)) ** (rho_source / (rho_source + epsilon))
    v = (1 / (kernel.T @ u)) ** (rho_target / (rho_target + epsilon))
    if np.abs(u / before - 1).max() < 1e-13:
      break
  return u[:, None] * kernel * v


def test_published_synthetic_problems(shared):
  """Plans of the authors' own code: masses of one there and of sum one here, so proportional."""
  with np.load(shared / 'reference' / 'uot' / 'synthetic_cases.npz') as cases:
    for i in range(4):
      epsilon, rho_source, rho_target = cases[f'par{i}'].tolist()
      solution = transport.solve(cases[f'M{i}'], epsilon=epsilon, rho_source=rho_source, rho_target=rho_target)
      expected = cases[f'T{i}'] / cases[f'T{i}'].sum()
      assert solution.converged
      np.testing.assert_allclose(solution.plan / solution.plan.sum(), expected, rtol=0, atol=1e-5 * expected.max())


@settings(max_examples=15, deadline=None)
@given(shape=st.sampled_from([(3, 2), (12, 5), (5, 30)]), epsilon=st.floats(0.05, 1.0), rho_source=st.floats(0.05, 2.0),
       rho_target=st.floats(0.05, 10.0), seed=st.integers(0, 99))
def test_equals_the_scaling_iteration(shape, epsilon, rho_source, rho_target, seed):
  """Random problems against the published iteration in float64."""
  cost = np.random.default_rng(seed).uniform(0, 2, shape)
  solution = transport.solve(cost, epsilon=epsilon, rho_source=rho_source, rho_target=rho_target)
  assert solution.converged
  plan, expected = (x / x.sum() for x in (solution.plan.astype(np.float64), scaling_iteration(cost, epsilon, rho_source, rho_target)))
  np.testing.assert_allclose(plan.sum(1), expected.sum(1), rtol=2e-4)
  np.testing.assert_allclose(plan, expected, rtol=0, atol=1e-4 * expected.max())


def test_not_converged_is_said():
  cost = np.random.default_rng(0).uniform(0, 2, (40, 30))
  solution = transport.solve(cost, epsilon=0.05, rho_source=5.0, rho_target=5.0, max_iterations=3)
  assert not solution.converged and solution.iterations == 3 and solution.error > 1e-6


@pytest.mark.parametrize('kwargs,words', [
    ({'epsilon': 0.001}, 'epsilon 0.001 is too small for costs up to .*use at least 0.02'), ({'epsilon': 0.0}, 'epsilon is 0.0'),
    ({'rho_source': -1.0}, 'rho_source is -1.0; expected a finite number above 0'), ({'rho_target': np.inf}, 'rho_target is inf'),
    ({'rho_source': 1e18, 'rho_target': 1e18}, 'so large that both marginals hold exactly')])
def test_parameters_that_cannot_be(kwargs, words):
  cost = np.full((4, 3), 2.0)
  with pytest.raises(ValueError, match=words):
    transport.solve(cost, **{'epsilon': 0.1, 'rho_source': 0.1, 'rho_target': 10.0, **kwargs})
