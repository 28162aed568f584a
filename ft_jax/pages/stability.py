"""The page of job stability: noise stability, distance from the start and trace of the Hessian of a trained network."""

from collections.abc import Mapping, Sequence
import csv
import io
from typing import Any

from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from ft_jax import parallel
from ft_jax.pages import page
from ft_jax.pages.page import BLUE, GREEN, GREY, RED
from ft_jax.workdir import write_text
from selection import fonts


def write(path: epath.Path, results: Mapping[str, Any], config: Mapping[str, Any]) -> None:
  """Writes the page.

  Args:
    path: the file that is written.
    results: what stability.json holds.
    config: the config of the run that was measured.
  """
  if not parallel.is_main():
    return
  kernels = [row for row in results['parameters'] if row['name'].endswith('/kernel')]
  trace = results['trace']
  write_text(path, page.render(
      'stability.html.jinja', title=f'Stability: {page.run_title(config)}', results=results, kernels=kernels,
      noise=page.svg(noise(results['noise'])) if results['noise'] else '',
      distance=page.svg(distances(kernels)) if results['start']['from'] else '',
      trace=page.svg(traces(kernels)) if trace else '', vectors=page.svg(vectors(trace)) if trace else ''))


def csv_table(parameters: Sequence[Mapping[str, Any]]) -> str:
  """CSV text, one row for each parameter; what was not measured is empty."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['parameter', 'numbers', 'perturbed', 'distance', 'start_norm', 'relative_distance', 'trace',
                   'trace_standard_error'])
  for row in parameters:
    trace = row['trace'] or {'mean': None, 'standard_error': None}
    numbers = (row['distance'], row['start'], row['relative'], trace['mean'], trace['standard_error'])
    cells = ['' if number is None else f'{number:.9g}' for number in numbers]
    writer.writerow([row['name'], row['numbers'], int(row['perturbed']), *cells])
  return text.getvalue()


def noise(results: Mapping[str, Any]) -> Figure:
  """The rise of the loss in each perturbed network, their mean and standard error, and what the trace predicts."""
  figure = Figure(figsize=(9, 1.9), layout='constrained')
  axes = figure.subplots()
  rises = results['differences']
  axes.scatter(rises, np.zeros(len(rises)), color=BLUE, alpha=0.6, label='one perturbed network')
  axes.errorbar(results['mean'], 1, xerr=results['standard_error'], color=RED, marker='o', capsize=4,
                label='mean, standard error')
  if results['by_trace'] is not None:
    axes.axvline(results['by_trace'], color=GREEN, linewidth=1, linestyle='--', label='σ² / 2 · trace of the Hessian')
  axes.axvline(0, color=GREY, linewidth=0.8)
  axes.set(xlabel='rise of the loss', ylim=(-0.8, 1.8), yticks=[])
  axes.spines[['top', 'right', 'left']].set_visible(False)
  figure.legend(loc='outside upper left', ncols=3, frameon=False, fontsize=8)
  return figure


def distances(rows: Sequence[Mapping[str, Any]]) -> Figure:
  """How far training moved each kernel of the backbone, absolute and relative to the kernel's initial norm."""
  rows = [row for row in rows if row['relative'] is not None]
  figure = Figure(figsize=(11, 4.2), layout='constrained')
  absolute, relative = figure.subplots(1, 2)
  absolute.bar(range(len(rows)), [row['distance'] for row in rows], color=BLUE)
  absolute.set_title('Distance from the start', fontsize=10)
  relative.bar(range(len(rows)), [100 * row['relative'] for row in rows], color=BLUE)
  relative.set_title('In percent of the norm at the start', fontsize=10)
  for axes in (absolute, relative):
    _kernel_ticks(axes, rows)
    axes.spines[['top', 'right']].set_visible(False)
  return figure


def traces(rows: Sequence[Mapping[str, Any]]) -> Figure:
  """The trace of each kernel's block of the Hessian with standard errors; log scale if all are clearly positive."""
  figure = Figure(figsize=(5.6, 4.2), layout='constrained')
  axes = figure.subplots()
  means = [row['trace']['mean'] for row in rows]
  errors = [row['trace']['standard_error'] or 0.0 for row in rows]
  axes.errorbar(range(len(rows)), means, yerr=errors, fmt='o', color=BLUE, ecolor=GREY, markersize=4, capsize=2)
  if all(mean > 2 * error for mean, error in zip(means, errors)):
    axes.set_yscale('log')
  else:
    axes.axhline(0, color=GREY, linewidth=0.8)
  _kernel_ticks(axes, rows)
  axes.set_title('Trace of the Hessian by kernel', fontsize=10)
  axes.spines[['top', 'right']].set_visible(False)
  return figure


def vectors(results: Mapping[str, Any]) -> Figure:
  """The running estimate of the trace of the whole Hessian over the random vectors, with its standard error."""
  figure = Figure(figsize=(5.6, 4.2), layout='constrained')
  axes = figure.subplots()
  values = np.asarray(results['by_vector'])
  counts = np.arange(1, len(values) + 1)
  means = np.cumsum(values) / counts
  axes.plot(counts, values, 'o', color=GREY, markersize=3, label='one vector')
  axes.plot(counts, means, color=BLUE, label='running mean')
  if len(values) > 1:
    errors = np.array([np.std(values[:n], ddof=1) / n ** 0.5 for n in counts[1:].tolist()])
    axes.fill_between(counts[1:], means[1:] - errors, means[1:] + errors, color=BLUE, alpha=0.2, linewidth=0,
                      label='standard error')
  axes.set_title('Trace of the Hessian, all parameters', fontsize=10)
  axes.set_xlabel('random vectors')
  axes.legend(frameon=False, fontsize=8)
  axes.spines[['top', 'right']].set_visible(False)
  return figure


def _kernel_ticks(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
  names = fonts.labels([row['name'].removesuffix('/kernel') for row in rows], 28)
  axes.set_xticks(range(len(rows)), names, rotation=90, fontsize=7 if len(rows) < 40 else 5)
