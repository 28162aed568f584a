"""select(): checks the arguments, opens both sets, forms the units, scores them, cuts and explains the choice."""

import numbers
import os
from typing import Any, NamedTuple

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

# An explanation holds a number for each chosen unit and each class of the target (each row of a target without
# labels). With more numbers than this it is left out, as it would take longer than the selection.
EXPLAINED_CLASSES, EXPLAINED_ROWS = 1 << 25, 1 << 22
# Chosen rows that are explained at a time.
SLICE = 1 << 16


def select(source: Any, target: Any, size: float, *, by: str = 'class', method: str = 'uot', seed: int = 0,
           clusters: int | None = None, workdir: str | os.PathLike[str] | None = None, memory: int | None = None,
           progress: bool = True, **parameters: Any) -> Selection:
  """Chooses the source units that help the target.

  Args:
    source: the pre-training data. `Embeddings`; an array of features `[n, d]`, which may be a `numpy.memmap`, or the
      path of a .npy file, which is memory-mapped; a pair (features, labels); or, for clusters and examples, chunks
      `[c, d]`: a list of arrays, an object that can be iterated over repeatedly, or a function that returns a new
      iterator at each call.
    target: the target's training images, embedded with the same encoder: `Embeddings`, features, or a pair (features,
      labels).
    size: how many units to choose; or, as a float below 1, the share of the transported mass to cover.
    by: the unit: 'class' (means of classes), 'cluster' (means of k-means clusters, for pools without labels) or
      'example' (every row). The target's units are its classes; with 'example', or without labels, its single images.
    method: a name of `STRATEGIES`: 'uot', 'ot', 'softmax', 'nearest', 'greedy_emd', 'random', 'least', 'none'.
    seed: of everything random: the random choice, k-means, samples.
    clusters: number of clusters for by='cluster'; None is 2,000, or a tenth of the rows of a pool with fewer than
      20,000.
    workdir: a folder where long passes save their progress. The same call with the same folder resumes from it, or
      returns its result once it is finished.
    memory: bytes, over all devices, that a stored kernel may take; a larger kernel is computed again in each pass. None
      is 1 GiB on the CPU, and half of the memory of other devices.
    progress: whether passes that take more than two seconds show a bar.
    **parameters: parameters of the strategy; see its docstring (`selection.STRATEGIES[method]`).

  Returns:
    The selection: `units` best first (`classes`, `examples`), `scores` of all units; prints as a table.

  Raises:
    ValueError: an argument that is not valid, with what was expected; a solver that does not converge.
  """
  # Rows are used as float32 whatever their dtype, and OTT's loops do not run under jax_enable_x64.
  with jax.enable_x64(False):
    request = _check(size, by, method, seed, clusters, parameters)
    source, target = _open_both(source, target)
    journal = Journal(workdir, _key(source, target, request) if workdir is not None else None)
    problem = _form_units(source, target, request, Settings(memory, progress=progress, journal=journal))
    scores = _score(problem, request)
    chosen = _cut(scores, request)
    return _explain(source, target, problem, scores, chosen, request)


class _Request(NamedTuple):
  """The checked arguments that decide what is chosen; `parameters` include the strategy's defaults."""
  size: float
  by: str
  method: str
  seed: int
  clusters: int | None
  parameters: dict[str, Any]


def _check(size: float, by: str, method: str, seed: int, clusters: int | None, parameters: dict[str, Any]) -> _Request:
  """Raises ValueError for arguments that are not valid whatever the data."""
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
      raise ValueError(f'size is {size}, a share of transported mass, but {method} chooses by number; give a whole '
                       'number of units')
    if clusters is not None:
      _check_most(size, clusters, by)
  return _Request(size, by, method, seed, clusters, {**known, **parameters})


def _check_size(size: float) -> None:
  is_share = isinstance(size, numbers.Real) and 0 < size < 1
  # 1.0 is refused: it might mean one unit or all of the mass.
  is_count = isinstance(size, numbers.Real) and (
      1 < size < np.inf and size == int(size) or size == 1 and isinstance(size, numbers.Integral))
  if isinstance(size, bool) or not (is_share or is_count):
    raise ValueError(f'size is {size!r}; expected a whole number of units from 1, or a share of the transported mass '
                     'between 0 and 1')


def _check_most(size: float, n: int, by: str) -> None:
  if size > n:
    raise ValueError(f'size is {size}; expected a whole number from 1 to {n}, the number of source {NOUNS[by]}, or a '
                     'share below 1')


def _open_both(source: Any, target: Any) -> tuple[Embeddings | Rows, Embeddings]:
  """Source and target in the forms that the units are made from; raises ValueError if they do not fit together."""
  source, target = _open(source, 'source'), _open(target, 'target')
  if not isinstance(target, Embeddings):
    raise ValueError('the target is given in chunks; expected selection.Embeddings(features, labels) or an array '
                     '[m, d]')
  dimension = source.features.shape[1] if isinstance(source, Embeddings) else source.dimension
  check_same_encoder((dimension, target.features.shape[1]), (_fingerprint(source), target.fingerprint))
  return source, target


def _open(side: Any, what: str) -> Embeddings | Rows:
  """Embeddings, or rows in chunks, from any of the forms that `select` accepts."""
  if isinstance(side, Embeddings):
    opened = side
  elif isinstance(side, (str, os.PathLike)):
    opened = _embeddings(what, _map_file(side, what))
  elif isinstance(side, tuple) and len(side) == 2:
    opened = _embeddings(what, *side)
  else:
    rows = open_rows(side, what)
    if rows is not None:
      return rows
    opened = _embeddings(what, _as_array(side, what))
  if not isinstance(opened.features, np.memmap):
    check_rows(opened.features, what=what)
  return opened


def _as_array(side: Any, what: str) -> np.ndarray:
  try:
    array = side if isinstance(side, np.memmap) else np.asarray(side)
    if np.iscomplexobj(array):
      raise ValueError('the numbers are complex')
    return array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float32)
  except (TypeError, ValueError) as error:
    raise ValueError(f'the {what} is a {type(side).__name__} that cannot be read as an array ({error}); expected '
                     'selection.Embeddings, features [n, d], or (features, labels)') from error


def _embeddings(what: str, *parts: Any) -> Embeddings:
  try:
    return Embeddings(*parts)
  except ValueError as error:
    raise ValueError(f'the {what}: {error}') from error


def _map_file(path: str | os.PathLike[str], what: str) -> np.ndarray:
  try:
    mapped = np.load(path, mmap_mode='r')
    if not isinstance(mapped, np.ndarray):
      mapped.close()
      raise ValueError('it holds several arrays')
    return mapped
  except (OSError, EOFError, ValueError) as error:
    raise ValueError(f'the {what} {os.fspath(path)!r} cannot be read ({error}); expected a .npy file of features '
                     '[n, d] (selection.Embeddings.load reads what Embeddings.save wrote)') from error


def _fingerprint(source: Embeddings | Rows) -> str:
  return source.fingerprint if isinstance(source, Embeddings) else ''


def _key(source: Embeddings | Rows, target: Embeddings, request: _Request) -> dict[str, Any]:
  """What saved passes depend on. A pool that may not fit in memory is identified by its size, file and a few rows."""
  # max_iterations changes no pass.
  parameters = {name: value for name, value in request.parameters.items() if name != 'max_iterations'}
  return {'source': _source_key(source), 'target': _digest(target, target.features), 'by': request.by,
          'method': request.method, 'seed': request.seed, 'clusters': request.clusters, 'parameters': parameters}


def _source_key(source: Embeddings | Rows) -> dict[str, Any]:
  if not isinstance(source, Embeddings):
    first_rows = next(source.read(64))[1]
    return {'dimension': source.dimension, 'rows': source.known_length, 'digest': array_digest(first_rows)}
  if not isinstance(source.features, np.memmap):
    return {'rows': len(source), 'digest': _digest(source, source.features)}
  rows = np.unique(np.linspace(0, len(source) - 1, 64).astype(int))
  file = os.stat(source.features.filename) if source.features.filename else None
  return {'rows': len(source), 'digest': _digest(source, np.asarray(source.features[rows])),
          'file': None if file is None else [file.st_size, file.st_mtime_ns]}


def _digest(side: Embeddings, features: np.ndarray) -> str:
  return array_digest(features, *(x for x in (side.labels, side.weights) if x is not None))


def _form_units(source: Embeddings | Rows, target: Embeddings, request: _Request, settings: Settings) -> Problem:
  """The units of both sides."""
  by, seed = request.by, request.seed
  units = UNITS[by](source, settings, request.clusters, np.random.default_rng([seed, 1]), 'source')
  if request.method != 'none' and units.rows.known_length is not None:
    _check_most(request.size, len(units.rows), by)
  return Problem(units, target_units(target, by), np.random.default_rng(seed), settings)


def _score(problem: Problem, request: _Request) -> Scores:
  """The strategy's score of every source unit."""
  return STRATEGIES[request.method](problem, **request.parameters)


def _cut(scores: Scores, request: _Request) -> np.ndarray:
  """The chosen units, best first."""
  if request.method == 'none':
    return np.zeros(0, np.int64)
  size, n = request.size, len(scores.values)
  _check_most(size, n, request.by)
  if size >= 1:
    return best(scores.values, scores.ascending, int(size))
  order = best(scores.values, scores.ascending, n)
  covered = np.cumsum(scores.values[order], dtype=np.float64)
  # Rounding may leave the last sum below one.
  return order[:min(int(np.searchsorted(covered, size)) + 1, n)]


def _explain(source: Embeddings | Rows, target: Embeddings, problem: Problem, scores: Scores, chosen: np.ndarray,
             request: _Request) -> Selection:
  """The selection: the chosen units with their images, and the plan that says which target classes draw them."""
  units = problem.source
  plan, target_names, target_mass = _plan(scores, chosen, source, problem.target)
  rows, row_units = _images(units, chosen, request.by)
  ids = source.ids[rows] if rows is not None and isinstance(source, Embeddings) and source.ids is not None else None
  return Selection(
      method=request.method, by=request.by, size=request.size if request.method != 'none' else 0, seed=request.seed,
      parameters=request.parameters, units=chosen, scores=scores.values, measure=scores.measure,
      ascending=scores.ascending, names=units.names, target_names=target_names,
      counts=None if units.counts is None else np.asarray(units.counts, np.int64), plan=plan, target_mass=target_mass,
      rows=rows, ids=ids, row_units=row_units, solver=scores.solver,
      encoder=_fingerprint(source) or target.fingerprint)


def _plan(scores: Scores, chosen: np.ndarray, source: Embeddings | Rows,
          target: Units) -> tuple[np.ndarray | None, tuple[str, ...], np.ndarray | None]:
  """The plan from the chosen units to the target's classes, or its rows without labels; their names and drawn mass."""
  m, members = len(target.rows), target.members
  names = tuple(map(str, target.names)) if len(target.names) else tuple(f'row {j}' for j in range(m))
  limit = EXPLAINED_ROWS if members is None else EXPLAINED_CLASSES
  if scores.plan is None or len(chosen) * len(names) > limit:
    return None, names, None
  groups = None
  if members is not None and not np.array_equal(members, np.arange(m)):
    groups = np.zeros((m, len(names)), np.float32)
    groups[np.arange(m), members] = 1
  # Slices, as the features of all chosen rows may not fit in memory. A pool in chunks takes one: each slice reads it.
  step = SLICE if isinstance(source, Embeddings) else max(1, len(chosen))
  plan = np.concatenate([scores.plan(chosen[k:k + step], groups) for k in range(0, max(1, len(chosen)), step)])
  if scores.target_mass is None:
    return plan, names, None
  # As fractions of all transported mass, of which balanced transport gives every unit the same.
  shares = scores.values[chosen] if scores.measure == 'share' else 1 / len(scores.values)
  plan *= (shares / plan.sum(1, dtype=np.float64))[:, None].astype(np.float32)
  return plan, names, scores.target_mass if groups is None else scores.target_mass @ groups


def _images(units: Units, chosen: np.ndarray, by: str) -> tuple[np.ndarray | None, np.ndarray | None]:
  """Rows of the source images in the chosen units, and the unit of each; None if the rows are not known."""
  if by == 'example':
    return chosen, chosen
  if units.members is None:
    return None, None
  rows = np.flatnonzero(np.isin(units.members, chosen))
  return rows, units.members[rows].astype(np.int64)
