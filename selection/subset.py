"""Selection: which units were chosen, how, and why; as a table, as a file."""

import dataclasses
import json
import os
import pathlib
import textwrap
from typing import Any

import numpy as np

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Selection:
  """What `select` chose.

  Attributes:
    method, by, size, seed, parameters: how it was chosen; parameters hold every one of the strategy, defaults included.
    shares: float `[n]`, the importance of each source unit in the order of the units; sum 1.
    classes: ids of the chosen classes, best first.
    names: of all source units.
    target_names: of the m target units.
    converged: whether the solver met its threshold (`select` gives nothing otherwise); True where there was none.
    counts: images of each source unit, or None.
    plan: `[chosen, m]`, the mass that goes from each chosen unit to each target unit; None for strategies without one.
    solver: how the solver ended: iterations, error; {} where there was none.
    encoder: fingerprint of the encoder.
    source: name and fingerprint of the source data set; {} where it is not known.
  """
  method: str
  by: str
  size: int
  seed: int
  parameters: dict[str, Any]
  shares: np.ndarray
  classes: tuple[int, ...]
  names: tuple[str, ...]
  target_names: tuple[str, ...]
  converged: bool = True
  counts: tuple[int, ...] | None = None
  plan: np.ndarray | None = None
  solver: dict[str, Any] = dataclasses.field(default_factory=dict)
  encoder: str = ''
  source: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def class_names(self) -> tuple[str, ...]:
    """Names of the chosen classes, best first."""
    return tuple(self.names[i] for i in self.classes)

  def ranking(self) -> np.ndarray:
    """All units, best first: int `[n]`."""
    return np.argsort(-self.shares, kind='stable')

  def explain(self, most: int = 3) -> list[list[tuple[str, float]]]:
    """For each chosen unit the target units that draw it, and which part of its transported mass goes to each.

    Returns:
      One list a chosen unit, of at most `most` (target name, part from 0 to 1), largest first; empty lists without a plan.
    """
    if self.plan is None:
      return [[] for _ in self.classes]
    parts = self.plan / self.plan.sum(1, keepdims=True)
    return [[(self.target_names[j], float(row[j])) for j in np.argsort(-row, kind='stable')[:most]] for row in parts]

  def table(self, most: int | None = 20, beyond: int = 3) -> str:
    """The chosen units as text, best first, with the first few that were not chosen.

    Args:
      most: chosen units to show; None shows all.
      beyond: units to show below the cut.
    """
    title = f'{self.method}: {len(self.classes)} of {len(self.shares)} source classes'
    if not self.classes:
      return title
    if self.solver:
      title += f', converged in {self.solver["iterations"]} iterations'
    shown = len(self.classes) if most is None else min(most, len(self.classes))
    rows = self.ranking()[:shown].tolist()
    below = self.ranking()[len(self.classes):len(self.classes) + beyond].tolist()
    names = {i: textwrap.shorten(self.names[i], 32, placeholder='...') for i in rows + below}
    width = max(len('class'), *map(len, names.values()))
    with_shares = self.plan is not None
    drawn = self.explain(2)

    def line(rank: int, unit: int) -> str:
      share = f'{self.shares[unit]:8.2%}' if with_shares else ''
      count = f'{self.counts[unit]:9,d}' if self.counts is not None else ''
      why = ', '.join(f'{name} {part:.0%}' for name, part in drawn[rank]) if rank < len(drawn) else ''
      return f'{rank + 1:5d}  {names[unit]:<{width}s}{share}{count}  {why}'.rstrip()

    head = (f'{"rank":>5s}  {"class":<{width}s}{"share":>8s}' if with_shares else f'{"rank":>5s}  {"class":<{width}s}')
    head += (f'{"images":>9s}' if self.counts is not None else '') + ('  drawn by' if with_shares else '')
    lines = [title, head] + [line(rank, unit) for rank, unit in enumerate(rows)]
    if shown < len(self.classes):
      lines.append(f'       ... and {len(self.classes) - shown} more')
    if below:
      lines.append('       ' + '-' * 8 + ' not chosen ' + '-' * 8)
      lines += [line(len(self.classes) + k, unit) for k, unit in enumerate(below)]
    return '\n'.join(lines)

  def __str__(self) -> str:
    return self.table()

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes one JSON file, whole or not at all."""
    path = pathlib.Path(path)
    document = {'format_version': FORMAT_VERSION, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}
    document['shares'] = self.shares.tolist()
    document['plan'] = None if self.plan is None else [[float(f'{mass:.7g}') for mass in row] for row in self.plan]
    # A line a field: readable, and small where lists are long.
    # Numpy's numbers are written as what they are.
    lines = (f'{json.dumps(key)}: {json.dumps(value, default=lambda number: number.item())}' for key, value in document.items())
    text = '{\n' + ',\n'.join(lines) + '\n}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
      temporary.write_text(text, encoding='utf-8')
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)

  @classmethod
  def load(cls, path: str | os.PathLike[str], source_fingerprint: str = '') -> 'Selection':
    """Reads what `save` wrote.

    Args:
      path: the file.
      source_fingerprint: of the data set that it is to be used with; '' checks nothing.

    Raises:
      ValueError: no such file, a damaged one, one of another version, or one made for another data set.
    """
    try:
      document = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
      version = document.pop('format_version')
      if version != FORMAT_VERSION:
        raise ValueError(f'it has format version {version}; this program reads {FORMAT_VERSION}')
      tuples = {key: tuple(document[key]) for key in ('classes', 'names', 'target_names')}
      arrays = {'shares': np.asarray(document['shares'], np.float64),
                'plan': None if document['plan'] is None else np.asarray(document['plan'], np.float32),
                'counts': None if document['counts'] is None else tuple(document['counts'])}
      selection = cls(**{**document, **tuples, **arrays})
    except (OSError, KeyError, TypeError, ValueError) as error:
      raise ValueError(f'{path} holds no selection that can be read ({error}); select again') from error
    made_for = selection.source.get('fingerprint', '')
    if source_fingerprint and made_for and made_for != source_fingerprint:
      raise ValueError(f'{path} was made for {selection.source.get("name")} (fingerprint {made_for}), not for this data set '
                       f'(fingerprint {source_fingerprint}); select again')
    return selection
