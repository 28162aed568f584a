"""Parsing of the command line with clear errors, and the exit code and last message of a job."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
import signal
import sys
import traceback

from absl import flags
from ml_collections import ConfigDict

from ft_jax import config_files

# Messages of ml_collections and Python about values of the wrong type, in a flag or in a config file, and clearer ones.
_WRONG_TYPES = {
    r"invalid literal for int\(\) with base 10: .*": 'expected a whole number',
    r"could not convert string to float: .*": 'expected a number',
    r"\('Non-boolean argument to boolean flag', .*\)": 'expected true or false',
    r"flag --config=None: .*": '--config is missing; give a config, such as --config=configs/pets.py',
    r"(?s)Failed to parse '(.*)' as a ConfigDict: .*":
        'this is a group of fields; set one of them, as --config.group.field=value',
    r"(?s)Could not override field '(\w+)' \(reference\)\. (.*) is of original type <class '([\w.]+)'> and cannot be "
    r"casted to type <class '(?:\w+[.])*(\w+)'>":
        r"the config file sets the field '\1' to \2, which is of type \3; expected \4",
}


def default_workdir(file_name: str, used_run: str = '') -> str:
  """`runs/pets` for configs/pets.py, `runs/pets-mocov2` for configs/pets.py:mocov2.

  Args:
    file_name: of the config.
    used_run: workdir of the finished run that the job uses; the default is then a folder in it, such as `export`.
  """
  path, _, argument = file_name.partition(':')
  return os.path.join(used_run or 'runs', pathlib.Path(path).stem + (f'-{argument}' if argument else ''))


def parse(argv: list[str]) -> list[str]:
  """Parses the flags; exits with one line for a wrong value, and with the known fields for an unknown one."""
  try:
    with config_files.importable():
      return flags.FLAGS(_with_config_path(argv))
  except (OSError, ValueError) as error:  # from a config that opens files of its own
    sys.exit(f'error: {error}')
  except flags.Error as error:
    # An error in a config file comes with its traceback.
    *_, reason = str(error).strip().splitlines()
    if 'takes 0 positional arguments' in reason:
      reason = 'this config takes no argument after a colon'
    program = os.path.basename(argv[0])
    program = f'python {program}' if program.endswith('.py') else program
    reason = _reworded(re.sub('^[A-Za-z]+Error: ', '', reason.strip()))
    sys.exit(f'error: {reason}\n({program} --help lists the flags)')
  except (AttributeError, KeyError) as error:
    if problem := _unknown_flag(argv) or _unknown_in_file(error):
      sys.exit(f'error: {problem}')
    raise


def _with_config_path(argv: list[str]) -> list[str]:
  """The arguments with the path of the config file in place of its name."""
  argv = list(argv)
  for i, arg in enumerate(argv[1:], 1):
    if match := re.fullmatch(r'--?config=(.+)', arg):
      argv[i] = f'--config={_found(match[1])}'
    elif arg in ('--config', '-config') and i + 1 < len(argv):
      argv[i + 1] = _found(argv[i + 1])
  return argv


def _found(name: str) -> str:
  try:
    return config_files.find(name)
  except ValueError as error:
    sys.exit(f'error: --config: {error}')


def _unknown_flag(argv: list[str]) -> str:
  """What is wrong with the first flag that names no field of the config; '' if all do."""
  from ft_jax.config import get_config
  from ft_jax.settings import RENAMED

  for flag in (arg[len('--config.'):].partition('=')[0] for arg in argv if arg.startswith('--config.')):
    if flag in RENAMED:
      return f'config.{flag} is now called config.{RENAMED[flag]}; use --config.{RENAMED[flag]}'
    group, known = '', get_config()
    for name in flag.split('.'):
      if not isinstance(known, ConfigDict):
        return f'the config has no field {flag!r}; config.{group.rstrip(".")} is a single value'
      if name not in known:
        return f'the config has no field {flag!r}; {("config." + group).rstrip(".")} has {", ".join(known)}'
      group, known = f'{group}{name}.', known[name]
  return ''


def _unknown_in_file(error: Exception) -> str:
  """What is wrong with a config file that sets an unknown field, from ml_collections' error; '' for another error."""
  from ft_jax.settings import RENAMED

  unknown = re.search(r'Key "(\w+)" does not exist', str(error))
  if not unknown:
    return ''
  for old, new in RENAMED.items():
    if old.rpartition('.')[2] == unknown[1]:
      return f'the config file sets {unknown[1]!r}, a field that is now called {new.rpartition(".")[2]!r}'
  meant = re.search(r'Did you mean "\w+"', str(error))
  hint = f' {meant[0]}?' if meant else ''
  return f'the config file sets {unknown[1]!r}, which is not a field of the config (ft_jax/config.py).{hint}'


def _reworded(reason: str) -> str:
  """A message of ml_collections or Python about a value of the wrong type, reworded for users of the command line."""
  for pattern, words in _WRONG_TYPES.items():
    reason = re.sub(pattern, words, reason)
  return reason


@contextlib.contextmanager
def exit_codes(show_traceback: bool) -> Iterator[None]:
  """Ends the program as a command should: one line for an error, an exit code, and all processes of a distributed run.

  Args:
    show_traceback: of errors; otherwise only unexpected ones show it.
  """
  from ft_jax import cluster, progress, stopping

  try:
    with stopping.signals_raise():
      yield
  except SystemExit as stopped:  # after a signal; the training is saved
    message = getattr(stopped, 'message', '')
    if message:
      progress.log.info('%s', message)
    if not message or cluster.several():  # all processes are about to exit, and jax ends them together
      raise
    cluster.leave(_exit_code(stopped))
  except KeyboardInterrupt as interrupt:
    number = interrupt.number if isinstance(interrupt, stopping.Signalled) else signal.SIGINT
    progress.log.info('stopped (%s); the same command resumes from what is finished', signal.Signals(number).name)
    cluster.leave(128 + number)
  except Exception as error:
    one_line = isinstance(error, (ValueError, OSError, RuntimeError)) and not show_traceback
    if not one_line and not cluster.several():
      raise
    if not one_line:
      traceback.print_exc()
    progress.log.error('error: %s', cluster.error_message(error))
    cluster.leave(1)


def _exit_code(stopped: SystemExit) -> int:
  return stopped.code if isinstance(stopped.code, int) else 1
