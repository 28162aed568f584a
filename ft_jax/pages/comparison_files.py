"""What the page of a comparison reads of its fine-tunings: how they trained, and single classes of the test images."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from ft_jax.pages.comparison_figures import Curve, History, Point
from ft_jax.settings import flat
from ft_jax.studies.advice import best_on_val, is_joint
from ft_jax.workdir import read_json, read_metrics
from selection import Selection

# Points of a line of a picture.
_POINTS = 30
# Beginnings of fields that mean nothing to plain fine-tuning.
_OF_SOURCE = ('selection.', 'source')


class ClassGain(NamedTuple):
  """How much better a class of the target is recognised.

  name: of the class.
  images: of it in the test split.
  before, after: fractions that are right, means over the seeds.
  sources: units of the source that the class draws most of its mass from, with the fraction of it.
  """
  name: str
  images: int
  before: float
  after: float
  sources: Sequence[tuple[str, float]]

  @property
  def gain(self) -> float:
    """The difference."""
    return self.after - self.before


class ClassGains(NamedTuple):
  """The gains of all classes of one variant over another, the largest first."""
  variant: str
  other: str
  gains: Sequence[ClassGain]


def finished(variant: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """The cells that have results."""
  return [cell for cell in variant['cells'] if not cell.get('error') and cell.get('top1') is not None]


def class_gains(folder: epath.Path, comparison: Mapping[str, Any]) -> ClassGains | None:
  """The gains of the variant that the advice is about, at equal compute where that was run; None without any."""
  variant = best_on_val(comparison['variants'])
  differences = variant['summary']['differences'] if variant else {}
  difference = differences.get('equal_compute') or differences.get('baseline')
  if variant is None or difference is None:
    return None
  other = next(each for each in comparison['variants'] if each['name'] == difference['to'])
  cells, others = ({cell['seed']: cell for cell in finished(each)} for each in (variant, other))
  rates: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
  for seed in [seed for seed in cells if seed in others]:
    rates.append((_rates(folder / others[seed]['folder']), _rates(folder / cells[seed]['folder'])))
  if not rates or not all(before and after for before, after in rates):
    return None
  first = folder / next(iter(cells.values()))['folder']
  sources, images = _sources(first), _images(first)
  gains = [ClassGain(name, images[name], _mean([before[name] for before, _ in rates]),
                     _mean([after[name] for _, after in rates]), sources.get(name, ()))
           for name in images if all(name in before and name in after for before, after in rates)]
  return ClassGains(variant['name'], other['name'], sorted(gains, key=lambda gain: -gain.gain))


def _results(folder: epath.Path) -> Mapping[str, Any] | None:
  """The results of a cell on the split that is compared; None where there are none."""
  if not (folder / 'results.json').exists():
    return None
  results = read_json(folder / 'results.json')
  return results['test'] or results['val']


def _images(folder: epath.Path) -> dict[str, int]:
  """The number of images of each class that has some."""
  results = _results(folder)
  return {row['name']: row['images'] for row in results['per_class'] if row['images']} if results else {}


def _rates(folder: epath.Path) -> dict[str, float]:
  """The fraction of each class that is right."""
  results = _results(folder)
  return {row['name']: row['right'] / row['images'] for row in results['per_class'] if row['images']} if results else {}


def _sources(folder: epath.Path) -> dict[str, list[tuple[str, float]]]:
  """By class of the target the units that it draws most from; {} where the selection does not say."""
  if not (folder / 'selection.json').exists():
    return {}
  try:
    chosen = Selection.load(folder / 'selection.json')
  except ValueError:
    return {}
  return dict(zip(chosen.target_names, chosen.explain_target(3)))


def history(folder: epath.Path, variant: Mapping[str, Any]) -> History:
  """The training of a variant, from metrics.jsonl of its cells."""
  runs = [read_metrics(folder / cell['folder']) for cell in finished(variant)]
  return History(variant['name'], _thinned(_means(runs, 'train/top1_target')), _means(runs, 'val/top1'))


def _means(runs: Sequence[Sequence[Mapping[str, float]]], key: str) -> list[tuple[float, float]]:
  """The mean of a metric over the runs, at the steps where all of them have it."""
  values: dict[float, list[float]] = {}
  for lines in runs:
    for line in lines:
      if key in line:
        values.setdefault(line['step'], []).append(line[key])
  return [(step, _mean(found)) for step, found in sorted(values.items()) if len(found) == len(runs)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Means of neighbours, where there are more points than a picture shows."""
  if len(points) <= _POINTS:
    return list(points)
  parts = np.array_split(np.array(points), _POINTS)
  return [(float(part[-1, 0]), float(part[:, 1].mean())) for part in parts]


def axis_curves(comparison: Mapping[str, Any], config: Mapping[str, Any]) -> list[Curve]:
  """Accuracies against the field `axis`; variants that agree in all other fields are one curve.

  Where the field means nothing to plain fine-tuning, that has no value of it. Variants with source images of which no
  other one has another value are left out.
  """
  axis, metric, default = comparison['axis'], comparison['metric'], flat(config).get(comparison['axis'])
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for variant in comparison['variants']:
    others = {name: value for name, value in variant['fields'].items() if name != axis}
    groups.setdefault(repr(sorted(others.items(), key=str)), []).append(variant)
  curves = []
  for group in groups.values():
    done = [variant for variant in group if variant['summary'][metric] is not None]
    if done and (len(group) > 1 or not is_joint(group[0])):
      points = [_point(variant, axis, default, metric) for variant in done]
      curves.append(Curve(_curve_name([variant['name'] for variant in group]), points))
  return curves


def _point(variant: Mapping[str, Any], axis: str, default: Any, metric: str) -> Point:
  value = variant['fields'].get(axis, default)
  if not is_joint(variant) and axis.startswith(_OF_SOURCE):
    value = None
  accuracy = variant['summary'][metric]
  return Point(value, accuracy['mean'], accuracy['interval'])


def _curve_name(names: Sequence[str]) -> str:
  """What the names of the variants of a curve begin with, as `uot` of `uot 20` and `uot 40`."""
  common = names[0]
  for name in names[1:]:
    while not name.startswith(common):
      common = common[:-1]
  return (common if len(names) == 1 else common.rstrip(' 0123456789.,;:=-_(')) or f'{names[0]}, …'


def _mean(values: Sequence[float]) -> float:
  return float(np.mean(values))
