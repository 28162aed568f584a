"""Plots of a selection; matplotlib is imported only when something is drawn."""

from __future__ import annotations

from typing import Any, TYPE_CHECKING

import numpy as np

from selection import fonts
from selection.ranking import best, NOUNS

if TYPE_CHECKING:  # result.py imports this file
  from selection.result import Selection

CHOSEN, OTHER, CUT = '#2563eb', '#cbd5e1', '#dc2626'
# Most characters of a tick label.
_LONGEST = 24


def ranking(selection: Selection, most: int = 60) -> Any:
  """A `matplotlib.figure.Figure`: the scores of the units in order, the chosen ones in colour, and the cut.

  Up to `most` units are drawn as bars with names, more as a curve.
  """
  figure = _figure(9, 3.6)
  _draw_ranking(figure.subplots(), selection, most)
  return figure


def heat_map(selection: Selection, most: int = 30) -> Any:
  """A `matplotlib.figure.Figure`: the plan from chosen units to target classes, as fractions of each unit's mass.

  Args:
    selection: a selection with a plan.
    most: how many units to show, the best first, and how many target classes, those that receive most from these units.

  Raises:
    ValueError: the selection has no plan.
  """
  if selection.plan is None or not len(selection.units):
    raise ValueError(f'there is no plan to draw: {selection.unexplained()}')
  rows, columns = _shown(selection.plan, most)
  figure = _figure(*_heat_map_size(rows, columns))
  _draw_heat_map(figure, figure.subplots(), selection, selection.plan, rows, columns)
  return figure


def overview(selection: Selection, most: int = 30) -> Any:
  """The ranking above the heat map; the ranking alone if there is no plan."""
  if selection.plan is None or not len(selection.units):
    return ranking(selection)
  rows, columns = _shown(selection.plan, most)
  width, height = _heat_map_size(rows, columns)
  figure = _figure(max(9, width), 3.6 + height)
  above, below = figure.subplots(2, height_ratios=(3.6, height))
  _draw_ranking(above, selection, 60)
  _draw_heat_map(figure, below, selection, selection.plan, rows, columns)
  return figure


def _figure(width: float, height: float) -> Any:
  from matplotlib.figure import Figure

  class Shown(Figure):
    """A figure that a notebook displays, whether or not pyplot is imported."""

    def _repr_png_(self) -> bytes:
      import io
      stream = io.BytesIO()
      self.savefig(stream, format='png', dpi=100)
      return stream.getvalue()

  return Shown(figsize=(width, height), layout='constrained')


def _draw_ranking(axes: Any, selection: Selection, most: int) -> None:
  chosen, n = len(selection.units), len(selection.scores)
  percent = selection.measure == 'share'
  scores = np.sort(selection.scores) if selection.ascending else -np.sort(-selection.scores)
  scores = scores * (100 if percent else 1)
  if n <= most:
    axes.bar(range(n), scores, color=[CHOSEN if i < chosen else OTHER for i in range(n)])
    names = fonts.labels(map(selection.name, selection.ranking()), _LONGEST)
    axes.set_xticks(range(n), names, rotation=60, ha='right', rotation_mode='anchor', fontsize=8,
                    fontfamily=fonts.families(names))
  else:
    # A thousand points look the same as a million.
    ends = [n - 1] + ([chosen - 1] if chosen else [])
    points = np.unique(np.concatenate([np.linspace(0, end, 1000) for end in ends]).astype(int))
    axes.fill_between(points + 1, scores[points], color=OTHER, linewidth=0)
    inside = points[points < chosen]
    axes.fill_between(inside + 1, scores[inside], color=CHOSEN, linewidth=0)
    axes.set_xlabel(f'source {NOUNS[selection.by]}, by rank')
    axes.xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
  if 0 < chosen < n:
    at = chosen - 0.5 if n <= most else chosen + 0.5
    axes.axvline(at, color=CUT, linewidth=1)
    axes.annotate(f' cut after {chosen:,d}', (at, 1), xycoords=('data', 'axes fraction'), color=CUT, fontsize=9,
                  va='top', ha='left' if at < 0.8 * n else 'right')
  axes.set_ylabel('share of transported mass, %' if percent else selection.measure)
  if percent:
    axes.set_ylim(0, 1.12 * scores[:1].max(initial=0) or 1)  # room for the label of the cut
  axes.margins(x=0.01)
  axes.spines[['top', 'right']].set_visible(False)


def _shown(plan: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows and columns of the plan to draw; columns sorted by the row with most of their mass, so that blocks show."""
  plan = plan[:most]
  columns = best(plan.sum(0), False, most)
  return np.arange(len(plan)), columns[np.argsort(np.argmax(plan[:, columns], 0), kind='stable')]


def _heat_map_size(rows: np.ndarray, columns: np.ndarray) -> tuple[float, float]:
  return max(5.0, 3.2 + 0.26 * len(columns)), max(2.4, 1.6 + 0.22 * len(rows))


def _draw_heat_map(figure: Any, axes: Any, selection: Selection, plan: np.ndarray, rows: np.ndarray,
                   columns: np.ndarray) -> None:
  fractions = plan / plan.sum(1, keepdims=True)
  image = axes.imshow(100 * fractions[np.ix_(rows, columns)], cmap='Blues', aspect='auto', vmin=0)
  below = fonts.labels((selection.target_names[j] for j in columns), _LONGEST)
  beside = fonts.labels((selection.name(selection.units[i]) for i in rows), _LONGEST)
  axes.set_xticks(range(len(columns)), below, rotation=60, ha='right', rotation_mode='anchor', fontsize=8,
                  fontfamily=fonts.families(below))
  axes.set_yticks(range(len(rows)), beside, fontsize=8, fontfamily=fonts.families(beside))
  shown = lambda some, all_, what: f'{some} of {all_:,d} {what}' if some < all_ else f'{all_:,d} {what}'
  noun = NOUNS[selection.by] if len(selection.units) > 1 else selection.by
  axes.set_title('where the mass of each goes: ' + shown(len(rows), len(selection.units), f'chosen {noun}') + ', '
                 + shown(len(columns), len(selection.target_names), 'of the target'), fontsize=9, loc='left')
  figure.colorbar(image, ax=axes, label=f'% of what the {selection.by} gives', shrink=0.9, pad=0.01)
