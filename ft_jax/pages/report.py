"""report.html: one file that opens offline and shows what was selected, how the training went and what came of it."""

import base64
from collections.abc import Mapping, Sequence
import io
import json
import math
import pathlib
from typing import Any, NamedTuple

from etils import epath
import jinja2
from matplotlib.figure import Figure
import numpy as np

from ft_jax import parallel
from ft_jax.workdir import Workdir, write_text
from selection import fonts

BLUE, RED, GREEN, GREY = '#2563eb', '#dc2626', '#059669', '#94a3b8'
# Up to so many classes have their names at the axes of a picture.
_NAMED = 50


class ChosenUnit(NamedTuple):
  """A unit of the pool that was chosen: its score ('' where it says nothing), what draws it, JPEG files of examples."""
  name: str
  score: str
  images: int
  drawn_by: Sequence[tuple[str, float]]
  examples: Sequence[bytes]


class SelectionSection(NamedTuple):
  """What was selected: a sentence on how, the unit (one, several), what its scores are, the chosen, a picture, the target by class."""
  how: str
  by: str
  noun: str
  measure: str
  chosen: Sequence[ChosenUnit]
  ranking: Figure | None
  target: Sequence[tuple[str, Sequence[bytes]]]


class DuplicatePair(NamedTuple):
  """Two images that are one: how alike they are in words, and of each its split, its id and a JPEG file."""
  kind: str
  copy: tuple[str, str, bytes]
  original: tuple[str, str, bytes]


def write(work: Workdir, selected: SelectionSection | None = None, duplicates: Sequence[DuplicatePair] = ()) -> None:
  """Writes report.html from the files of a finished run, what was selected, and pairs of images that training and evaluation shared."""
  if not parallel.is_main():
    return
  results, config = work.results(), json.loads(work.config_json.read_text())
  evaluation = results['test'] or results['val']
  page = template('report.html.jinja').render(
      title=_title(config), results=results, evaluation=evaluation, split='test' if results['test'] else 'val',
      duplicates=duplicates, selected=selected, ranking=svg(selected.ranking) if selected and selected.ranking else '',
      curves=svg(curves(work.metrics(), results['best_step'])), per_class=svg(per_class(evaluation['per_class'])),
      confusion=svg(confusion(evaluation)), confused=most_confused(evaluation), settings=setting_rows(config))
  write_text(work.report_html, page)


def write_comparison(work: Workdir) -> None:
  """Writes report.html of a comparison from its results."""
  if not parallel.is_main():
    return
  results, config = work.results(), json.loads(work.config_json.read_text())
  rows = [{'method': row['method'], 'top1': spoken(row['top1']), 'mean_per_class': spoken(row['mean_per_class']),
           'gain': spoken(row['gain'], sign=True) if k else ''} for k, row in enumerate(results['rows'])]
  page = template('comparison.html.jinja').render(
      title=f'Selection methods on {config["target"]["name"]}', results=results, rows=rows, dots=svg(dots(results['rows'])),
      settings=setting_rows(config))
  write_text(work.report_html, page)


def write_stability(path: epath.Path, results: Mapping[str, Any], config: Mapping[str, Any]) -> None:
  """Writes the page of job stability from its results and the config of the run that it measured."""
  if not parallel.is_main():
    return
  kernels = [row for row in results['parameters'] if row['name'].endswith('/kernel')]
  page = template('stability.html.jinja').render(
      title=f'Stability: {_title(config)}', results=results, kernels=kernels,
      noise=svg(noise(results['noise'])) if results['noise'] else '',
      distance=svg(distances(kernels)) if results['start']['from'] else '',
      trace=svg(traces(kernels)) if results['trace'] else '', vectors=svg(vectors(results['trace'])) if results['trace'] else '')
  write_text(path, page)


def with_error(spread: Mapping[str, float | None]) -> str:
  """Mean and standard error as text, to the digits that the error leaves: `0.00123 ± 0.00004`, `1,230 ± 40`; the mean alone of one draw."""
  mean, error = spread['mean'], spread['standard_error']
  if not error:
    return f'{mean:.4g}'
  digits = max(0, 1 - math.floor(math.log10(error)))
  return f'{mean:,.{digits}f} ± {error:,.{digits}f}' if digits < 9 else f'{mean:.3e} ± {error:.1e}'


def comparison_table(results: Mapping[str, Any]) -> str:
  """The results of a comparison as a Markdown table: means over the seeds and their standard errors, in percent."""
  split, first = results['split'], results['rows'][0]['method']
  lines = [f'| selection | {split} top-1, % | {split} mean per class, % | top-1 against {first}, by seed |', '|---|---|---|---|']
  for k, row in enumerate(results['rows']):
    gain = spoken(row['gain'], sign=True) if k else ''
    lines.append(f'| {row["method"]} | {spoken(row["top1"])} | {spoken(row["mean_per_class"])} | {gain} |')
  return '\n'.join(lines)


def spoken(values: Sequence[float], sign: bool = False) -> str:
  """Mean and standard error of the mean in percent: `41.2 ± 0.8`; the mean alone of one value."""
  mean = f'{100 * np.mean(values):{"+" if sign else ""}.1f}'
  return mean if len(values) < 2 else f'{mean} ± {100 * np.std(values, ddof=1) / len(values) ** 0.5:.1f}'


def dots(rows: Sequence[Mapping[str, Any]]) -> Figure:
  """Top-1 of every run of a comparison by method; runs of one seed are joined."""
  figure = Figure(figsize=(1.6 + 1.5 * len(rows), 3.4), layout='constrained')
  axes = figure.subplots()
  for values in zip(*(row['top1'] for row in rows)):
    axes.plot(range(len(rows)), [100 * v for v in values], color=GREY, marker='o', markerfacecolor=BLUE, markeredgecolor=BLUE,
              linewidth=0.8)
  for k, row in enumerate(rows):
    axes.hlines(100 * np.mean(row['top1']), k - 0.18, k + 0.18, color=RED, linewidth=2, label='mean' if k == 0 else None)
  axes.set_xticks(range(len(rows)), [row['method'] for row in rows])
  axes.set_ylabel('top-1, %')
  axes.margins(x=0.2)
  axes.legend(frameon=False, fontsize=8)
  axes.spines[['top', 'right']].set_visible(False)
  return figure


def noise(results: Mapping[str, Any]) -> Figure:
  """The rise of the loss in each perturbed network, their mean with its standard error, and what the trace says of it."""
  figure = Figure(figsize=(9, 1.9), layout='constrained')
  axes = figure.subplots()
  rises = results['differences']
  axes.scatter(rises, np.zeros(len(rises)), color=BLUE, alpha=0.6, label='a perturbed network')
  axes.errorbar(results['mean'], 1, xerr=results['standard_error'], color=RED, marker='o', capsize=4, label='mean, standard error')
  if results['by_trace'] is not None:
    axes.axvline(results['by_trace'], color=GREEN, linewidth=1, linestyle='--', label='σ² / 2 · trace of the Hessian')
  axes.axvline(0, color=GREY, linewidth=0.8)
  axes.set(xlabel='rise of the loss', ylim=(-0.8, 1.8), yticks=[])
  axes.spines[['top', 'right', 'left']].set_visible(False)
  figure.legend(loc='outside upper left', ncols=3, frameon=False, fontsize=8)
  return figure


def distances(rows: Sequence[Mapping[str, Any]]) -> Figure:
  """How far each kernel of the backbone went, and as a part of the norm that it began with."""
  rows = [row for row in rows if row['relative'] is not None]
  figure = Figure(figsize=(11, 4.2), layout='constrained')
  far, relative = figure.subplots(1, 2)
  names = fonts.labels((row['name'].removesuffix('/kernel') for row in rows), 28)
  far.bar(range(len(rows)), [row['distance'] for row in rows], color=BLUE)
  far.set_title('Distance from the start', fontsize=10)
  relative.bar(range(len(rows)), [100 * row['relative'] for row in rows], color=BLUE)
  relative.set_title('In percent of the norm at the start', fontsize=10)
  for axes in (far, relative):
    axes.set_xticks(range(len(rows)), names, rotation=90, fontsize=7 if len(rows) < 40 else 5)
    axes.spines[['top', 'right']].set_visible(False)
  return figure


def traces(rows: Sequence[Mapping[str, Any]]) -> Figure:
  """The trace of each kernel's block of the Hessian, with standard errors; logarithmic where all are above zero."""
  figure = Figure(figsize=(5.6, 4.2), layout='constrained')
  axes = figure.subplots()
  means = [row['trace']['mean'] for row in rows]
  errors = [row['trace']['standard_error'] or 0.0 for row in rows]
  axes.errorbar(range(len(rows)), means, yerr=errors, fmt='o', color=BLUE, ecolor=GREY, markersize=4, capsize=2)
  if all(mean > 2 * error for mean, error in zip(means, errors)):
    axes.set_yscale('log')
  else:
    axes.axhline(0, color=GREY, linewidth=0.8)
  axes.set_xticks(range(len(rows)), fonts.labels((row['name'].removesuffix('/kernel') for row in rows), 28), rotation=90,
                  fontsize=7 if len(rows) < 40 else 5)
  axes.set_title('Trace of the Hessian by kernel', fontsize=10)
  axes.spines[['top', 'right']].set_visible(False)
  return figure


def vectors(results: Mapping[str, Any]) -> Figure:
  """The estimate of the whole trace as random vectors come, with its standard error."""
  figure = Figure(figsize=(5.6, 4.2), layout='constrained')
  axes = figure.subplots()
  values = np.asarray(results['by_vector'])
  counts = np.arange(1, len(values) + 1)
  means = np.cumsum(values) / counts
  axes.plot(counts, values, 'o', color=GREY, markersize=3, label='a vector')
  axes.plot(counts, means, color=BLUE, label='mean so far')
  if len(values) > 1:
    errors = np.array([np.std(values[:n], ddof=1) / n ** 0.5 for n in counts[1:].tolist()])
    axes.fill_between(counts[1:], means[1:] - errors, means[1:] + errors, color=BLUE, alpha=0.2, linewidth=0, label='standard error')
  axes.set_title('Trace of the Hessian, all parameters', fontsize=10)
  axes.set_xlabel('random vectors')
  axes.legend(frameon=False, fontsize=8)
  axes.spines[['top', 'right']].set_visible(False)
  return figure


def curves(metrics: Sequence[Mapping[str, float]], best_step: int) -> Figure:
  """Loss, accuracy and learning rate over the steps; the best checkpoint is marked."""
  added = sorted({key for m in metrics for key in m if key.startswith('train/loss_')} - {'train/loss_target', 'train/loss_source'})
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
  titles = ('Cross-entropy', 'Top-1 accuracy', 'Learning rate of the backbone', 'What methods add to the loss')
  for axes, title in zip((loss, accuracy, rate, *more), titles):
    axes.axvline(best_step, color=GREEN, linewidth=0.8, linestyle='--', label='best checkpoint')
    axes.set(title=title, xlabel='step')
    axes.spines[['top', 'right']].set_visible(False)
    axes.set_ylim(bottom=0)
  accuracy.set_ylim(0, 1.02)
  # One for both panels, where it hides no curve.
  figure.legend(*loss.get_legend_handles_labels(), loc='outside lower left', ncols=4, frameon=False, fontsize=8)
  return figure


def per_class(rows: Sequence[Mapping[str, Any]]) -> Figure:
  """The accuracy of each class, lowest first; a histogram where there are too many for names."""
  rows = sorted((row for row in rows if row['images']), key=lambda row: row['right'] / row['images'])
  values = np.array([row['right'] / row['images'] for row in rows])
  if len(rows) > _NAMED:
    figure = Figure(figsize=(7, 3), layout='constrained')
    axes = figure.subplots()
    axes.hist(values, np.linspace(0, 1, 21), color=BLUE)
    axes.set(xlabel='accuracy of a class', ylabel='classes', xlim=(0, 1))
  else:
    figure = Figure(figsize=(7, 0.8 + 0.2 * len(rows)), layout='constrained')
    axes = figure.subplots()
    axes.barh(range(len(rows)), values, color=BLUE)
    names = fonts.labels((row['name'] for row in rows), 28)
    axes.set_yticks(range(len(rows)), [f'{name} ({row["right"]}/{row["images"]})' for name, row in zip(names, rows)], fontsize=8,
                    fontfamily=fonts.families(names))
    axes.set(xlabel='accuracy', xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6))
  axes.spines[['top', 'right']].set_visible(False)
  return figure


def confusion(evaluation: Mapping[str, Any]) -> Figure:
  """The confusion matrix, each row as parts of its true class."""
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
  figure.colorbar(image, ax=axes, shrink=0.6, label='part of the true class')
  axes.set(xlabel='predicted', ylabel='true')
  if named:
    short = fonts.labels(names, 20)
    axes.set_xticks(range(len(names)), short, rotation=90, fontsize=7, fontfamily=fonts.families(short))
    axes.set_yticks(range(len(names)), short, fontsize=7, fontfamily=fonts.families(short))
  return figure


def most_confused(evaluation: Mapping[str, Any], most: int = 8) -> list[tuple[str, str, int, int]]:
  """The most frequent errors: (true class, predicted class, how often, of how many)."""
  rows = evaluation['per_class']
  wrong = sorted(((count, true, predicted) for true, predicted, count in evaluation['confusion'] if true != predicted), reverse=True)
  return [(rows[true]['name'], rows[predicted]['name'], count, rows[true]['images']) for count, true, predicted in wrong[:most]]


def _title(config: Mapping[str, Any]) -> str:
  if config['job'] == 'pretrain':
    return f'Pre-training on {config["source"]["name"]}'
  return f'Fine-tuning on {config["target"]["name"]}'


def setting_rows(config: Mapping[str, Any], prefix: str = 'config') -> list[tuple[str, str]]:
  """Every field of a config with its value, as text."""
  return [row for key, value in config.items()
          for row in (setting_rows(value, f'{prefix}.{key}') if isinstance(value, dict) else [(f'{prefix}.{key}', str(value))])]


def svg(figure: Figure) -> str:
  """The figure as SVG text, with a fixed salt so that the same figure gives the same text."""
  import matplotlib

  text = io.StringIO()
  with matplotlib.rc_context({'svg.hashsalt': 'report'}):
    figure.savefig(text, format='svg', metadata={'Date': None})
  # Without the XML head, which is not part of a page.
  return text.getvalue()[text.getvalue().index('<svg'):]


def template(name: str) -> jinja2.Template:
  """A page of templates/, with the filters that pages share."""
  # Class names come from folders and files: everything is escaped but the pictures made here.
  environment = jinja2.Environment(loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / 'templates'), autoescape=True,
                                   trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
  environment.filters['with_error'] = with_error
  environment.filters['percent'] = lambda value: f'{100 * value:.1f} %'
  environment.filters['jpeg'] = lambda data: 'data:image/jpeg;base64,' + base64.b64encode(data).decode()
  return environment.get_template(name)
