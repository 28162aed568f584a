"""The page of job study: which checkpoint to start from, how sure that is, and what was measured of each checkpoint."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from ft_jax import parallel
from ft_jax.pages import page, study_figures
from ft_jax.pages.page import format_percent
from ft_jax.pages.study_values import (
  accuracies,
  numbers,
  PROBES,
  recommended,
  score_names,
  SCORES,
  source,
  SPECTRA,
  WAYS,
)
from ft_jax.workdir import write_text

METRICS = {'top1': 'top-1 accuracy', 'mean_per_class': 'mean per-class accuracy'}


class Panels(NamedTuple):
  """Figures that stand side by side in so many columns, as SVG text."""
  columns: int
  pictures: Sequence[str]


class Table(NamedTuple):
  """A table of the page.

  title: its heading.
  columns: names of the columns after the first.
  rows: for each checkpoint its name, its cells, and the WAYS it is recommended for, in capitals.
  """
  title: str
  columns: Sequence[str]
  rows: Sequence[tuple[str, Sequence[str], Sequence[str]]]


def write(path: epath.Path, results: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
  """Writes the page.

  Args:
    path: the file that is written.
    results: what study.json holds.
    settings: the nested config of the study.
  """
  if not parallel.is_main():
    return
  write_text(path, page.render(
      'study.html.jinja', title='Which checkpoint to start from', results=results, metric=METRICS[results['metric']],
      targets=[_target(results, target) for target in results['targets']], settings=page.setting_rows(settings)))


def _target(results: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
  """What the page shows of one target."""
  accuracy, sizes = study_figures.accuracy(results, target), study_figures.sizes(target)
  changes, scores = study_figures.changes(target), study_figures.scores(target)
  score_columns = 2 if len(scores) in (2, 4) else 3
  spectra = [page.svg(study_figures.singular_values(results, target, kind)) for kind in SPECTRA]
  return {
      'name': target['name'], 'target': target, 'answers': [answer(results, target, way) for way in WAYS],
      'accuracy': _panels(results, accuracy, 3 if len(accuracy) == 3 else 2), 'spectra': Panels(2, spectra),
      'sizes': _panels(results, sizes, 4), 'changes': _panels(results, changes, len(changes)) if changes else None,
      'scores': _panels(results, scores, score_columns) if scores else None,
      'correlations': _correlations(target), 'tables': _tables(results, target)}


def _panels(results: Mapping[str, Any], figures: Iterable[tuple[str, study_figures.Draw]], columns: int) -> Panels:
  size = study_figures.SIZES[columns]
  drawn = [study_figures.over_checkpoints(results['history'], title, draw, size) for title, draw in figures]
  return Panels(columns, [page.svg(figure) for figure in drawn])


def answer(results: Mapping[str, Any], target: Mapping[str, Any], way: str) -> dict[str, Any]:
  """What the page says first about a target and one way of using a checkpoint.

  Args:
    results: of the study.
    target: an entry of its `targets`.
    way: 'fe' or 'ft'.

  Returns:
    way, done (how many checkpoints have values), name (None without a recommendation). With a recommendation also:
    sentence; verdict ('clear', 'none' or 'against'); badge, the verdict as text; accuracy on test; second, the best
    other checkpoint and the margin over it, if the sentence is not about it; marks, [(checkpoint, 'best' | 'similar' |
    'other' | 'missing')].
  """
  names = [checkpoint['name'] for checkpoint in results['history']]
  values = accuracies(target, way)
  found: dict[str, Any] = {'way': WAYS[way], 'done': sum(map(bool, values)), 'name': None}
  choice = target['recommended'][way]
  if choice is None:
    return found
  best, last, other = choice['row'], choice['last'], choice['best_other']
  verdict, badge = _verdict(choice, names)
  # The sentence is about the last checkpoint, or about the best other one if the last is the best.
  second = other if last and other and other['row'] != last['row'] else None
  return found | {
      'name': names[best], 'sentence': choice['sentence'], 'verdict': verdict, 'badge': badge,
      'accuracy': format_percent(values[best]) if values[best] else '',
      'second': (names[second['row']], _format_margin(second)) if second else None,
      'marks': [(name, _mark(k, value, choice)) for k, (name, value) in enumerate(zip(names, values))]}


def _verdict(choice: Mapping[str, Any], names: Sequence[str]) -> tuple[str, str]:
  """The kind of the verdict ('clear', 'none' or 'against') and its text."""
  margin = choice['last'] or choice['best_other']
  if margin is None:
    return 'none', 'nothing to compare with'
  if not choice['difference']:
    return 'none', 'no significant difference'
  if margin['margin'] < 0:
    return 'against', 'val and test disagree'
  return 'clear', f'better than {"the last" if choice["last"] else names[margin["row"]]}'


def _mark(index: int, values: Sequence[float], choice: Mapping[str, Any]) -> str:
  if index == choice['row']:
    return 'best'
  if not values:
    return 'missing'
  return 'similar' if index in choice['similar'] else 'other'


def _format_margin(of: Mapping[str, Any]) -> str:
  """A margin in percentage points, with its standard error."""
  error = '' if of['standard_error'] is None else f' ± {100 * of["standard_error"]:.1f}'
  return f'{100 * of["margin"]:+.1f}{error} points'


def _correlations(target: Mapping[str, Any]) -> list[tuple[str, list[float | None]]]:
  """For each score its correlations with FE and with FT: Kendall, weighted Kendall, Pearson."""
  keys = ('kendall', 'weighted_kendall', 'pearson')
  return [(SCORES.get(name, name), [(by_way[way] or {}).get(key) for way in WAYS for key in keys])
          for name, by_way in target['correlations'].items()]


def _tables(results: Mapping[str, Any], target: Mapping[str, Any]) -> list[Table]:
  tables = [_table(results, target, 'Accuracy, %', _accuracy_columns(results, target))]
  for kind in SPECTRA:
    of = lambda key, kind=kind: numbers(target, 'spectrum', kind, key)
    tables.append(_table(results, target, f'Spectrum of the {kind} features', {
        'k': map(_number, of('main')), 'share, %': map(_percent, of('share')), 'energy, %': map(_percent, of('energy')),
        'effective rank': map(_number, of('effective_rank')), 'stable rank': map(_number, of('stable_rank'))}))
  for key, title in (('change', 'Change since the previous checkpoint'), ('fine_tuned', 'Change by fine-tuning')):
    if any(numbers(target, key)):
      tables.append(_table(results, target, title, {
          'main part, %': map(_percent, numbers(target, key, 'main')),
          'residual, %': map(_percent, numbers(target, key, 'residual')),
          'median angle, degrees': map(_median, numbers(target, key, 'angles'))}))
  if names := score_names(target):
    scores = {SCORES.get(name, name): map(_number, numbers(target, 'scores', name)) for name in names}
    tables.append(_table(results, target, 'Transferability scores', scores))
  return tables


def _accuracy_columns(results: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Iterable[str]]:
  columns: dict[str, Iterable[str]] = {}
  top1 = source(results, 'top1')
  if any(value is not None for value in top1):
    columns['source'] = map(_percent, top1)
  for probe, name in PROBES.items():
    columns[f'FE {name}'] = map(_mean, accuracies(target, 'fe', probe))
  if any(accuracies(target, 'ft')):
    columns['FT'] = map(_mean, accuracies(target, 'ft'))
  return columns


def _table(results: Mapping[str, Any], target: Mapping[str, Any], title: str,
           columns: Mapping[str, Iterable[str]]) -> Table:
  cells = zip(*columns.values())
  return Table(title, list(columns), [
      (checkpoint['name'], row, [way.upper() for way in WAYS if recommended(target, way) == k])
      for k, (checkpoint, row) in enumerate(zip(results['history'], cells))])


def _percent(value: float | None) -> str:
  return '' if value is None else f'{100 * value:.1f}'


def _number(value: float | None) -> str:
  return '' if value is None else f'{value:.4g}'


def _mean(values: Sequence[float]) -> str:
  return format_percent(values) if values else ''


def _median(values: Sequence[float] | None) -> str:
  return f'{np.median(values):.0f}' if values else ''
