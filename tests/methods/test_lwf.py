"""LwF: the term is the formula, its gradient reaches the features alone."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import method_case
import numpy as np
import pytest

from ft_jax import methods
from ft_jax.methods.base import StepContext
from ft_jax.methods.lwf import LwF
from ft_jax.models.resnet import Outputs


def term(features: np.ndarray, head: dict[str, np.ndarray], teacher: np.ndarray, weight: float,
         temperature: float) -> float:
  """The formula, in float64."""
  log_p, log_q = (x / temperature - np.log(np.exp(x / temperature).sum(1, keepdims=True))
                  for x in (teacher, features @ head['kernel'] + head['bias']))
  return weight * np.mean(np.sum(np.exp(log_p) * (log_p - log_q), 1))


def step_context(features, head, teacher) -> StepContext:
  return StepContext(None, {}, {}, {'params': {'heads': {'pretrained': head}}},
                     Outputs(None, {'pretrained': teacher}, {}),
              {'target': Outputs(features, {}, {})}, {}, None, None, None, None, None)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.floats(0.1, 10.0), st.floats(0.5, 8.0))
def test_term_and_gradient(seed, weight, temperature):
  rng = np.random.default_rng(seed)
  features, teacher = rng.normal(size=(6, 5)), 4 * rng.normal(size=(6, 8))
  head = {'kernel': rng.normal(size=(5, 8)), 'bias': rng.normal(size=8)}
  expected = term(features, head, teacher, weight, temperature)
  loss = lambda features: LwF(weight, temperature).loss(step_context(features, head, teacher), {}).loss
  with jax.enable_x64(True):
    value, gradient = jax.device_get(jax.value_and_grad(loss)(features))
  np.testing.assert_allclose(value, expected, rtol=1e-9)
  step = 1e-5 * rng.normal(size=features.shape)
  change = term(features + step, head, teacher, weight, temperature) - term(features - step, head, teacher, weight,
                                                                            temperature)
  np.testing.assert_allclose(np.sum(gradient * 2 * step), change, rtol=1e-4, atol=1e-11)


def test_bad_settings():
  context = method_case.context(method_case.network())
  with pytest.raises(ValueError, match=r'methods.lwf.temperature is 0.0; expected a number above 0'):
    methods.check({'lwf': LwF(1.0, 0.0)}, context)
  with pytest.raises(ValueError,
                     match=r'methods.lwf needs a pre-trained classifier, but config.model.weights is empty'):
    methods.check({'lwf': LwF(1.0)}, dataclasses.replace(context, pretrained=False))
