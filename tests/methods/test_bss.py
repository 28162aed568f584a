"""BSS: the sum of the smallest squared singular values and its gradient are those of a float64 SVD, however the
singular values lie.

That they are of the whole batch on any number of devices is in test_bi_tuning.py, with one compilation for both.
"""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import method_case
import numpy as np
import pytest

from ft_jax import methods
from ft_jax.methods.bss import smallest

both = jax.jit(jax.value_and_grad(smallest), static_argnums=1)


def reference(features: np.ndarray, k: int) -> tuple[float, np.ndarray]:
  """The sum and its gradient, 2 * sum of s_i u_i v_i'."""
  u, s, v = np.linalg.svd(features.astype(np.float64), full_matrices=False)
  return np.sum(s[-k:] ** 2), 2 * (u[:, -k:] * s[-k:]) @ v[-k:]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.sampled_from([(5, 9), (9, 5), (1, 4)]), st.booleans(), st.integers(0, 1000))
def test_against_singular_values(shape, all_of_them, seed):
  """Also against finite differences, in float64."""
  k = min(shape) if all_of_them else 1
  features, direction = np.random.default_rng(seed).normal(size=(2, *shape)) + 1.0
  value, gradient = both(features.astype(np.float32), k)
  expected, slope = reference(features.astype(np.float32), k)
  np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gradient, slope, atol=1e-4 * np.linalg.norm(features))
  with jax.enable_x64(True):
    slope = np.sum(direction * np.asarray(both(features, k)[1]))
    step = 1e-6
    by_difference = (both(features + step * direction, k)[0] - both(features - step * direction, k)[0]) / (2 * step)
    np.testing.assert_allclose(slope, by_difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('k', [1, 3, 5])
def test_equal_singular_values(k):
  """Five equal ones: the gradient is finite, has the length of that of any k of them, and is exact where all five are
  taken.
  """
  rng = np.random.default_rng(0)
  u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (8, 12))
  features = ((u * [9, 7, 5, 2, 2, 2, 2, 2]) @ v[:8]).astype(np.float32)
  value, gradient = both(features, k)
  np.testing.assert_allclose(value, 4 * k, rtol=1e-5)
  np.testing.assert_allclose(np.linalg.svd(gradient)[1], [4.0] * k + [0.0] * (8 - k), atol=1e-4)
  if k == 5:
    np.testing.assert_allclose(gradient, reference(features, 5)[1], atol=1e-4)


def test_lost_directions():
  """Features of nothing, of one image many times, and of a spectrum from 1 to 1e-4: no NaN, and float32 keeps the
  smallest one.
  """
  for features in (np.zeros((8, 12), np.float32), np.ones((8, 12), np.float32)):
    value, gradient = both(features, 3)
    np.testing.assert_allclose(value, 0.0, atol=1e-8)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-4)
  rng = np.random.default_rng(0)
  u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (16, 16))
  # the Gram matrix has 1e-8 of its largest eigenvalue there
  features = ((u * np.geomspace(100, 0.01, 16)) @ v).astype(np.float32)
  value, gradient = both(features, 1)
  expected, slope = reference(features, 1)
  np.testing.assert_allclose(value, expected, rtol=2e-2)
  np.testing.assert_allclose(gradient, slope, atol=2e-2 * np.linalg.norm(slope))


def test_bad_settings():
  context = method_case.context(method_case.network(), pretrained=False)
  for settings_, message in ((dict(weight=1.0, k=0),
                              'methods.bss.k is 0; expected 1 to 16, .* a batch of 16 with 32 features each'),
                             (dict(weight=1.0, k=17), 'methods.bss.k is 17; expected 1 to 16'),
                             (dict(weight=-1.0), 'methods.bss.weight is -1.0')):
    with pytest.raises(ValueError, match=message):
      methods.check(methods.active({'bss': settings_}), context)
  with pytest.raises(ValueError, match='k is 33; expected 1 to 32'):
    methods.check(methods.active({'bss': dict(weight=1.0, k=33)}), dataclasses.replace(context, batch_size=64))
