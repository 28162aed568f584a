"""The page and the table of a study show the given numbers, whatever is missing and whatever names are used."""

import csv
import io
import re
import xml.etree.ElementTree

from etils import epath
import numpy as np
import pytest

from ft_jax.pages import study, study_csv, study_figures, study_values
from ft_jax.studies import study_results, transferability

HOSTILE = '<script>alert(1)</script> & "quoted" $^$'
EPOCHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)


def made(names=('folder:pets',), checkpoints=8, seeds=3, fine_tuned=None, source=True, numbered=True, dimensions=48,
         seed=0):
  """Made-up results of a study: FE rises and falls, FT rises, spectra flatten.

  Args:
    fine_tuned: how many checkpoints, from the first, are fine-tuned; None for all.
  """
  rng = np.random.default_rng(seed)
  epochs = EPOCHS[:checkpoints] if checkpoints <= len(EPOCHS) else range(1, checkpoints + 1)
  history = [{'name': f'epoch {epoch}' if numbered else f'part-{epoch}.pth',
              'epoch': float(epoch) if numbered else None,
              'step': 445 * epoch if numbered else None,
              'source': {'top1': 0.5 * (1 - 0.8 ** (k + 1)), 'loss': 4.5 - k / 4} if source else None}
             for k, epoch in enumerate(epochs)]
  tuned = checkpoints if fine_tuned is None else fine_tuned
  targets = []
  for name in names:
    rows = [_row(rng, k, k / max(1, checkpoints - 1), seeds, k < tuned, dimensions, history)
            for k in range(checkpoints)]
    targets.append(_target(rng, name, rows, tuned, history))
  return {'job': 'study', 'checkpoints': 'runs/pretrain', 'model': 'resnet18 (width 16)',
          'source': 'folder:tiny_imagenet' if source else None, 'metric': 'top1', 'seeds': list(range(seeds)),
          'threshold': 0.8, 'parts_of': 'centred', 'devices': '1 x cpu', 'history': history, 'targets': targets}


def _row(rng, k, t, seeds, tuned, dimensions, history):
  def accuracy(mean):
    return {split: np.clip(mean + error * rng.normal(size=seeds), 0, 1).tolist()
            for split, error in (('val', 0.03), ('test', 0.008))}

  level = 0.30 + 0.15 * np.sin(2.2 * t) + 0.003 * rng.normal()
  below = {'linear': 0, 'nearest_mean': 0.08, 'neighbours': 0.05, 'main': 0.03, 'residual': 0.12 - 0.05 * t}
  values = np.exp(-np.arange(dimensions) / (3 + 8 * t)) * 20 * (1 + t) + 0.02
  angles = lambda most: np.sort(np.clip(most * rng.random(9) + 5, 0, 90)).tolist()
  source = history[k]['source']
  return {
      'fe': {probe: {**accuracy(level - lower), 'chosen': [0.1] * seeds} for probe, lower in below.items()},
      'ft': accuracy(0.5 + 0.12 * t) if tuned else {'val': [], 'test': []},
      'spectrum': {'plain': _spectrum(np.append(8 * values[0], values[1:])), 'centred': _spectrum(values)},
      'change': {'since': history[k - 1]['name'], 'angles': angles(70 * (1 - t)), 'main': 0.9 * 0.6 ** k + 0.1,
                 'residual': 0.8 * 0.8 ** k + 0.3} if k else None,
      'fine_tuned': {'angles': angles(40), 'main': 0.4 + 0.1 * t, 'residual': 1.2 - 0.2 * t} if tuned else None,
      'scores': {'h_score': 3 + level + 0.02 * rng.normal(), 'h_score_regularised': 2 + level,
                 'leep': -2.0 + t if source else None,
                 'nce': -1.9 + 0.8 * t if source else None, 'logme': 0.6 + 0.1 * level, 'transrate': 1 + t}}


def _target(rng, name, rows, tuned, history):
  without_source = ['h_score', 'h_score_regularised', 'logme', 'transrate']
  scores = ['source accuracy', *study_values.SCORES] if history[0]['source'] else without_source
  agreement = lambda: {key: rng.uniform(-1, 1) if len(rows) > 2 else None
                       for key in ('kendall', 'weighted_kendall', 'pearson')}
  return {'name': name, 'classes': 37, 'train': 1148, 'val': 37, 'test': 185,
          'notes': ['There are 37 images of val to choose by.'],
          'rows': rows,
          'correlations': {score: {'fe': agreement(), 'ft': agreement() if tuned else None} for score in scores},
          'recommended': {'fe': _choice([row['fe']['linear'] for row in rows], history),
                          'ft': _choice([row['ft'] for row in rows], history) if tuned == len(rows) else None}}


def _spectrum(values):
  shares = np.cumsum(values) / values.sum()
  main = int(np.argmax(shares >= 0.8)) + 1
  parts = values / values.sum()
  return {'images': 185, 'dimensions': len(values), 'values': values.tolist(), 'main': main, 'share': shares[main - 1],
          'energy': (values[:main] ** 2).sum() / (values ** 2).sum(),
          'effective_rank': float(np.exp(-(parts * np.log(parts)).sum())),
          'stable_rank': (values ** 2).sum() / values[0] ** 2}


def _choice(accuracies, history):
  val, test = ([row[split] for row in accuracies] for split in ('val', 'test'))
  order = np.argsort(np.mean(val, axis=1))[::-1].tolist()
  best, last = order[0], len(history) - 1

  def over(row):
    gains = np.subtract(test[best], test[row])
    return {'row': row, 'margin': float(gains.mean()),
            'standard_error': float(np.hypot(gains.std() / len(gains) ** 0.5, 0.008))}

  seen = lambda of: abs(of['margin']) > 2 * of['standard_error']
  other = over(order[1]) if len(order) > 1 else None
  against = over(last) if best != last else other
  return {'row': best, 'last': over(last) if best != last else None, 'best_other': other,
          'difference': bool(against and seen(against)),
          'similar': [row for row in order[1:] if not seen(over(row))],
          'sentence': f'Start from {history[best]["name"]}: ' + (
              f'{100 * against["margin"]:.1f} ± {100 * against["standard_error"]:.1f} points above '
              f'{history[against["row"]]["name"]}.'
              if against else 'there is no other.')}


def page(tmp_path, results):
  path = epath.Path(tmp_path) / 'report.html'
  study.write(path, results, {'job': 'study', 'study': {'threshold': 0.8}})
  return path.read_text()


def test_names_that_look_like_code_are_text(tmp_path):
  """No name becomes a tag of the page or a formula in a figure, and none breaks a figure."""
  results = made([HOSTILE, 'folder:pets'], checkpoints=2, numbered=False)
  results |= {'checkpoints': HOSTILE, 'model': HOSTILE, 'source': HOSTILE}
  for checkpoint in results['history']:
    checkpoint['name'] = HOSTILE + checkpoint['name']
  results['targets'][0]['notes'] = [HOSTILE]
  results['targets'][0]['recommended']['fe']['sentence'] = HOSTILE
  text = page(tmp_path, results)
  assert '<script' not in text and '&lt;script&gt;' in text
  pictures = re.findall('<svg.*?</svg>', text, re.DOTALL)
  assert len(pictures) == 2 * (4 + 2 + 4 + 3 + 6)
  for picture in pictures:
    xml.etree.ElementTree.fromstring(picture)


@pytest.mark.parametrize('case', [dict(checkpoints=1, seeds=1), dict(checkpoints=3, source=False, fine_tuned=0),
                                  dict(fine_tuned=1)])
def test_what_is_missing_is_left_out(tmp_path, case):
  """What is not measured (yet) leaves a gap; the page never shows None or nan."""
  results = made(**case)
  if case.get('fine_tuned') == 1:
    results['targets'][0]['rows'][2:] = [{}] * 6
    results['targets'][0]['recommended'] = {'fe': None, 'ft': None}
    results['targets'][0]['correlations'] = {}
  text = re.sub('<svg.*?</svg>|<style>.*?</style>', '', page(tmp_path, results), flags=re.DOTALL)
  shown = re.sub('<[^>]*>', ' ', text)
  assert 'None' not in shown and 'nan' not in shown
  assert ('Not measured.' in shown) == (case.get('fine_tuned') == 0)
  assert ('Change by fine-tuning' in shown) == (case.get('fine_tuned') != 0)
  assert ('pre-trained on' in shown) == case.get('source', True)
  assert ('2 of 8 checkpoints measured so far; no recommendation yet.' in shown) == (case.get('fine_tuned') == 1)
  assert ('nothing to compare with' in shown) == (case['checkpoints'] == 1 if 'checkpoints' in case else False)


def test_the_answer_comes_first(tmp_path):
  """Checkpoint, sentence, test accuracy and margin precede all figures; a margin against the choice is shown as
  such."""
  results = made(checkpoints=4)
  target = results['targets'][0]
  target['rows'][2]['fe']['linear']['test'] = [0.40, 0.42, 0.44]
  target['recommended']['fe'] = {'row': 2, 'last': {'row': 3, 'margin': 0.031, 'standard_error': 0.0049},
                                 'best_other': {'row': 1, 'margin': -0.002, 'standard_error': 0.011},
                                 'difference': True, 'similar': [1],
                                 'sentence': 'Start from epoch 3: 3.1 ± 0.5 points above the last one.'}
  found = study.answer(results, target, 'fe')
  assert (found['name'], found['verdict'], found['badge']) == ('epoch 3', 'clear', 'better than the last')
  assert found['accuracy'] == '42.0 ± 1.2'
  assert found['second'] == ('epoch 2', '-0.2 ± 1.1 points')
  assert found['marks'] == [('epoch 1', 'other'), ('epoch 2', 'similar'), ('epoch 3', 'best'), ('epoch 5', 'other')]
  target['recommended']['fe']['best_other']['row'] = 3
  # The best other one is the last, which the sentence is about.
  assert study.answer(results, target, 'fe')['second'] is None
  target['recommended']['fe']['best_other']['row'] = 1
  text = page(tmp_path, results)
  first = text[:text.index('<svg')]
  for words in ('Start from epoch 3: 3.1 ± 0.5 points above the last one.', '42.0 ± 1.2', '-0.2 ± 1.1 points',
                'better than the last'):
    assert words in first
  target['recommended']['fe']['last']['margin'] = -0.031
  assert study.answer(results, target, 'fe')['verdict'] == 'against'
  target['recommended']['fe']['difference'] = False
  assert study.answer(results, target, 'fe')['badge'] == 'no significant difference'
  target['recommended']['fe'] |= {'row': 3, 'last': None, 'difference': True}
  found = study.answer(results, target, 'fe')
  # If the last one is recommended, the sentence is about the best other one.
  assert (found['second'], found['verdict']) == (None, 'against')


def test_curves_hold_the_numbers_with_gaps_and_bands():
  """Means in percent, one standard error (n - 1) to each side, gaps where nothing is measured, and a star."""
  history = made(checkpoints=4)['history']
  values = [[0.1, 0.2, 0.3], [], [0.5], [0.4, 0.6]]
  figure = study_figures.over_checkpoints(history, 'title',
                                          lambda axes: study_figures.curve(axes, values, 'C0', 'name', 3), (4, 3))
  means, star = figure.axes[0].lines
  np.testing.assert_allclose(means.get_ydata(), [20, np.nan, 50, 50])
  assert (star.get_xdata(), star.get_ydata()) == ([3], [50])
  band, bars = figure.axes[0].collections
  half = 100 * 0.1 / 3 ** 0.5
  np.testing.assert_allclose(bars.get_segments()[0][:, 1], [20 - half, 20 + half])
  last = band.get_paths()[-1].vertices
  np.testing.assert_allclose(sorted(set(last[last[:, 0] == 3, 1])), [40, 60])
  assert not any((path.vertices[:, 0] == 1).any() for path in band.get_paths())
  assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ['5', '3', '2', '1']


@pytest.mark.parametrize('case', [dict(checkpoints=20), dict(checkpoints=20, numbered=False), dict(checkpoints=3)])
def test_legends_hide_nothing_and_ticks_do_not_touch(case):
  history, target = made(**case)['history'], made(**case)['targets'][0]

  def draw(axes):
    for probe in ('linear', 'neighbours', 'nearest_mean'):
      study_figures.curve(axes, [row['fe'][probe]['test'] for row in target['rows']], 'C0', study_values.PROBES[probe])

  for size in study_figures.SIZES.values():
    figure = study_figures.over_checkpoints(history, 'title', draw, size)
    figure.draw_without_rendering()
    box = figure.axes[0].get_window_extent()
    ticks = [tick.get_window_extent() for tick in figure.axes[0].get_xticklabels()]
    assert not any(a.overlaps(b) for a, b in zip(ticks, ticks[1:]))
    assert box.height > 0.3 * figure.bbox.height
    legend = figure.legends[0].get_window_extent()
    assert not legend.overlaps(box) and legend.y1 <= min(tick.y0 for tick in ticks)
    if size is study_figures.SIZES[2]:
      assert legend.x1 <= figure.bbox.x1


def test_singular_values_end_where_the_main_part_does():
  """One curve per checkpoint, later ones lighter; a dot at k; values that are zero up to rounding are left out."""
  results = made(checkpoints=20, dimensions=3000)
  target = results['targets'][0]
  spectrum = target['rows'][0]['spectrum']['centred']
  spectrum['values'][100:] = [1e-9] * 2900
  spectrum['main'] = 7
  target['rows'][1] = {}
  target['rows'][2]['spectrum']['centred']['values'] = [0.0] * 3000
  figure = study_figures.singular_values(results, target, 'centred')
  curves, dots = figure.axes[0].lines[::2], figure.axes[0].lines[1::2]
  assert len(curves) == len(dots) == 18
  x, y = curves[0].get_data()
  assert x[-1] <= 100 and len(curves[1].get_xdata()) <= 150 and curves[1].get_xdata()[-1] == 3000
  np.testing.assert_array_equal(y, np.asarray(spectrum['values'])[x - 1])
  assert dots[0].get_xydata().tolist() == [[7, spectrum['values'][6]]]
  lightness = [np.dot(curve.get_color()[:3], (0.2126, 0.7152, 0.0722)) for curve in curves]
  assert (np.diff(lightness) > 0).all()


def test_all_that_a_study_measures_has_a_name():
  assert list(study_values.SCORES) == list(transferability.SCORES)
  assert set(study_values.PROBES) == set(study_results.PROBES)


def test_table():
  """One row per target and checkpoint; means and errors as in numpy; empty where not measured; no formulas."""
  results = made(['folder:pets', '=1+1'], checkpoints=3, fine_tuned=2)
  results['history'][0]['name'] = '-best.pth'
  results['targets'][1]['rows'][0] = {}
  results['targets'][0]['rows'][1]['ft']['test'] = [0.5]
  text = study_csv.text(results)
  assert 'nan' not in text and 'None' not in text
  rows = list(csv.DictReader(io.StringIO(text)))
  assert [(row['target'], row['checkpoint']) for row in rows] == [
      (target, checkpoint) for target in ('folder:pets', "'=1+1")
      for checkpoint in ("'-best.pth", 'epoch 2', 'epoch 3')]
  first, second, third, lost = rows[:4]
  measured = results['targets'][0]['rows'][0]
  for probe in study_values.PROBES:
    for split in ('val', 'test'):
      values = measured['fe'][probe][split]
      assert float(first[f'fe_{probe}_{split}']) == pytest.approx(np.mean(values))
      assert float(first[f'fe_{probe}_{split}_standard_error']) == pytest.approx(np.std(values, ddof=1) / 3 ** 0.5)
  assert (first['epoch'], first['step'], first['fe_seeds'], first['change_main']) == ('1', '445', '3', '')
  assert (second['ft_seeds'], second['ft_test'], second['ft_test_standard_error']) == ('1', '0.5', '')
  assert (third['ft_seeds'], third['ft_test'], third['fine_tuned_residual']) == ('0', '', '')
  assert float(second['change_median_angle']) == pytest.approx(
      np.median(results['targets'][0]['rows'][1]['change']['angles']))
  spectrum, scores = measured['spectrum']['plain'], measured['scores']
  assert int(first['plain_main']) == spectrum['main'] and float(first['plain_stable_rank']) == pytest.approx(
      spectrum['stable_rank'])
  assert float(first['logme']) == pytest.approx(scores['logme'])
  assert {lost[key] for key in lost if key.startswith(('fe_linear', 'plain', 'change', 'logme'))} == {''}
  chosen = [row['recommended_fe'] for row in rows[:3]]
  assert chosen.count('1') == 1 and chosen.index('1') == results['targets'][0]['recommended']['fe']['row']
