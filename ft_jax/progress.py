"""Progress bars and log lines, on a terminal, in a notebook, or as plain lines elsewhere."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import importlib.util
import io
import logging
import sys
import threading
from typing import TypeVar
import warnings

from etils import epath
import tqdm

from ft_jax.names import visible
from selection import storage

T = TypeVar('T')

log = logging.getLogger('ft_jax')
_LOGGERS = (log, logging.getLogger('selection'))
_NO_EDIT: Callable[[str], str] = lambda text: text
# Calls of `log_shown` at work, in any thread, and what they found.
_shown_lock = threading.Lock()
_shown = 0
_before = contextlib.ExitStack()


def bar(items: Iterable[T], what: str, total: int, unit: str = 'batch', initial: int = 0) -> Iterator[T]:
  """Iterates over `items` with a progress bar.

  Args:
    items: the rest of `total` items.
    what: a description, such as 'embedding target'.
    total: number of all items.
    unit: of one item.
    initial: number of items that were finished before.
  """
  with counter(what, total, unit, initial) as shown:
    for item in items:
      yield item
      shown.update()


def counter(what: str, total: int | None, unit: str = 'step', initial: int = 0) -> tqdm.tqdm:
  """A progress bar that is moved by `update`; hidden without a terminal or notebook, and if log lines are.

  In a notebook it is a widget, as of tqdm.auto. Without ipywidgets it is hidden, too: text that overwrites itself would
  fill pages there.
  """
  bar_class, shown = tqdm.tqdm, sys.stderr.isatty()
  if in_notebook():
    shown = importlib.util.find_spec('ipywidgets') is not None
    bar_class = _notebook_bar() if shown else tqdm.tqdm
  hidden = not shown or not log.isEnabledFor(logging.INFO)
  return bar_class(desc=f'  {visible(what)}', total=total, unit=f' {unit}', initial=initial, disable=hidden,
                      leave=False, dynamic_ncols=True, smoothing=0.1)


def in_notebook() -> bool:
  """Whether this process is a Jupyter kernel, as Colab's is."""
  return 'ipykernel' in sys.modules


def _notebook_bar() -> type[tqdm.tqdm]:
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # tqdm calls this experimental
    from tqdm.auto import tqdm as notebook_bar
  return notebook_bar


class Handler(logging.Handler):
  """Writes log lines above the progress bars; control characters are escaped."""

  def __init__(self, edit: Callable[[str], str] = _NO_EDIT) -> None:
    """`edit` is applied to each line."""
    super().__init__()
    self._edit = edit

  def emit(self, record: logging.LogRecord) -> None:
    """Writes one record."""
    # Notebooks show stderr as if something were wrong.
    stream = sys.stdout if in_notebook() else sys.stderr
    tqdm.tqdm.write(visible(self._edit(self.format(record))), file=stream)


def show_log(process: int = 0) -> None:
  """Shows the project's log lines, for the rest of this process.

  Args:
    process: its number in a distributed run: process 0 shows progress, the others only warnings and errors.
  """
  for logger in _LOGGERS:
    logger.setLevel(logging.WARNING if process else logging.INFO)
    logger.propagate = False
    if not _handlers(logger):
      logger.addHandler(Handler())
    for handler in _handlers(logger):
      handler.setFormatter(logging.Formatter(f'process {process}: %(message)s' if process else None))


def quiet_libraries() -> None:
  """Limits other libraries to warnings for the rest of this process.

  Matplotlib logs its first use, orbax and jax log a page for every checkpoint.
  """
  from absl import logging as absl_logging

  absl_logging.set_verbosity(absl_logging.WARNING)
  absl_logging.get_absl_logger().addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
  """False for orbax's warning that a checkpoint has no metrics: those between two evaluations have none."""
  return 'tracked_metric' not in record.getMessage()


@contextlib.contextmanager
def log_shown(edit: Callable[[str], str] = _NO_EDIT) -> Iterator[None]:
  """Within it, the project's log lines are shown, and those of other libraries limited to warnings.

  Nothing of this stays afterwards. Several threads may be within it at once; the lines of all are edited by the `edit`
  of the first.
  """
  global _shown
  with _shown_lock:
    if not _shown:
      _change_logging(edit)
    _shown += 1
  try:
    yield
  finally:
    with _shown_lock:
      _shown -= 1
      if not _shown:
        _before.close()


@contextlib.contextmanager
def logged_to(path: epath.Path) -> Iterator[None]:
  """Within it, the project's log lines are also appended to a file; an object is written at the end."""
  stream = io.StringIO()
  handler: logging.Handler = logging.StreamHandler(stream)
  if not storage.is_url(path):
    handler = logging.FileHandler(path, encoding='utf-8', errors='backslashreplace')
  handler.setFormatter(_Visible('%(asctime)s %(message)s'))
  for logger in _LOGGERS:
    logger.addHandler(handler)
  try:
    yield
  finally:
    for logger in _LOGGERS:
      logger.removeHandler(handler)
    handler.close()
    if storage.is_url(path):
      path.write_text(stream.getvalue())


class _Visible(logging.Formatter):
  """Escapes control characters, which names of files may have."""

  def format(self, record: logging.LogRecord) -> str:
    return visible(super().format(record))


def _change_logging(edit: Callable[[str], str]) -> None:
  """What `log_shown` does; `_before.close()` undoes it."""
  from absl import logging as absl_logging

  for logger in _LOGGERS:
    if _handlers(logger):  # the program calls `show_log` itself
      continue
    handler = Handler(edit)
    _before.callback(logger.setLevel, logger.level)
    _before.callback(setattr, logger, 'propagate', logger.propagate)
    _before.callback(logger.removeHandler, handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
  absl_logger = absl_logging.get_absl_logger()
  _before.callback(absl_logger.setLevel, absl_logger.level)
  _before.callback(absl_logger.removeFilter, _is_wanted)
  absl_logger.setLevel(logging.WARNING)
  absl_logger.addFilter(_is_wanted)


def _handlers(logger: logging.Logger) -> list[Handler]:
  return [handler for handler in logger.handlers if isinstance(handler, Handler)]
