"""Runs one job: python main.py --config=configs/pets.py [--config.field=value ...] [--workdir=runs/pets]."""

import os
import pathlib
import re
import signal
import sys

from absl import app, flags, logging
from ml_collections import config_flags, ConfigDict

_CONFIG = config_flags.DEFINE_config_file(
    'config', help_string='a file of configs/, with the job and all its settings; any field is set as --config.field=value')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'where everything is written, and where a stopped run goes on (default: runs/<name of the config>; of jobs that '
    'use a run <config.workdir>/<name of the config>)')
_TRACEBACK = flags.DEFINE_bool('traceback', False, 'show where in the program an error came from')
flags.mark_flag_as_required('config')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}; settings are written --config.field=value')
  # Below warnings, matplotlib writes when it is first used, and orbax and jax a page of lines for every checkpoint.
  logging.set_verbosity(logging.WARNING)
  # A checkpoint between two evaluations has no metrics, and is meant so.
  logging.get_absl_logger().addFilter(lambda record: 'tracked_metric' not in record.getMessage())
  # After the flags, so that --help answers at once.
  from ft_jax import names, progress
  from ft_jax.jobs import compare, export, finetune, loop, predict, pretrain, stability, study

  jobs = {'finetune': finetune.run, 'pretrain': pretrain.run, 'compare': compare.run, 'export': export.run, 'predict': predict.run,
          'stability': stability.run, 'study': study.run}
  file_name = config_flags.get_config_filename(flags.FLAGS['config'])
  progress.show_log()
  try:
    config = _CONFIG.value
    if config.job not in jobs:
      raise ValueError(f'config.job is {config.job!r}; known: {", ".join(jobs)}')
    if config.workdir and config.job not in ('export', 'predict', 'stability'):
      raise ValueError('config.workdir is the run that export, predict and stability use, and this is job '
                       f'{config.job}; its own folder is --workdir')
    jobs[config.job](config, _WORKDIR.value or default_workdir(file_name, config.workdir))
  except loop.Interrupted as stopped:
    progress.log.info('%s', stopped.message)
    raise
  except (ValueError, OSError, RuntimeError) as error:
    if _TRACEBACK.value:
      raise
    sys.exit(names.visible(f'error: {error}'))
  except KeyboardInterrupt:
    progress.log.info('stopped; the same command goes on from what is finished')
    # At once: threads that still read images would be torn down under their feet.
    sys.stderr.flush()
    os._exit(128 + signal.SIGINT)


def default_workdir(file_name: str, used: str = '') -> str:
  """`runs/pets` for configs/pets.py, `runs/pets-mocov2` for configs/pets.py:mocov2; `<used>/export` for a job that uses a run."""
  path, _, argument = file_name.partition(':')
  return os.path.join(used or 'runs', pathlib.Path(path).stem + (f'-{argument}' if argument else ''))


def check_config_file(file_name: str) -> None:
  """Ends the program where there is no such file, and says which there are: ml_collections says it late, and over five lines."""
  path = file_name.partition(':')[0]
  if not os.path.isfile(path):
    folder = pathlib.Path(__file__).parent / 'configs'
    sys.exit(f'error: --config: there is no file {path}; in configs/ are {", ".join(sorted(file.name for file in folder.glob("*.py")))}')


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
    sys.exit(f'error: {re.sub(r"^[A-Za-z]+Error: ", "", reason.strip())}\n(python main.py --help lists the flags)')
  except (AttributeError, KeyError) as error:
    from configs import default

    for flag in (arg[len('--config.'):].partition('=')[0] for arg in argv if arg.startswith('--config.')):
      group, known = '', default.get_config()
      for name in flag.split('.'):
        if not isinstance(known, ConfigDict) or name not in known:
          fields = f'has {", ".join(known)}' if isinstance(known, ConfigDict) else 'is one value'
          sys.exit(f'error: the config has no field {flag!r}; {("config." + group).rstrip(".")} {fields}')
        group, known = f'{group}{name}.', known[name]
    if wrong := re.search(r'Key "(\w+)" does not exist', str(error)):
      meant = re.search(r'Did you mean "\w+"', str(error))
      sys.exit(f'error: the file of --config sets {wrong[1]!r}, which is no field of configs/default.py. {meant[0] + "?" if meant else ""}')
    raise


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
