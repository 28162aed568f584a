"""How signals end a program: soon, whatever it is doing, and in a training by asking it."""

import pathlib
import signal
import subprocess
import sys

import pytest

from ft_jax import stopping

ROOT = pathlib.Path(__file__).parents[1]
# What takes long is a lock that is taken twice, outside of the interpreter, as a compilation is: no handler of Python
# is called meanwhile.
BEGIN = '''
import ctypes
import sys
import threading
import time
from ft_jax import command, progress, stopping
progress.show_log()
stopping.PATIENCE = float(sys.argv[1])
library, lock = ctypes.CDLL(None), (ctypes.c_char * 64)()
long = lambda: [library.pthread_mutex_lock(lock) for _ in range(2)]
def ready(): print('ready', flush=True)
def ready_within():
  def tell():
    while int.from_bytes(lock.raw[:4], sys.byteorder) != 2:  # what glibc writes there when somebody has to wait
      time.sleep(0.01)
    ready()
  threading.Thread(target=tell, daemon=True).start()
'''
OUTSIDE = BEGIN + '''
with command.exit_codes(False):
  ready_within()
  long()
'''
WAITING = BEGIN + '''
with command.exit_codes(False):
  ready()
  input()
'''
TRAINING = BEGIN + '''
with command.exit_codes(False), stopping.signals() as stop:
  ready()
  while not stop():
    pass
  print(stop.signal, flush=True)
  long()
'''
STUCK = BEGIN + '''
with command.exit_codes(False), stopping.signals() as stop:
  ready_within()
  long()
'''


def end(script, signals, patience=600.0):
  """Starts it, sends the signals one after the other (a line of its output comes before each); (exit code, output,
  messages)."""
  command = [sys.executable, '-c', script, str(patience)]
  with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        text=True) as process:
    lines = []
    for number in signals:
      lines.append(process.stdout.readline().strip())
      process.send_signal(number)
    rest, messages = process.communicate(timeout=300)
  return process.returncode, [*lines, *rest.split()], messages


@pytest.mark.parametrize('script,patience,words', [
    (WAITING, 600.0, 'stopped (SIG'), (OUTSIDE, 1.0, 'stopped at once'), (STUCK, 0.5, 'did not end within')])
def test_a_signal_ends_whatever_is_going_on(script, patience, words):
  """Where Python gets to it, at once; where it does not, as in a compilation, after a while."""
  for number in (signal.SIGTERM, signal.SIGINT) if script is WAITING else (signal.SIGTERM,):
    code, _, messages = end(script, [number], patience)
    assert code == 128 + number and words in messages and 'the same command resumes' in messages
    assert 'Traceback' not in messages


def test_a_second_one_leaves_at_once():
  """The first asks the training to stop, which saves for a long time; nobody has to wait for that."""
  code, printed, messages = end(TRAINING, [signal.SIGINT, signal.SIGINT])
  assert (code, printed) == (130, ['ready', '2']) and 'stopping after this step (SIGINT)' in messages
  assert 'stopped at once' in messages


def test_within_another_program_a_signal_never_ends_it():
  """The first Ctrl-C asks to stop, the second one is an ordinary KeyboardInterrupt; SIGTERM is the program's own."""
  before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  with stopping.embedded(), pytest.raises(KeyboardInterrupt, match='the same command resumes'):
    with stopping.signals() as stop:
      assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM] and not stop()
      signal.raise_signal(signal.SIGINT)
      assert stop() and stop.signal == signal.SIGINT
      signal.raise_signal(signal.SIGINT)
  assert before == {number: signal.getsignal(number) for number in before}
