"""What a person sees while something long runs."""

import sys
from typing import Any


def bar(what: str, total: int | None, unit: str, *, shown: bool = True, **options: Any) -> Any:
  """A tqdm bar for what takes more than two seconds, on a terminal or in a notebook; hidden elsewhere."""
  from tqdm import tqdm
  seen = sys.stderr.isatty() or 'ipykernel' in sys.modules
  return tqdm(desc=what, total=total, unit=f' {unit}', delay=2, leave=False, disable=not (shown and seen), **options)
