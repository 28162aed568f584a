"""What a comparison says: which variants are compared with which, over which seeds, and the advice that follows."""

import itertools

import comparison_case as case
import numpy as np
import pytest

from ft_jax.studies import advice, paired
from ft_jax.studies.comparison import summarize


def flipped(correct, gained, lost, seed=0):
  """Right and wrong by seed, with so many wrong ones made right and right ones made wrong in each."""
  rng, found = np.random.default_rng(seed), {}
  for number, row in correct.items():
    found[number] = row.copy()
    found[number][rng.choice(np.flatnonzero(~row), gained, replace=False)] = True
    found[number][rng.choice(np.flatnonzero(row), lost, replace=False)] = False
  return found


PLAIN = case.drawn(0.4, 5, 400)
LONG = {'selection.method': 'none', 'train.steps': 20}


def advised(**variants):
  """The summaries by name, and the advice, of plain for 10 and 20 steps and of others at the compute of the latter."""
  images = {name: 1000 if name == 'plain' else 2000 for name in ('plain', 'longer', *variants)}
  fields = {'random': case.RANDOM}
  table, found = case.make({'plain': (case.PLAIN, PLAIN), **{
      name: (fields.get(name, case.UOT) if name != 'longer' else LONG, rows) for name, rows in variants.items()}},
                           images, {'uot': 0.6})
  whole = summarize(table, found)
  return {variant['name']: variant['summary'] for variant in whole['variants']}, whole['advice']


def test_differences_are_paired_by_seed_and_image():
  """The numbers are those of the tables of right and wrong; accuracies and costs are means over the seeds."""
  uot = flipped(PLAIN, 20, 4)
  summaries, _ = advised(uot=uot)
  found = summaries['uot']['differences']['baseline']
  [expected] = paired.estimates([np.stack([uot[k].astype(float) - PLAIN[k] for k in range(5)])])
  assert (found['to'], found['seeds'], found['over']) == ('plain', 5, 'seeds and images')
  assert found['mean'] == pytest.approx(16 / 400) and found['interval'] == pytest.approx(expected.interval, abs=1e-6)
  assert found['p'] == found['p_holm'] == pytest.approx(expected.p, abs=2e-4)
  assert found['by_seed'] == [[k, pytest.approx(0.04)] for k in range(5)]
  own = summaries['uot']
  assert own['top1']['mean'] == pytest.approx(np.mean([row.mean() for row in uot.values()]))
  assert (own['seeds'], own['failed'], own['val'], own['steps'], own['images']) == (5, 0, pytest.approx(0.6), 10, 2000)
  assert summaries['plain']['differences'] == {}


def test_seeds_that_both_have_are_paired():
  """A failed cell counts nowhere; one that is not finished neither; a variant without any has no numbers."""
  table, found = case.make({'plain': (case.PLAIN, PLAIN), 'uot': (case.UOT, flipped(PLAIN, 9, 3)),
                            'least': ({'selection.method': 'least'}, {0: PLAIN[0]})})
  table['variants'][1]['cells'][3] |= {'error': 'the loss is nan', 'top1': None, 'val': None, 'cost': None}
  del found['cells/uot-seed-4'], found['cells/plain-seed-0']
  table['variants'][2]['cells'][0]['error'] = 'no such file'
  whole = summarize(table, found)
  plain, uot, least = (variant['summary'] for variant in whole['variants'])
  assert (plain['seeds'], uot['seeds'], uot['failed']) == (4, 3, 1)
  assert [seed for seed, _ in uot['differences']['baseline']['by_seed']] == [1, 2]
  assert least['top1'] is None and least['val'] is None and not least['differences'] and least['failed'] == 1


def test_seeds_with_other_images_in_each_variant():
  """Nothing can be paired, so there is no difference; accuracies are there all the same."""
  table, found = case.make({'plain': (case.PLAIN, PLAIN), 'uot': (case.UOT, PLAIN)})
  for seed in range(4):
    predicted = found[f'cells/uot-seed-{seed}']
    predicted['ids'] = [f'val/{name}' for name in predicted['ids']]
  uot = summarize(table, found)['variants'][1]['summary']
  assert uot['seeds'] == 5 and uot['differences']['baseline']['seeds'] == 1


def test_which_variants_are_compared():
  """Equal compute by the images through the network; random choice of as many units, trained alike."""
  rows = {0: PLAIN[0], 1: PLAIN[1]}
  sized = lambda method, size: {'selection.method': method, 'selection.size': size}
  table, found = case.make({
      'plain': (case.PLAIN, rows), 'plain, equal compute x2': ({**case.PLAIN, 'train.steps': 20}, rows),
      'plain, equal compute x4': ({**case.PLAIN, 'train.steps': 40}, rows), 'l2_sp': ({**case.PLAIN, 'x': 1}, rows),
      'uot 5': ({**sized('uot', 5), 'selection.epsilon': 0.1}, rows), 'uot 20': (sized('uot', 20), rows),
      'random 20': (sized('random', 20), rows), 'random 5': (sized('random', 5), rows),
      'uot 5, mu 3': ({**sized('uot', 5), 'source_ratio': 3.0}, rows), 'odd': (sized('uot', 7), rows),
      'all': (sized('all', 20), rows)},
                           {'plain, equal compute x2': 2000, 'plain, equal compute x4': 4010, 'uot 5': 2000,
                            'uot 20': 2000, 'random 5': 2000, 'random 20': 2000, 'uot 5, mu 3': 4000, 'odd': 3000,
                            'all': 2000})
  whole = summarize(table, found)
  others = {variant['name']: {kind: found['to'] for kind, found in variant['summary']['differences'].items()}
            for variant in whole['variants']}
  assert others == {
      'plain': {}, 'plain, equal compute x2': {'baseline': 'plain'}, 'plain, equal compute x4': {'baseline': 'plain'},
      'l2_sp': {'baseline': 'plain', 'equal_compute': 'plain'},
      'uot 5': {'baseline': 'plain', 'equal_compute': 'plain, equal compute x2', 'random': 'random 5'},
      'uot 20': {'baseline': 'plain', 'equal_compute': 'plain, equal compute x2', 'random': 'random 20'},
      'random 20': {'baseline': 'plain', 'equal_compute': 'plain, equal compute x2'},
      'random 5': {'baseline': 'plain', 'equal_compute': 'plain, equal compute x2'},
      'uot 5, mu 3': {'baseline': 'plain', 'equal_compute': 'plain, equal compute x4'}, 'odd': {'baseline': 'plain'},
      'all': {'baseline': 'plain', 'equal_compute': 'plain, equal compute x2'}}


def test_along_an_axis_the_baseline_has_the_same_value():
  """With fewer target images, plain fine-tuning has fewer too."""
  few = lambda fields: {**fields, 'target.train_per_class': 5}
  table, found = case.make({'plain': (case.PLAIN, PLAIN), 'plain 5': (few(case.PLAIN), PLAIN),
                            'uot': (case.UOT, PLAIN), 'uot 5': (few(case.UOT), PLAIN),
                            'uot 9': ({**case.UOT, 'target.train_per_class': 9}, PLAIN)}, axis='target.train_per_class')
  others = {variant['name']: {kind: found['to'] for kind, found in variant['summary']['differences'].items()}
            for variant in summarize(table, found)['variants']}
  assert others == {'plain': {}, 'plain 5': {}, 'uot': {'baseline': 'plain', 'equal_compute': 'plain'},
                    'uot 5': {'baseline': 'plain 5', 'equal_compute': 'plain 5'}, 'uot 9': {}}


def test_p_values_are_corrected_over_the_variants():
  several = {f'uot {k}': flipped(PLAIN, 9, 4, k) for k in range(4)}
  summaries, _ = advised(**several)
  found = [summaries[name]['differences']['baseline'] for name in several]
  assert [each['p_holm'] for each in found] == paired.holm([each['p'] for each in found])
  assert any(each['p_holm'] > each['p'] for each in found)


def test_images_of_other_classes_are_refused():
  table, found = case.make({'plain': (case.PLAIN, PLAIN), 'uot': (case.UOT, PLAIN)})
  found['cells/uot-seed-1']['labels'][7] += 1
  with pytest.raises(ValueError, match="predictions of 'uot': image 'test/7.jpg' is of class 4, and of class 3"):
    summarize(table, found)


MUCH = flipped(PLAIN, 40, 4)
NOTHING = {seed: flipped(PLAIN, 10 + 4 * (seed - 2), 10)[seed] for seed in PLAIN}
WORSE = flipped(PLAIN, 4, 40)


@pytest.mark.parametrize('variants,beginning,inside', [
    ({'uot': MUCH, 'longer': PLAIN, 'random': PLAIN}, 'Use it: uot has +9.0 points over plain fine-tuning at '
     'equal compute (95 % interval ', [
         '+9.0 points over plain fine-tuning at equal target images', 'over random choice (95']),
    ({'uot': MUCH, 'longer': PLAIN}, 'Use it: uot has +9.0', ['Whether other source images would do as well']),
    ({'uot': MUCH, 'longer': PLAIN, 'random': MUCH}, 'Use it, but the choice of source images is not what helps: ',
     ['+0.0 points over random choice', 'comes from any source images and not from the selection']),
    ({'uot': MUCH, 'longer': MUCH}, 'Train longer, or use it: plain fine-tuning at equal compute does as well', []),
    ({'uot': NOTHING, 'longer': MUCH}, 'Do not use it: uot has -9.0 points against plain fine-tuning at ', []),
    ({'uot': flipped(PLAIN, 20, 4), 'longer': MUCH}, 'Do not use it, train longer instead: uot has -', []),
    ({'uot': WORSE, 'longer': PLAIN}, 'Do not use it: uot has -9.0 points', []),
    ({'uot': WORSE}, 'Do not use it: uot has -9.0 points', ['; plain fine-tuning at equal compute was not run.']),
    ({'uot': NOTHING, 'longer': PLAIN}, 'No difference to be seen with 5 seeds: uot has +0.0',
     [' would be needed for one point.']),
    ({'uot': PLAIN, 'longer': PLAIN}, 'It makes no difference of one point or more with 5 seeds: uot has +0.0', []),
    ({'uot': {0: MUCH[0]}, 'longer': PLAIN}, 'No advice from one seed: uot has +9.0', ['1 seed, other images alone']),
    ({'uot': {7: MUCH[0]}, 'longer': PLAIN}, 'No advice yet: uot has no seed in common with plain fine-tuning', []),
    ({'longer': PLAIN}, 'No advice yet: no fine-tuning with source images has finished.', []),
    ({'random': MUCH, 'longer': PLAIN}, 'Use source images, of classes chosen at random: random has +9.0', []),
])
def test_advice(variants, beginning, inside):
  _, told = advised(**variants)
  assert told.startswith(beginning), told
  assert all(part in told for part in inside) and '\n' not in told, told


def test_the_variant_of_the_advice_is_chosen_on_val():
  """Not the one that the test images like best, and no control."""
  table, found = case.make({'plain': (case.PLAIN, PLAIN), 'uot': (case.UOT, NOTHING),
                            'nearest': ({'selection.method': 'nearest'}, MUCH),
                            'shuffled': ({**case.UOT, 'source.shuffle_labels': True}, MUCH),
                            'leaked': ({**case.UOT, 'source.duplicates': 'keep'}, MUCH)},
                           val={'uot': 0.51, 'nearest': 0.5, 'shuffled': 0.6, 'leaked': 0.9})
  assert 'uot has' in summarize(table, found)['advice']


def test_more_seeds_are_not_advised_where_they_cannot_help():
  """The same images are gained and lost by every seed: only other test images could tell more."""
  rng = np.random.default_rng(0)
  gained, lost = rng.random(400) < 0.1, rng.random(400) < 0.09
  uot = {seed: (PLAIN[0] | gained) & ~lost for seed in range(5)}
  table, found = case.make({'plain': (case.PLAIN, {seed: PLAIN[0] for seed in range(5)}), 'uot': (case.UOT, uot)})
  assert 'more seeds cannot show one point: that takes about ' in summarize(table, found)['advice']


def test_seeds_that_differ_too_much():
  """Neither seeds nor images in any number that one could have."""
  uot = {seed: np.full(400, seed % 2 == 0) for seed in range(5)}
  table, found = case.make({'plain': (case.PLAIN, {seed: np.full(400, True) for seed in range(5)}),
                            'uot': (case.UOT, uot)})
  assert summarize(table, found)['advice'].endswith('; more than 1,000 seeds would be needed for one point.')


def test_numbers_are_as_exact_as_they_are_known():
  assert [advice._rounded(number) for number in (7, 23, 187, 1342)] == ['7', '23', '190', '1,300']
  assert [advice.points(value) for value in (0.0213, -0.0004, -0.034)] == ['+2.1', '+0.0', '-3.4']


def test_any_order_of_seeds_gives_the_same_summary():
  table, found = case.make({'plain': (case.PLAIN, PLAIN), 'uot': (case.UOT, NOTHING)})
  for order in itertools.islice(itertools.permutations(range(5)), 1, 3):
    turned = {**table, 'variants': [{**variant, 'cells': [variant['cells'][k] for k in order]}
                                    for variant in table['variants']]}
    assert summarize(turned, found)['variants'][1]['summary']['differences']['baseline']['mean'] == pytest.approx(
        summarize(table, found)['variants'][1]['summary']['differences']['baseline']['mean'])
