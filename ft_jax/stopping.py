"""How a training is asked to end: SIGTERM and Ctrl-C, in one process or in several that have to agree on the step."""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import os
import select
import signal
import sys
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from ft_jax.progress import log

# Seconds from the signal to the end of the step (or of the batch of an evaluation) that is under way. Preemptible machines are gone after
# thirty; a compilation may take longer, and has nothing to save.
PATIENCE = 20.0
# Of several processes: every question has a number, the same on all of them.
_QUESTIONS = itertools.count(1)


class Stop:
  """Called, it says whether to end now, on all processes at the same call: all must call it alike.

  Attributes:
    signal: that was sent to this process, or to another one and has been agreed upon; None before.
  """

  def __init__(self):
    self.signal: int | None = None
    self._noticed = threading.Event()

  def __call__(self) -> bool:
    """Whether to end now."""
    if jax.distributed.is_initialized():
      # jax's own handler of SIGTERM tells the other processes, which then find a number that none has come to yet.
      if not multihost_utils.reached_preemption_sync_point(next(_QUESTIONS)):
        return False
      self.signal = self.signal or signal.SIGTERM
    if self.signal is not None:
      self._noticed.set()
    return self.signal is not None

  @property
  def asked(self) -> bool:
    """Whether a signal came to this process, on which alone it may decide; of several, none may."""
    return self.signal is not None and not jax.distributed.is_initialized()

  def _listen(self, pipe: int) -> None:
    """Takes the numbers of signals out of a pipe, until its other end is closed."""
    deadline = None
    while True:
      wait = None if deadline is None or self._noticed.is_set() else max(0.0, deadline - time.monotonic())
      if not select.select([pipe], [], [], wait)[0]:
        if self._noticed.is_set():
          continue
        _leave(self.signal, f'what is under way has not come to an end within {PATIENCE:.0f} seconds')
      number = os.read(pipe, 1)
      if not number:
        return
      if number[0] == signal.SIGINT and self.signal is not None:
        _leave(signal.SIGINT, 'left at once')
      elif number[0] in (signal.SIGINT, signal.SIGTERM) and self.signal is None:
        self.signal = number[0]
        log.info('stopping after this step (%s)', signal.Signals(self.signal).name)
        if jax.distributed.is_initialized():
          os.kill(os.getpid(), signal.SIGTERM)  # so that the others hear of it
        else:
          deadline = time.monotonic() + PATIENCE


def _leave(number: int, why: str) -> None:
  log.info('%s; the same command goes on from the last checkpoint', why)
  sys.stderr.flush()
  os._exit(128 + number)


class Ended(KeyboardInterrupt):
  """A signal that ends the program outside of a training, where there is nothing to save."""

  def __init__(self, number: int):
    super().__init__()
    self.number = number


@contextlib.contextmanager
def leaving() -> Iterator[None]:
  """Within it SIGTERM and Ctrl-C raise Ended, where a training does not hear them: soon, also while something compiles."""

  def end(number: int, frame: Any) -> None:
    del frame
    raise Ended(number)

  def listen(pipe: int) -> None:
    if number := os.read(pipe, 1):
      if select.select([pipe], [], [], PATIENCE / 2)[0] and not os.read(pipe, 1):
        return  # it has come to its end by itself
      _leave(number[0], 'left at once')

  with _heard(end, listen):
    yield


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
  """Within it SIGTERM and Ctrl-C ask to stop, and a second Ctrl-C leaves at once."""
  stop = Stop()
  with _heard(lambda number, frame: None, stop._listen):
    yield stop


@contextlib.contextmanager
def _heard(handler: Callable[[int, Any], None], listen: Callable[[int], None]) -> Iterator[None]:
  """Handles SIGTERM and Ctrl-C, and lets a thread read their numbers from a pipe until its other end is closed.

  Python's handlers run when the main thread comes back from compiling, for which a second Ctrl-C should not have to wait.
  """
  if threading.current_thread() is not threading.main_thread():  # as in some notebooks: nobody can ask
    yield
    return
  pipe, end = os.pipe()
  os.set_blocking(end, False)
  # Of several processes, SIGTERM is jax's.
  numbers = (signal.SIGINT,) if jax.distributed.is_initialized() else (signal.SIGINT, signal.SIGTERM)
  before = {number: signal.signal(number, handler) for number in numbers}
  before_end = signal.set_wakeup_fd(end, warn_on_full_buffer=False)
  listener = threading.Thread(target=listen, args=(pipe,), name='signals', daemon=True)
  listener.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before_end)
    for number, handler in before.items():
      signal.signal(number, handler)
    os.close(end)
    listener.join()
    os.close(pipe)
