"""Processes of this host that work on one job side by side, each with a share of the CPU cores."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import threading
from typing import Any

from etils import epath

from ft_jax import stopping
from selection import storage

# Seconds that processes have to save their state and leave, longer than a training needs to stop.
PATIENCE = stopping.PATIENCE + 20

Process = multiprocessing.context.SpawnProcess


@contextlib.contextmanager
def started(count: int, work: Callable[..., None], args: Sequence[Any], folder: epath.Path) -> Iterator[list[Process]]:
  """Within it, processes call a function; after it, or after an error, none of them is left.

  A process that does not leave by itself is asked to, as by SIGTERM, so a training saves its state. They also leave
  when this process is killed.

  Args:
    count: of processes.
    work: of a module, so that another process can import it.
    args: of the function.
    folder: for what they log and print: worker-1.log, ...
  """
  storage.make_folder(folder)
  context = multiprocessing.get_context('spawn')
  processes: list[Process] = []
  try:
    for number, cores in enumerate(core_shares(count), 1):
      process = context.Process(target=_call, args=(work, tuple(args), os.fspath(folder / f'worker-{number}.log')),
                                name=f'worker {number}')
      with _limited_to(cores):  # from its first instruction on: XLA takes as many threads as it has cores
        process.start()
      processes.append(process)
    yield processes
  finally:
    for process in processes:
      if process.is_alive():
        process.terminate()
    for process in processes:
      process.join(PATIENCE)
      if process.is_alive():
        process.kill()
      process.join()


def share_gpu_memory() -> None:
  """Lets jax take memory of a GPU when it needs it, here and in processes that are started; before its first use."""
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # by default each takes three quarters


def core_shares(count: int) -> list[set[int]]:
  """The CPU cores of each of so many processes; where there are fewer cores than processes, some share one."""
  if not hasattr(os, 'sched_getaffinity'):  # as on macOS
    return [set() for _ in range(count)]
  cores = sorted(os.sched_getaffinity(0))
  share = lambda k: cores[k * len(cores) // count:(k + 1) * len(cores) // count] or [cores[k % len(cores)]]
  return [set(share(k)) for k in range(count)]


def describe_end(process: Process) -> str:
  """How a process ended that did not end well."""
  code = process.exitcode or 0
  if code < 0:
    return f'{process.name} was ended by {signal.Signals(-code).name}'
  return f'{process.name} ended with code {code}'


@contextlib.contextmanager
def _limited_to(cores: set[int]) -> Iterator[None]:
  """Within it, this thread, and processes that it starts, use these CPU cores alone."""
  if not cores:
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


def _call(work: Callable[..., None], args: Sequence[Any], log_file: str) -> None:
  """What a process does: it logs to a file, and leaves when its parent is gone."""
  output = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
  for stream in (sys.stdout, sys.stderr):
    os.dup2(output, stream.fileno())
  threading.Thread(target=_leave_with_parent, daemon=True).start()
  from ft_jax import progress
  from ft_jax.command import exit_codes

  progress.quiet_libraries()
  progress.show_log()
  with exit_codes(False):
    work(*args)


def _leave_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None, 'only processes that `started` has started are here'
  parent.join()
  os.kill(os.getpid(), signal.SIGTERM)
