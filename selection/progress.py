"""Progress bars."""

import sys
from typing import Any

import jax


def bar(what: str, total: int | None, unit: str, *, shown: bool = True, **options: Any) -> Any:
  """A tqdm bar, shown after two seconds in a terminal or a notebook.

  It is hidden where stderr is not a terminal, on all processes but the first, and where `shown` is False.
  """
  from tqdm import tqdm
  shown = shown and (sys.stderr.isatty() or 'ipykernel' in sys.modules) and jax.process_index() == 0
  return tqdm(desc=what, total=total, unit=f' {unit}', delay=2, leave=False, disable=not shown, **options)
