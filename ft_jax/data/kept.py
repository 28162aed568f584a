"""What is known of image sets from reading all of them once, kept in the user's cache folder for the next time."""

from collections.abc import Callable
import os
import pathlib

import numpy as np


def user_cache() -> pathlib.Path | None:
  """The folder of this program among the user's caches, which need not exist yet; None where the user has no home."""
  if base := os.environ.get('XDG_CACHE_HOME'):
    return pathlib.Path(base) / 'ft_jax'
  try:
    return pathlib.Path.home() / '.cache' / 'ft_jax'
  except RuntimeError:
    return None


def kept(what: str, key: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Arrays by name: those that were kept, or what `make` gives now.

  Args:
    what: names the folder, such as 'labels'.
    key: changes with everything that the arrays depend on.
    make: takes long.
  """
  folder = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'ft_jax' / what
  path = folder / f'{key}.npz'
  try:
    with open(path, 'rb') as stream, np.load(stream, allow_pickle=False) as saved:
      return dict(saved)
  except Exception:  # not there, or damaged, which makes the libraries raise almost anything: made again
    pass
  made = make()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}.npz')
    np.savez(temporary, **made)
    os.replace(temporary, path)
  except OSError:
    pass  # a cache that cannot be written costs time, nothing else
  return made
