"""Pictures of a comparison: accuracies by seed, differences with intervals, curves along a field, and the training."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import matplotlib.lines
import numpy as np

from ft_jax.pages.comparison_table import HEADS, is_significant, kinds_of, METRICS
from ft_jax.pages.page import AMBER, BLUE, GREEN, GREY, INK, RED, TEAL, VIOLET
from selection import fonts

# Of lines that stand for variants, in turn; after these they are dashed.
COLORS = (BLUE, RED, GREEN, AMBER, VIOLET, TEAL, INK, GREY)
_OF_COMPARISONS = {'baseline': AMBER, 'equal_compute': BLUE, 'random': GREEN}
# Inches: the width of a page, and the height of a variant.
_WIDTH, _ROW = 10.6, 0.42
# Characters of a name.
_NAME = 34


class Point(NamedTuple):
  """A point of a curve: the value of the field, and the mean accuracy with its interval."""
  value: Any
  mean: float
  interval: Sequence[float]


class Curve(NamedTuple):
  """Variants that differ in the field of the axis alone; one whose field means nothing to it has a single point, with
  the value None.
  """
  name: str
  points: Sequence[Point]


class History(NamedTuple):
  """How a variant trained: accuracies on training batches and on val by step, means over the seeds."""
  name: str
  train: Sequence[tuple[float, float]]
  val: Sequence[tuple[float, float]]


def forest(comparison: Mapping[str, Any]) -> Figure:
  """Left the accuracy of each seed, right the differences; a variant a line, the first one on top."""
  variants = comparison['variants']
  figure = Figure(figsize=(_WIDTH, 1.3 + _ROW * len(variants)), layout='constrained')
  left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.25))
  for row, variant in enumerate(variants):
    if row % 2 == 0:
      for axes in (left, right):
        axes.axhspan(row - 0.5, row + 0.5, color='#f8fafc', zorder=0)
    _draw_seeds(left, row, variant, comparison['metric'])
    _draw_differences(right, row, variant['summary']['differences'], kinds_of(comparison))
  accuracies = [variant['summary'][comparison['metric']] for variant in variants]
  left.set_xlim(*_limits([accuracy for accuracy in accuracies if accuracy is not None]))
  right.set_xlim(*_limits([difference for variant in variants
                           for difference in variant['summary']['differences'].values()], 0.0))
  names = fonts.labels((variant['name'] for variant in variants), _NAME)
  left.set_yticks(range(len(variants)), names, fontsize=9, fontfamily=fonts.families(names))
  left.set_ylim(len(variants) - 0.5, -0.5)
  left.set_title(f'{METRICS[comparison["metric"]]} on {comparison["split"]}, %', fontsize=10)
  right.set_title('difference in points, with 95 % intervals', fontsize=10)
  right.axvline(0, color=INK, linewidth=0.8)
  right.tick_params(left=False)
  for axes in (left, right):
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis='x', color='#e2e8f0', linewidth=0.6)
    axes.set_axisbelow(True)
  figure.legend(handles=_forest_legend(kinds_of(comparison)), loc='outside lower center', ncols=6, frameon=False,
                fontsize=8)
  return figure


def _draw_seeds(axes: Axes, row: int, variant: Mapping[str, Any], metric: str) -> None:
  values = [100 * cell[metric] for cell in variant['cells'] if cell.get(metric) is not None and not cell.get('error')]
  axes.plot(values, [row] * len(values), 'o', color=BLUE, alpha=0.5, markersize=5, markeredgewidth=0, zorder=3)
  if (accuracy := variant['summary'][metric]) is not None:
    axes.plot([100 * bound for bound in accuracy['interval']], [row, row], color=INK, linewidth=1)
    axes.plot(100 * accuracy['mean'], row, marker='|', color=INK, markersize=13, markeredgewidth=2)


def _draw_differences(axes: Axes, row: int, differences: Mapping[str, Mapping[str, Any]], kinds: Sequence[str]) -> None:
  for k, kind in enumerate(kinds):
    if kind not in differences:
      continue
    difference, color = differences[kind], _OF_COMPARISONS[kind]
    y = row + 0.22 * (k - (len(kinds) - 1) / 2)
    axes.plot([100 * bound for bound in difference['interval']], [y, y], color=color, linewidth=1.6)
    axes.plot(100 * difference['mean'], y, 'o', color=color, markersize=5,
              markerfacecolor=color if is_significant(difference) else 'white')


def _forest_legend(kinds: Sequence[str]) -> list[matplotlib.lines.Line2D]:
  line = matplotlib.lines.Line2D
  of_kinds = [line([], [], color=_OF_COMPARISONS[kind], marker='o', markersize=5, label=f'from {_FROM[kind]}')
              for kind in kinds]
  return [line([], [], color=BLUE, marker='o', alpha=0.5, linestyle='', markersize=5, label='one seed'),
          line([], [], color=INK, marker='|', markersize=9, label='mean, 95 % interval'), *of_kinds,
          line([], [], color=GREY, marker='o', markersize=5, markerfacecolor='white', linestyle='',
               label='not significant')]


_FROM = {'baseline': f'plain at {HEADS["baseline"]}', 'equal_compute': f'plain at {HEADS["equal_compute"]}',
         'random': HEADS['random']}


def curves(axis: str, drawn: Sequence[Curve], metric: str) -> Figure:
  """Accuracy against the values of a field; a curve of one point without a value is a line from side to side."""
  values = sorted({point.value for curve in drawn for point in curve.points if point.value is not None}, key=_order)
  numeric = all(isinstance(value, (int, float)) for value in values)
  at = {value: float(value) if numeric else float(k) for k, value in enumerate(values)}
  figure = Figure(figsize=(8.4, 3.8), layout='constrained')
  axes = figure.subplots()
  names = fonts.labels((curve.name for curve in drawn), _NAME)
  for k, (name, curve) in enumerate(zip(names, drawn)):
    color, style = COLORS[k % len(COLORS)], '-' if k < len(COLORS) else '--'
    if [point.value for point in curve.points] == [None]:
      [point] = curve.points
      axes.axhline(100 * point.mean, color=color, linewidth=1.2, linestyle=':', label=name)
      continue
    points = sorted((point for point in curve.points if point.value is not None), key=lambda point: at[point.value])
    middle = np.array([100 * point.mean for point in points])
    reach = np.abs(100 * np.array([point.interval for point in points]).T - middle)
    axes.errorbar([at[point.value] for point in points], middle, reach, color=color, linestyle=style, marker='o',
                  markersize=4, linewidth=1.4, elinewidth=1, capsize=2, label=name)
  if numeric and values and values[0] > 0 and values[-1] >= 8 * values[0]:
    axes.set_xscale('log')
    axes.minorticks_off()
  axes.set_ylim(*_limits([point._asdict() for curve in drawn for point in curve.points]))
  labels = fonts.labels((f'{value:g}' if isinstance(value, float) else str(value) for value in values), 20)
  axes.set_xticks([at[value] for value in values], labels, fontfamily=fonts.families(labels))
  axes.set(xlabel=f'config.{axis}', ylabel=f'{METRICS[metric]}, %')
  axes.spines[['top', 'right']].set_visible(False)
  figure.legend(loc='outside right upper', frameon=False, fontsize=8, prop={'family': fonts.families(names), 'size': 8})
  return figure


def training(histories: Sequence[History]) -> Figure:
  """Accuracy on training batches and on val over the steps, means over the seeds."""
  figure = Figure(figsize=(_WIDTH, 3.6 + 0.16 * max(0, len(histories) - 9)), layout='constrained')
  train, val = figure.subplots(1, 2, sharey=True)
  names = fonts.labels((history.name for history in histories), _NAME)
  for k, (name, history) in enumerate(zip(names, histories)):
    color, style = COLORS[k % len(COLORS)], '-' if k < len(COLORS) else '--'
    for axes, points, marker in ((train, history.train, ''), (val, history.val, 'o')):
      if points:
        steps, values = zip(*points)
        axes.plot(steps, [100 * value for value in values], color=color, linestyle=style, linewidth=1.2,
                  marker=marker, markersize=2.5, label=name)
  train.set(title='top-1 on target training batches, %', xlabel='step')
  val.set(title='top-1 on val, %', xlabel='step')
  for axes in (train, val):
    axes.title.set_fontsize(10)
    axes.spines[['top', 'right']].set_visible(False)
    axes.set_ylim(0, 102)
    axes.grid(axis='y', color='#e2e8f0', linewidth=0.6)
  handles, labels = max((axes.get_legend_handles_labels() for axes in (train, val)), key=lambda found: len(found[0]))
  figure.legend(handles, labels, loc='outside right upper', frameon=False,
                prop={'family': fonts.families(names), 'size': 8})
  return figure


def _limits(shown: Sequence[Mapping[str, Any]], *included: float) -> tuple[float, float]:
  """The ends of an axis in per cent for means with intervals; intervals that are much wider than most reach over it.

  Of two seeds, as a comparison that is not finished may have, an interval is so wide that nothing else could be seen.

  Args:
    shown: `mean` and `interval` of each.
    *included: further values that must lie on it.
  """
  if not shown:
    return 0.0, 1.0
  means = np.array([each['mean'] for each in shown])
  widths = np.array([(each['interval'][1] - each['interval'][0]) / 2 for each in shown])
  widths = np.minimum(widths, 3 * np.median(widths))
  low, high = min(*(means - widths), *included, means[0]), max(*(means + widths), *included, means[0])
  room = 0.05 * (high - low) or 0.01
  return 100 * (low - room), 100 * (high + room)


def _order(value: Any) -> tuple[int, float, str]:
  return (0, float(value), '') if isinstance(value, (int, float)) else (1, 0.0, str(value))
