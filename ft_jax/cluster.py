"""Several processes that work as one: how they find each other at the start, and how one that fails ends the others.

Process 0 carries jax's coordination service, which all report to; where one ends, the others are ended.
"""

from collections.abc import Mapping
import os
import re
import socket
import sys
import threading
import time
from typing import NamedTuple, NoReturn

import jax

from ft_jax.names import short
from ft_jax.progress import log

# Seconds that the others may take to come: hosts of a pod are started one after the other, and import from a shared disk.
START_SECONDS = 300
# Seconds of silence after which a process counts as dead, and all end. Its host answers from a thread of its own, so compiling or a slow
# image do not matter; a network that is away for longer ends the run, which then goes on from its last checkpoint.
HEARTBEAT_SECONDS = 60
# Seconds that a finished process waits for the others at the end: the last ones may still be waiting for a slow disk.
SHUTDOWN_SECONDS = 300
# Seconds that process 0 stays after an error: without it the others are ended at once, also those that are about to say the same.
_SAYING = 2

# What jax says where a process that it computes with is gone.
_LOST = re.compile(r'gloo|nccl|rccl|coordination service|heartbeat|socket closed|connection (closed|reset|refused)|barrier', re.IGNORECASE)
_SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')


# Whether this process was started as one of several, and its number once they have met: jax would look for devices to tell it.
_started, _joined = False, None


class Place(NamedTuple):
  """Where a process finds the others.

  coordinator: HOST:PORT of process 0; None where jax finds it (and the other two) by itself.
  processes: how many there are, or None.
  process: which of them this one is, or None.
  found: what says so, for messages.
  devices: the GPUs of this process, by their numbers among those that it sees; None is jax's choice.
  """
  coordinator: str | None
  processes: int | None
  process: int | None
  found: str
  devices: list[int] | None = None


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None,
          seconds: float = START_SECONDS) -> int:
  """Joins the other processes, where there are any; must come before anything asks for devices.

  Without arguments the environment is asked: a SLURM step of several tasks and a Cloud TPU of several hosts are started together.

  Args:
    coordinator: HOST:PORT on which process 0 listens, and all others find it.
    processes: how many there are; 1, alone, starts no others whatever the environment says.
    process: the number of this one, from 0.
    seconds: that all of them may take to come.

  Returns:
    The number of this process.

  Raises:
    ValueError: arguments of which some are missing or wrong; others that cannot be joined. Where time runs out, the program ends.
  """
  global _started, _joined
  place = _place(coordinator, processes, process, os.environ)
  if place is None:
    return 0
  _started = True
  who = f'process {place.process} of {place.processes}' if place.process is not None else f'a process of {place.found}'
  where = place.coordinator or f'the address that {place.found} gives'
  if not place.process:
    log.info('waiting for %s at %s', f'{place.processes} processes' if place.processes else f'all processes of {place.found}', where)
  if place.coordinator and not place.process:
    _check_port(place)
  # jax ends the program itself where the time is up, with a page about its insides; this comes before it.
  watch = threading.Timer(seconds, _not_all_came, (f'{who} has not met the others at {where} within {seconds:g} s. {_advice(place)}',))
  watch.daemon = True
  watch.start()
  try:
    jax.distributed.initialize(
        place.coordinator, place.processes, place.process, local_device_ids=place.devices,
        cluster_detection_method='deactivate' if place.coordinator else None, initialization_timeout=int(seconds) + 60,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
  except (ValueError, OSError, RuntimeError) as error:
    raise ValueError(f'{who} cannot be started at {where} ({short(error)}). {_advice(place)}') from error
  finally:
    watch.cancel()
  _joined = jax.process_index()
  if not _joined:
    log.info('%d processes with %d devices', jax.process_count(), jax.device_count())
  return _joined


def several() -> bool:
  """Whether this process was started as one of several, also where it has not met them yet."""
  return _started


def described(error: BaseException) -> str:
  """An error in words; of one that only says that another process is gone, what that means."""
  if _joined is not None and _LOST.search(str(error)):
    return f'another process ended or cannot be reached; what it printed says why ({short(error)})'
  return str(error)


def leave(code: int) -> NoReturn:
  """Ends this process at once. The usual way out waits for other processes to come to their end, and for threads that hang on a disk."""
  if _joined == 0:
    time.sleep(_SAYING)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _place(coordinator: str | None, processes: int | None, process: int | None, environment: Mapping[str, str]) -> Place | None:
  """Where the others are; None for a process that works alone."""
  given = {'--coordinator': coordinator, '--num_processes': processes, '--process_id': process}
  if processes == 1 and coordinator is None and process in (None, 0):
    return None
  if any(value is not None for value in given.values()):
    return _explicit(given)
  if (tasks := _slurm_tasks(environment)) > 1:
    return Place(None, tasks, int(environment['SLURM_PROCID']), 'SLURM', _slurm_devices(environment))
  return Place(None, None, None, 'the Cloud TPU') if _tpu_hosts(environment) else None


def _explicit(given: Mapping[str, str | int | None]) -> Place:
  coordinator, processes, process = given.values()
  if missing := [name for name, value in given.items() if value is None]:
    raise ValueError(f'{", ".join(name for name in given if name not in missing)} without {" and ".join(missing)}; several processes need '
                     'all three: --coordinator=HOST:PORT --num_processes=N --process_id=0 ... N-1')
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ValueError(f'--coordinator is {coordinator!r}; expected HOST:PORT of process 0, such as 10.0.0.2:8476')
  if processes < 1:
    raise ValueError(f'--num_processes is {processes}; expected a number from 1')
  if not 0 <= process < processes:
    raise ValueError(f'--process_id is {process}; expected 0 to {processes - 1}, as --num_processes is {processes}')
  return Place(coordinator, processes, process, 'the flags')


def _slurm_tasks(environment: Mapping[str, str]) -> int:
  """The tasks of the step that this process is one of; 0 outside of srun, as in the script that sbatch runs."""
  if not all(name in environment for name in _SLURM):
    return 0
  # That of the step where it is smaller than the job.
  return int(environment.get('SLURM_STEP_NUM_TASKS') or environment['SLURM_NTASKS'])


def _slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
  """The GPUs of this task: all that it sees where it is alone on its node or has some of its own; else jax's choice, one a task."""
  visible = [name for name in environment.get('CUDA_VISIBLE_DEVICES', '').split(',') if name]
  on_node = int(environment.get('SLURM_GPUS_ON_NODE') or 0)
  seen = len(visible) or on_node
  alone = environment.get('SLURM_STEP_NUM_TASKS') == environment.get('SLURM_STEP_NUM_NODES')
  return list(range(seen)) if seen and (alone or 0 < len(visible) < on_node) else None


def _tpu_hosts(environment: Mapping[str, str]) -> bool:
  """Whether jax sees a Cloud TPU that may have several hosts."""
  # jax, when it is imported, asks for TPUs where it finds them with their library, and otherwise says so in TPU_SKIP_MDS_QUERY.
  if not (jax.config.jax_platforms or '').startswith('tpu') or 'TPU_SKIP_MDS_QUERY' in environment:
    return False
  names = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES')
  alone = names is not None and len(names.split(',')) == 1  # in notebooks, on one host of Kubernetes
  return not alone or int(environment.get('MEGASCALE_NUM_SLICES') or 1) > 1


def _check_port(place: Place) -> None:
  """Raises ValueError where process 0 cannot listen: jax may crash there."""
  port = int(place.coordinator.rpartition(':')[2])
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  try:
    socket.create_server(('', port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
  except OSError as error:
    why = os.strerror(error.errno).lower()
    raise ValueError(f'process 0 of {place.processes} cannot listen on port {port} ({why}). {_advice(place)}') from error


def _advice(place: Place) -> str:
  if place.found == 'the flags':
    host, _, port = place.coordinator.rpartition(':')
    return (f'Start all {place.processes} with the same --coordinator and --num_processes, and --process_id 0 to {place.processes - 1}, '
            f'each once; process 0 must run on {host}, with port {port} free and reachable from the others')
  return (f'{place.found[0].upper()}{place.found[1:]} says that there are others: run the same command in all of them, or this one '
          'alone with --num_processes=1')


def _not_all_came(message: str) -> None:
  log.error('error: %s', message)
  sys.stderr.flush()
  os._exit(1)  # the main thread is inside of jax
