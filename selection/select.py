"""select(): check what came in, form the units, score them, cut."""

import inspect
from typing import Any

import numpy as np

from selection.embeddings import class_means, Embeddings
from selection.strategies import STRATEGIES
from selection.subset import Selection


def select(source: Embeddings, target: Embeddings, size: int, *, by: str = 'class', method: str = 'uot', seed: int = 0,
           **parameters: Any) -> Selection:
  """Chooses the part of the source that helps the target.

  Args:
    source: the pre-training data: embeddings of its images (or means of its classes), with labels.
    target: the target's training images by the same encoder, with labels.
    size: how many units to choose.
    by: the unit: 'class'.
    method: a name of `STRATEGIES`: 'uot', 'random', 'none'.
    seed: for strategies that draw.
    **parameters: the strategy's own; see its docstring.

  Returns:
    The selection: `classes` best first, `shares` of all units, `converged`; prints as a table.

  Raises:
    ValueError: anything that does not fit, with what was expected.
  """
  if method not in STRATEGIES:
    raise ValueError(f'selection method {method!r}; known: {", ".join(STRATEGIES)}')
  if by not in UNITS:
    raise ValueError(f'selection by {by!r}; known: {", ".join(UNITS)}')
  strategy = STRATEGIES[method]
  defaults = {name: p.default for name, p in inspect.signature(strategy).parameters.items() if p.kind is p.KEYWORD_ONLY}
  unknown = set(parameters) - set(defaults)
  if unknown:
    raise ValueError(f'{method} has no parameter {sorted(unknown)[0]!r}; known: {", ".join(defaults) or "none"}')
  units, target_units = UNITS[by](_checked(source, 'source')), UNITS[by](_checked(target, 'target'))
  if units.features.shape[1] != target_units.features.shape[1]:
    raise ValueError(f'source features have {units.features.shape[1]} dimensions and target features {target_units.features.shape[1]}; '
                     'embed both with the same encoder')
  if source.fingerprint and target.fingerprint and source.fingerprint != target.fingerprint:
    raise ValueError(f'source and target come from different encoders (fingerprints {source.fingerprint} and {target.fingerprint}); '
                     'embed both with the same one')
  if method == 'none':
    size = 0
  elif not 0 < size <= len(units) or int(size) != size:
    raise ValueError(f'size is {size}; expected a whole number from 1 to {len(units)}, the number of source units')

  size = int(size)
  scores = strategy(units.features, target_units.features, np.random.default_rng(seed), **parameters)
  chosen = np.argsort(-scores.shares, kind='stable')[:size].tolist()
  return Selection(
      method=method, by=by, size=size, seed=seed, parameters={**defaults, **parameters}, shares=scores.shares,
      classes=tuple(chosen), names=_names(units), target_names=_names(target_units), converged=scores.converged,
      counts=tuple(int(n) for n in units.weights), plan=None if scores.plan is None else scores.plan[chosen],
      solver=scores.solver, encoder=source.fingerprint)


def _checked(embeddings: Embeddings, side: str) -> Embeddings:
  if not isinstance(embeddings, Embeddings):
    raise ValueError(f'{side} is a {type(embeddings).__name__}; expected selection.Embeddings(features, labels)')
  zero = np.flatnonzero(~embeddings.features.any(1))
  if len(zero):
    raise ValueError(f'{len(zero)} rows of {side} features are zero, the first is row {zero[0]}; their direction is not defined')
  return embeddings


def _names(units: Embeddings) -> tuple[str, ...]:
  return tuple(units.class_names) if units.class_names is not None else tuple(str(i) for i in range(len(units)))


UNITS = {'class': class_means}
