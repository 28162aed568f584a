"""The user's folder for what is kept between runs to save time: $XDG_CACHE_HOME/ft_jax, or ~/.cache/ft_jax."""

import functools
import os
import pathlib

from ft_jax.progress import log


def user_cache(name: str) -> pathlib.Path | None:
  """The folder `name` in the user's cache, made if needed; None, with one line in the log, where there cannot be one.

  An unknown user in a container has no home directory, and others have one that is not there or cannot be written to.
  """
  caches, home = os.environ.get('XDG_CACHE_HOME', ''), home_directory()
  if not os.path.isabs(caches):  # a relative one is to be ignored, says its specification
    if home is None:
      return _without('there is no home directory')
    caches = os.path.join(home, '.cache')
  folder = pathlib.Path(caches) / 'ft_jax' / name
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    return _without(f'{folder} cannot be made ({error.strerror})')
  return folder if os.access(folder, os.W_OK) else _without(f'{folder} cannot be written to')


def home_directory() -> str | None:
  """The user's home directory; None where neither HOME nor the system's list of users has one."""
  home = os.path.expanduser('~')
  return home if os.path.isabs(home) else None


@functools.cache
def _without(why: str) -> None:
  """Says it once."""
  log.warning('warning: %s, so nothing is cached between runs; set XDG_CACHE_HOME to a folder that can be written to', why)
