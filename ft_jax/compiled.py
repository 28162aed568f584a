"""jax's persistent compilation cache: programs that many starts or short trainings share are compiled once."""

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

# Programs that compile in fewer seconds than this are not cached: reading a file is no faster.
SECONDS = 0.5
# Above this size, the least recently used programs are removed.
MOST_BYTES = 2 << 30
# If a lock cannot be acquired within this many seconds, the file system is taken to have no locks.
PATIENCE = 10.0


def keep(folder: str) -> None:
  """Caches compiled programs in a folder, where later starts with the same shapes find them.

  jax identifies a program by all that it depends on, including the processor and the versions of jax and XLA, so
  machines may share the folder. It locks the folder, so processes may share it too. A folder that is set for jax itself
  (JAX_COMPILATION_CACHE_DIR) takes precedence.

  Args:
    folder: 'auto' is `ft_jax/compiled` in the user's cache folder if there is a single process (several hosts need a
      folder that they share); '' disables the cache.

  Raises:
    ValueError: a folder on object storage, where nothing can be locked; or `~` if there is no home directory.
  """
  # A program that cannot be read or written is compiled again, which only costs time.
  warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache')
  if not folder or jax.config.values['jax_compilation_cache_dir']:
    return
  if '://' in folder:
    raise ValueError(f"config.compile_cache is {folder!r}; expected a folder on a disk, 'auto', or '' for none")
  path = _automatic() if folder == 'auto' else pathlib.Path(storage.absolute(folder))
  if path is None:
    return
  new = not path.exists()
  try:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_trusted(path)
    remove_incomplete(path)
  except (OSError, NotImplementedError) as error:  # the latter if the file system has no locks
    log.warning("warning: compiled programs cannot be kept in %s (%s); --config.compile_cache='' goes without", path,
                error)
    return
  if new:
    log.info("compiled programs are kept in %s, for the next start (--config.compile_cache='' keeps none)", path)
  jax.config.update('jax_compilation_cache_max_size', MOST_BYTES)
  _use(str(path), SECONDS)


def _automatic() -> pathlib.Path | None:
  """The folder in the user's cache; None for several processes, and if there is no home directory."""
  cache = user_cache() if jax.process_count() == 1 else None
  return cache / 'compiled' if cache else None


def _check_trusted(path: pathlib.Path) -> None:
  """Raises OSError if others may write there, because programs from this folder are executed."""
  status = path.stat()
  if status.st_uid not in (os.getuid(), 0) or status.st_mode & stat.S_IWOTH:
    raise PermissionError('others may write to it, and what lies there is run as a program')


def remove_incomplete(path: pathlib.Path) -> None:
  """Removes programs that a killed process has left incomplete.

  jax writes the time of use after the program itself, and never writes a program that exists again.
  """
  with filelock.FileLock(path / '.lockfile', timeout=PATIENCE):
    for program in path.glob('*-cache'):
      if not program.with_name(program.name.removesuffix('-cache') + '-atime').exists():
        program.unlink()


@contextlib.contextmanager
def kept(folder: str) -> Iterator[None]:
  """Within it, compiled programs are kept in a folder; see `keep`. Afterwards, jax's settings are as they were."""
  before = jax.config.values['jax_compilation_cache_dir']
  seconds = jax.config.values['jax_persistent_cache_min_compile_time_secs']
  most = jax.config.values['jax_compilation_cache_max_size']
  keep(folder)
  try:
    yield
  finally:
    if jax.config.values['jax_compilation_cache_dir'] != before:
      jax.config.update('jax_compilation_cache_max_size', most)
      _use(before, seconds)


@contextlib.contextmanager
def once() -> Iterator[None]:
  """Within this context, trainings share compiled programs.

  They are cached in a temporary folder, unless a folder is in use already.
  """
  if jax.config.values['jax_compilation_cache_dir']:
    yield
    return
  with tempfile.TemporaryDirectory(prefix='compiled-') as folder:
    before = jax.config.values['jax_persistent_cache_min_compile_time_secs']
    _use(folder, SECONDS)
    try:
      yield
    finally:
      _use(None, before)


def clear_compiled() -> None:
  """Frees the compiled programs of a finished training.

  On the CPU each program takes hundreds of memory mappings, whose number is limited (vm.max_map_count on Linux, 65,530
  by default): after about seventy trainings, the next program could not be loaded.
  """
  jax.clear_caches()
  gc.collect()


def _use(folder: str | None, seconds: float) -> None:
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', seconds)
  compilation_cache.reset_cache()  # jax reads the setting only once
