"""select(): check what came in, form the units, score them, cut."""

import numbers
import os
from typing import Any

import jax
import numpy as np

from selection.blocks import Settings
from selection.embeddings import check_same_encoder, Embeddings
from selection.journal import array_digest, Journal
from selection.pools import check_rows, open_rows, Rows
from selection.ranking import best, NOUNS
from selection.result import Selection
from selection.strategies import BY_SHARE, defaults, Problem, Scores, STRATEGIES
from selection.units import target_units, UNITS, Units

# Explanations hold a number for each chosen unit and each class of the target, or each of its rows where it has no labels. Larger ones
# are left out: they would take longer than the selection.
EXPLAINED_CLASSES, EXPLAINED_ROWS = 1 << 25, 1 << 22
# Chosen rows that are explained at a time.
SLICE = 1 << 16


def select(source: Any, target: Any, size: float, *, by: str = 'class', method: str = 'uot', seed: int = 0, clusters: int | None = None,
           workdir: str | os.PathLike[str] | None = None, memory: int | None = None, progress: bool = True,
           **parameters: Any) -> Selection:
  """Chooses the part of the source that helps the target.

  Args:
    source: the pre-training data. `Embeddings`; an array of features `[n, d]`, which may be a `numpy.memmap`, or the path of a .npy
      file, which is memory-mapped; a pair (features, labels); or, for clusters and examples, chunks `[c, d]`: a list of arrays, an
      object that can be iterated over again and again, or a function that returns a new iterator at each call.
    target: the target's training images by the same encoder: `Embeddings`, features, or a pair (features, labels).
    size: how many units to choose; or, as a float below 1, the share of the transported mass that they are to cover.
    by: the unit: 'class' (means of classes), 'cluster' (means of k-means clusters, for pools without labels), 'example' (every row).
      The target's units are its classes, and its single images by 'example' or where it has no labels.
    method: a name of `STRATEGIES`: 'uot', 'ot', 'softmax', 'nearest', 'greedy_emd', 'random', 'least', 'none'.
    seed: for whatever draws: random, k-means, samples.
    clusters: how many, for by='cluster'; None is 2,000, or a tenth of the rows of a pool with fewer than 20,000.
    workdir: a folder where long passes keep how far they have come. The same call with the same folder goes on from there, and from
      its result once it is done.
    memory: bytes that a stored kernel may take over all devices; larger ones are computed again in each pass. None is 1 GiB on the
      CPU, and half of the memory of other devices.
    progress: whether passes that take more than two seconds show a bar.
    **parameters: the strategy's own; see its docstring (`selection.STRATEGIES[method]`).

  Returns:
    The selection: `units` best first (`classes`, `examples`), `scores` of all units; prints as a table.

  Raises:
    ValueError: anything that does not fit, with what was expected; a solver that does not converge.
  """
  # The rows are float32 whatever they came as; and OTT's loops do not run under jax_enable_x64.
  with jax.enable_x64(False):
    return _select(source, target, size, by, method, seed, clusters, workdir, memory, progress, parameters)


def _select(source: Any, target: Any, size: float, by: str, method: str, seed: int, clusters: int | None,
            workdir: str | os.PathLike[str] | None, memory: int | None, progress: bool, parameters: dict[str, Any]) -> Selection:
  known = defaults(method)
  unknown = set(parameters) - set(known)
  if unknown:
    raise ValueError(f'{method} has no parameter {sorted(unknown)[0]!r}; known: {", ".join(known) or "none"}')
  if by not in UNITS:
    raise ValueError(f'selection by {by!r}; known: {", ".join(UNITS)}')
  if not isinstance(seed, numbers.Integral) or seed < 0:
    raise ValueError(f'seed is {seed!r}; expected a whole number from 0')
  if clusters is not None and not (isinstance(clusters, numbers.Integral) and clusters > 0):
    raise ValueError(f'clusters is {clusters!r}; expected a whole number from 1')
  if clusters is not None and by != 'cluster':
    raise ValueError(f"clusters is {clusters}, but the units are {NOUNS[by]}; leave it out, or select by='cluster'")
  if method != 'none':
    _check_size(size)
    if size < 1 and method not in BY_SHARE:
      raise ValueError(f'size is {size}, a share of transported mass, which {method} does not go by; give a whole number of units')
    if clusters is not None:
      _check_most(size, clusters, by)
  source, target = _opened(source, 'source'), _opened(target, 'target')
  if not isinstance(target, Embeddings):
    raise ValueError('the target is given in chunks; expected selection.Embeddings(features, labels) or an array [m, d]')
  known_encoder = isinstance(source, Embeddings)
  check_same_encoder((source.features.shape[1] if known_encoder else source.dimension, target.features.shape[1]),
                     (source.fingerprint if known_encoder else '', target.fingerprint))

  parameters = {**known, **parameters}
  journal = Journal(workdir, _key(source, target, by, method, seed, clusters, parameters) if workdir is not None else None)
  settings = Settings(memory, progress=progress, journal=journal)
  units = UNITS[by](source, settings, clusters, np.random.default_rng([seed, 1]), 'source')
  if method != 'none' and units.rows.known_length is not None:
    _check_most(size, len(units.rows), by)
  problem = Problem(units, target_units(target, by), np.random.default_rng(seed), settings)
  scores = STRATEGIES[method](problem, **parameters)
  chosen = _cut(scores, size, by) if method != 'none' else np.zeros(0, np.int64)
  plan, names, target_mass = _explained(scores, chosen, source, problem.target)
  rows, row_units = _images(units, chosen, by)
  ids = source.ids[rows] if rows is not None and isinstance(source, Embeddings) and source.ids is not None else None
  return Selection(
      method=method, by=by, size=size if method != 'none' else 0, seed=seed, parameters=parameters, units=chosen,
      scores=scores.values, measure=scores.measure, ascending=scores.ascending, names=units.names, target_names=names,
      counts=None if units.counts is None else np.asarray(units.counts, np.int64), plan=plan, target_mass=target_mass,
      rows=rows, ids=ids, row_units=row_units, solver=scores.solver,
      encoder=(source.fingerprint if known_encoder else '') or target.fingerprint)


def _opened(side: Any, what: str) -> Embeddings | Rows:
  """Embeddings or rows in chunks, whatever was given."""
  if isinstance(side, Embeddings):
    opened = side
  elif isinstance(side, (str, os.PathLike)):
    opened = _embeddings(what, _mapped(side, what))
  elif isinstance(side, tuple) and len(side) == 2:
    opened = _embeddings(what, *side)
  else:
    rows = open_rows(side, what)
    if rows is not None:
      return rows
    try:
      array = side if isinstance(side, np.memmap) else np.asarray(side)
      if np.iscomplexobj(array):
        raise ValueError('the numbers are complex')
      array = array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float32)
    except (TypeError, ValueError) as error:
      raise ValueError(f'the {what} is a {type(side).__name__} that is no array ({error}); expected selection.Embeddings, features [n, d], '
                       'or (features, labels)') from error
    opened = _embeddings(what, array)
  if not isinstance(opened.features, np.memmap):
    check_rows(opened.features, what=what)
  return opened


def _embeddings(what: str, *parts: Any) -> Embeddings:
  try:
    return Embeddings(*parts)
  except ValueError as error:
    raise ValueError(f'the {what}: {error}') from error


def _mapped(path: str | os.PathLike[str], what: str) -> np.ndarray:
  try:
    mapped = np.load(path, mmap_mode='r')
    if not isinstance(mapped, np.ndarray):
      mapped.close()
      raise ValueError('it holds several arrays')
    return mapped
  except (OSError, EOFError, ValueError) as error:
    raise ValueError(f'the {what} {os.fspath(path)!r} cannot be read ({error}); expected a .npy file of features [n, d] '
                     '(selection.Embeddings.load reads what Embeddings.save wrote)') from error


def _check_size(size: float) -> None:
  # 1.0 might mean one unit or all of the mass.
  if isinstance(size, bool) or not isinstance(size, numbers.Real) or not (
      0 < size < 1 or 1 < size < np.inf and size == int(size) or size == 1 and isinstance(size, numbers.Integral)):
    raise ValueError(f'size is {size!r}; expected a whole number of units from 1, or a share of the transported mass between 0 and 1')


def _check_most(size: float, n: int, by: str) -> None:
  if size > n:
    raise ValueError(f'size is {size}; expected a whole number from 1 to {n}, the number of source {NOUNS[by]}, or a share below 1')


def _cut(scores: Scores, size: float, by: str) -> np.ndarray:
  """The chosen units, best first."""
  _check_most(size, len(scores.values), by)
  if size >= 1:
    return best(scores.values, scores.ascending, int(size))
  order = best(scores.values, scores.ascending, len(scores.values))
  covered = np.cumsum(scores.values[order], dtype=np.float64)
  # Rounding may leave the last sum below one.
  return order[:min(int(np.searchsorted(covered, size)) + 1, len(order))]


def _explained(scores: Scores, chosen: np.ndarray, source: Embeddings | Rows,
               target: Units) -> tuple[np.ndarray | None, tuple[str, ...], np.ndarray | None]:
  """The plan from chosen units to classes of the target (its rows, without labels), the names of those, and the mass that each draws."""
  m = len(target.rows)
  names = tuple(map(str, target.names)) if len(target.names) else tuple(f'row {j}' for j in range(m))
  alone = target.members is None or np.array_equal(target.members, np.arange(m))
  if scores.plan is None or len(chosen) * len(names) > (EXPLAINED_ROWS if target.members is None else EXPLAINED_CLASSES):
    return None, names, None
  groups = None
  if not alone:
    groups = np.zeros((m, len(names)), np.float32)
    groups[np.arange(m), target.members] = 1
  # The features of the chosen rows are not needed all at once; chunks have to be gone through for each slice.
  step = SLICE if isinstance(source, Embeddings) else max(1, len(chosen))
  plan = np.concatenate([scores.plan(chosen[k:k + step], groups) for k in range(0, max(1, len(chosen)), step)])
  if scores.target_mass is not None:  # in units of all transported mass, of which balanced transport gives every unit the same
    shares = scores.values[chosen] if scores.measure == 'share' else 1 / len(scores.values)
    plan *= (shares / plan.sum(1, dtype=np.float64))[:, None].astype(np.float32)
  mass = scores.target_mass if scores.target_mass is None or groups is None else scores.target_mass @ groups
  return plan, names, mass


def _images(units: Units, chosen: np.ndarray, by: str) -> tuple[np.ndarray | None, np.ndarray | None]:
  """Rows of the source images in the chosen units, and the unit of each."""
  if by != 'example' and units.members is None:
    return None, None
  rows = chosen if by == 'example' else np.flatnonzero(np.isin(units.members, chosen))
  return rows, chosen if by == 'example' else units.members[rows].astype(np.int64)


def _key(source: Embeddings | Rows, target: Embeddings, by: str, method: str, seed: int, clusters: int | None,
         parameters: dict[str, Any]) -> dict[str, Any]:
  """What kept passes depend on. A pool that may be larger than the memory is known by its size, its file and a few rows."""
  digest = lambda side, features: array_digest(features, *(x for x in (side.labels, side.weights) if x is not None))
  if not isinstance(source, Embeddings):
    known = {'dimension': source.dimension, 'rows': source.known_length, 'digest': array_digest(next(source.read(64))[1])}
  elif isinstance(source.features, np.memmap):
    rows = np.unique(np.linspace(0, len(source) - 1, 64).astype(int))
    file = os.stat(source.features.filename) if source.features.filename else None
    known = {'rows': len(source), 'digest': digest(source, np.asarray(source.features[rows])),
             'file': None if file is None else [file.st_size, file.st_mtime_ns]}
  else:
    known = {'rows': len(source), 'digest': digest(source, source.features)}
  kept = {name: value for name, value in parameters.items() if name != 'max_iterations'}  # which changes no pass
  return {'source': known, 'target': digest(target, target.features), 'by': by, 'method': method, 'seed': seed,
          'clusters': clusters, 'parameters': kept}
