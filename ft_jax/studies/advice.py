"""One sentence in plain words on whether to train on source images too."""

from collections.abc import Mapping, Sequence
from typing import Any

from ft_jax.studies.paired import MOST_SEEDS

# A p-value after correction below this is taken for a difference.
LEVEL = 0.05
# A difference that is smaller is not worth having, as a fraction of the test images.
WORTH = 0.01
# Fields, and the value with which a variant is a control.
_CONTROLS = (('selection.method', 'least'), ('source.shuffle_labels', True), ('source.duplicates', 'keep'))


def advise(comparison: Mapping[str, Any]) -> str:
  """The advice of a comparison whose variants have their summaries (`studies.comparison.summarize`).

  It is about the variant that is best on val among those that train on source images, so the test images do not choose
  what they judge. What it calls a gain or a loss has a p-value below 0.05 after Holm's correction.
  """
  variant = best_on_val(comparison['variants'])
  if variant is None:
    return 'No advice yet: no fine-tuning with source images has finished.'
  differences = variant['summary']['differences']
  fair = differences.get('equal_compute') or differences.get('baseline')
  if fair is None:
    return f'No advice yet: {variant["name"]} has no seed in common with plain fine-tuning.'
  if fair['seeds'] < 2:
    return (f'No advice from one seed: {_phrase(variant["name"], differences)}; another seed may say the opposite. Add '
            'seeds (config.compare.seeds), five at least.')
  if _shown(fair):
    return _on_gain(variant, differences) if fair['mean'] > 0 else _on_loss(variant, differences)
  return _on_nothing(variant, differences, fair)


def best_on_val(variants: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
  """The variant with source images, controls aside, whose mean on val is the highest; None where none has finished a
  seed.
  """
  joint = [variant for variant in variants if is_joint(variant) and variant['summary']['val'] is not None]
  advised = [variant for variant in joint if not is_control(variant)]
  return max(advised, key=lambda variant: variant['summary']['val'], default=None)


def is_joint(variant: Mapping[str, Any]) -> bool:
  """Whether a variant trains on images of the source too."""
  return bool(variant['fields'].get('selection.method') != 'none')


def is_control(variant: Mapping[str, Any]) -> bool:
  """Whether a variant is there to explain the results of others, and is not meant to be used."""
  return any(variant['fields'].get(field) == value for field, value in _CONTROLS)


def points(fraction: float) -> str:
  """A difference of fractions in percentage points, with its sign."""
  return f'{round(100 * fraction, 1) + 0.0:+.1f}'


def interval_text(difference: Mapping[str, Any]) -> str:
  """`95 % interval 0.8 to 3.4, 5 seeds`."""
  low, high = (round(100 * bound, 1) + 0.0 for bound in difference['interval'])
  seeds = '1 seed, other images alone' if difference['seeds'] == 1 else f'{difference["seeds"]} seeds'
  return f'95 % interval {low:.1f} to {high:.1f}, {seeds}'


def _on_gain(variant: Mapping[str, Any], differences: Mapping[str, Any]) -> str:
  told, random = _phrase(variant['name'], differences), differences.get('random')
  if variant['fields'].get('selection.method') == 'random':
    return (f'Use source images, of classes chosen at random: {told}. No other choice was better on val, so the gain '
            'comes from any source images and not from the selection.')
  if random is None or random['p'] is None:
    return f'Use it: {told}. Whether other source images would do as well is not known: compare it with random choice.'
  if _shown(random) and random['mean'] > 0:
    return f'Use it: {told}.'
  return (f'Use it, but the choice of source images is not what helps: {told}. The gain comes from any source images '
          'and not from the selection, as far as these seeds show.')


def _on_loss(variant: Mapping[str, Any], differences: Mapping[str, Any]) -> str:
  baseline = differences.get('baseline')
  told = _phrase(variant['name'], differences)
  if 'equal_compute' in differences and baseline and _shown(baseline) and baseline['mean'] > 0:
    return f'Do not use it, train longer instead: {told}.'
  return f'Do not use it: {told}.'


def _on_nothing(variant: Mapping[str, Any], differences: Mapping[str, Any], fair: Mapping[str, Any]) -> str:
  told, seeds, baseline = _phrase(variant['name'], differences), fair['seeds'], differences.get('baseline')
  if 'equal_compute' in differences and baseline and _shown(baseline) and baseline['mean'] > 0:
    return f'Train longer, or use it: plain fine-tuning at equal compute does as well as far as can be seen: {told}.'
  low, high = fair['interval']
  if -WORTH < low and high < WORTH:
    return f'It makes no difference of one point or more with {seeds} seeds: {told}.'
  return f'No difference to be seen with {seeds} seeds: {told}; {needed_text(fair)}.'


def needed_text(difference: Mapping[str, Any]) -> str:
  """How many seeds it takes to see one point."""
  if difference['seeds_needed'] is not None:
    return f'about {_rounded(difference["seeds_needed"])} seeds would be needed for one point'
  if difference['images_needed'] is None:
    return f'more than {MOST_SEEDS:,d} seeds would be needed for one point'
  images = _rounded(difference['images_needed'])
  return f'more seeds cannot show one point: that takes about {images} test images'


def _rounded(number: int) -> str:
  """A number to two digits: estimates of it are no better."""
  digits = max(0, len(str(number)) - 2)
  return f'{round(number, -digits):,d}'


def _shown(difference: Mapping[str, Any]) -> bool:
  return difference['p_holm'] is not None and difference['p_holm'] < LEVEL


def _phrase(name: str, differences: Mapping[str, Any]) -> str:
  """All differences of a variant in words."""
  others = {'equal_compute': 'plain fine-tuning at equal compute',
            'baseline': 'plain fine-tuning at equal target images', 'random': 'random choice'}
  told = []
  for kind, other in others.items():
    if kind in differences:
      difference = differences[kind]
      than = 'over' if difference['mean'] >= 0 else 'against'
      told.append(f'{points(difference["mean"])} points {than} {other} ({interval_text(difference)})')
  missing = '' if 'equal_compute' in differences else '; plain fine-tuning at equal compute was not run'
  return f'{name} has {", ".join(told)}{missing}'
