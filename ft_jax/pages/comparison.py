"""The report of a comparison of selection methods: accuracy by method and seed."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from ft_jax import parallel
from ft_jax.pages import page
from ft_jax.pages.page import BLUE, format_percent, GREY, RED
from ft_jax.workdir import Workdir, write_text


def write(work: Workdir) -> None:
  """Writes report.html of a comparison from its results.json."""
  if not parallel.is_main():
    return
  results, config = page.results_and_config(work)
  write_text(work.report_html, page.render(
      'comparison.html.jinja', title=f'Selection methods on {config["target"]["name"]}', results=results,
      rows=_rows(results), dots=page.svg(dots(results['rows'])), settings=page.setting_rows(config)))


def markdown(results: Mapping[str, Any]) -> str:
  """The results of a comparison as a Markdown table: means over the seeds and their standard errors, in percent."""
  split, first = results['split'], results['rows'][0]['method']
  lines = [f'| selection | {split} top-1, % | {split} mean per class, % | top-1 gain over {first}, same seed |',
           '|---|---|---|---|']
  lines += [f'| {row["method"]} | {row["top1"]} | {row["mean_per_class"]} | {row["gain"]} |' for row in _rows(results)]
  return '\n'.join(lines)


def _rows(results: Mapping[str, Any]) -> list[dict[str, str]]:
  """The cells of the table, as text; the first method, which the others are compared with, has no gain."""
  return [{'method': row['method'], 'top1': format_percent(row['top1']),
           'mean_per_class': format_percent(row['mean_per_class']),
           'gain': format_percent(row['gain'], sign=True) if k else ''} for k, row in enumerate(results['rows'])]


def dots(rows: Sequence[Mapping[str, Any]]) -> Figure:
  """Top-1 of every run by method; lines connect runs with the same seed."""
  figure = Figure(figsize=(1.6 + 1.5 * len(rows), 3.4), layout='constrained')
  axes = figure.subplots()
  for values in zip(*(row['top1'] for row in rows)):
    axes.plot(range(len(rows)), [100 * v for v in values], color=GREY, marker='o', markerfacecolor=BLUE,
              markeredgecolor=BLUE, linewidth=0.8)
  for k, row in enumerate(rows):
    # A label that begins with an underscore has no entry in the legend: one entry is enough for all methods.
    label = 'mean' if k == 0 else '_mean'
    axes.hlines(100 * float(np.mean(row['top1'])), k - 0.18, k + 0.18, color=RED, linewidth=2, label=label)
  axes.set_xticks(range(len(rows)), [row['method'] for row in rows])
  axes.set_ylabel('top-1, %')
  axes.margins(x=0.2)
  axes.legend(frameon=False, fontsize=8)
  axes.spines[['top', 'right']].set_visible(False)
  return figure
