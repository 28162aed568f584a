"""Compiling once what many starts, or many short trainings, share: jax's persistent compilation cache."""

from collections.abc import Iterator
import contextlib
import gc
import os
import pathlib
import stat
import tempfile
import warnings

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from ft_jax.progress import log
from ft_jax.user_cache import user_cache
from selection import storage

# Programs that compile faster than this are compiled again: reading a file is no faster.
SECONDS = 0.5
# Beyond that, the programs that were not used for the longest time are removed.
MOST_BYTES = 2 << 30
# A lock that is not given within this time, in seconds, is one that the file system does not have.
PATIENCE = 10.0


def keep(folder: str) -> None:
  """Keeps compiled programs in a folder, where the next start of the same shapes finds them.

  jax tells programs apart by everything that they depend on, the processor and the versions of jax and XLA among them, so
  machines may share the folder. It locks the folder, so that processes may, too. A folder that jax was told to use
  (JAX_COMPILATION_CACHE_DIR) is left as it is.

  Args:
    folder: 'auto' is `ft_jax/compiled` in the user's cache folder where one process runs alone (several hosts need a folder that
      they share); '' keeps nothing.

  Raises:
    ValueError: a folder on object storage, where nothing can be locked; or `~` where there is no home directory.
  """
  # A program that cannot be read or written is compiled, which costs time and nothing else.
  warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache')
  if not folder or jax.config.jax_compilation_cache_dir:
    return
  if '://' in folder:
    raise ValueError(f"config.compile_cache is {folder!r}; expected a folder on a disk, 'auto', or '' for none")
  if folder == 'auto' and (jax.process_count() > 1 or user_cache() is None):
    return
  path = user_cache() / 'compiled' if folder == 'auto' else pathlib.Path(storage.absolute(folder))
  new = not path.exists()
  try:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_trusted(path)
    remove_incomplete(path)
  except (OSError, NotImplementedError) as error:  # filelock's word for a file system without locks
    log.warning("warning: compiled programs cannot be kept in %s (%s); --config.compile_cache='' goes without", path, error)
    return
  if new:
    log.info("compiled programs are kept in %s, for the next start (--config.compile_cache='' keeps none)", path)
  jax.config.update('jax_compilation_cache_max_size', MOST_BYTES)
  _use(str(path), SECONDS)


def _check_trusted(path: pathlib.Path) -> None:
  """Raises OSError where somebody else may write: what lies there is run."""
  status = path.stat()
  if status.st_uid not in (os.getuid(), 0) or status.st_mode & stat.S_IWOTH:
    raise PermissionError('others may write to it, and what lies there is run as a program')


def remove_incomplete(path: pathlib.Path) -> None:
  """Removes what a process was writing when it was killed: jax writes the time of use behind the program, and never writes one again."""
  with filelock.FileLock(path / '.lockfile', timeout=PATIENCE):
    for program in path.glob('*-cache'):
      if not program.with_name(program.name.removesuffix('-cache') + '-atime').exists():
        program.unlink()


@contextlib.contextmanager
def kept(folder: str) -> Iterator[None]:
  """Within it, compiled programs are kept in a folder; see `keep`. Afterwards, jax's settings are as they were."""
  before, seconds = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
  most = jax.config.jax_compilation_cache_max_size
  keep(folder)
  try:
    yield
  finally:
    if jax.config.jax_compilation_cache_dir != before:
      jax.config.update('jax_compilation_cache_max_size', most)
      _use(before, seconds)


@contextlib.contextmanager
def once() -> Iterator[None]:
  """Within, a program that was compiled is not compiled again where another training comes to the same one.

  It is kept in a folder that goes away at the end, unless a folder is in use already.
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


def clear_compiled() -> None:
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
