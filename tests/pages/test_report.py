"""The page is safe whatever the class names, and its figures show the given numbers."""

import xml.etree.ElementTree

from matplotlib.figure import Figure
import numpy as np
import pytest

from ft_jax.metrics import MetricsWriter
from ft_jax.pages import page, report
from ft_jax.workdir import Workdir, write_results

HOSTILE = '<script>alert(1)</script> & "quoted" $^$'


def evaluation(confusion, names):
  confusion = np.asarray(confusion)
  return {'top1': np.trace(confusion) / confusion.sum(), 'mean_per_class': 0.5, 'loss': 1.25,
          'images': int(confusion.sum()),
          'per_class': [{'name': name, 'images': int(row.sum()), 'right': int(row[k])}
                        for k, (name, row) in enumerate(zip(names, confusion))],
          'confusion': [[int(t), int(p), int(confusion[t, p])] for t, p in np.argwhere(confusion)]}


@pytest.fixture
def work(tmp_path) -> Workdir:
  config = {'job': 'finetune', 'target': {'name': f'folder:{HOSTILE}'}, 'seed': 0}
  work = Workdir(tmp_path / 'run', config)
  writer = MetricsWriter(work, 0)
  writer.write(1, {'train/loss_target': 2.0, 'train/top1_target': 0.1, 'learning_rate': 0.01})
  writer.write(2, {'train/loss_target': 1.0, 'train/top1_target': 0.4, 'val/loss': 1.5, 'val/top1': 0.5,
                   'learning_rate': 0.001})
  writer.close()
  names = [HOSTILE, 'plain']
  write_results(work, {
      'job': 'finetune', 'metric': 'top1', 'best_step': 2, 'steps': 2, 'seed': 0, 'devices': '1 x cpu',
      'batch_norm': 'x',
      'versions': {'jax': '0'}, 'command': ['main.py'],
      'val': evaluation([[1, 1], [0, 2]], names), 'test': evaluation([[3, 1], [2, 4]], names),
      'target': {'train': 8, 'val': 4, 'test': 10, 'classes': 2}, 'source': {'name': 'pool', 'images': 9, 'classes': 3},
      'selection': {'method': 'uot', 'by': 'class', 'noun': 'classes', 'units': 1, 'classes': [HOSTILE], 'images': 5}})
  return work


def test_class_names_are_text(work):
  """A class named like a tag does not become one, neither in the page nor in a figure."""
  chosen = [report.ChosenUnit(HOSTILE, '50.00%', 5, [(HOSTILE, 1.0)], [b'jpeg'])]
  figure = Figure()
  figure.subplots().set_title(HOSTILE.replace('$', r'\$'))
  report.write(work,
               report.SelectionSection(HOSTILE, 'class', 'classes', 'share', chosen, figure, [(HOSTILE, [b'jpeg'])]))
  text = work.report_html.read_text()
  assert '<script' not in text and '&lt;script&gt;' in text
  assert '70.0 %' in text and '1.250' in text  # 7 of 10 right


def test_pictures_are_whole_and_hold_the_numbers(work):
  results = work.results()
  pictures = [report.curves(work.metrics(), 2), report.per_class(results['test']['per_class']),
              report.confusion(results['test'])]
  for picture in pictures:
    xml.etree.ElementTree.fromstring(page.svg(picture))
  accuracy = pictures[0].axes[1]
  assert [line.get_ydata() for line in accuracy.lines if line.get_label() == 'val'][0] == (0.5,)
  assert [bar.get_width() for bar in pictures[1].axes[0].patches] == pytest.approx([4 / 6, 3 / 4])  # lowest first
  np.testing.assert_allclose(pictures[2].axes[0].images[0].get_array(), [[0.75, 0.25], [1 / 3, 2 / 3]])
  assert report.most_confused(results['test'])[0] == ('plain', HOSTILE, 2, 6)


def test_many_classes_have_no_names_at_the_axes():
  names = [f'class {k}' for k in range(200)]
  many = evaluation(np.eye(200, dtype=int) * 3, names)
  assert len(report.per_class(many['per_class']).axes[0].patches) == 20
  assert len(report.confusion(many).axes[0].get_xticks()) < 20


def test_means_with_errors():
  """Standard errors of the mean (n - 1)."""
  assert (page.format_percent([0.5, 0.6, 0.7]), page.format_percent([0.123])) == ('60.0 ± 5.8', '12.3')
  assert page.format_percent([0.01, 0.03], sign=True) == '+2.0 ± 1.0'
