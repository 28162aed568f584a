"""What is known of image sets from reading all of them once, kept in the user's cache folder for the next time."""

from collections.abc import Callable
import os
import pathlib
from typing import Any

import numpy as np

from ft_jax.user_cache import user_cache


def kept(what: str, key: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Arrays by name: those that were kept, or what `make` gives now.

  Args:
    what: names the folder, such as 'labels'.
    key: changes with everything that the arrays depend on.
    make: takes long.
  """
  before = load(what, key)
  if before is not None:
    return before
  made = make()
  save(what, key, made)
  return made


def load(what: str, key: str) -> dict[str, np.ndarray] | None:
  """What was kept under these names, None where there is nothing that can be read."""
  path = _path(what, key)
  if path is None:
    return None
  try:
    with open(path, 'rb') as stream, np.load(stream, allow_pickle=False) as saved:
      return dict(saved)
  except Exception:  # not there, or damaged, which makes the libraries raise almost anything: made again
    return None


def save(what: str, key: str, made: dict[str, Any]) -> None:
  """Keeps arrays by name; a cache that cannot be written costs time, nothing else."""
  path = _path(what, key)
  if path is None:
    return
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}.npz')
    np.savez(temporary, **made)
    os.replace(temporary, path)
  except OSError:
    pass


def _path(what: str, key: str) -> pathlib.Path | None:
  cache = user_cache()
  return cache / what / f'{key}.npz' if cache else None
