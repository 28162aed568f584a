"""The page and the table of job study: which checkpoint to start from, how sure that is, and what was measured of each checkpoint."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
from typing import Any, NamedTuple

from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from ft_jax import parallel
from ft_jax.names import cell, csv_line
from ft_jax.pages import report
from ft_jax.pages.report import BLUE, GREEN, GREY, RED
from ft_jax.studies.stability import estimate
from ft_jax.workdir import write_text
from selection import fonts

VIOLET, TEAL, AMBER, INK = '#7c3aed', '#0891b2', '#d97706', '#0f172a'
METRICS = {'top1': 'top-1 accuracy', 'mean_per_class': 'mean per-class accuracy'}
PROBES = {'linear': 'logistic regression', 'nearest_mean': 'nearest class mean', 'neighbours': 'k-NN', 'main': 'main part',
          'residual': 'residual'}
WAYS = {'fe': 'Frozen features, logistic regression (FE)', 'ft': 'Fine-tuning of all weights (FT)'}
SCORES = {'h_score': 'H-score', 'h_score_regularised': 'H-score, regularised', 'leep': 'LEEP', 'nce': 'NCE', 'logme': 'LogME',
          'transrate': 'TransRate'}
SPECTRA = ('centred', 'plain')
SIZES = ('main', 'share', 'energy', 'effective_rank', 'stable_rank')

# Sides in inches of a picture, by how many stand side by side: the text in them is then as large as the page's, or a little smaller.
_SIZES = {2: (4.3, 2.75), 3: (3.6, 2.6), 4: (2.8, 2.2)}
# A curve of singular values has no more points than can be seen.
_POINTS = 150
# Smaller ones (parts of the largest) are noise of the arithmetic, or zero, and would flatten the rest of the curve.
_SMALLEST = 1e-5
_TICKS = 10

Row = Mapping[str, Any]
Draw = Callable[[Axes], None]


class Spread(NamedTuple):
  """Mean over the seeds and its standard error; None of what is not measured."""
  mean: float | None
  standard_error: float | None


class Panels(NamedTuple):
  """Pictures that stand side by side, as SVG text."""
  columns: int
  pictures: Sequence[str]


class Table(NamedTuple):
  """Names of the columns, and of each checkpoint its name, its cells and what it is recommended for ('FE', 'FT')."""
  title: str
  columns: Sequence[str]
  rows: Sequence[tuple[str, Sequence[str], Sequence[str]]]


def write(path: epath.Path, results: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
  """Writes the page of a study.

  Args:
    path: the file that is written.
    results: what study.json holds.
    settings: the config of the study, nested as it is.
  """
  if not parallel.is_main():
    return
  targets = [{'name': target['name'], 'target': target, 'answers': [answer(results, target, way) for way in WAYS],
              'accuracy': _accuracy(results, target), 'spectra': _spectra(results, target), 'sizes': _sizes(results, target),
              'changes': _changes(results, target), 'scores': _scores(results, target),
              'correlations': _correlations(target), 'tables': _tables(results, target)} for target in results['targets']]
  page = report.template('study.html.jinja').render(
      title='Which checkpoint to start from', results=results, metric=METRICS[results['metric']], targets=targets,
      settings=report.setting_rows(settings))
  write_text(path, page)


def table(results: Mapping[str, Any]) -> str:
  """CSV text, one row a target and checkpoint; what was not measured is empty.

  Accuracies are means over the seeds, with their standard errors, of val and test, from 0 to 1; the angles are in degrees.
  """
  rows = [_record(results, target, k) for target in results['targets'] for k in range(len(results['history']))]
  lines = [csv_line(row) for row in rows[:1]]
  lines += [csv_line(f'{value:.9g}' if isinstance(value, float) else '' if value is None else value for value in row.values())
            for row in rows]
  return ''.join(lines)


def spread(values: Sequence[float] | None) -> Spread:
  """Mean and standard error of the mean of some seeds."""
  return Spread(*estimate(values)) if values else Spread(None, None)


def answer(results: Mapping[str, Any], target: Mapping[str, Any], way: str) -> dict[str, Any]:
  """What the page says first of a target and one way to use a checkpoint ('fe', 'ft').

  Returns:
    way, done (how many checkpoints have values), name (None without a recommendation); with one also sentence, verdict ('clear', 'none',
    'against'), said (the verdict in words), accuracy on test, second (the best other with the margin over it, where that is not what the
    sentence is about), marks [(checkpoint, 'best' | 'similar' | 'other' | 'missing')].
  """
  names = [checkpoint['name'] for checkpoint in results['history']]
  values = _values(target, way)
  found: dict[str, Any] = {'way': WAYS[way], 'done': sum(map(bool, values)), 'name': None}
  choice = target['recommended'][way]
  if choice is None:
    return found
  best, last, other = choice['row'], choice['last'], choice['best_other']
  margin = last or other
  verdict = 'none' if not choice['difference'] else 'clear' if margin['margin'] > 0 else 'against'
  said = {'clear': f'better than {"the last" if last or margin is None else names[margin["row"]]}', 'against': 'val and test do not agree',
          'none': 'no difference to be seen'}[verdict]
  # What the sentence is not about.
  second = other if last and other and other['row'] != last['row'] else None
  marks = ['best' if k == best else 'missing' if not value else 'similar' if k in choice['similar'] else 'other'
           for k, value in enumerate(values)]
  return found | {'name': names[best], 'sentence': choice['sentence'], 'verdict': verdict,
                  'said': said if margin else 'nothing to compare with', 'accuracy': report.spoken(values[best]) if values[best] else '',
                  'second': (names[second['row']], _points(second)) if second else None, 'marks': list(zip(names, marks))}


# What is read from the results: a list with an entry for each checkpoint.


def _values(target: Mapping[str, Any], way: str, probe: str = 'linear', split: str = 'test') -> list[Sequence[float]]:
  """Accuracies of each checkpoint by seed; empty where there are none (yet)."""
  if way == 'ft':
    return [(row.get('ft') or {}).get(split) or [] for row in target['rows']]
  return [((row.get('fe') or {}).get(probe) or {}).get(split) or [] for row in target['rows']]


def _numbers(target: Mapping[str, Any], *keys: str) -> list[Any]:
  """What is found in each row by following `keys`; None where any is missing."""
  found = []
  for row in target['rows']:
    for key in keys:
      row = (row or {}).get(key)
    found.append(row)
  return found


def _source(results: Mapping[str, Any], key: str) -> list[float | None]:
  return [(checkpoint['source'] or {}).get(key) for checkpoint in results['history']]


def _recommended(target: Mapping[str, Any], way: str) -> int | None:
  choice = target['recommended'][way]
  return None if choice is None else choice['row']


def _points(of: Mapping[str, Any]) -> str:
  """A margin in percentage points, with its standard error."""
  error = of['standard_error']
  return f'{100 * of["margin"]:+.1f}' + (f' ± {100 * error:.1f}' if error is not None else '') + ' points'


# The pictures.


def _accuracy(results: Mapping[str, Any], target: Mapping[str, Any]) -> Panels:
  """Source accuracy, that of frozen features and of fine-tuning, and that of both parts of the features."""
  fe, ft, source = _recommended(target, 'fe'), _recommended(target, 'ft'), _source(results, 'top1')
  wanted: list[tuple[str, Draw]] = []
  if any(value is not None for value in source):
    wanted.append(('Source accuracy (%)', lambda axes: curve(axes, [[] if v is None else [v] for v in source], INK, 'top-1, source')))

  def frozen(axes: Axes) -> None:
    for probe, color in (('linear', BLUE), ('neighbours', VIOLET), ('nearest_mean', GREY)):
      curve(axes, _values(target, 'fe', probe), color, PROBES[probe], fe if probe == 'linear' else None)

  def parts(axes: Axes) -> None:
    for probe, color, name in (('linear', BLUE, 'whole features'), ('main', TEAL, 'main part'), ('residual', AMBER, 'residual')):
      curve(axes, _values(target, 'fe', probe), color, name, fe if probe == 'linear' else None)

  wanted.append(('Frozen features (FE), test accuracy (%)', frozen))
  if any(_values(target, 'ft')):
    wanted.append(('Fine-tuning (FT), test accuracy (%)', lambda axes: curve(axes, _values(target, 'ft'), RED, 'fine-tuned', ft)))
  wanted.append(('FE on each part of the features (%)', parts))
  return _panels(results, wanted, 3 if len(wanted) == 3 else 2)


def _spectra(results: Mapping[str, Any], target: Mapping[str, Any]) -> Panels:
  return Panels(2, [report.svg(singular_values(results, target, kind)) for kind in SPECTRA])


def _sizes(results: Mapping[str, Any], target: Mapping[str, Any]) -> Panels:
  titles = {'main': 'Directions in the main part, k', 'energy': 'Energy of the main part (%)', 'effective_rank': 'Effective rank',
            'stable_rank': 'Stable rank'}

  def draw(key: str) -> Draw:
    def drawn(axes: Axes) -> None:
      for kind, color in zip(SPECTRA, (BLUE, GREY)):
        line(axes, _numbers(target, 'spectrum', kind, key), color, kind, 100 if key == 'energy' else 1)
      if key == 'main':
        axes.yaxis.get_major_locator().set_params(integer=True)
    return drawn

  return _panels(results, [(title, draw(key)) for key, title in titles.items()], 4)


def _changes(results: Mapping[str, Any], target: Mapping[str, Any]) -> Panels | None:
  """How far both parts move from checkpoint to checkpoint and by fine-tuning, and the angles between the main subspaces."""
  titles = {'change': 'Change since the checkpoint before (%)', 'fine_tuned': 'Change by fine-tuning (%)'}
  there = [key for key in titles if any(_numbers(target, key))]

  def draw(key: str) -> Draw:
    def drawn(axes: Axes) -> None:
      for part, color in (('main', TEAL), ('residual', AMBER)):
        line(axes, _numbers(target, key, part), color, PROBES[part], 100)
      axes.set_ylim(bottom=0)
    return drawn

  def turned(axes: Axes) -> None:
    for key, color, name in (('change', BLUE, 'since the one before'), ('fine_tuned', RED, 'by fine-tuning')):
      if key in there:
        angles(axes, _numbers(target, key, 'angles'), color, name)

  wanted = [(titles[key], draw(key)) for key in there] + [('Angles of the main subspaces (degrees)', turned)]
  return _panels(results, wanted, len(wanted)) if there else None


def _scores(results: Mapping[str, Any], target: Mapping[str, Any]) -> Panels | None:
  names = _score_names(target)
  draw = lambda name: lambda axes: line(axes, _numbers(target, 'scores', name), BLUE, '', best=True)
  wanted = [(SCORES.get(name, name), draw(name)) for name in names]
  return _panels(results, wanted, 2 if len(names) in (2, 4) else 3) if names else None


def _score_names(target: Mapping[str, Any]) -> list[str]:
  """The scores that any checkpoint has."""
  there = {name: None for scores in _numbers(target, 'scores') for name, value in (scores or {}).items() if value is not None}
  return [name for name in SCORES if name in there] + [name for name in there if name not in SCORES]


def _panels(results: Mapping[str, Any], wanted: Iterable[tuple[str, Draw]], columns: int) -> Panels:
  pictures = [report.svg(over_checkpoints(results['history'], title, draw, _SIZES[columns])) for title, draw in wanted]
  return Panels(columns, pictures)


def over_checkpoints(history: Sequence[Row], title: str, draw: Draw, size: tuple[float, float]) -> Figure:
  """A picture with the checkpoints at even distances along its axis, in order of training; its legend hides nothing."""
  numbered, shown, names = _ticks(history)
  # Names stand upright and take room of their own.
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
    figure.legend(handles, labels, loc='outside lower left', ncols=len(handles), frameon=False, fontsize=7.5, columnspacing=1.2,
                  handlelength=1.6)
  return figure


def curve(axes: Axes, values: Sequence[Sequence[float]], color: str, name: str, recommended: int | None = None) -> None:
  """Means in percent with a band of one standard error over the seeds, and a star at one checkpoint.

  Args:
    values: by checkpoint and seed, from 0 to 1; an empty one leaves a gap.
  """
  spreads = [spread(by_seed) for by_seed in values]
  means = np.array([np.nan if s.mean is None else 100 * s.mean for s in spreads])
  errors = np.array([100 * (s.standard_error or 0.0) for s in spreads])
  x = np.arange(len(means))
  if errors.any():
    axes.fill_between(x, means - errors, means + errors, color=color, alpha=0.22, linewidth=0)
    # Beside a gap, and of a single checkpoint, a band has no width.
    axes.errorbar(x, means, yerr=errors, fmt='none', ecolor=color, elinewidth=0.9, alpha=0.6)
  axes.plot(x, means, color=color, marker='o', markersize=3, linewidth=1.4, label=name or None)
  if recommended is not None and np.isfinite(means[recommended]):
    axes.plot(recommended, means[recommended], marker='*', markersize=13, color=GREEN, markeredgecolor='white', linestyle='none', zorder=5)


def line(axes: Axes, values: Sequence[float | None], color: str, name: str, scale: float = 1, best: bool = False) -> None:
  """A value of each checkpoint, with gaps where it is None; a ring around the highest if `best`."""
  heights = np.array([np.nan if value is None else scale * value for value in values])
  axes.plot(heights, color=color, marker='o', markersize=3, linewidth=1.4, label=name or None)
  if best and np.isfinite(heights).any():
    top = int(np.nanargmax(heights))
    axes.plot(top, heights[top], marker='o', markersize=9, markerfacecolor='none', markeredgecolor=color, linestyle='none')


def angles(axes: Axes, values: Sequence[Sequence[float] | None], color: str, name: str) -> None:
  """The median of the angles of each checkpoint, in degrees, and the range from the smallest to the largest."""
  low, middle, high = np.array([[np.nan] * 3 if not of else np.quantile(of, (0, 0.5, 1)) for of in values]).T
  x = np.arange(len(values))
  axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
  axes.plot(x, middle, color=color, marker='o', markersize=3, linewidth=1.4, label=name)
  axes.set(ylim=(0, 92), yticks=(0, 30, 60, 90))


def singular_values(results: Mapping[str, Any], target: Mapping[str, Any], kind: str) -> Figure:
  """The singular values of each checkpoint's features ('centred', 'plain'), and where its main part ends; later ones are lighter."""
  from matplotlib import colormaps
  from matplotlib.cm import ScalarMappable
  from matplotlib.colors import BoundaryNorm, ListedColormap

  history = results['history']
  # Up to where the colours can be told from white.
  colors = ListedColormap(colormaps['viridis'](np.linspace(0, 0.92, len(history))))
  figure = Figure(figsize=_SIZES[2], layout='constrained')
  axes = figure.subplots()
  dot, drawn = (5 if len(history) <= 10 else 4), False
  for k, spectrum in enumerate(_numbers(target, 'spectrum', kind)):
    values = np.asarray(spectrum['values'] if spectrum else [])
    if values.any():
      shown = np.unique(np.geomspace(1, len(values), _POINTS).round().astype(int))
      shown = shown[values[shown - 1] > values[0] * _SMALLEST]
      axes.plot(shown, values[shown - 1], color=colors(k), linewidth=1.3)
      axes.plot(spectrum['main'], values[spectrum['main'] - 1], 'o', color=colors(k), markersize=dot, markeredgecolor='white',
                markeredgewidth=0.7, zorder=3)
      drawn = True
  if drawn:
    axes.set(xscale='log', yscale='log')
    axes.xaxis.set_major_formatter('{x:g}')
  axes.set_xlabel('number of the direction', fontsize=8)
  axes.tick_params(labelsize=8)
  axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
  axes.spines[['top', 'right']].set_visible(False)
  figure.suptitle(f'Singular values, {kind} features', fontsize=9, x=0.01, ha='left')
  bar = figure.colorbar(ScalarMappable(BoundaryNorm(np.arange(len(history) + 1) - 0.5, len(history)), colors), ax=axes)
  numbered, shown, names = _ticks(history)
  bar.set_ticks(shown, labels=names, fontfamily=fonts.families(names))
  bar.ax.tick_params(labelsize=8, length=0)
  bar.minorticks_off()
  bar.outline.set_visible(False)
  bar.set_label('epoch' if numbered else 'checkpoint', fontsize=8)
  return figure


def _ticks(history: Sequence[Row]) -> tuple[bool, Sequence[int], list[str]]:
  """Whether all checkpoints have an epoch, which of them have a tick (the last one always), and what is written there."""
  numbered = all(checkpoint['epoch'] is not None for checkpoint in history)
  shown = range(len(history) - 1, -1, -math.ceil(len(history) / _TICKS))
  names = [f'{checkpoint["epoch"]:g}' if numbered else checkpoint['name'] for checkpoint in history]
  names = names if numbered else fonts.labels(names, 12)
  return numbered, shown, [names[k] for k in shown]


# The tables.


def _correlations(target: Mapping[str, Any]) -> list[tuple[str, list[float | None]]]:
  """Of each score its correlations with FE and FT: Kendall, weighted Kendall, Pearson."""
  return [(SCORES.get(name, name), [(by_way[way] or {}).get(key) for way in WAYS for key in ('kendall', 'weighted_kendall', 'pearson')])
          for name, by_way in target['correlations'].items()]


def _tables(results: Mapping[str, Any], target: Mapping[str, Any]) -> list[Table]:
  percent = lambda value: '' if value is None else f'{100 * value:.1f}'
  number = lambda value: '' if value is None else f'{value:.4g}'
  spoken = lambda values: report.spoken(values) if values else ''
  median = lambda of: f'{np.median(of):.0f}' if of else ''
  accuracy = {'source': map(percent, _source(results, 'top1'))} if any(v is not None for v in _source(results, 'top1')) else {}
  accuracy |= {f'FE {name}': map(spoken, _values(target, 'fe', probe)) for probe, name in PROBES.items()}
  accuracy |= {'FT': map(spoken, _values(target, 'ft'))} if any(_values(target, 'ft')) else {}
  tables = [_table(results, target, 'Accuracy, %', accuracy)]
  names = {'main': ('k', number), 'share': ('share, %', percent), 'energy': ('energy, %', percent),
           'effective_rank': ('effective rank', number), 'stable_rank': ('stable rank', number)}
  for kind in SPECTRA:
    columns = {name: map(said, _numbers(target, 'spectrum', kind, key)) for key, (name, said) in names.items()}
    tables.append(_table(results, target, f'Spectrum of the {kind} features', columns))
  for key, title in (('change', 'Change since the checkpoint before'), ('fine_tuned', 'Change by fine-tuning')):
    if any(_numbers(target, key)):
      tables.append(_table(results, target, title, {
          'main part, %': map(percent, _numbers(target, key, 'main')), 'residual, %': map(percent, _numbers(target, key, 'residual')),
          'median angle, degrees': map(median, _numbers(target, key, 'angles'))}))
  if names := _score_names(target):
    columns = {SCORES.get(name, name): map(number, _numbers(target, 'scores', name)) for name in names}
    tables.append(_table(results, target, 'Transferability scores', columns))
  return tables


def _table(results: Mapping[str, Any], target: Mapping[str, Any], title: str, columns: Mapping[str, Iterable[str]]) -> Table:
  cells = list(zip(*columns.values()))
  return Table(title, list(columns), [(checkpoint['name'], cells[k], [way.upper() for way in WAYS if _recommended(target, way) == k])
                                      for k, checkpoint in enumerate(results['history'])])


def _record(results: Mapping[str, Any], target: Mapping[str, Any], row: int) -> dict[str, Any]:
  """A row of the CSV by the names of its columns."""
  checkpoint = results['history'][row]
  record = {'target': cell(target['name']), 'checkpoint': cell(checkpoint['name']), 'epoch': checkpoint['epoch'],
            'step': checkpoint['step'], 'source_top1': _source(results, 'top1')[row], 'source_loss': _source(results, 'loss')[row]}
  for name, way, probe in (*((f'fe_{probe}', 'fe', probe) for probe in PROBES), ('ft', 'ft', '')):
    by_split = {split: _values(target, way, probe, split)[row] for split in ('val', 'test')}
    for split, values in by_split.items():
      record |= dict(zip((f'{name}_{split}', f'{name}_{split}_standard_error'), spread(values)))
    if name in ('fe_linear', 'ft'):
      record[f'{way}_seeds'] = len(by_split['test'])
  for kind in SPECTRA:
    record |= {f'{kind}_{key}': _numbers(target, 'spectrum', kind, key)[row] for key in SIZES}
  for key in ('change', 'fine_tuned'):
    record |= {f'{key}_{part}': _numbers(target, key, part)[row] for part in ('main', 'residual')}
    turned = _numbers(target, key, 'angles')[row]
    record[f'{key}_median_angle'] = float(np.median(turned)) if turned else None
  record |= {name: _numbers(target, 'scores', name)[row] for name in SCORES}
  return record | {f'recommended_{way}': int(_recommended(target, way) == row) for way in WAYS}
