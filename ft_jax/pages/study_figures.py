"""The figures of a study's page: one value or curve per checkpoint, in order of pre-training."""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import numpy as np

from ft_jax.pages.page import AMBER, BLUE, GREEN, GREY, INK, RED, TEAL, VIOLET
from ft_jax.pages.study_values import (
  accuracies,
  numbers,
  PROBES,
  recommended,
  score_names,
  SCORES,
  source,
  SPECTRA,
  spread,
)
from selection import fonts

# Width and height in inches of a figure, by how many stand side by side: their text is then about as large as the
# page's.
SIZES = {2: (4.3, 2.75), 3: (3.6, 2.6), 4: (2.8, 2.2)}
# A curve of singular values has no more points than can be seen.
_POINTS = 150
# Singular values below this fraction of the largest are rounding errors, or zero, and would flatten the rest of the
# curve.
_SMALLEST = 1e-5
_TICKS = 10

Draw = Callable[[Axes], None]


def accuracy(results: Mapping[str, Any], target: Mapping[str, Any]) -> list[tuple[str, Draw]]:
  """Titles and figures: source accuracy, frozen features, fine-tuning, and frozen features on each part."""
  fe, ft, top1 = recommended(target, 'fe'), recommended(target, 'ft'), source(results, 'top1')
  drawn: list[tuple[str, Draw]] = []

  def on_source(axes: Axes) -> None:
    curve(axes, [[] if value is None else [value] for value in top1], INK, 'top-1, source')

  def frozen(axes: Axes) -> None:
    for probe, color in (('linear', BLUE), ('neighbours', VIOLET), ('nearest_mean', GREY)):
      curve(axes, accuracies(target, 'fe', probe), color, PROBES[probe], fe if probe == 'linear' else None)

  def fine_tuned(axes: Axes) -> None:
    curve(axes, accuracies(target, 'ft'), RED, 'fine-tuned', ft)

  def parts(axes: Axes) -> None:
    for probe, color, name in (('linear', BLUE, 'whole features'), ('main', TEAL, 'main part'),
                               ('residual', AMBER, 'residual')):
      curve(axes, accuracies(target, 'fe', probe), color, name, fe if probe == 'linear' else None)

  if any(value is not None for value in top1):
    drawn.append(('Source accuracy (%)', on_source))
  drawn.append(('Frozen features (FE), test accuracy (%)', frozen))
  if any(accuracies(target, 'ft')):
    drawn.append(('Fine-tuning (FT), test accuracy (%)', fine_tuned))
  drawn.append(('FE on each part of the features (%)', parts))
  return drawn


def sizes(target: Mapping[str, Any]) -> list[tuple[str, Draw]]:
  """Titles and figures: how many directions the main part has, its energy, and two ranks."""
  titles = {'main': 'Directions in the main part, k', 'energy': 'Energy of the main part (%)',
            'effective_rank': 'Effective rank', 'stable_rank': 'Stable rank'}

  def draw(key: str) -> Draw:
    def drawn(axes: Axes) -> None:
      for kind, color in zip(SPECTRA, (BLUE, GREY)):
        line(axes, numbers(target, 'spectrum', kind, key), color, kind, 100 if key == 'energy' else 1)
      if key == 'main':
        axes.yaxis.set_major_locator(MaxNLocator('auto', steps=[1, 2, 2.5, 5, 10], integer=True))
    return drawn

  return [(title, draw(key)) for key, title in titles.items()]


def changes(target: Mapping[str, Any]) -> list[tuple[str, Draw]]:
  """Titles and figures: the change of both parts between checkpoints and by fine-tuning, and the angles; maybe none."""
  titles = {'change': 'Change since the previous checkpoint (%)', 'fine_tuned': 'Change by fine-tuning (%)'}
  measured = [key for key in titles if any(numbers(target, key))]

  def draw(key: str) -> Draw:
    def drawn(axes: Axes) -> None:
      for part, color in (('main', TEAL), ('residual', AMBER)):
        line(axes, numbers(target, key, part), color, PROBES[part], 100)
      axes.set_ylim(bottom=0)
    return drawn

  def turned(axes: Axes) -> None:
    for key, color, name in (('change', BLUE, 'since the previous one'), ('fine_tuned', RED, 'by fine-tuning')):
      if key in measured:
        angles(axes, numbers(target, key, 'angles'), color, name)

  if not measured:
    return []
  return [*((titles[key], draw(key)) for key in measured), ('Angles of the main subspaces (degrees)', turned)]


def scores(target: Mapping[str, Any]) -> list[tuple[str, Draw]]:
  """Titles and figures: each transferability score."""
  def draw(name: str) -> Draw:
    return lambda axes: line(axes, numbers(target, 'scores', name), BLUE, '', best=True)

  return [(SCORES.get(name, name), draw(name)) for name in score_names(target)]


def over_checkpoints(history: Sequence[Mapping[str, Any]], title: str, draw: Draw, size: tuple[float, float]) -> Figure:
  """A figure with evenly spaced checkpoints, in order of training, along its x axis; the legend is outside of the
  axes."""
  numbered, shown, names = _ticks(history)
  # Names are written vertically and need more space.
  figure = Figure(figsize=size if numbered else (size[0], size[1] + 0.6), layout='constrained')
  axes = figure.subplots()
  draw(axes)
  axes.set_xticks(shown, names, rotation=0 if numbered else 90, fontfamily=fonts.families(names))
  axes.set_xlabel('epoch of pre-training' if numbered else 'checkpoint, in order of training', fontsize=8)
  axes.set_xlim(-0.4, len(history) - 0.6)
  axes.tick_params(labelsize=8)
  axes.ticklabel_format(axis='y', useOffset=False)
  axes.grid(axis='y', color=GREY, alpha=0.25, linewidth=0.6)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  figure.suptitle(title, fontsize=9, x=0.01, ha='left')
  handles, labels = axes.get_legend_handles_labels()
  if handles:
    figure.legend(handles, labels, loc='outside lower left', ncols=len(handles), frameon=False, fontsize=7.5,
                  columnspacing=1.2, handlelength=1.6)
  return figure


def curve(axes: Axes, values: Sequence[Sequence[float]], color: str, name: str, star: int | None = None) -> None:
  """Means in percent with a band of one standard error over the seeds, and a star at one checkpoint.

  Args:
    axes: where it is drawn.
    values: fractions by checkpoint and seed; an empty entry leaves a gap.
    color: of the curve.
    name: in the legend.
    star: index of the checkpoint.
  """
  spreads = [spread(by_seed) for by_seed in values]
  means = np.array([np.nan if s.mean is None else 100 * s.mean for s in spreads])
  errors = np.array([100 * (s.standard_error or 0.0) for s in spreads])
  x = np.arange(len(means))
  if errors.any():
    axes.fill_between(x, means - errors, means + errors, color=color, alpha=0.22, linewidth=0)
    # Next to a gap, and for a single checkpoint, a band has no width.
    axes.errorbar(x, means, yerr=errors, fmt='none', ecolor=color, elinewidth=0.9, alpha=0.6)
  axes.plot(x, means, color=color, marker='o', markersize=3, linewidth=1.4, label=name or None)
  if star is not None and np.isfinite(means[star]):
    axes.plot(star, means[star], marker='*', markersize=13, color=GREEN, markeredgecolor='white', linestyle='none',
              zorder=5)


def line(axes: Axes, values: Sequence[float | None], color: str, name: str, scale: float = 1,
         best: bool = False) -> None:
  """One value per checkpoint, times `scale`, with gaps where it is None; a ring around the highest if `best`."""
  heights = np.array([np.nan if value is None else scale * value for value in values])
  axes.plot(heights, color=color, marker='o', markersize=3, linewidth=1.4, label=name or None)
  if best and np.isfinite(heights).any():
    top = int(np.nanargmax(heights))
    axes.plot(top, heights[top], marker='o', markersize=9, markerfacecolor='none', markeredgecolor=color,
              linestyle='none')


def angles(axes: Axes, values: Sequence[Sequence[float] | None], color: str, name: str) -> None:
  """The median of the angles of each checkpoint, in degrees, and the range from the smallest to the largest."""
  low, middle, high = np.array([np.quantile(of, (0, 0.5, 1)) if of else [np.nan] * 3 for of in values]).T
  x = np.arange(len(values))
  axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
  axes.plot(x, middle, color=color, marker='o', markersize=3, linewidth=1.4, label=name)
  axes.set(ylim=(0, 92), yticks=(0, 30, 60, 90))


def singular_values(results: Mapping[str, Any], target: Mapping[str, Any], kind: str) -> Figure:
  """The singular values of each checkpoint's features, a dot where the main part ends; later checkpoints are lighter.

  Args:
    results: of the study.
    target: an entry of its `targets`.
    kind: one of SPECTRA.
  """
  history = results['history']
  # Only the part of the colour map that stands out from white.
  colors = ListedColormap(colormaps['viridis'](np.linspace(0, 0.92, len(history))).tolist())
  figure = Figure(figsize=SIZES[2], layout='constrained')
  axes = figure.subplots()
  dot_size = 5 if len(history) <= 10 else 4
  for k, spectrum in enumerate(numbers(target, 'spectrum', kind)):
    values = np.asarray(spectrum['values'] if spectrum else [])
    if not values.any():
      continue
    shown = np.unique(np.geomspace(1, len(values), _POINTS).round().astype(int))
    shown = shown[values[shown - 1] > values[0] * _SMALLEST]
    axes.plot(shown, values[shown - 1], color=colors(k), linewidth=1.3)
    axes.plot(spectrum['main'], values[spectrum['main'] - 1], 'o', color=colors(k), markersize=dot_size,
              markeredgecolor='white', markeredgewidth=0.7, zorder=3)
  if axes.lines:
    axes.set(xscale='log', yscale='log')
    axes.xaxis.set_major_formatter('{x:g}')
  axes.set_xlabel('number of the direction', fontsize=8)
  axes.tick_params(labelsize=8)
  axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
  axes.spines[['top', 'right']].set_visible(False)
  figure.suptitle(f'Singular values, {kind} features', fontsize=9, x=0.01, ha='left')
  bar = figure.colorbar(ScalarMappable(BoundaryNorm(np.arange(len(history) + 1) - 0.5, len(history)), colors), ax=axes)
  numbered, ticks, names = _ticks(history)
  bar.set_ticks(list(ticks), labels=names, fontfamily=fonts.families(names))
  bar.ax.tick_params(labelsize=8, length=0)
  bar.minorticks_off()
  bar.outline.set_visible(False)
  bar.set_label('epoch' if numbered else 'checkpoint', fontsize=8)
  return figure


def _ticks(history: Sequence[Mapping[str, Any]]) -> tuple[bool, Sequence[int], list[str]]:
  """Whether all checkpoints have an epoch, which checkpoints have a tick (always the last), and the labels of the
  ticks."""
  numbered = all(checkpoint['epoch'] is not None for checkpoint in history)
  shown = range(len(history) - 1, -1, -math.ceil(len(history) / _TICKS))
  if numbered:
    names = [f'{checkpoint["epoch"]:g}' for checkpoint in history]
  else:
    names = list(fonts.labels([checkpoint['name'] for checkpoint in history], 12))
  return numbered, shown, [names[k] for k in shown]
