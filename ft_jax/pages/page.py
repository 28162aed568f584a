"""What all pages share: colours, templates with their filters, figures as SVG, numbers as text, the table of
settings."""

import base64
from collections.abc import Mapping, Sequence
import io
import json
import math
import pathlib
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure
import numpy as np

from ft_jax.workdir import Workdir

BLUE, RED, GREEN, GREY = '#2563eb', '#dc2626', '#059669', '#94a3b8'
VIOLET, TEAL, AMBER, INK = '#7c3aed', '#0891b2', '#d97706', '#0f172a'


def render(template: str, **values: Any) -> str:
  """The text of a page.

  Args:
    template: a file of templates/.
    **values: what the template refers to; it raises for a name that is missing.
  """
  # Class names come from folders and files: everything is escaped except the figures made here.
  environment = jinja2.Environment(loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / 'templates'),
                                   autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                   undefined=jinja2.StrictUndefined)
  environment.filters['with_error'] = format_with_error
  environment.filters['percent'] = lambda value: f'{100 * value:.1f} %'
  environment.filters['jpeg'] = lambda data: 'data:image/jpeg;base64,' + base64.b64encode(data).decode()
  return environment.get_template(template).render(**values)


def results_and_config(work: Workdir) -> tuple[dict[str, Any], dict[str, Any]]:
  """results.json and config.json of a finished run; raises ValueError if it is not finished."""
  results = work.results()
  if results is None:
    raise ValueError(f'{work.path} has no results.json; its page can be written only once the run has finished')
  return results, json.loads(work.config_json.read_text())


def run_title(config: Mapping[str, Any]) -> str:
  """What a run trained on, as the heading of its pages."""
  if config['job'] == 'pretrain':
    return f'Pre-training on {config["source"]["name"]}'
  return f'Fine-tuning on {config["target"]["name"]}'


def setting_rows(config: Mapping[str, Any], prefix: str = 'config') -> list[tuple[str, str]]:
  """Every field of a nested config and its value, as text."""
  rows = []
  for key, value in config.items():
    name = f'{prefix}.{key}'
    rows += setting_rows(value, name) if isinstance(value, dict) else [(name, str(value))]
  return rows


def svg(figure: Figure) -> str:
  """The figure as SVG text; the same figure always gives the same text."""
  text = io.StringIO()
  with matplotlib.rc_context({'svg.hashsalt': 'report'}):
    figure.savefig(text, format='svg', metadata={'Date': None})
  # The XML declaration before it is not allowed inside HTML.
  return text.getvalue()[text.getvalue().index('<svg'):]


def format_with_error(spread: Mapping[str, float | None]) -> str:
  """Mean and standard error, to the digits that the error leaves: `0.00123 ± 0.00004`, `1,230 ± 40`.

  Args:
    spread: `mean` and `standard_error`; the mean alone is shown where the error is None or 0.
  """
  mean, error = spread['mean'], spread['standard_error']
  if not error:
    return f'{mean:.4g}'
  digits = max(0, 1 - math.floor(math.log10(error)))
  if digits < 9:
    return f'{mean:,.{digits}f} ± {error:,.{digits}f}'
  return f'{mean:.3e} ± {error:.1e}'


def format_percent(values: Sequence[float], sign: bool = False) -> str:
  """Mean and standard error of the mean of fractions, in percent: `41.2 ± 0.8`; of one value the mean alone."""
  mean = f'{100 * np.mean(values):{"+" if sign else ""}.1f}'
  if len(values) < 2:
    return mean
  return f'{mean} ± {100 * np.std(values, ddof=1) / len(values) ** 0.5:.1f}'
