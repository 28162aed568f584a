"""The page of a comparison says what compare.json says, also of comparisons that are not finished; the table fits a
terminal, and compare.csv has a line for each run."""

import csv
import io
import re

import comparison_case as case
import pytest

from ft_jax.names import from_cell
from ft_jax.pages import comparison, comparison_figures, comparison_table
from ft_jax.pages.comparison_files import axis_curves, class_gains
from ft_jax.studies.comparison import summarize
from ft_jax.workdir import read_json, Workdir

LONG = 'joint training, <b>labels</b> shuffled, with the classes that another target has chosen, seed {}'


def sized(method, size):
  return {'selection.method': method, 'selection.size': size}


def along_sizes():
  """Twelve variants along an axis, two with long names, with one failed cell and trials."""
  variants = {'plain': ({**case.PLAIN, 'selection.size': 100}, case.drawn(0.4, 3, 200, 1)),
              'plain, equal compute': ({**case.PLAIN, 'train.steps': 20, 'selection.size': 100},
                                       case.drawn(0.41, 3, 200, 2))}
  for k, size in enumerate((5, 10, 20, 40)):
    variants[f'uot {size}'] = sized('uot', size), case.drawn(0.5 + 0.01 * k, 3, 200, 3 + k)
    variants[f'random {size}'] = sized('random', size), case.drawn(0.4 + 0.01 * k, 3, 200, 10 + k)
  for k in range(2):
    variants[LONG.format(k)] = {**sized('uot', 100), 'source_weight': k}, case.drawn(0.36, 3, 200, 30 + k)
  table, found = case.make(variants, {name: 2000 for name in variants if name != 'plain'}, {'uot 20': 0.6},
                           axis='selection.size')
  cell = table['variants'][3]['cells'][2]
  cell |= {'error': '=cmd: the loss is nan', 'top1': None, 'mean_per_class': None, 'val': None, 'cost': None,
           'log': 'cells/random-5-seed-2/log.txt'}
  del found[cell['folder']]
  table['variants'][2] |= {'tuned': {'train.learning_rate': 0.03, 'source_weight': 0.3}, 'trials': [
      {'fields': {'train.learning_rate': rate, 'source_weight': weight}, 'seed': 0, 'error': None, 'val': 0.4}
      for rate in (0.01, 0.03) for weight in (0.1, 0.3, 1.0)]}
  return table, found


@pytest.fixture(scope='module')
def twelve(tmp_path_factory):
  """The workdir of many variants, with its page, and the page's text without tags."""
  work = case.write(tmp_path_factory.mktemp('twelve') / 'run', *along_sizes())
  comparison.write(work)
  html = re.sub(r'<svg.*?</svg>', '<svg>', work.report_html.read_text(), flags=re.S)
  return work, html, re.sub(r'\s+', ' ', re.sub(r'<[^>]*>', ' ', html.replace('&nbsp;', ' ')))


def test_the_page_says_what_compare_json_says(twelve):
  """The advice stands first; the table has accuracies, all three comparisons, and what is significant is coloured."""
  work, html, text = twelve
  whole = read_json(work.path / 'compare.json')
  assert text.index('Advice') < text.index(whole['advice']) < text.index('Variants and differences')
  uot = next(variant for variant in whole['variants'] if variant['name'] == 'uot 20')
  assert list(uot['summary']['differences']) == ['baseline', 'equal_compute', 'random']
  for difference in uot['summary']['differences'].values():
    low, high = difference['interval']
    shown = f'{100 * difference["mean"]:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]*'
    assert re.search(rf'class="n better" title="from {difference["to"]}, 3 seeds, p = [^"]*">{re.escape(shown)}<', html)
  assert 'from plain at equal compute' in text and 'from random choice' in text
  assert '35 of 36 runs have finished' in text and '<b>labels' not in html


def test_the_page_shows_trials_costs_classes_training_and_failures(twelve):
  work, html, text = twelve
  assert '0.03 0.01, 0.03 6 the largest value that was tried: try larger ones' in text
  assert 'source_weight 0.3 0.1, 0.3, 1.0 ' in text and text.count('value that was tried') == 1
  assert 'random 5, seed 2 =cmd: the loss is nan ( log )' in text and 'href="cells/random-5-seed-2/log.txt"' in html
  assert 'plain, equal compute 10 2,000 2 12' in text
  assert 'Single classes: uot 20 against plain, equal compute' in text and 'source 0 ' in text
  assert 'fraction of the training batches that is right: plain: 91.' in text
  assert html.count('<svg>') == 3, 'differences, curves along the axis, training'
  assert len(re.findall(r'href="cells/[^"]*/report.html"', html)) == 35


def test_classes_are_compared_over_the_same_seeds(twelve):
  """By hand, from the predictions of the cells."""
  work, _, _ = twelve
  found = class_gains(work.path, read_json(work.path / 'compare.json'))
  assert (found.variant, found.other, len(found.gains)) == ('uot 20', 'plain, equal compute', 4)
  gain = found.gains[0]
  number = int(gain.name.removeprefix('class '))
  rate = lambda name: sum(
      sum(label == predicted == number for label, predicted in zip(table['labels'], table['predictions'])) / 50
      for table in (read_json(work.path / f'cells/{name}-seed-{seed}' / 'predictions.json') for seed in range(3))) / 3
  assert gain.after == pytest.approx(rate('uot-20')) and gain.before == pytest.approx(rate('plain,-equal-compute'))
  assert gain.images == 50 and [name for name, _ in gain.sources][0] == f'source {number}'
  assert gain.gain == max(each.gain for each in found.gains)


def test_curves_along_an_axis(twelve):
  """One for each selection method; plain fine-tuning has no value where the field means nothing to it, and a variant
  that nothing else is like along the axis is left out."""
  work, _, _ = twelve
  whole = read_json(work.path / 'compare.json')
  curves = {curve.name: [point.value for point in curve.points] for curve in axis_curves(whole, {})}
  assert curves == {'plain': [None], 'plain, equal compute': [None], 'uot': [5, 10, 20, 40], 'random': [5, 10, 20, 40]}
  axes = comparison_figures.curves('selection.size', axis_curves(whole, {}), 'top1').axes[0]
  assert axes.get_xscale() == 'log' and [text.get_text() for text in axes.get_xticklabels()] == ['5', '10', '20', '40']
  wide = comparison_figures.Curve('two seeds', [comparison_figures.Point(5, 0.5, (0.0, 1.0))])
  low, high = comparison_figures.curves('selection.size', [*axis_curves(whole, {}), wide], 'top1').axes[0].get_ylim()
  assert 20 < low < high < 80, 'an interval that is much wider than all others reaches over the picture'
  named = [comparison_figures.Curve('uot', [comparison_figures.Point(value, 0.5, (0.4, 0.6)) for value in ('a', 'b')])]
  assert comparison_figures.curves('train.schedule', named, 'top1').axes[0].get_xscale() == 'linear'


def test_the_table_fits_a_terminal(twelve):
  """Whatever the names are; two long ones stay different."""
  work, _, _ = twelve
  text = comparison.markdown(read_json(work.path / 'compare.json'))
  lines = [line for line in text.splitlines() if line.startswith('|')]
  assert max(map(len, text.splitlines())) <= 120 and len({len(line) for line in lines}) == 1
  assert len(lines) == 14 and len({line.split('|')[1] for line in lines}) == 14
  assert re.search(r'\| plain +\| 3\d\.\d \[\d\d\.\d, \d\d\.\d\] \|', text) and '2/3' in text


def test_the_csv_has_a_line_for_each_run(twelve):
  work, _, _ = twelve
  rows = list(csv.DictReader(io.StringIO((work.path / 'compare.csv').read_text())))
  assert len(rows) == 36 and {row['seed'] for row in rows} == {'0', '1', '2'}
  failed = next(row for row in rows if row['error'])
  assert from_cell(failed['error']) == '=cmd: the loss is nan' != failed['error']
  assert (failed['variant'], failed['top1'], failed['images']) == ('random 5', '', '')
  uot = next(row for row in rows if row['variant'] == 'uot 5')
  assert (uot['images'], uot['seconds'], uot['tuned']) == ('2000', '12.5',
                                                           '{"source_weight": 0.3, "train.learning_rate": 0.03}')


def test_a_page_of_one_seed_and_of_none(tmp_path):
  """One seed has intervals over images alone, and no stars; where all failed, the page says why."""
  one = case.make({'plain': (case.PLAIN, case.drawn(0.4, 1, 100, 1)), 'uot': (case.UOT, case.drawn(0.6, 1, 100, 2))})
  work = case.write(tmp_path / 'one', *one)
  comparison.write(work)
  html = work.report_html.read_text()
  assert 'from plain, one seed: the interval is over other test images alone' in html and 'better" title' not in html
  assert 'of one seed, test images alone' in html
  table, _ = one
  for variant in table['variants']:
    variant['cells'][0] |= {'error': 'no such file', 'top1': None, 'val': None}
  work = case.write(tmp_path / 'none', table, {})
  comparison.write(work)
  html = work.report_html.read_text()
  assert html.count('no such file') == 2 and '<svg' not in html and 'No advice yet' in html
  assert 'No advice yet' in comparison.markdown(summarize(table, {}))


def test_a_value_at_the_edge_of_what_was_tried():
  assert comparison.edge([0.1, 0.3], 0.1).startswith('the smallest') and not comparison.edge([0.1, 0.3, 1.0], 0.3)
  assert not comparison.edge([0.1], 0.1) and not comparison.edge(['a', 'b'], 'b') and not comparison.edge([1, 2], None)


def test_a_folder_of_an_older_version_is_refused(tmp_path):
  work = Workdir(tmp_path / 'run', {'job': 'compare', 'seed': 0, 'train': {}})
  (work.path / 'results.json').write_text('{"rows": []}')
  with pytest.raises(ValueError, match='has no compare.json; run job compare again in another --workdir'):
    comparison.write(work)


def test_numbers_in_the_table():
  assert comparison_table.difference_text(None) == '' and comparison_table.accuracy_text({'top1': None}, 'top1') == ''
  difference = {'mean': 0.0214, 'interval': [-0.0004, 0.05], 'p_holm': 0.06}
  assert comparison_table.difference_text(difference) == '+2.1 [+0.0, +5.0]'
  assert comparison_table.difference_text({**difference, 'p_holm': 0.01}) == '+2.1 [+0.0, +5.0]*'
