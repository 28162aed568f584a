"""The user's home directory, and the folder for caches that are shared by all runs."""

import functools
import os
import pathlib

from ft_jax.progress import log


def user_cache() -> pathlib.Path | None:
  """The folder for this program's caches, which need not exist yet.

  None, with a warning in the log, if there is no home directory, as for an unknown user in a container.
  """
  caches = os.environ.get('XDG_CACHE_HOME', '')
  if os.path.isabs(caches):  # its specification says to ignore a relative path
    return pathlib.Path(caches) / 'ft_jax'
  home = home_directory()
  if home is None:
    _warn_once()
    return None
  return home / '.cache' / 'ft_jax'


def home_directory() -> pathlib.Path | None:
  """The user's home directory; None if neither HOME nor the system's list of users has one."""
  try:
    return pathlib.Path.home()
  except RuntimeError:
    return None


@functools.cache
def _warn_once() -> None:
  log.warning('warning: there is no home directory, so nothing is cached between runs; set XDG_CACHE_HOME to a folder '
              'that can be written to')
