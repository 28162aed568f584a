"""The command line: flags, the processes of a distributed run, and the table of jobs.

`ft-jax` of the installed package and `python main.py` of the repository are the same command.
"""

from collections.abc import Callable
import functools
import signal
from typing import Any

from absl import app, flags
from ml_collections import config_flags, ConfigDict

from ft_jax.command import default_workdir, exit_codes, parse

_CONFIG = config_flags.DEFINE_config_file(
    'config', help_string='a name in configs/ such as pets, or a file: the job and all its settings; '
    '--config.field=value sets a field')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'folder for everything that is written; an interrupted run resumes from it (default: '
    'runs/<name of the config>; for jobs that use a finished run <config.workdir>/<name of the config>)')
_TRACEBACK = flags.DEFINE_bool('traceback', False, 'show the traceback of an error')
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'on several hosts: HOST:PORT of process 0. SLURM tasks and Cloud TPU hosts do not need it')
_PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'on several hosts: number of processes; 1 starts this one alone, even under SLURM or on a '
    'Cloud TPU pod')
_PROCESS = flags.DEFINE_integer('process_id', None, 'on several hosts: number of this process, from 0')
_WORKERS = flags.DEFINE_integer(
    'workers', 1, 'job compare: number of processes on this host that share the runs and the CPU cores. Several hosts '
    'that share the --workdir share the runs too, each with its own command')
flags.mark_flag_as_required('config')


def command() -> None:
  """Runs the job that the command line asks for, and exits."""
  # Until a job handles Ctrl-C, it ends the program without a traceback from whatever is being imported.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  app.run(main, flags_parser=parse)


def main(argv: list[str]) -> None:
  """Runs one job, after the flags are parsed."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}; settings are written --config.field=value')
  # Imported here, so that --help answers at once.
  from ft_jax import cluster, compiled, progress

  progress.quiet_libraries()
  progress.show_log(_PROCESS.value or 0)
  with exit_codes(_TRACEBACK.value):
    progress.show_log(cluster.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value))
    config = _CONFIG.value
    compiled.keep(config.compile_cache)
    run = job(config, _WORKERS.value)
    file_name = config_flags.get_config_filename(flags.FLAGS['config'])
    run(config, _WORKDIR.value or default_workdir(file_name, config.workdir))


def job(config: ConfigDict, processes: int = 1) -> Callable[[ConfigDict, str], Any]:
  """The function that runs the job of a config.

  Raises:
    ValueError: an unknown job, one that does not use `config.workdir` although that is set, or another one than
      compare with several `processes`.
  """
  from ft_jax.jobs import compare, export, finetune, predict, pretrain, stability, study

  jobs: dict[str, Callable[[ConfigDict, str], Any]] = {
      'finetune': finetune.run,
      'pretrain': pretrain.run,
      'compare': functools.partial(compare.run, processes=processes),
      'export': export.run,
      'predict': predict.run,
      'stability': stability.run,
      'study': study.run,
  }
  if config.job not in jobs:
    raise ValueError(f'config.job is {config.job!r}; known: {", ".join(jobs)}')
  if config.workdir and config.job not in ('export', 'predict', 'stability'):
    raise ValueError('config.workdir is the finished run that export, predict and stability use, but this is job '
                     f'{config.job}; set its own folder by --workdir')
  if processes != 1 and config.job != 'compare':
    raise ValueError(f'--workers is {processes}, but only job compare has several runs to share, and this is job '
                     f'{config.job}')
  return jobs[config.job]
