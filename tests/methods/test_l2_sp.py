"""L2-SP: the penalty is the formula, of the right parameters, and its gradient draws towards the start."""

import dataclasses

import method_case
import numpy as np
import pytest

from ft_jax import methods
from ft_jax.methods.base import flat
from ft_jax.methods.l2_sp import L2SP


def test_step_is_the_plain_one_and_the_pull():
  """After a step of gradient descent, parameters differ from those of the plain step by rate * weight * (w - w0); heads
  by rate * w.
  """
  start, moved = method_case.start_of(method_case.network()), method_case.start_of(method_case.network(), seed=5)
  plain, _ = method_case.run({}, start=moved, rate=0.1)
  state = plain.replace(start=start)
  before = flat(state.params)
  after = flat(method_case.run({}, state=state, rate=0.1)[0].params)
  drawn_state, history = method_case.run({'l2_sp': L2SP(0.3, 0.2)}, state=state.replace(methods={'l2_sp': {}}),
                                         rate=0.1)
  drawn, w0 = flat(drawn_state.params), flat(start['params'])
  loss = 0.0
  for path, w in before.items():
    w = w.astype(np.float64)
    weight, reference = (0.2, 0.0) if path.startswith('heads/') else (0.3, w0[path])
    loss += 0.5 * weight * np.sum((w - reference) ** 2)
    if not path.endswith(('scale', 'bias')) or path.startswith('heads/'):  # BatchNorm is frozen here
      np.testing.assert_allclose(after[path] - drawn[path], 0.1 * weight * (w - reference), atol=2e-7)
  np.testing.assert_allclose(history[0]['loss_l2_sp'], loss, rtol=1e-5)


def test_same_whatever_the_split():
  method_case.assert_same_whatever_the_split({'l2_sp': L2SP(0.1)})


def test_bad_settings():
  context = method_case.context(method_case.network())
  for settings, message in ((dict(weight=-1.0), r'l2_sp.weight is -1.0; expected a number above 0'),
                            (dict(weight=1.0, head_weight=-2.0), r'head_weight is -2.0; expected a number from 0')):
    with pytest.raises(ValueError, match=message):
      methods.check(methods.active({'l2_sp': settings}), context)
  with pytest.raises(ValueError, match=r'methods.l2_sp needs pre-trained weights, but config.model.weights is empty'):
    methods.check(methods.active({'l2_sp': {'weight': 1.0}}), dataclasses.replace(context, pretrained=False))
