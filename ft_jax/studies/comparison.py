"""What a comparison says: accuracies of its variants, their differences with intervals, and advice.

Two comparisons are always made. At equal target images, a variant is compared with the baseline. At equal compute it is
compared with plain fine-tuning that sends as many images through the network. Where there is a variant with units
chosen at random, those with other selections are compared with it too: a gain over plain fine-tuning that random choice
has as well does not come from the selection.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np

from ft_jax.studies import paired
from ft_jax.studies.advice import advise, is_joint
from ft_jax.studies.paired import Estimate

# The comparisons of a variant, in the order in which they are shown.
COMPARISONS = ('baseline', 'equal_compute', 'random')
METRICS = ('top1', 'mean_per_class')
# Fields that say how long a training is: at equal compute they may differ.
_LENGTH = ('train.steps', 'train.epochs')
# Compute is equal where the images through the network differ by at most this fraction.
_TOLERANCE = 0.05
# Beginnings of fields that matter for plain fine-tuning as well: along them it must have the same value.
_OF_BOTH = ('target.', 'model.', 'noise.', 'image_size', *_LENGTH)
# Fields of a selection that matter for units chosen at random.
_OF_RANDOM = ('selection.size', 'selection.by')


def summarize(comparison: Mapping[str, Any], predictions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The comparison with the `summary` of each variant, and `advice`.

  Args:
    comparison: what compare.json holds without summaries. Variants whose `fields` lack `selection.method` have a
      selection. `axis` is the field that differs along a curve; '' or missing for none. A cell counts if it has no
      `error` and its predictions are there.
    predictions: what predictions.json holds, by the `folder` of the cell.

  Returns:
    A copy of `comparison`. The `summary` of a variant has `seeds`, how many cells count; `failed`; `val`, `steps`,
    `images` and `seconds`, means over them (None without any); `top1` and `mean_per_class`, each with `mean` and 95 %
    `interval` (None without any); and `differences`, those of COMPARISONS that can be made, each with `to` (the name of
    the other variant), `seeds` (those that both have), `mean`, `interval`, `over` ('seeds and images', or 'images'
    where there is one seed), `p` and `p_holm` (after Holm's correction over all variants with that comparison; None for
    one seed), `by_seed` (pairs of a seed and its difference), `seeds_needed` for an interval of one point to each side
    on these test images (None where up to 1,000 would not do, or one seed is all there is), and `images_needed` (where
    no number of seeds would do on so few test images, how many it takes; else None).

  Raises:
    ValueError: predictions of two cells that disagree on the classes of the test images.
  """
  axis = comparison.get('axis') or ''
  variants = [_Variant(variant, axis, predictions) for variant in comparison['variants']]
  images = _Images(variants)
  baseline = next(variant for variant in variants if variant.name == comparison['baseline'])
  accuracies = {metric: images.accuracies(variants, metric) for metric in METRICS}
  pairs = [(kind, variant, other) for kind in COMPARISONS for variant in variants
           if (other := _other(kind, variant, variants, baseline))]
  differences = images.differences(pairs, comparison['metric'])
  for kind in COMPARISONS:
    _correct([difference for (each, _), difference in differences.items() if each == kind])
  summaries = [{**variant.summary(), **{metric: of_variant.get(variant.name) for metric, of_variant in
                                        accuracies.items()},
                'differences': {kind: differences[kind, variant.name] for kind in COMPARISONS
                                if (kind, variant.name) in differences}} for variant in variants]
  whole = {**comparison, 'variants': [{**variant, 'summary': summary}
                                      for variant, summary in zip(comparison['variants'], summaries)]}
  return {**whole, 'advice': advise(whole)}


class _Variant:
  """A variant, and the predictions of its cells that count.

  Attributes:
    name, fields: as in compare.json.
    joint: whether it trains on images of the source too.
    is_random: whether these are chosen at random.
    axis: the field that differs along a curve; '' for none.
    value: of that field; None where the variant does not set it.
    failed: how many cells failed.
    cells: those that count, by seed.
    predictions: likewise.
  """

  def __init__(self, variant: Mapping[str, Any], axis: str, predictions: Mapping[str, Mapping[str, Any]]):
    self.name: str = variant['name']
    self.fields: Mapping[str, Any] = variant['fields']
    self.joint = is_joint(variant)
    self.is_random = self.fields.get('selection.method') == 'random'
    self.axis, self.value = axis, self.fields.get(axis)
    self.failed = sum(bool(cell.get('error')) for cell in variant['cells'])
    self.cells = {cell['seed']: cell for cell in variant['cells']
                  if not cell.get('error') and cell['folder'] in predictions}
    self.predictions = {seed: predictions[cell['folder']] for seed, cell in self.cells.items()}

  @property
  def images(self) -> float | None:
    """Images through the network in training."""
    return self.cost('images')

  def cost(self, name: str) -> float | None:
    """The mean over the cells; None without any, or where one does not say."""
    return _mean([(cell.get('cost') or {}).get(name) for cell in self.cells.values()])

  def off_axis(self, *without: str) -> dict[str, Any]:
    """The fields, without that of the axis and some others."""
    return {name: value for name, value in self.fields.items() if name not in (self.axis, *without)}

  def comparable(self, other: '_Variant') -> bool:
    """Whether a difference from another variant can mean anything, where the axis is a field of both."""
    return self.value == other.value or not self.axis.startswith(_OF_BOTH)

  @property
  def beside_choice(self) -> dict[str, Any]:
    """The fields, without those that say which units are chosen; how many they are stays."""
    return {name: value for name, value in self.fields.items()
            if not name.startswith('selection.') or name in _OF_RANDOM}

  def summary(self) -> dict[str, Any]:
    """What follows from the cells alone; see `summarize`."""
    return {'seeds': len(self.cells), 'failed': self.failed,
            'val': _mean([cell.get('val') for cell in self.cells.values()]),
            **{name: self.cost(name) for name in ('steps', 'images', 'seconds')}}


class _Images:
  """The test images of all cells, and what was predicted for them."""

  def __init__(self, variants: Sequence[_Variant]):
    """Raises ValueError where two cells disagree on the class of an image."""
    labels: dict[str, int] = {}
    for variant in variants:
      for found in variant.predictions.values():
        for name, label in zip(found['ids'], found['labels']):
          if labels.setdefault(name, label) != label:
            raise ValueError(f'predictions of {variant.name!r}: image {name!r} is of class {label}, and of class '
                             f'{labels[name]} in another run; do the comparison again in another --workdir')
    self._positions = {name: k for k, name in enumerate(labels)}
    self._labels = np.array(list(labels.values()), int)
    self._correct = {(variant.name, seed): self._row(found) for variant in variants
                     for seed, found in variant.predictions.items()}

  def accuracies(self, variants: Sequence[_Variant], metric: str) -> dict[str, dict[str, Any]]:
    """By name of the variant the mean over seeds, with its interval; without variants of which no cell counts."""
    finished = [variant for variant in variants if variant.cells]
    tables = [self._table(variant, list(variant.cells)) for variant in finished]
    found = paired.estimates(tables, self._classes(metric))
    return {variant.name: {'mean': estimate.mean, 'interval': [max(estimate.interval[0], 0.0),
                                                               min(estimate.interval[1], 1.0)]}
            for variant, estimate in zip(finished, found)}

  def differences(self, pairs: Sequence[tuple[str, _Variant, _Variant]],
                  metric: str) -> dict[tuple[str, str], dict[str, Any]]:
    """For each (kind, variant, other) the difference by kind and name of the variant, see `summarize`; without those
    that share no seed.
    """
    seeds = [self._common_seeds(one, other) for _, one, other in pairs]
    shared = [(pair, common) for pair, common in zip(pairs, seeds) if common]
    tables = [self._table(one, common) - self._table(other, common) for (_, one, other), common in shared]
    found = paired.estimates(tables, self._classes(metric))
    return {(kind, one.name): {'to': other.name, **self._difference(estimate, common)}
            for ((kind, one, other), common), estimate in zip(shared, found)}

  def _common_seeds(self, one: _Variant, other: _Variant) -> list[int]:
    """The seeds that both variants have, with at least one image in common."""
    return [seed for seed in one.cells if seed in other.cells and not np.isnan(
        self._correct[one.name, seed] - self._correct[other.name, seed]).all()]

  def _difference(self, estimate: Estimate, seeds: Sequence[int]) -> dict[str, Any]:
    several = len(seeds) > 1
    needed = paired.seeds_needed(estimate)
    least = paired.images_needed(estimate, len(self._labels))
    too_few = several and needed is None and least > len(self._labels)
    return {
        'seeds': len(seeds), 'mean': estimate.mean, 'interval': list(estimate.interval),
        'over': 'seeds and images' if several else 'images', 'p': estimate.p if several else None,
        'by_seed': [[seed, score] for seed, score in zip(seeds, estimate.scores)], 'seeds_needed': needed,
        'images_needed': least if too_few else None}

  def _row(self, found: Mapping[str, Any]) -> np.ndarray:
    """Right (1) or wrong (0) for each image; NaN for those that the run did not have."""
    row = np.full(len(self._labels), np.nan)
    row[[self._positions[name] for name in found['ids']]] = np.equal(found['labels'], found['predictions'])
    return row

  def _table(self, variant: _Variant, seeds: Sequence[int]) -> np.ndarray:
    """`[S, N]`, see `paired.estimates`."""
    return np.stack([self._correct[variant.name, seed] for seed in seeds])

  def _classes(self, metric: str) -> np.ndarray | None:
    return self._labels if metric == 'mean_per_class' else None


def _correct(differences: Sequence[dict[str, Any]]) -> None:
  """Adds `p_holm` to the differences of one kind."""
  corrected = iter(paired.holm([difference['p'] for difference in differences if difference['p'] is not None]))
  for difference in differences:
    difference['p_holm'] = None if difference['p'] is None else next(corrected)


def _other(kind: str, variant: _Variant, variants: Sequence[_Variant], baseline: _Variant) -> _Variant | None:
  """What a variant is compared with; None for nothing."""
  others = [other for other in variants if other is not variant]
  if kind == 'baseline':
    return _baseline_of(variant, others, baseline)
  if kind == 'equal_compute':
    return _equal_compute(variant, others, baseline)
  return _random(variant, others)


def _baseline_of(variant: _Variant, others: Sequence[_Variant], baseline: _Variant) -> _Variant | None:
  """The baseline; of several along the axis the one with the variant's value."""
  if variant.off_axis() == baseline.off_axis():
    return None
  along = [other for other in others if other.off_axis() == baseline.off_axis() and variant.comparable(other)]
  same = [other for other in along if other.value == variant.value]
  return next(iter(same or along), None)


def _equal_compute(variant: _Variant, others: Sequence[_Variant], baseline: _Variant) -> _Variant | None:
  """The baseline with another length of training, whose images through the network are as many."""
  plain = [other for other in others if other.off_axis(*_LENGTH) == baseline.off_axis(*_LENGTH)]
  plain = [other for other in plain if variant.comparable(other) or variant.axis in _LENGTH]
  if variant.images is None or variant.off_axis(*_LENGTH) == baseline.off_axis(*_LENGTH):
    return None
  distances = [(abs(other.images / variant.images - 1), k) for k, other in enumerate(plain) if other.images is not None]
  nearest, k = min(distances, default=(math.inf, 0))
  return plain[k] if nearest <= _TOLERANCE else None


def _random(variant: _Variant, others: Sequence[_Variant]) -> _Variant | None:
  """The variant that differs by choosing its units at random."""
  if not variant.joint or variant.is_random or variant.fields.get('selection.method') == 'all':
    return None
  matching = [other for other in others if other.is_random and other.beside_choice == variant.beside_choice]
  return matching[0] if matching else None


def _mean(values: Sequence[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return math.fsum(known) / len(known) if known and len(known) == len(values) else None
