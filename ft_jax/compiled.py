"""Compiling once what many short trainings share."""

from collections.abc import Iterator
import contextlib
import gc
import tempfile

import jax
from jax.experimental.compilation_cache import compilation_cache

# Programs that compile faster than this are compiled again: reading a file is no faster.
SECONDS = 0.5


@contextlib.contextmanager
def once() -> Iterator[None]:
  """Within, a program that was compiled is not compiled again where another training comes to the same one.

  It is kept in a folder that goes away at the end: programs for one machine's processor are of no use to another's, which may share its
  disk. A folder that jax was told to use (JAX_COMPILATION_CACHE_DIR) is left as it is.
  """
  if jax.config.jax_compilation_cache_dir:
    yield
    return
  with tempfile.TemporaryDirectory(prefix='compiled-') as folder:
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    _use(folder, SECONDS)
    try:
      yield
    finally:
      _use(None, before)


def forget() -> None:
  """Gives back what the programs of a finished training hold.

  On the CPU each of them is hundreds of mappings of memory, of which a process may have so many (Linux: vm.max_map_count, 65,530 by
  default): after some seventy trainings the next program would find no memory.
  """
  jax.clear_caches()
  gc.collect()


def _use(folder: str | None, seconds: float) -> None:
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', seconds)
  compilation_cache.reset_cache()  # the folder is looked at once
