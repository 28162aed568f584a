"""What study.json says of a target: rates by seed, the choice with its margins, correlations, and what a reader should
know.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ft_jax.studies import choice, transferability
from ft_jax.studies.study_data import Target

PROBES = ('linear', 'nearest_mean', 'neighbours', 'main', 'residual')
Found = Mapping[str, Any]  # of a checkpoint: `about`, `change`, and by seed `probes`, `ft` and `ft_change`


def target_results(target: Target, seeds: Sequence[int], names: Sequence[str],
                   source: Sequence[Mapping[str, float] | None], found: Sequence[Found], per_class: bool,
                   named_val: bool) -> dict[str, Any]:
  """What study.json says of a target.

  Args:
    target: the images.
    seeds: in order.
    names: of the checkpoints, in order.
    source: of each checkpoint, its accuracy on its own val split, or None.
    found: of each checkpoint.
    per_class: whether rates are means over classes.
    named_val: whether val is a split of its own.
  """
  first = target.rows[seeds[0]]
  rows = [row(each, seeds) for each in found]
  frozen = [{seed: probed['linear'] for seed, probed in each['probes'].items()} for each in found]
  return {'name': target.name, 'classes': len(target.class_names),
          'train': len(first.train), 'val': len(first.val), 'test': len(first.test),
          'notes': list(notes(target, seeds[0], found, named_val)), 'rows': rows,
          'correlations': correlations(source, rows),
          'recommended': {'fe': chosen(target, seeds, names, frozen, per_class),
                          'ft': chosen(target, seeds, names, [each['ft'] for each in found], per_class)}}


def row(found: Found, seeds: Sequence[int]) -> dict[str, Any]:
  """What study.json says of a checkpoint on a target."""
  probed = [found['probes'][seed] for seed in seeds if seed in found['probes']]
  fe = {name: {key: [each[name][key] for each in probed] for key in ('val', 'test', 'chosen')} for name in PROBES}
  done = [found['ft'][seed] for seed in seeds if seed in found['ft']]
  return {'fe': fe, 'ft': {key: [each[key] for each in done] for key in ('val', 'test', 'report')},
          **(found['about'] or {'spectrum': None, 'scores': {}}), 'change': found['change'],
          'fine_tuned': _mean_change([found['ft_change'][seed] for seed in seeds if seed in found['ft_change']])}


def _mean_change(done: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """The means over seeds; of the angles, of as many as all have: the main part of each network has a size of its own.
  """
  if not done:
    return None
  size = min(len(each['angles']) for each in done)
  return {'angles': np.mean([each['angles'][:size] for each in done], 0).tolist(),
          **{key: None if None in values else float(np.mean(values))
             for key, values in ((key, [each[key] for each in done]) for key in ('main', 'residual'))}}


def chosen(target: Target, seeds: Sequence[int], names: Sequence[str], found: Sequence[Mapping[int, Mapping[str, Any]]],
           per_class: bool) -> dict[str, Any] | None:
  """The choice among checkpoints, by the seeds that all of them have; None where there is none."""
  seeds = [seed for seed in seeds if all(seed in each for each in found)]
  if not seeds:
    return None
  tested = np.unique(np.concatenate([target.rows[seed].test for seed in seeds]))
  labels = target.labels[tested]

  def contributions(seed: int, wrong: Sequence[int]) -> np.ndarray:
    here, right = np.isin(tested, target.rows[seed].test), ~np.isin(tested, wrong)
    of_images = np.zeros(len(tested))
    of_images[here] = choice.contributions(right[here], labels[here], per_class)
    return of_images

  test = [np.stack([contributions(seed, each[seed]['wrong']) for seed in seeds]) for each in found]
  val = [float(np.mean([each[seed]['val'] for seed in seeds])) for each in found]
  made = choice.choose(val, test, labels if per_class else None)
  against = lambda other: None if other is None or other == made.row else {
      'row': other, 'margin': made.margins[other].mean, 'standard_error': made.margins[other].standard_error}
  last = len(found) - 1
  other = made.best_other if made.row == last else last
  return {'row': made.row, 'seeds': len(seeds), 'last': against(last), 'best_other': against(made.best_other),
          'difference': other is not None and made.margins[other].seen, 'similar': list(made.similar),
          'sentence': choice.sentence(made, names)}


def correlations(source: Sequence[Mapping[str, float] | None],
                 rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """How well source accuracy and each score rank the checkpoints: against the mean test scores on frozen features and
  by fine-tuning.
  """
  values = {'source accuracy': [entry['top1'] if entry else None for entry in source],
            **{name: [each['scores'].get(name) for each in rows] for name in rows[0]['scores']}}
  fe = [np.mean(each['fe']['linear']['test']) for each in rows]
  ft = [np.mean(each['ft']['test']) for each in rows] if all(each['ft']['test'] for each in rows) else None
  against = lambda numbers, means: transferability.correlate(numbers, means)._asdict() if means else None
  return {name: {'fe': against(numbers, fe), 'ft': against(numbers, ft)}
          for name, numbers in values.items() if None not in numbers}


def notes(target: Target, seed: int, found: Sequence[Found], named_val: bool) -> Iterator[str]:
  """Sentences that a reader of the numbers should know."""
  count = lambda rows: np.bincount(target.labels[rows], minlength=len(target.class_names))
  training, held_out = count(target.rows[seed].train), count(target.rows[seed].val)

  def listed(wanted: np.ndarray) -> str:
    first = ', '.join(target.class_names[k] for k in wanted[:5].tolist())
    return first + (', ...' if len(wanted) > 5 else '')

  lone = np.flatnonzero((training == 1) & (held_out == 0))
  absent = np.flatnonzero((training > 1) & (held_out == 0))
  if len(lone):
    yield (f'{len(lone)} of {len(training)} classes have one image for training and val together ({listed(lone)}), '
           'which is trained on: strengths and checkpoints are chosen by the val images of the other classes, '
           'without folds.')
  if len(absent):
    yield f'{len(absent)} of {len(training)} classes have no image in val ({listed(absent)}).'
  if named_val:
    yield ('val is a split of its own, so on frozen features every seed gives the same: what is left is the error of '
           'the test images.')
  about = [each['about'] for each in found if each['about']]
  if about and about[0]['note']:
    yield (about[0]['note'] + '. H-score is then at its bound for every checkpoint, and only the regularised one says '
           'anything.')
  if about and about[0]['scores'].get('leep', 0.0) is None:
    yield 'The checkpoints have no classifier, so there is no LEEP and no NCE.'
  if any(probed['linear']['at_edge'] for each in found for probed in each['probes'].values()):
    yield 'For some checkpoints the best strength of the logistic regression lies at the end of its grid.'
  if any(set(each['ft']) - set(each['ft_change']) for each in found):
    yield ('How far fine-tuning moved each part is not known for all networks: they are gone, and it was taken with '
           'another '
           'study.threshold or study.centred.')
