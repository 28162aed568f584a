"""The examples of docs/design.md: each is under 30 lines, is registered by one row of a table, and does what the page
says."""

import pathlib
import re
from typing import Any

import jax
import method_case
import numpy as np

from configs import default
from ft_jax import methods
from ft_jax.methods import METHODS

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'design.md'


def example(name: str) -> dict[str, Any]:
  """What the code block of that name on the page defines."""
  code = re.search(rf'^```python {name}\n(.*?)^```$', PAGE.read_text(), re.M | re.S)[1]
  assert len(code.splitlines()) < 30
  space: dict[str, Any] = {'__name__': f'example_{name}'}
  exec(compile(code, f'{PAGE.name}: {name}', 'exec'), space)
  return space


def test_a_new_method(monkeypatch):
  """It becomes a field of the config, and its term is its formula."""
  monkeypatch.setitem(METHODS, 'features', example('method')['Features'])
  assert default.get_config().methods.features.weight == 0.0
  active = methods.active({'features': {'weight': 0.5}})
  start = method_case.start_of(method_case.network())
  plain, _ = method_case.run({}, start=start)
  state, history = method_case.run(active, start=start, state=plain.replace(start=start, methods={'features': {}}))
  model, image = method_case.network({}, batch_norm='frozen'), method_case.batch()['target']['input']
  of = lambda params: model.apply({'params': params, 'batch_stats': start['batch_stats']}, image).features
  distance = np.sum(np.square(np.float64(of(plain.params)) - of(start['params'])), axis=1)
  np.testing.assert_allclose(history[0]['loss_features'], 0.5 / 2 * distance.mean(), rtol=1e-4)
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(plain.params)))
