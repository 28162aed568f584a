"""Selection: which units were chosen, how, and why; with its queries, tables and files."""

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
    method, by, size, seed, parameters: how it was chosen; parameters hold all of the strategy's, defaults included.
    units: int `[k]`, numbers of the chosen units, best first.
    scores: float `[n]`, one for each source unit in the order of the units.
    measure: what the scores are: 'share' of the transported mass (sum 1), 'cosine', 'mean distance', 'mean cost',
      'random', 'given' (a list that was made elsewhere).
    ascending: whether small scores are chosen first.
    names: of all source units; () if the units are examples.
    target_names: of the g classes (or rows) of the target.
    counts: images of each source unit, or None.
    plan: `[k, g]`, the share of the mass that goes from each chosen unit to each class of the target. For 'nearest' it
      is 1 at the nearest target unit. None for strategies without a plan, or if it would be very large (see
      `unexplained`).
    target_mass: `[g]`, the share of the mass that arrives at each class of the target, from all source units, chosen or
      not; or None.
    rows: int `[e]`, rows of the source images in the chosen units, in the order of the source, or best first if the
      units are examples. None if they are not known because the source was given as means.
    ids: `[e]`, the source's ids of these images; None if it has no ids.
    row_units: int `[e]`, the unit of each of these images.
    solver: how the solver ended: iterations, error, converged; {} for methods without a solver.
    encoder: fingerprint of the encoder.
    source: name and fingerprint of the source data set; {} if it is not known.
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
  names: Sequence[str] | np.ndarray
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
    """Whether the solver converged; None for methods without a solver."""
    # Files of older versions do not say: those versions saved only selections that had converged.
    return bool(self.solver.get('converged', True)) if self.solver else None

  @property
  def solver_summary(self) -> str:
    """A phrase that says how the solver ended; '' for methods without a solver."""
    if not self.solver:
      return ''
    iterations = self.solver['iterations']
    if self.converged:
      return f'converged in {iterations} iterations'
    error = f' (error {self.solver["error"]:.2g})' if 'error' in self.solver else ''
    return f'not converged after {iterations} iterations{error}'

  @property
  def has_scores(self) -> bool:
    """Whether the scores measure anything about the units."""
    return self.measure not in ('random', 'given')

  @property
  def shares(self) -> np.ndarray | None:
    """Each source unit's share of the transported mass, `[n]`, sum 1; None for strategies that transport nothing."""
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
    """The source images in the chosen units, `[e]`: their ids, or rows without ids; None if they are not known."""
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
    """The score of a unit for a table: shares in per cent, the largest one with three significant digits or more."""
    if self.measure != 'share':
      return f'{self.scores[unit]:.4f}'
    exponent = int(np.floor(np.log10(max(self.scores.max(), 1e-300))))
    return f'{self.scores[unit]:.{max(2, -exponent)}%}'

  def rows_of(self, unit: int) -> np.ndarray:
    """Rows of the source images in a chosen unit; raises ValueError if they are not known."""
    if self.rows is None:
      raise ValueError(f'the images of unit {unit} are not known: the source was given as means')
    if unit not in self.units:
      raise ValueError(f'the images of unit {unit} are not known: it is not among the chosen units')
    return self.rows[self.row_units == unit]

  def ranking(self) -> np.ndarray:
    """All units, best first: int `[n]`."""
    return np.argsort(self.scores if self.ascending else -self.scores, kind='stable')

  def explain(self, most: int = 3) -> list[list[tuple[str, float]]]:
    """For each chosen unit the classes of the target that draw it, and the fraction of its mass that goes to each.

    Returns:
      One list for each chosen unit, of at most `most` (target name, fraction), largest first; empty lists without a
      plan.
    """
    if self.plan is None:
      return [[] for _ in self.units]
    return [_largest(row / row.sum(), self.target_names, most) for row in self.plan]

  def explain_target(self, most: int = 3) -> list[list[tuple[str, float]]]:
    """For each class of the target the chosen units that serve it, and the fraction of its drawn mass from each.

    The mass that a class draws comes from all source units, chosen or not.

    Returns:
      One list for each class of the target, of at most `most` (unit name, fraction), largest first; empty lists without
      a plan.
    """
    if self.plan is None or self.target_mass is None:
      return [[] for _ in self.target_names]
    names = [self.name(i) for i in self.units]
    return [_largest(column / total, names, most) for column, total in zip(self.plan.T, self.target_mass)]

  def coverage(self) -> np.ndarray | None:
    """The fraction of each target class's drawn mass that comes from chosen units, `[g]`; None without a plan."""
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
      return (f'the explanation was left out: {len(self.units):,d} chosen {NOUNS[self.by]} by '
              f'{len(self.target_names):,d} of the target are too many numbers; give the target labels, or choose '
              'fewer')
    return f'{self.method} does not relate units to single classes of the target'

  def target_table(self, most: int | None = 20) -> str:
    """Each class of the target as text: how much of its mass comes from chosen units, and from which.

    Args:
      most: classes to show, the best covered first; None shows all.
    """
    return text.target_table(self, most)

  def plot(self) -> Any:
    """A `matplotlib.figure.Figure` of the ranked scores with the cut, and of the plan as a heat map.

    The rows of the heat map are the chosen units, its columns the classes of the target.
    """
    return plots.overview(self)

  def compare(self, other: 'Selection') -> 'Comparison':
    """What two selections from the same units have in common; raises ValueError if the units are not the same."""
    same = self.by == other.by and len(self.scores) == len(other.scores)
    # A loaded selection of examples has no names except those of the chosen ones.
    same = same and (not len(self.names) or not len(other.names) or list(self.names) == list(other.names))
    # Clusters are named by number; those of another clustering differ in size.
    if not same or self.by == 'cluster' and not _equal(self.counts, other.counts):
      raise ValueError(f'a selection of {len(self.scores)} {NOUNS[self.by]} cannot be compared with one of '
                       f'{len(other.scores)} {NOUNS[other.by]}: the units are not the same')
    mine, others = set(self.units.tolist()), set(other.units.tolist())
    return Comparison(self._names_of(mine & others), self._names_of(mine - others), other._names_of(others - mine))

  def _names_of(self, units: set[int]) -> tuple[str, ...]:
    """The names of some of the chosen units, best first."""
    return tuple(self.name(i) for i in self.units.tolist() if i in units)

  def export(self, path: str | os.PathLike[str], files: Sequence[str] | None = None,
             labels: Sequence[int] | None = None) -> int:
    """Writes the chosen images as a list of file names, one a line, sorted, without duplicates; whole or not at all.

    Args:
      path: the text file.
      files: the file of each row of the source. Without it, the source's ids are written, or the rows if there are no
        ids.
      labels: the class of each file; for a selection of classes whose source was given as means, so that its images are
        not known.

    Returns:
      The number of lines.

    Raises:
      ValueError: the images are not known, or the lists do not fit.
    """
    chosen = self._chosen_lines(files, labels)
    # Numbers of rows are sorted as numbers, everything else as text.
    as_text = files is not None or isinstance(next(iter(chosen), ''), str)
    lines = sorted({str(line) for line in chosen} if as_text else set(chosen))
    broken = [line for line in lines if isinstance(line, str) and ('\n' in line or '\r' in line)]
    if broken:
      raise ValueError(f'the file name {broken[0]!r} has a line break in it, so it cannot be written as one line; '
                       'rename the file')
    write_text(path, ''.join(f'{line}\n' for line in lines))
    return len(lines)

  def _chosen_lines(self, files: Sequence[str] | None, labels: Sequence[int] | None) -> list[Any]:
    """The chosen images as `export` writes them: files, ids or rows; raises ValueError if they are not known."""
    if labels is not None:
      if files is None or len(files) != len(labels) or self.by != 'class':
        raise ValueError(f'labels need a file for each ({len(labels)} labels, {0 if files is None else len(files)} '
                         f'files) and a selection of classes (this one is of {NOUNS[self.by]})')
      return [str(files[i]) for i in np.flatnonzero(np.isin(np.asarray(labels), self.units)).tolist()]
    if self.rows is None or self.examples is None:
      raise ValueError('this selection was made from means, so its images are not known; give files=[...] and '
                       'labels=[...], the file and the class of each source image')
    if files is None:
      return self.examples.tolist()
    images = self._number_of_images()
    if images is not None and len(files) != images:
      raise ValueError(f'{len(files):,d} files do not fit: expected one for each of the {images:,d} rows of the source')
    return [str(files[i]) for i in self.rows.tolist()]

  def __str__(self) -> str:
    return self.table()

  def __repr__(self) -> str:
    return f'<Selection of {text.title(self)}>'

  def _repr_html_(self) -> str:
    import html
    return f'<pre style="font-family: monospace; white-space: pre">{html.escape(self.table())}</pre>'

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes one JSON file, whole or not at all, on a disk or on object storage.

    For a large pool it holds mostly the scores, 11 bytes a row.
    """
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    if self.by == 'example':  # all file names of the pool; those of the chosen examples are saved as ids
      fields['names'] = ()
    json_file.write(path, fields)

  @classmethod
  def of_rows(cls, rows: Sequence[int] | np.ndarray, ids: Sequence[str] | np.ndarray) -> 'Selection':
    """A selection that was made elsewhere, as a list of images.

    Args:
      rows: rows of the source, `[e]`, in the order in which they are listed.
      ids: ids of all rows of the source, `[n]`.
    """
    rows, ids = np.asarray(rows, np.int64), np.asarray(ids)
    scores = np.zeros(len(ids))
    scores[rows] = 1.0
    return cls(method='given', by='example', size=float(len(rows)), seed=0, parameters={}, units=rows, scores=scores,
               measure='given', ascending=False, names=(), target_names=(), rows=rows, ids=ids[rows], row_units=rows)

  @classmethod
  def load(cls, path: str | os.PathLike[str], source_fingerprint: str = '',
           source: Embeddings | None = None) -> 'Selection':
    """Reads what `save` wrote.

    Args:
      path: the file.
      source_fingerprint: fingerprint of the data set that the selection will be used with; '' checks nothing.
      source: embeddings of the data set that it will be used with; their encoder, number of units and class names are
        checked.

    Raises:
      ValueError: a file that is missing, damaged, of another version, or made for another data set.
    """
    try:
      selection = cls(**json_file.read(path))
      selection._check()
    except (OSError, ValueError) as error:
      raise ValueError(f'{path} holds no selection that can be read ({text.one_line(error)}); select again') from error
    selection._check_source(path, source_fingerprint, source)
    return selection

  def _check(self) -> None:
    """Raises ValueError if the fields contradict each other, as in a file that was edited."""
    n, k, g = len(self.scores), len(self.units), len(self.target_names)
    images = () if self.rows is None else self.rows.shape
    shapes: dict[str, tuple[int, ...]] = {
        'names': (0,) if self.by == 'example' else (n,), 'counts': (n,), 'plan': (k, g), 'target_mass': (g,),
        'row_units': images, 'ids': images}
    values = {name: getattr(self, name) for name in shapes}
    wrong = [name for name, value in values.items() if value is not None and np.shape(value) != shapes[name]]
    valid_units = n and _within(self.units, n) and len(set(self.units.tolist())) == k
    if wrong or self.by not in NOUNS or not valid_units:
      raise ValueError(f'its parts do not fit together: {", ".join(wrong) or "units"}')
    if any(part is not None and part.size and part.min() < 0 for part in (self.counts, self.plan, self.target_mass)):
      raise ValueError('its counts, plan or target_mass have negative values')
    if self.rows is not None:
      valid_rows = _within(self.rows, self._number_of_images())
      if not valid_rows or self.row_units is None or not np.isin(self.row_units, self.units).all():
        raise ValueError('its rows are not those of the chosen units')

  def _number_of_images(self) -> int | None:
    """Images of the whole source, if they are known."""
    if self.by == 'example':
      return len(self.scores)
    return None if self.counts is None else int(self.counts.sum(dtype=np.float64))

  def _check_source(self, path: str | os.PathLike[str], fingerprint: str, source: Embeddings | None) -> None:
    made_for = self.source.get('fingerprint', '')
    if fingerprint and made_for and made_for != fingerprint:
      raise ValueError(f'{path} was made for {self.source.get("name")} (fingerprint {made_for}), not for this data '
                       f'set (fingerprint {fingerprint}); select again')
    if source is None:
      return
    if self.encoder and source.fingerprint and self.encoder != source.fingerprint:
      raise ValueError(f'{path} was made with another encoder (fingerprint {self.encoder}, not {source.fingerprint}); '
                       'select again')
    if self.by == 'class' and source.labels is None and source.class_names is None:
      raise ValueError(f'{path} was made for source classes, and this source has no labels; give its labels')
    units = source.num_classes if self.by == 'class' else len(source)
    # The number of clusters does not follow from the source.
    if self.by != 'cluster' and units != len(self.scores):
      raise ValueError(f'{path} was made for {len(self.scores)} source {NOUNS[self.by]}, and this source has {units}; '
                       'select again')
    if self.by == 'class' and source.class_names is not None and tuple(source.class_names) != tuple(self.names):
      different = next(i for i, (a, b) in enumerate(zip(source.class_names, self.names)) if a != b)
      raise ValueError(f'{path} was made for other classes: class {different} was {self.names[different]}, and is '
                       f'{source.class_names[different]} here; select again')


class Comparison(NamedTuple):
  """Names of the units that two selections share, and of those that only one of them has; each list best first."""
  shared: tuple[str, ...]
  only_first: tuple[str, ...]
  only_second: tuple[str, ...]

  @property
  def overlap(self) -> float:
    """Shared units as a fraction of the smaller selection."""
    smaller = len(self.shared) + min(len(self.only_first), len(self.only_second))
    return len(self.shared) / smaller if smaller else 1.0

  def __str__(self) -> str:
    return text.comparison(self)


def _largest(parts: np.ndarray, names: Sequence[str], most: int) -> list[tuple[str, float]]:
  return [(str(names[j]), float(parts[j])) for j in np.argsort(-parts, kind='stable')[:most] if parts[j] > 0]


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
  return a is b if a is None or b is None else np.array_equal(a, b)


def _within(numbers: np.ndarray, size: int | None) -> bool:
  """Whether all numbers are at least 0, and below `size` if it is known."""
  return not len(numbers) or 0 <= numbers.min() and (size is None or int(numbers.max()) < size)
