"""The numbers of a comparison as text: a table for terminals and Markdown, and compare.csv."""

from collections.abc import Mapping, Sequence
import json
import textwrap
from typing import Any

from ft_jax.names import cell, csv_line, visible
from ft_jax.studies.advice import LEVEL
from ft_jax.studies.comparison import COMPARISONS
from selection import fonts

# What a comparison is called in the head of a column.
HEADS = {'baseline': 'equal target images', 'equal_compute': 'equal compute', 'random': 'random choice'}
METRICS = {'top1': 'top-1', 'mean_per_class': 'mean per class'}
# Columns of a terminal.
WIDTH = 120


def markdown(comparison: Mapping[str, Any]) -> str:
  """A comparison with its summaries as a Markdown table of at most 120 columns, and the advice under it."""
  metric = comparison['metric']
  kinds = kinds_of(comparison)
  head = ['variant', f'{METRICS[metric]}, %', *(f'{HEADS[kind]}' for kind in kinds), 'seeds']
  rows = [[variant['name'], accuracy_text(variant['summary'], metric),
           *(difference_text(variant['summary']['differences'].get(kind)) for kind in kinds),
           seeds_text(comparison, variant)] for variant in comparison['variants']]
  lines = _aligned([head, *rows])
  note = (f'{comparison["images"]:,d} {comparison["split"]} images; 95 % intervals. Right of the accuracy: differences '
          f'in points from {comparison["baseline"]} at equal target images and at equal compute, and from random '
          f'choice. * p < {LEVEL} after correction.')
  return '\n'.join([*lines, '', *textwrap.wrap(note, WIDTH), '', *textwrap.wrap(comparison['advice'], WIDTH)])


def kinds_of(comparison: Mapping[str, Any]) -> list[str]:
  """The comparisons that any variant has."""
  found = {kind for variant in comparison['variants'] for kind in variant['summary']['differences']}
  return [kind for kind in COMPARISONS if kind in found]


def accuracy_text(summary: Mapping[str, Any], metric: str) -> str:
  """`41.2 [40.1, 42.3]`, in per cent; '' where no cell has finished."""
  accuracy = summary[metric]
  if accuracy is None:
    return ''
  low, high = (100 * bound for bound in accuracy['interval'])
  return f'{100 * accuracy["mean"]:.1f} [{low:.1f}, {high:.1f}]'


def difference_text(difference: Mapping[str, Any] | None) -> str:
  """`+2.1 [+0.8, +3.4]*` in points, with a star where it is significant; '' for None."""
  if difference is None:
    return ''
  mean, low, high = (f'{round(100 * value, 1) + 0.0:+.1f}' for value in (difference['mean'], *difference['interval']))
  return f'{mean} [{low}, {high}]{"*" if is_significant(difference) else ""}'


def is_significant(difference: Mapping[str, Any]) -> bool:
  """Whether its p-value after correction is below 0.05."""
  return difference['p_holm'] is not None and difference['p_holm'] < LEVEL


def seeds_text(comparison: Mapping[str, Any], variant: Mapping[str, Any]) -> str:
  """`5`, or `3/5` where some are missing."""
  finished, wanted = variant['summary']['seeds'], len(comparison['seeds'])
  return str(finished) if finished == wanted else f'{finished}/{wanted}'


def csv_text(comparison: Mapping[str, Any]) -> str:
  """compare.csv: a header, and a line for each cell that has ended. Accuracies are fractions; of a cell that failed
  they are empty.
  """
  columns = ('variant', 'seed', 'folder', 'error', 'val', *METRICS, 'steps', 'images', 'seconds', 'fields', 'tuned')
  lines = [csv_line(columns)]
  for variant in comparison['variants']:
    fields, tuned = (json.dumps(variant.get(name) or {}, sort_keys=True) for name in ('fields', 'tuned'))
    for each in variant['cells']:
      cost = each.get('cost') or {}
      values = [each.get('val'), *(each.get(metric) for metric in METRICS),
                *(cost.get(name) for name in ('steps', 'images', 'seconds'))]
      lines.append(csv_line([cell(variant['name']), each['seed'], cell(each['folder']), cell(each.get('error') or ''),
                             *map(_number, values), cell(fields), cell(tuned)]))
  return ''.join(lines)


def _number(value: float | None) -> Any:
  if value is None:
    return ''
  return f'{value:.9g}' if isinstance(value, float) else value


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """Rows as lines of a Markdown table; the first column is shortened so that they fit."""
  widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
  room = WIDTH - sum(width + 3 for width in widths[1:]) - 4
  widths[0] = min(widths[0], max(room, 12))
  lines = []
  shorten = lambda name, ending: _shortened(name, widths[0] - len(ending)) + ending
  names = fonts.distinct((row[0] for row in rows), shorten)
  for name, (_, *others) in zip(names, rows):
    lines.append('| ' + ' | '.join([name.ljust(widths[0]), *(text.rjust(width) for text, width in
                                                             zip(others, widths[1:]))]) + ' |')
  rule = '|'.join('-' * (width + 1) + (':' if k else '-') for k, width in enumerate(widths))
  return [lines[0], f'|{rule}|', *lines[1:]]


def _shortened(name: str, most: int) -> str:
  """A name of at most `most` characters in a cell of the table: its beginning and its end."""
  text = visible(' '.join(name.split())).replace('|', '/')
  if len(text) <= most:
    return text
  end = most // 3
  return f'{text[:most - end - 1]}…{text[len(text) - end:]}'
