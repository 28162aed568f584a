"""Runs main.py many times without importing jax and the rest every time (about five seconds).

One process imports everything and forks for each command, so that a command still has a process, flags and devices of
its own.
"""

import atexit
import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]

_SERVER = """
import json, os, sys, warnings
from ft_jax import main
from ft_jax.jobs import compare, export, finetune, predict, pretrain, stability, study
from jax._src import xla_bridge

assert not xla_bridge.backends_are_initialized(), 'a process with running devices must not be forked'
for line in sys.stdin:
  command = json.loads(line)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Python 3.12 warns of idle threads of BLAS
    child = os.fork()
  if not child:
    break
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
  sys.exit()
for stream, path in ((0, os.devnull), (1, command['stdout']), (2, command['stderr'])):
  os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
os.environ.clear()
os.environ.update(command['environment'])
sys.argv = ['main.py', *command['flags']]
main.command()
"""


def main(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
  """`python main.py <flags>`, with these variables of the environment beside the present ones."""
  environment = {**os.environ, **environment}
  read_at_import = {name: value for name, value in environment.items() if name.startswith(('JAX_', 'PYTHON'))}
  return _server(tuple(sorted(read_at_import.items()))).run(flags, environment)


@functools.cache
def _server(read_at_import: tuple[tuple[str, str], ...]) -> 'Server':
  present = {name: value for name, value in os.environ.items() if not name.startswith(('JAX_', 'PYTHON'))}
  return Server({**present, **dict(read_at_import)})


class Server:
  """A process that has imported the program, and forks for every command."""

  def __init__(self, environment: dict[str, str]):
    self._process = subprocess.Popen([sys.executable, '-c', _SERVER], cwd=ROOT,
                                     env={**environment, 'PYTHONPATH': str(ROOT)},
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(self.close)

  def run(self, flags: tuple[str, ...], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`python main.py <flags>`, in this environment as far as it is read after the imports."""
    assert self._process.stdin and self._process.stdout
    with tempfile.TemporaryDirectory() as folder:
      files = {name: str(pathlib.Path(folder) / name) for name in ('stdout', 'stderr')}
      self._process.stdin.write(json.dumps({'flags': flags, 'environment': environment, **files}) + '\n')
      self._process.stdin.flush()
      reply = self._process.stdout.readline()
      if not reply:
        raise RuntimeError('the process that runs the commands has ended; its error is above')
      texts = [pathlib.Path(files[name]).read_text() for name in ('stdout', 'stderr')]
    return subprocess.CompletedProcess(['main.py', *flags], int(reply), *texts)

  def close(self) -> None:
    """Ends the process."""
    with contextlib.suppress(BrokenPipeError):
      self._process.communicate()
