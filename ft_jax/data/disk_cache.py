"""Arrays that take long to compute, such as labels that need all records of a set, in the user's cache folder."""

from collections.abc import Callable, Mapping
import os
import pathlib

import numpy as np

from ft_jax.user_cache import user_cache


def cached_arrays(what: str, key: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Arrays by name, from the cache or, if they are not there, from `compute`.

  Args:
    what: names the folder, such as 'labels'.
    key: must change with everything that the arrays depend on.
    compute: takes long.
  """
  cached = load(what, key)
  if cached is not None:
    return cached
  arrays = compute()
  save(what, key, arrays)
  return arrays


def load(what: str, key: str) -> dict[str, np.ndarray] | None:
  """The arrays that were saved under these names; None if there are none that can be read."""
  path = _path(what, key)
  if path is None:
    return None
  try:
    with open(path, 'rb') as stream, np.load(stream, allow_pickle=False) as saved:
      return dict(saved)
  except Exception:  # missing, or damaged, for which the libraries raise almost anything: computed again
    return None


def save(what: str, key: str, arrays: Mapping[str, np.ndarray]) -> None:
  """Saves arrays by name. A cache that cannot be written costs time and nothing else."""
  path = _path(what, key)
  if path is None:
    return
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}.npz')
    np.savez(temporary, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle, a parameter of savez
    os.replace(temporary, path)
  except OSError:
    pass


def _path(what: str, key: str) -> pathlib.Path | None:
  cache = user_cache()
  return cache / what / f'{key}.npz' if cache else None
