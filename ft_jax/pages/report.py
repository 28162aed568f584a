"""The report of a run: one file that opens offline and shows what was selected, how training went and how good it
is."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
import numpy as np

from ft_jax import parallel
from ft_jax.pages import page
from ft_jax.pages.page import BLUE, GREEN, GREY, RED
from ft_jax.workdir import Workdir, write_text
from selection import fonts

# With more classes than this, axes have no class names.
_NAMED = 50


class ChosenUnit(NamedTuple):
  """A selected unit of the pool.

  name: of the unit.
  score: as text; '' where the selection method has none.
  images: how many it has.
  drawn_by: target classes that its transported mass goes to, with the fraction of it.
  examples: JPEG files.
  """
  name: str
  score: str
  images: int
  drawn_by: Sequence[tuple[str, float]]
  examples: Sequence[bytes]


class SelectionSection(NamedTuple):
  """What the report says about the selection.

  how: a sentence on how it was made.
  by: the unit, singular.
  noun: the unit, plural.
  measure: what the scores are; '' where there are none.
  chosen: the selected units, best first.
  ranking: a figure of the scores.
  target: for comparison, the names of the target's classes with JPEG files of examples.
  """
  how: str
  by: str
  noun: str
  measure: str
  chosen: Sequence[ChosenUnit]
  ranking: Figure | None
  target: Sequence[tuple[str, Sequence[bytes]]]


class DuplicatePair(NamedTuple):
  """Two images that show the same: how similar they are, as text, and the split, id and JPEG file of each."""
  kind: str
  copy: tuple[str, str, bytes]
  original: tuple[str, str, bytes]


def write(work: Workdir, selected: SelectionSection | None = None, duplicates: Sequence[DuplicatePair] = ()) -> None:
  """Writes report.html from the files of a finished run.

  Args:
    work: the workdir of the run.
    selected: the section on the selection; None leaves it out.
    duplicates: pairs of images that training and evaluation share.
  """
  if not parallel.is_main():
    return
  results, config = page.results_and_config(work)
  evaluation = results['test'] or results['val']
  write_text(work.report_html, page.render(
      'report.html.jinja', title=page.run_title(config), results=results, evaluation=evaluation,
      split='test' if results['test'] else 'val', duplicates=duplicates, selected=selected,
      ranking=page.svg(selected.ranking) if selected and selected.ranking else '',
      curves=page.svg(curves(work.metrics(), results['best_step'])),
      per_class=page.svg(per_class(evaluation['per_class'])), confusion=page.svg(confusion(evaluation)),
      confused=most_confused(evaluation), settings=page.setting_rows(config)))


def curves(metrics: Sequence[Mapping[str, float]], best_step: int) -> Figure:
  """Loss, accuracy and learning rate over the steps; the best checkpoint is marked."""
  terms = {key for m in metrics for key in m if key.startswith('train/loss_')}
  added = sorted(terms - {'train/loss_target', 'train/loss_source'})
  figure = Figure(figsize=(11 + 3.6 * bool(added), 3.4), layout='constrained')
  loss, accuracy, rate, *more = figure.subplots(1, 3 + bool(added))
  lines = [(loss, 'train/loss_target', 'target, training', BLUE), (loss, 'train/loss_source', 'source, training', GREY),
           (loss, 'val/loss', 'val', RED), (accuracy, 'train/top1_target', 'target, training', BLUE),
           (accuracy, 'train/top1_source', 'source, training', GREY), (accuracy, 'val/top1', 'val', RED),
           (rate, 'learning_rate', 'learning rate', BLUE)]
  lines += [(more[0], key, key.removeprefix('train/loss_'), f'C{k}') for k, key in enumerate(added)]
  for axes, key, label, color in lines:
    points = [(m['step'], m[key]) for m in metrics if key in m]
    if points:
      axes.plot(*zip(*points), color=color, label=label, linewidth=1.6 if 'val' in key else 1.0,
                marker='o' if 'val' in key else None, markersize=3)
  titles = ('Cross-entropy', 'Top-1 accuracy', 'Learning rate of the backbone', 'Loss terms added by methods')
  for axes, title in zip((loss, accuracy, rate, *more), titles):
    axes.axvline(best_step, color=GREEN, linewidth=0.8, linestyle='--', label='best checkpoint')
    axes.set(title=title, xlabel='step')
    axes.spines[['top', 'right']].set_visible(False)
    axes.set_ylim(bottom=0)
  accuracy.set_ylim(0, 1.02)
  # One legend for both panels, outside of the axes so that it hides no curve.
  figure.legend(*loss.get_legend_handles_labels(), loc='outside lower left', ncols=4, frameon=False, fontsize=8)
  return figure


def per_class(rows: Sequence[Mapping[str, Any]]) -> Figure:
  """The accuracy of each class, lowest first; a histogram if there are too many classes for names."""
  rows = sorted((row for row in rows if row['images']), key=lambda row: row['right'] / row['images'])
  values = np.array([row['right'] / row['images'] for row in rows])
  if len(rows) > _NAMED:
    figure = Figure(figsize=(7, 3), layout='constrained')
    axes = figure.subplots()
    axes.hist(values, np.linspace(0, 1, 21).tolist(), color=BLUE)
    axes.set(xlabel='accuracy of a class', ylabel='classes', xlim=(0, 1))
  else:
    figure = Figure(figsize=(7, 0.8 + 0.2 * len(rows)), layout='constrained')
    axes = figure.subplots()
    axes.barh(range(len(rows)), values, color=BLUE)
    names = fonts.labels((row['name'] for row in rows), 28)
    labels = [f'{name} ({row["right"]}/{row["images"]})' for name, row in zip(names, rows)]
    axes.set_yticks(range(len(rows)), labels, fontsize=8, fontfamily=fonts.families(names))
    axes.set(xlabel='accuracy', xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6))
  axes.spines[['top', 'right']].set_visible(False)
  return figure


def confusion(evaluation: Mapping[str, Any]) -> Figure:
  """The confusion matrix; each row holds fractions of its true class."""
  names = [row['name'] for row in evaluation['per_class']]
  matrix = np.zeros((len(names), len(names)))
  for true, predicted, count in evaluation['confusion']:
    matrix[true, predicted] = count
  matrix /= np.maximum(matrix.sum(1, keepdims=True), 1)
  named = len(names) <= _NAMED
  side = max(4.0, 1.6 + 0.19 * len(names)) if named else 6.5
  figure = Figure(figsize=(side + 0.6, side), layout='constrained')
  axes = figure.subplots()
  image = axes.imshow(matrix, cmap='Blues', vmin=0, vmax=1, interpolation='nearest')
  figure.colorbar(image, ax=axes, shrink=0.6, label='fraction of the true class')
  axes.set(xlabel='predicted', ylabel='true')
  if named:
    short = fonts.labels(names, 20)
    axes.set_xticks(range(len(names)), short, rotation=90, fontsize=7, fontfamily=fonts.families(short))
    axes.set_yticks(range(len(names)), short, fontsize=7, fontfamily=fonts.families(short))
  return figure


def most_confused(evaluation: Mapping[str, Any], most: int = 8) -> list[tuple[str, str, int, int]]:
  """The most frequent errors: (true class, predicted class, count, images of the true class)."""
  rows = evaluation['per_class']
  wrong = [(count, true, predicted) for true, predicted, count in evaluation['confusion'] if true != predicted]
  return [(rows[true]['name'], rows[predicted]['name'], count, rows[true]['images'])
          for count, true, predicted in sorted(wrong, reverse=True)[:most]]
