"""Selection: which units were chosen, how, and why: data and queries."""

from collections.abc import Sequence
import dataclasses
import functools
import os
from typing import Any, NamedTuple

import numpy as np

from selection import json_file, plots, text
from selection.embeddings import Embeddings
from selection.ranking import NOUNS
from selection.storage import write_text


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Selection:
  """What `select` chose.

  Attributes:
    method, by, size, seed, parameters: how it was chosen; parameters hold every one of the strategy, defaults included.
    units: int `[k]`, numbers of the chosen units, best first.
    scores: float `[n]`, one for each source unit in the order of the units.
    measure: what the scores are: 'share' of the transported mass (sum 1), 'cosine', 'mean distance', 'mean cost', 'random',
      'given' (a list from elsewhere).
    ascending: whether small scores are chosen first.
    names: of all source units; () where the units are examples.
    target_names: of the g classes (or rows) of the target.
    counts: images of each source unit, or None.
    plan: `[k, g]`, the share of the mass that goes from each chosen unit to each class of the target. For 'nearest' it is 1 where the
      nearest target unit is. None for strategies without one, and where it would be very large (see `unexplained`).
    target_mass: `[g]`, the share of the mass that arrives at each class of the target, from chosen units and all others; or None.
    rows: int `[e]`, rows of the source images in the chosen units; None where they are not known, as the source was given as means.
      In the order of the source, or best first where the units are examples.
    ids: `[e]`, the ids of these images in the source; None where it has none.
    row_units: int `[e]`, the unit of each of these images.
    solver: how the solver ended: iterations, error, converged; {} where there was none.
    encoder: fingerprint of the encoder.
    source: name and fingerprint of the source data set; {} where it is not known.
  """
  method: str
  by: str
  size: float
  seed: int
  parameters: dict[str, Any]
  units: np.ndarray
  scores: np.ndarray
  measure: str
  ascending: bool
  names: Sequence[str]
  target_names: Sequence[str]
  counts: np.ndarray | None = None
  plan: np.ndarray | None = None
  target_mass: np.ndarray | None = None
  rows: np.ndarray | None = None
  ids: np.ndarray | None = None
  row_units: np.ndarray | None = None
  solver: dict[str, Any] = dataclasses.field(default_factory=dict)
  encoder: str = ''
  source: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def converged(self) -> bool | None:
    """Whether the solver converged; None for methods without one. (Files of older versions do not say so: those only kept what did.)"""
    return bool(self.solver.get('converged', True)) if self.solver else None

  @property
  def solver_summary(self) -> str:
    """How the solver ended, in words; '' for methods without one."""
    if not self.solver:
      return ''
    iterations = self.solver['iterations']
    if self.converged:
      return f'converged in {iterations} iterations'
    error = f' (error {self.solver["error"]:.2g})' if 'error' in self.solver else ''
    return f'not converged after {iterations} iterations{error}'

  @property
  def has_scores(self) -> bool:
    """Whether the scores say something of the units."""
    return self.measure not in ('random', 'given')

  @property
  def shares(self) -> np.ndarray | None:
    """The share of each source unit in the transported mass, `[n]`, sum 1; None for strategies that transport nothing."""
    return self.scores if self.measure == 'share' else None

  @property
  def classes(self) -> tuple[int, ...]:
    """Ids of the chosen classes, best first; () for other units."""
    return tuple(self.units.tolist()) if self.by == 'class' else ()

  @property
  def class_names(self) -> tuple[str, ...]:
    """Names of the chosen classes, best first; () for other units."""
    return tuple(self.name(i) for i in self.classes)

  @property
  def examples(self) -> np.ndarray | None:
    """The source images in the chosen units: their ids, or rows where there are none, `[e]`; None where they are not known."""
    return self.rows if self.ids is None else self.ids

  def name(self, unit: int) -> str:
    """The name of a source unit."""
    if len(self.names):
      return str(self.names[unit])
    return self._example_names.get(int(unit), f'row {unit}')

  @functools.cached_property
  def _example_names(self) -> dict[int, str]:
    if self.by != 'example' or self.ids is None:
      return {}
    return dict(zip(self.units.tolist(), map(str, self.ids.tolist())))

  def score_text(self, unit: int) -> str:
    """The score of a unit to be read: shares in per cent, with as many digits as the largest one needs for three."""
    digits = f'{max(2, -int(np.floor(np.log10(max(self.scores.max(), 1e-300)))))}%' if self.measure == 'share' else '4f'
    return f'{self.scores[unit]:.{digits}}'

  def rows_of(self, unit: int) -> np.ndarray:
    """Rows of the source images in a chosen unit; raises ValueError where they are not known."""
    if self.rows is None or unit not in self.units:
      raise ValueError(f'the images of unit {unit} are not known: ' + (
          'the source was given as means' if self.rows is None else 'it is not among the chosen units'))
    return self.rows[self.row_units == unit]

  def ranking(self) -> np.ndarray:
    """All units, best first: int `[n]`."""
    return np.argsort(self.scores if self.ascending else -self.scores, kind='stable')

  def explain(self, most: int = 3) -> list[list[tuple[str, float]]]:
    """For each chosen unit the classes of the target that draw it, and which part of its transported mass goes to each.

    Returns:
      One list a chosen unit, of at most `most` (target name, part from 0 to 1), largest first; empty lists without a plan.
    """
    if self.plan is None:
      return [[] for _ in self.units]
    return [_largest(row / row.sum(), self.target_names, most) for row in self.plan]

  def explain_target(self, most: int = 3) -> list[list[tuple[str, float]]]:
    """The reverse: for each class of the target the chosen units that serve it, and which part of all mass that it draws comes from each.

    Returns:
      One list a class of the target, of at most `most` (unit name, part from 0 to 1), largest first; empty lists without a plan.
    """
    if self.plan is None or self.target_mass is None:
      return [[] for _ in self.target_names]
    names = [self.name(i) for i in self.units]
    return [_largest(column / total, names, most) for column, total in zip(self.plan.T, self.target_mass)]

  def coverage(self) -> np.ndarray | None:
    """The part of the mass drawn by each class of the target that comes from chosen units, `[g]`, from 0 to 1; None without a plan."""
    return None if self.plan is None or self.target_mass is None else self.plan.sum(0) / self.target_mass

  def table(self, most: int | None = 20, beyond: int = 3) -> str:
    """The chosen units as text, best first, followed by the first units that were not chosen.

    Args:
      most: chosen units to show; None shows all.
      beyond: units to show below the cut.
    """
    return text.table(self, most, beyond)

  def unexplained(self) -> str:
    """Why there is no plan."""
    if self.measure in ('share', 'mean cost', 'cosine') and len(self.units):
      return (f'the explanation was left out: {len(self.units):,d} chosen {NOUNS[self.by]} by {len(self.target_names):,d} of the target '
              'are too many numbers; give the target labels, or choose fewer')
    return f'{self.method} says nothing of single classes of the target'

  def target_table(self, most: int | None = 20) -> str:
    """The reverse as text: each class of the target, how much of its mass comes from chosen units, and from which.

    Args:
      most: classes to show, the best covered first; None shows all.
    """
    return text.target_table(self, most)

  def plot(self) -> Any:
    """A `matplotlib.figure.Figure`: the ranked scores with the cut, and the plan from chosen units to target classes as a heat map."""
    return plots.overview(self)

  def compare(self, other: 'Selection') -> 'Comparison':
    """What two selections from the same units have in common; raises ValueError where the units are not the same."""
    same = self.by == other.by and len(self.scores) == len(other.scores)
    # Examples that were loaded have no names but those of the chosen.
    same = same and (not len(self.names) or not len(other.names) or list(self.names) == list(other.names))
    # Clusters have numbers for names; those of another clustering have other sizes.
    if not same or self.by == 'cluster' and not np.array_equal(self.counts, other.counts):
      raise ValueError(f'a selection of {len(self.scores)} {NOUNS[self.by]} cannot be compared with one of {len(other.scores)} '
                       f'{NOUNS[other.by]}: the units are not the same')
    mine, others = set(self.units.tolist()), set(other.units.tolist())
    listed = lambda units, chosen: tuple(self.name(i) if chosen is self else chosen.name(i) for i in chosen.units.tolist() if i in units)
    return Comparison(listed(mine & others, self), listed(mine - others, self), listed(others - mine, other))

  def export(self, path: str | os.PathLike[str], files: Sequence[str] | None = None, labels: Sequence[int] | None = None) -> int:
    """Writes the chosen images as a list of file names, one a line, sorted and without duplicates; whole or not at all.

    Args:
      path: the text file.
      files: the file of each row of the source. Without it the ids of the source are written, or the rows where there are none.
      labels: the class of each file; for a selection of classes that was made from means, which knows no images.

    Returns:
      The number of lines.

    Raises:
      ValueError: the images are not known, or the lists do not fit.
    """
    if labels is not None:
      if files is None or len(files) != len(labels) or self.by != 'class':
        raise ValueError(f'labels need a file for each ({len(labels)} labels, {0 if files is None else len(files)} files) and a selection '
                         f'of classes (this one is of {NOUNS[self.by]})')
      chosen = [str(files[i]) for i in np.flatnonzero(np.isin(np.asarray(labels), self.units))]
    elif self.examples is None:
      raise ValueError('this selection was made from means, and knows no images; give files=[...] and labels=[...], the file and the '
                       'class of each source image')
    elif files is not None:
      images = len(self.scores) if self.by == 'example' else int(self.counts.sum())
      if len(files) != images:
        raise ValueError(f'{len(files):,d} files do not fit: expected one for each of the {images:,d} rows of the source')
      chosen = [str(files[i]) for i in self.rows]
    else:
      chosen = self.examples.tolist()
    lines = sorted({str(line) for line in chosen} if files is not None or isinstance(next(iter(chosen), ''), str) else set(chosen))
    broken = [line for line in lines if isinstance(line, str) and ('\n' in line or '\r' in line)]
    if broken:
      raise ValueError(f'the file name {broken[0]!r} has a line break in it, so a list of lines cannot hold it')
    write_text(path, ''.join(f'{line}\n' for line in lines))
    return len(lines)

  def __str__(self) -> str:
    return self.table()

  def __repr__(self) -> str:
    return f'<Selection of {text.title(self)}>'

  def _repr_html_(self) -> str:
    import html
    return f'<pre style="font-family: monospace; white-space: pre">{html.escape(self.table())}</pre>'

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes one JSON file, whole or not at all, on a disk or on object storage; of a large pool mostly the scores, 11 bytes a row."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    if self.by == 'example':  # they would be all file names of the pool; those of the chosen ones are among the ids
      fields['names'] = ()
    json_file.write(path, fields)

  @classmethod
  def of_rows(cls, rows: Sequence[int] | np.ndarray, ids: Sequence[str] | np.ndarray) -> 'Selection':
    """A selection that was made elsewhere, as a list of images.

    Args:
      rows: of the source, `[e]`, in the order in which they are to be listed.
      ids: of all rows of the source, `[n]`.
    """
    rows, ids = np.asarray(rows, np.int64), np.asarray(ids)
    scores = np.zeros(len(ids))
    scores[rows] = 1.0
    return cls(method='given', by='example', size=float(len(rows)), seed=0, parameters={}, units=rows, scores=scores, measure='given',
               ascending=False, names=(), target_names=(), rows=rows, ids=ids[rows], row_units=rows)

  @classmethod
  def load(cls, path: str | os.PathLike[str], source_fingerprint: str = '', source: Embeddings | None = None) -> 'Selection':
    """Reads what `save` wrote.

    Args:
      path: the file.
      source_fingerprint: of the data set that it is to be used with; '' checks nothing.
      source: embeddings of the data set that it is to be used with: encoder, number of units and names of classes are checked.

    Raises:
      ValueError: no such file, a damaged one, one of another version, or one made for another data set.
    """
    try:
      selection = cls(**json_file.read(path))
      selection._check()
    except (OSError, ValueError) as error:
      raise ValueError(f'{path} holds no selection that can be read ({text.one_line(error)}); select again') from error
    selection._check_source(path, source_fingerprint, source)
    return selection

  def _check(self) -> None:
    """Raises ValueError where the parts do not fit together: the file was changed."""
    n, k, g = len(self.scores), len(self.units), len(self.target_names)
    shapes = {'names': (0,) if self.by == 'example' else (n,), 'counts': (n,), 'plan': (k, g), 'target_mass': (g,),
              'row_units': np.shape(self.rows), 'ids': np.shape(self.rows)}
    wrong = [name for name, shape in shapes.items() if getattr(self, name) is not None and np.shape(getattr(self, name)) != shape]
    if wrong or self.by not in NOUNS or not n or not _within(self.units, n) or len(set(self.units.tolist())) < k:
      raise ValueError(f'its parts do not fit together: {", ".join(wrong) or "units"}')
    if self.counts is not None and self.counts.min() < 0 or any(
        part is not None and part.size and part.min() < 0 for part in (self.plan, self.target_mass)):
      raise ValueError('its counts, plan or target_mass go below zero')
    if self.rows is not None:
      images = n if self.by == 'example' else None if self.counts is None else int(self.counts.sum(dtype=np.float64))
      if not _within(self.rows, images) or self.row_units is None or not np.isin(self.row_units, self.units).all():
        raise ValueError('its rows are not those of the chosen units')

  def _check_source(self, path: str | os.PathLike[str], fingerprint: str, source: Embeddings | None) -> None:
    made_for = self.source.get('fingerprint', '')
    if fingerprint and made_for and made_for != fingerprint:
      raise ValueError(f'{path} was made for {self.source.get("name")} (fingerprint {made_for}), not for this data set '
                       f'(fingerprint {fingerprint}); select again')
    if source is None:
      return
    if self.encoder and source.fingerprint and self.encoder != source.fingerprint:
      raise ValueError(f'{path} was made with another encoder (fingerprint {self.encoder}, not {source.fingerprint}); select again')
    if self.by == 'class' and source.labels is None and source.class_names is None:
      raise ValueError(f'{path} was made for source classes, and this source has no labels')
    units = {'class': lambda: source.num_classes, 'example': lambda: len(source), 'cluster': lambda: len(self.scores)}[self.by]()
    if units != len(self.scores):
      raise ValueError(f'{path} was made for {len(self.scores)} source {NOUNS[self.by]}, and this source has {units}; select again')
    if self.by == 'class' and source.class_names is not None and tuple(source.class_names) != tuple(self.names):
      different = next(i for i, (a, b) in enumerate(zip(source.class_names, self.names)) if a != b)
      raise ValueError(f'{path} was made for other classes: class {different} was {self.names[different]}, and is '
                       f'{source.class_names[different]} here; select again')


class Comparison(NamedTuple):
  """Names of the units that two selections share, and of those that only one of them has; each best first."""
  shared: tuple[str, ...]
  only_first: tuple[str, ...]
  only_second: tuple[str, ...]

  @property
  def overlap(self) -> float:
    """Shared units as a part of the smaller selection, from 0 to 1."""
    smaller = len(self.shared) + min(len(self.only_first), len(self.only_second))
    return len(self.shared) / smaller if smaller else 1.0

  def __str__(self) -> str:
    return text.comparison(self)


def _largest(parts: np.ndarray, names: Sequence[str], most: int) -> list[tuple[str, float]]:
  return [(str(names[j]), float(parts[j])) for j in np.argsort(-parts, kind='stable')[:most] if parts[j] > 0]


def _within(numbers: np.ndarray, size: int | None) -> bool:
  """Whether all are from 0 to below `size`, where that is known."""
  return not len(numbers) or 0 <= numbers.min() and (size is None or int(numbers.max()) < size)
