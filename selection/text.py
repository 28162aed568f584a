"""A selection as text: one line, tables, and the comparison of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TYPE_CHECKING

import numpy as np

from selection.ranking import best, NOUNS

if TYPE_CHECKING:  # result.py imports this file
  from selection.result import Comparison, Selection

# A terminal would interpret control characters in the name of a file.
_CONTROLS = {code: f'\\x{code:02x}' for code in (*range(32), *range(127, 160))}


def title(chosen: Selection) -> str:
  """How many units were chosen, how, and how the solver ended, in one line."""
  units = f'{chosen.method}: {len(chosen.units):,d} of {len(chosen.scores):,d} source {NOUNS[chosen.by]}'
  return ', '.join(filter(None, (units, chosen.solver_summary)))


def table(chosen: Selection, most: int | None, beyond: int) -> str:
  """See `Selection.table`."""
  if not len(chosen.units):
    return title(chosen)
  shown = len(chosen.units) if most is None else min(most, len(chosen.units))
  rows = chosen.units[:shown].tolist()
  below = best(chosen.scores, chosen.ascending, len(chosen.units) + beyond)[len(chosen.units):].tolist()
  names = {i: short(chosen.name(i)) for i in rows + below}
  width = max(len(chosen.by), *map(len, names.values()))
  why = chosen.explain(2) if chosen.plan is not None else []
  score_width = max(len(chosen.measure) + 2, 8, len(chosen.score_text(rows[0])) + 2) if chosen.has_scores else 0

  def line(rank: int, unit: int) -> str:
    cells = f'{rank + 1:5d}  {names[unit]:<{width}s}'
    if score_width:
      cells += f'{chosen.score_text(unit):>{score_width}s}'
    if chosen.counts is not None:
      cells += f'{int(chosen.counts[unit]):9,d}'
    reasons = why[rank] if rank < len(why) else []
    reason = ', '.join(f'{short(name, 40)} {fraction:.0%}' for name, fraction in reasons if fraction >= 0.005)
    return f'{cells}  {reason}'.rstrip()

  head = f'{"rank":>5s}  {chosen.by:<{width}s}'
  if score_width:
    head += f'{chosen.measure:>{score_width}s}'
  if chosen.counts is not None:
    head += f'{"images":>9s}'
  if why:
    head += '  drawn by'
  lines = [title(chosen), head] + [line(rank, unit) for rank, unit in enumerate(rows)]
  if shown < len(chosen.units):
    lines.append(f'       ... and {len(chosen.units) - shown:,d} more')
  if below and chosen.measure != 'given':
    lines.append('       ' + '-' * 8 + ' not chosen ' + '-' * 8)
    lines += [line(len(chosen.units) + k, unit) for k, unit in enumerate(below)]
  return '\n'.join(lines)


def target_table(chosen: Selection, most: int | None) -> str:
  """See `Selection.target_table`."""
  covered = chosen.coverage()
  if covered is None:
    return chosen.unexplained()
  order = np.argsort(-covered, kind='stable')
  rows = order[:most].tolist()
  names = {j: short(chosen.target_names[j]) for j in rows}
  width = max(len('target'), *map(len, names.values()))
  sources = chosen.explain_target(3)
  lines = [f'{"target":<{width}s}  covered  by']
  for j in rows:
    by = ', '.join(f'{short(name, 24)} {fraction:.1%}' for name, fraction in sources[j] if fraction >= 0.0005)
    lines.append(f'{names[j]:<{width}s}{covered[j]:9.1%}  {by}'.rstrip())
  if len(rows) < len(order):
    lines.append(f'... and {len(order) - len(rows):,d} more')
  return '\n'.join(lines)


def comparison(found: Comparison) -> str:
  """The names of the units that two selections share, and of those that only one of them has."""
  return (f'{len(found.shared):,d} shared ({found.overlap:.1%} of the smaller): {_listed(found.shared)}\n'
          f'only in the first: {_listed(found.only_first)}\nonly in the second: {_listed(found.only_second)}')


def one_line(error: Exception) -> str:
  """The text of an error without line breaks and control characters."""
  return ' '.join(str(error).split()).translate(_CONTROLS)


def short(name: Any, width: int = 32) -> str:
  """A name that fits in a column."""
  name = ' '.join(str(name).split()).translate(_CONTROLS)
  # Class names differ at the front, so the front is shown; paths differ at the end.
  end = 3 * width // 4 - 3 if '/' in name else 0
  return name if len(name) <= width else name[:width - 3 - end] + '...' + name[len(name) - end:]


def _listed(names: Sequence[str]) -> str:
  more = f', and {len(names) - 10:,d} more' if len(names) > 10 else ''
  return (', '.join(short(name) for name in names[:10]) or 'none') + more
