"""Runs one job: python main.py --config=configs/pets.py [--config.field=value ...] [--workdir=runs/pets]."""

import signal

from absl import app, flags, logging
from ml_collections import config_flags

from ft_jax.command import default_workdir, ending, parse

# Until a job hears it, Ctrl-C ends the program as any other, without a traceback through whatever is being imported.
signal.signal(signal.SIGINT, signal.SIG_DFL)

_CONFIG = config_flags.DEFINE_config_file(
    'config', help_string='a file of configs/, with the job and all its settings; any field is set as --config.field=value')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'where everything is written, and where a stopped run goes on (default: runs/<name of the config>; of jobs that '
    'use a run <config.workdir>/<name of the config>)')
_TRACEBACK = flags.DEFINE_bool('traceback', False, 'show where in the program an error came from')
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'on several hosts: HOST:PORT of process 0. Tasks of SLURM and hosts of a Cloud TPU find each other without it')
_PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'on several hosts: how many processes there are; 1 starts this one alone, whatever SLURM or a Cloud TPU say')
_PROCESS = flags.DEFINE_integer('process_id', None, 'on several hosts: the number of this process, from 0')
flags.mark_flag_as_required('config')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}; settings are written --config.field=value')
  # Below warnings, matplotlib writes when it is first used, and orbax and jax a page of lines for every checkpoint.
  logging.set_verbosity(logging.WARNING)
  # A checkpoint between two evaluations has no metrics, and is meant so.
  logging.get_absl_logger().addFilter(lambda record: 'tracked_metric' not in record.getMessage())
  # After the flags, so that --help answers at once.
  from ft_jax import cluster, compiled, progress

  progress.show_log(_PROCESS.value or 0)
  with ending(_TRACEBACK.value):
    progress.show_log(cluster.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value))
    from ft_jax.jobs import compare, export, finetune, predict, pretrain, stability, study

    jobs = {'finetune': finetune.run, 'pretrain': pretrain.run, 'compare': compare.run, 'export': export.run, 'predict': predict.run,
            'stability': stability.run, 'study': study.run}
    config = _CONFIG.value
    compiled.keep(config.compile_cache)
    if config.job not in jobs:
      raise ValueError(f'config.job is {config.job!r}; known: {", ".join(jobs)}')
    if config.workdir and config.job not in ('export', 'predict', 'stability'):
      raise ValueError('config.workdir is the run that export, predict and stability use, and this is job '
                       f'{config.job}; its own folder is --workdir')
    file_name = config_flags.get_config_filename(flags.FLAGS['config'])
    jobs[config.job](config, _WORKDIR.value or default_workdir(file_name, config.workdir))


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
