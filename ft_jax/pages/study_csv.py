"""study.csv: all numbers of a study's page, one line per target and checkpoint."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ft_jax.names import cell, csv_line
from ft_jax.pages.study_values import accuracies, numbers, PROBES, recommended, SCORES, source, SPECTRA, spread, WAYS

_SIZES = ('main', 'share', 'energy', 'effective_rank', 'stable_rank')


def text(results: Mapping[str, Any]) -> str:
  """CSV text with a header; cells of what was not measured are empty.

  Accuracies are fractions, means over the seeds with their standard errors, on val and test; angles are in degrees.
  """
  rows = [_row(results, target, k) for target in results['targets'] for k in range(len(results['history']))]
  lines = [csv_line(row) for row in rows[:1]]
  lines += [csv_line(_format(value) for value in row.values()) for row in rows]
  return ''.join(lines)


def _format(value: Any) -> Any:
  if value is None:
    return ''
  return f'{value:.9g}' if isinstance(value, float) else value


def _row(results: Mapping[str, Any], target: Mapping[str, Any], index: int) -> dict[str, Any]:
  """A line of the file, by the names of its columns."""
  checkpoint = results['history'][index]
  row = {'target': cell(target['name']), 'checkpoint': cell(checkpoint['name']), 'epoch': checkpoint['epoch'],
         'step': checkpoint['step'], 'source_top1': source(results, 'top1')[index],
         'source_loss': source(results, 'loss')[index]}
  for name, way, probe in (*((f'fe_{probe}', 'fe', probe) for probe in PROBES), ('ft', 'ft', '')):
    by_split = {split: accuracies(target, way, probe, split)[index] for split in ('val', 'test')}
    for split, values in by_split.items():
      row |= dict(zip((f'{name}_{split}', f'{name}_{split}_standard_error'), spread(values)))
    if name in ('fe_linear', 'ft'):
      row[f'{way}_seeds'] = len(by_split['test'])
  for kind in SPECTRA:
    row |= {f'{kind}_{key}': numbers(target, 'spectrum', kind, key)[index] for key in _SIZES}
  for key in ('change', 'fine_tuned'):
    row |= {f'{key}_{part}': numbers(target, key, part)[index] for part in ('main', 'residual')}
    angles = numbers(target, key, 'angles')[index]
    row[f'{key}_median_angle'] = float(np.median(angles)) if angles else None
  row |= {name: numbers(target, 'scores', name)[index] for name in SCORES}
  return row | {f'recommended_{way}': int(recommended(target, way) == index) for way in WAYS}
