"""What a person sees while something long runs: a bar with rate and time left on a terminal, plain lines elsewhere."""

from collections.abc import Iterable, Iterator
import logging
import sys
from typing import TypeVar

import tqdm

from ft_jax.names import visible

T = TypeVar('T')

log = logging.getLogger('ft_jax')


def bar(items: Iterable[T], what: str, total: int, unit: str = 'batch', initial: int = 0) -> Iterator[T]:
  """Goes through `items`, of `total` with `initial` ones before, with a progress bar; without a terminal, silently."""
  with counter(what, total, unit, initial) as shown:
    for item in items:
      yield item
      shown.update()


def counter(what: str, total: int | None, unit: str = 'step', initial: int = 0) -> tqdm.tqdm:
  """A progress bar that is moved by `update`; hidden without a terminal or notebook, or where log lines are."""
  seen = sys.stderr.isatty() or 'ipykernel' in sys.modules  # a terminal or a notebook
  hidden = not seen or not log.isEnabledFor(logging.INFO)
  return tqdm.tqdm(desc=f'  {visible(what)}', total=total, unit=f' {unit}', initial=initial, disable=hidden, leave=False,
                   dynamic_ncols=True, smoothing=0.1)


class Handler(logging.Handler):
  """Log lines above the bar, with what a terminal would obey spelt out."""

  def emit(self, record: logging.LogRecord) -> None:
    """Writes one record."""
    tqdm.tqdm.write(visible(self.format(record)), file=sys.stderr)


def show_log(process: int = 0) -> None:
  """Sends the project's log lines to the terminal: what main.py does, and a notebook may.

  Args:
    process: the number of this one, where several work together: the first one tells how it goes, the others only what is wrong.
  """
  for logger in (log, logging.getLogger('selection')):
    logger.setLevel(logging.WARNING if process else logging.INFO)
    logger.propagate = False
    if not any(isinstance(handler, Handler) for handler in logger.handlers):
      logger.addHandler(Handler())
    for handler in logger.handlers:
      if isinstance(handler, Handler):
        handler.setFormatter(logging.Formatter(f'process {process}: %(message)s' if process else None))
