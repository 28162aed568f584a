"""The page of job compare: advice first, then differences with intervals, costs, classes and training."""

from collections.abc import Mapping, Sequence
import json
from typing import Any

from ft_jax import parallel
from ft_jax.pages import comparison_figures, page
from ft_jax.pages.comparison_files import axis_curves, class_gains, finished, history
from ft_jax.pages.comparison_table import (
  accuracy_text,
  csv_text,
  difference_text,
  HEADS,
  is_significant,
  kinds_of,
  markdown,
  METRICS,
  seeds_text,
)
from ft_jax.studies.advice import is_joint, needed_text
from ft_jax.workdir import read_json, Workdir, write_text

__all__ = ['markdown', 'write']

# Classes with the largest gains and losses that are shown, of each.
_CLASSES = 8


def write(work: Workdir) -> None:
  """Writes report.html and compare.csv of a comparison from its compare.json, which may hold only a part of the cells.

  Raises:
    ValueError: no compare.json is there, as an older version wrote the folder.
  """
  if not parallel.is_main():
    return
  path = work.path / 'compare.json'
  if not path.exists():
    raise ValueError(f'{work.path} has no compare.json; run job compare again in another --workdir')
  comparison, config = read_json(path), json.loads(work.config_json.read_text())
  write_text(work.path / 'compare.csv', csv_text(comparison))
  write_text(work.report_html, _page(work, comparison, config))


def _page(work: Workdir, comparison: Mapping[str, Any], config: Mapping[str, Any]) -> str:
  variants, kinds = comparison['variants'], kinds_of(comparison)
  histories = [history(work.path, variant) for variant in variants]
  curves = axis_curves(comparison, config) if comparison.get('axis') else []
  trained = [each for each in histories if each.train or each.val]
  done = sum(len(finished(variant)) for variant in variants)
  figures = {
      'forest': page.svg(comparison_figures.forest(comparison)) if done else '',
      'curves': page.svg(comparison_figures.curves(comparison['axis'], curves, comparison['metric'])) if curves else '',
      'training': page.svg(comparison_figures.training(trained)) if trained else ''}
  wanted = len(variants) * len(comparison['seeds'])
  return page.render(
      'comparison.html.jinja', title=f'Is it worth it? Variants of fine-tuning on {comparison["target"]}',
      comparison=comparison, heads=[HEADS[kind] for kind in kinds], metric=METRICS[comparison['metric']],
      rows=[_row(comparison, variant, kinds) for variant in variants], runs=[_runs(comparison, variant) for variant in
                                                                             variants],
      done=done, wanted=wanted, figures=figures,
      costs=_costs(comparison), tuned=[_tuned(variant) for variant in variants if variant.get('trials')],
      failed=_failed(variants), classes=_classes(work, comparison), converged=_converged(variants, histories),
      settings=page.setting_rows(config))


def _row(comparison: Mapping[str, Any], variant: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
  """A line of the main table."""
  summary = variant['summary']
  differences = [summary['differences'].get(kind) for kind in kinds]
  return {'name': variant['name'], 'accuracies': [accuracy_text(summary, metric) for metric in METRICS],
          'differences': [(difference_text(each), _details(each), _color(each)) for each in differences],
          'seeds': seeds_text(comparison, variant), 'val': summary['val']}


def _details(difference: Mapping[str, Any] | None) -> str:
  """What the table shows where the mouse rests."""
  if difference is None:
    return ''
  if difference['p'] is None:
    return f'from {difference["to"]}, one seed: the interval is over other test images alone'
  return (f'from {difference["to"]}, {difference["seeds"]} seeds, p = {difference["p"]:.4f}, after correction '
          f'{difference["p_holm"]:.4f}; {needed_text(difference)}')


def _color(difference: Mapping[str, Any] | None) -> str:
  """The class of a cell of the table."""
  if difference is None or not is_significant(difference):
    return ''
  return 'better' if difference['mean'] > 0 else 'worse'


def _runs(comparison: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
  """A line of the table of all runs: for each seed its accuracy and its folder, or why there is none."""
  cells = {cell['seed']: cell for cell in variant['cells']}
  found: list[dict[str, Any]] = []
  for seed in comparison['seeds']:
    cell = cells.get(seed, {})
    value = None if cell.get('error') else cell.get(comparison['metric'])
    found.append({'value': value, 'folder': cell.get('folder', ''), 'failed': bool(cell.get('error'))})
  return {'name': variant['name'], 'cells': found}


def _costs(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
  """For each variant its mean cost, and the images as a multiple of the baseline's."""
  variants = comparison['variants']
  base = next(variant['summary']['images'] for variant in variants if variant['name'] == comparison['baseline'])
  return [{'name': variant['name'], **{name: _count(variant['summary'][name]) for name in ('steps', 'images',
                                                                                           'seconds')},
           'times': _times(variant['summary']['images'], base)} for variant in variants]


def _count(value: float | None) -> str:
  if value is None:
    return ''
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def _times(images: float | None, base: float | None) -> str:
  return f'{images / base:.3g}' if images and base else ''


def _tuned(variant: Mapping[str, Any]) -> dict[str, Any]:
  """What was chosen on val for a variant."""
  trials = variant['trials']
  tried: dict[str, list[Any]] = {}
  for trial in trials:
    for field, value in trial['fields'].items():
      if value not in tried.setdefault(field, []):
        tried[field].append(value)
  chosen = variant.get('tuned') or {}
  fields = [(field, chosen.get(field), ', '.join(str(value) for value in values), edge(values, chosen.get(field)))
            for field, values in tried.items()]
  return {'name': variant['name'], 'fields': fields, 'runs': len(trials),
          'error': variant.get('error') or '', 'failed': sum(bool(trial.get('error')) for trial in trials)}


def edge(values: Sequence[Any], chosen: Any) -> str:
  """A warning where the value that was chosen is the smallest or the largest of several numbers; else ''."""
  numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
  if chosen is None or not numeric or len(values) < 2:
    return ''
  if chosen == max(values):
    return 'the largest value that was tried: try larger ones'
  return 'the smallest value that was tried: try smaller ones' if chosen == min(values) else ''


def _failed(variants: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The cells that failed, and variants without cells because of their trials."""
  cells = [{'name': f'{variant["name"]}, seed {cell["seed"]}', 'error': cell['error'], 'log': cell.get('log', '')}
           for variant in variants for cell in variant['cells'] if cell.get('error')]
  return cells + [{'name': variant['name'], 'error': variant['error'], 'log': ''} for variant in variants
                  if variant.get('error')]


def _classes(work: Workdir, comparison: Mapping[str, Any]) -> dict[str, Any] | None:
  """The largest gains and losses of single classes."""
  found = class_gains(work.path, comparison)
  if found is None or not found.gains:
    return None
  gained = [each for each in found.gains if each.gain > 0][:_CLASSES]
  lost = [each for each in reversed(found.gains) if each.gain < 0][:_CLASSES]
  return {'variant': found.variant, 'other': found.other,
          'groups': [('Largest gains', gained), ('Largest losses', lost)],
          'drawn': any(each.sources for each in (*gained, *lost))}


def _converged(variants: Sequence[Mapping[str, Any]], histories: Sequence[comparison_figures.History]) -> list[str]:
  """How well plain fine-tuning fits its training images at the end."""
  return [f'{each.name}: {each.train[-1][1]:.1%}'.replace('%', ' %') for variant, each in zip(variants, histories)
          if not is_joint(variant) and each.train]
