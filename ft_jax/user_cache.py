"""The user's home directory and the folder in it for what is kept between runs to save time."""

import functools
import os
import pathlib

from ft_jax.progress import log


def user_cache() -> pathlib.Path | None:
  """The folder of this program among the user's caches, which need not exist yet.

  None, with one line in the log, where there is none: an unknown user in a container has no home directory.
  """
  caches, home = os.environ.get('XDG_CACHE_HOME', ''), home_directory()
  if os.path.isabs(caches):  # a relative one is to be ignored, says its specification
    return pathlib.Path(caches) / 'ft_jax'
  return home / '.cache' / 'ft_jax' if home else _without()


def home_directory() -> pathlib.Path | None:
  """The user's home directory; None where neither HOME nor the system's list of users has one."""
  try:
    return pathlib.Path.home()
  except RuntimeError:
    return None


@functools.cache
def _without() -> None:
  """Says it once."""
  log.warning('warning: there is no home directory, so nothing is cached between runs; set XDG_CACHE_HOME to a folder that can be written '
              'to')
