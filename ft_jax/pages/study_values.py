"""Reading the results of a study (study.json): lists with one entry per checkpoint, None or empty where not
measured."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ft_jax.studies.stability import estimate

PROBES = {'linear': 'logistic regression', 'nearest_mean': 'nearest class mean', 'neighbours': 'k-NN',
          'main': 'main part', 'residual': 'residual'}
WAYS = {'fe': 'Frozen features, logistic regression (FE)', 'ft': 'Fine-tuning of all weights (FT)'}
SCORES = {'h_score': 'H-score', 'h_score_regularised': 'H-score, regularised', 'leep': 'LEEP', 'nce': 'NCE',
          'logme': 'LogME', 'transrate': 'TransRate'}
SPECTRA = ('centred', 'plain')


class Spread(NamedTuple):
  """Mean over the seeds and its standard error; None where not measured."""
  mean: float | None
  standard_error: float | None


def spread(values: Sequence[float] | None) -> Spread:
  """Mean over the seeds and standard error of the mean."""
  return Spread(*estimate(values)) if values else Spread(None, None)


def accuracies(target: Mapping[str, Any], way: str, probe: str = 'linear',
               split: str = 'test') -> list[Sequence[float]]:
  """Accuracies of each checkpoint by seed; empty where there are none (yet).

  Args:
    target: an entry of `targets` in the results.
    way: 'fe' or 'ft', see WAYS.
    probe: one of PROBES, for 'fe'.
    split: 'val' or 'test'.
  """
  if way == 'ft':
    return [(row.get('ft') or {}).get(split) or [] for row in target['rows']]
  return [((row.get('fe') or {}).get(probe) or {}).get(split) or [] for row in target['rows']]


def numbers(target: Mapping[str, Any], *keys: str) -> list[Any]:
  """For each checkpoint, the value under the path of `keys`; None where any of them is missing."""
  found = []
  for row in target['rows']:
    for key in keys:
      row = (row or {}).get(key)
    found.append(row)
  return found


def source(results: Mapping[str, Any], key: str) -> list[float | None]:
  """'top1' or 'loss' of each checkpoint on the pre-training data."""
  return [(checkpoint['source'] or {}).get(key) for checkpoint in results['history']]


def recommended(target: Mapping[str, Any], way: str) -> int | None:
  """The index of the recommended checkpoint; None without a recommendation (yet)."""
  choice = target['recommended'][way]
  return None if choice is None else choice['row']


def score_names(target: Mapping[str, Any]) -> list[str]:
  """The transferability scores that at least one checkpoint has, known ones first."""
  found: list[str] = []
  for scores in numbers(target, 'scores'):
    found += [name for name, value in (scores or {}).items() if value is not None and name not in found]
  return [name for name in SCORES if name in found] + [name for name in found if name not in SCORES]
