"""What a person sees while something long runs."""

import sys
from typing import Any

import jax


def bar(what: str, total: int | None, unit: str, *, shown: bool = True, **options: Any) -> Any:
  """A tqdm bar for what takes more than two seconds, on a terminal or in a notebook; hidden elsewhere, and on hosts but the first."""
  from tqdm import tqdm
  shown = shown and (sys.stderr.isatty() or 'ipykernel' in sys.modules) and jax.process_index() == 0
  return tqdm(desc=what, total=total, unit=f' {unit}', delay=2, leave=False, disable=not shown, **options)
