"""How a job is asked to stop: SIGTERM and Ctrl-C of a command, an interrupt of a notebook or program that called it.

A training saves its state and stops after the current step. Several processes agree on that step.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import itertools
import os
import select
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from ft_jax.progress import log

# Seconds from the signal to the end of the current step (or batch of an evaluation). Preemptible machines are taken
# away after thirty; a compilation may take longer, and has nothing to save.
PATIENCE = 20.0
# Several processes number the calls of `Stop` alike.
_CALLS = itertools.count(1)
# Whether a job was called by another program, whose process must live on.
_EMBEDDED = contextvars.ContextVar('embedded', default=False)

Handler = Callable[[int, FrameType | None], None]


class Stop:
  """Calling it returns whether to stop now. Several processes must call it equally often, and all get the same answer.

  Attributes:
    signal: the number of the signal that asked to stop, here or in another process; None before.
  """

  def __init__(self) -> None:
    self.signal: int | None = None
    self._seen = threading.Event()

  def __call__(self) -> bool:
    """Whether to stop now."""
    if jax.distributed.is_initialized():
      # jax's own handler of SIGTERM informs the other processes; they agree on a call that none has reached yet.
      if not multihost_utils.reached_preemption_sync_point(next(_CALLS)):
        return False
      self.signal = self.signal or signal.SIGTERM
    if self.signal is not None:
      self._seen.set()
    return self.signal is not None

  @property
  def asked(self) -> bool:
    """Whether this process alone has to stop; one of several never decides that alone."""
    return self.signal is not None and not jax.distributed.is_initialized()

  def _listen(self, pipe: int) -> None:
    """Reads the numbers of signals from a pipe, until its other end is closed."""
    deadline = None
    while True:
      wait = None if deadline is None or self._seen.is_set() else max(0.0, deadline - time.monotonic())
      if not select.select([pipe], [], [], wait)[0]:
        if self._seen.is_set():
          continue
        _exit(self.signal or signal.SIGTERM, f'the current step did not end within {PATIENCE:.0f} seconds')
      number = os.read(pipe, 1)
      if not number:
        return
      if number[0] == signal.SIGINT and self.signal is not None:
        _exit(signal.SIGINT, 'stopped at once')
      elif number[0] in (signal.SIGINT, signal.SIGTERM) and self.signal is None:
        self.signal = number[0]
        log.info('stopping after this step (%s)', signal.Signals(self.signal).name)
        if jax.distributed.is_initialized():
          os.kill(os.getpid(), signal.SIGTERM)  # jax then informs the other processes
        else:
          deadline = time.monotonic() + PATIENCE


def _exit(number: int, why: str) -> NoReturn:
  log.info('%s; the same command resumes from the last checkpoint', why)
  sys.stderr.flush()
  os._exit(128 + number)


class Signalled(KeyboardInterrupt):
  """A signal stops the program outside of a training, where there is nothing to save.

  Attributes:
    number: of the signal.
  """

  def __init__(self, number: int) -> None:
    super().__init__()
    self.number = number


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
  """Within it, SIGTERM and Ctrl-C raise Signalled outside of trainings; they end the program if Python cannot react."""

  def interrupt(number: int, frame: FrameType | None) -> None:
    del frame
    raise Signalled(number)

  def listen(pipe: int) -> None:
    if number := os.read(pipe, 1):
      if select.select([pipe], [], [], PATIENCE / 2)[0] and not os.read(pipe, 1):
        return  # the program reacted
      _exit(number[0], 'stopped at once')

  with _handled(interrupt, listen):
    yield


@contextlib.contextmanager
def embedded() -> Iterator[None]:
  """Within it, jobs run inside another program or a notebook.

  They handle Ctrl-C only, in the main thread only, and never end the process; a second Ctrl-C raises KeyboardInterrupt
  at once.
  """
  token = _EMBEDDED.set(True)
  try:
    yield
  finally:
    _EMBEDDED.reset(token)


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
  """Within it, SIGTERM and Ctrl-C ask the yielded Stop to stop; a second Ctrl-C ends the program at once."""
  stop = Stop()
  with _interrupts_ask(stop) if _EMBEDDED.get() else _handled(lambda number, frame: None, stop._listen):
    yield stop


@contextlib.contextmanager
def _interrupts_ask(stop: Stop) -> Iterator[None]:
  """Within it, a first Ctrl-C asks to stop, and a second one raises KeyboardInterrupt; see `embedded`."""
  if threading.current_thread() is not threading.main_thread():
    yield  # only the main thread may handle signals
    return

  def interrupt(number: int, frame: FrameType | None) -> None:
    del frame
    if stop.signal is not None:
      raise KeyboardInterrupt('stopped at once; the same command resumes from the last checkpoint')
    stop.signal = number
    log.info('stopping after this step; interrupt again to stop at once')

  before = signal.signal(signal.SIGINT, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _handled(handler: Handler, listen: Callable[[int], None]) -> Iterator[None]:
  """Handles SIGTERM and Ctrl-C; a thread also reads their numbers from a pipe until its other end is closed.

  Python's handlers wait until the main thread returns from compiling; a second Ctrl-C should not.
  """
  if threading.current_thread() is not threading.main_thread():
    yield  # only the main thread may handle signals
    return
  pipe, end = os.pipe()
  os.set_blocking(end, False)
  # In one of several processes, jax handles SIGTERM.
  numbers = (signal.SIGINT,) if jax.distributed.is_initialized() else (signal.SIGINT, signal.SIGTERM)
  before = {number: signal.signal(number, handler) for number in numbers}
  before_end = signal.set_wakeup_fd(end, warn_on_full_buffer=False)
  listener = threading.Thread(target=listen, args=(pipe,), name='signals', daemon=True)
  listener.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before_end)
    for number, old_handler in before.items():
      signal.signal(number, old_handler)
    os.close(end)
    listener.join()
    os.close(pipe)
