"""The command line around the jobs: flags that are read with clear errors, and how a job's end is told."""

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

# Messages about values of the wrong type: of a flag, and of a field that the file of a config sets.
_WRONG_TYPES = {
    r"invalid literal for int\(\) with base 10: .*": 'expected a whole number',
    r"could not convert string to float: .*": 'expected a number',
    r"\('Non-boolean argument to boolean flag', .*\)": 'expected true or false',
    r"(?s)Failed to parse '(.*)' as a ConfigDict: .*": 'this is a group of fields; set one of them, as --config.group.field=value',
    r"(?s)Could not override field '(\w+)' \(reference\)\. (.*) is of original type <class '([\w.]+)'> and cannot be casted to type "
    r"<class '(?:\w+[.])*(\w+)'>": r"the file of --config sets the field '\1' to \2, which is of type \3; expected \4",
}
_CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def default_workdir(file_name: str, used: str = '') -> str:
  """`runs/pets` for configs/pets.py, `runs/pets-mocov2` for configs/pets.py:mocov2; `<used>/export` for a job that uses a run."""
  path, _, argument = file_name.partition(':')
  return os.path.join(used or 'runs', pathlib.Path(path).stem + (f'-{argument}' if argument else ''))


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; an unknown field, there or in the config's file, is refused with the known ones."""
  if file_name := re.search(r'\0--?config[=\0]([^\0]+)', '\0'.join(argv)):
    check_config_file(file_name[1])
  try:
    return flags.FLAGS(argv)
  except OSError as error:  # of a config that opens files of its own
    sys.exit(f'error: {error}')
  except flags.Error as error:
    # What a config raises comes with its traceback.
    *_, reason = str(error).strip().splitlines()
    if 'takes 0 positional arguments' in reason:
      reason = 'that config takes no argument behind a colon'
    sys.exit(f'error: {_in_words(re.sub(r"^[A-Za-z]+Error: ", "", reason.strip()))}\n(python main.py --help lists the flags)')
  except (AttributeError, KeyError) as error:
    from configs import default
    from ft_jax.settings import RENAMED

    for flag in (arg[len('--config.'):].partition('=')[0] for arg in argv if arg.startswith('--config.')):
      if flag in RENAMED:
        sys.exit(f'error: config.{flag} is now called config.{RENAMED[flag]}; use --config.{RENAMED[flag]}')
      group, known = '', default.get_config()
      for name in flag.split('.'):
        if not isinstance(known, ConfigDict) or name not in known:
          fields = f'has {", ".join(known)}' if isinstance(known, ConfigDict) else 'is one value'
          sys.exit(f'error: the config has no field {flag!r}; {("config." + group).rstrip(".")} {fields}')
        group, known = f'{group}{name}.', known[name]
    if wrong := re.search(r'Key "(\w+)" does not exist', str(error)):
      if renamed := {new.rpartition('.')[2] for old, new in RENAMED.items() if old.rpartition('.')[2] == wrong[1]}:
        sys.exit(f'error: the file of --config sets {wrong[1]!r}, a field that is now called {renamed.pop()!r}')
      meant = re.search(r'Did you mean "\w+"', str(error))
      sys.exit(f'error: the file of --config sets {wrong[1]!r}, which is no field of configs/default.py. {meant[0] + "?" if meant else ""}')
    raise


def _in_words(reason: str) -> str:
  """What ml_collections and Python say of a value of the wrong type, as a user would."""
  for pattern, words in _WRONG_TYPES.items():
    reason = re.sub(pattern, words, reason)
  return reason


def check_config_file(file_name: str) -> None:
  """Ends the program where there is no such file, and says which there are: ml_collections says it late, and over five lines."""
  path = file_name.partition(':')[0]
  if not os.path.isfile(path):
    known = sorted(file.name for file in _CONFIGS.glob('*.py'))
    sys.exit(f'error: --config: there is no file {path}; in configs/ are {", ".join(known)}')


@contextlib.contextmanager
def ending(show_traceback: bool) -> Iterator[None]:
  """What a job ends with: an error is one line (or its traceback, where that is wanted), and of several processes all end."""
  from ft_jax import cluster, progress, stopping

  try:
    with stopping.leaving():
      yield
  except SystemExit as stopped:  # a signal asked for it, and what it was at is saved
    message = getattr(stopped, 'message', '')
    if message:
      progress.log.info('%s', message)
    if not message or cluster.several():  # of several, all are about to leave, and say good-bye
      raise
    cluster.leave(stopped.code)
  except KeyboardInterrupt as ended:
    number = ended.number if isinstance(ended, stopping.Ended) else signal.SIGINT
    progress.log.info('stopped (%s); the same command goes on from what is finished', signal.Signals(number).name)
    cluster.leave(128 + number)
  except Exception as error:
    in_words = isinstance(error, (ValueError, OSError, RuntimeError)) and not show_traceback
    if not in_words and not cluster.several():
      raise
    if not in_words:
      traceback.print_exc()
    progress.log.error('error: %s', cluster.described(error))
    cluster.leave(1)
