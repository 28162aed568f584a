"""Distributed runs: how the processes find each other at the start, and how one that fails ends the others.

Process 0 runs jax's coordination service, which all processes report to. When one of them ends, the others are ended.
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

# Seconds within which all processes must connect: hosts of a pod start one by one, and import from a shared disk.
START_SECONDS = 300
# Seconds without a heartbeat after which a process counts as dead, and all end. Heartbeats come from a separate thread,
# so that compiling or reading a slow image does not delay them. A longer network failure ends the run, which can then
# be resumed from its last checkpoint.
HEARTBEAT_SECONDS = 60
# Seconds that a finished process waits for the others at the end: some may still be writing to a slow disk.
SHUTDOWN_SECONDS = 300
# Seconds that process 0 waits before it exits after an error. The others are ended together with it, and could
# otherwise not print their own errors.
_EXIT_DELAY = 2

# How jax's errors begin when another process is gone.
_LOST = re.compile(
    r'gloo|nccl|rccl|coordination service|heartbeat|socket closed|connection (closed|reset|refused)|barrier',
    re.IGNORECASE)
_SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')

# Whether this process was started as one of several, and its number once all are connected. (jax.process_index() would
# initialise the devices.)
_started: bool = False
_joined: int | None = None


class Place(NamedTuple):
  """How a process finds the others.

  coordinator: HOST:PORT of process 0; None if jax finds it (and the other two) by itself.
  processes: how many there are, or None.
  process: the number of this one, or None.
  found: where this is set, for messages.
  devices: the GPUs of this process, as indices into those that it sees; None leaves the choice to jax.
  """
  coordinator: str | None
  processes: int | None
  process: int | None
  found: str
  devices: list[int] | None = None


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None,
          seconds: float = START_SECONDS) -> int:
  """Connects to the other processes, if there are any. Must be called before anything uses jax's devices.

  Without arguments, the environment decides: the tasks of a SLURM step and the hosts of a Cloud TPU are connected.

  Args:
    coordinator: HOST:PORT at which process 0 listens and all others find it.
    processes: how many there are; 1, without the others, means a single process whatever the environment says.
    process: the number of this one, from 0.
    seconds: within which all must connect; otherwise the program ends.

  Returns:
    The number of this process.

  Raises:
    ValueError: arguments that are missing or wrong; a failed connection.
  """
  global _started, _joined
  place = _place(coordinator, processes, process, os.environ)
  if place is None:
    return 0
  _started = True
  who = f'process {place.process} of {place.processes}' if place.process is not None else f'a process of {place.found}'
  where = place.coordinator or f'the address that {place.found} gives'
  if not place.process:
    log.info('waiting for %s at %s',
             f'{place.processes} processes' if place.processes else f'all processes of {place.found}', where)
  if place.coordinator and not place.process:
    _check_port(place.coordinator, place)
  # When the time is up, jax would end the program with a page of internals; this ends it earlier, with one line.
  watch = threading.Timer(seconds, _exit_unconnected,
                          (f'{who} has not met the others at {where} within {seconds:g} s. {_advice(place)}',))
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
  """Whether this process was started as one of several, even if they are not connected yet."""
  return _started


def error_message(error: BaseException) -> str:
  """The message of an error; if it only reports that another process is gone, an explanation of that."""
  if _joined is not None and _LOST.search(str(error)):
    return f'another process ended or cannot be reached; what it printed says why ({short(error)})'
  return str(error)


def leave(code: int) -> NoReturn:
  """Exits at once. A normal exit would wait for the other processes, and for threads that hang on a disk."""
  if _joined == 0:
    time.sleep(_EXIT_DELAY)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _place(coordinator: str | None, processes: int | None, process: int | None,
           environment: Mapping[str, str]) -> Place | None:
  """How to find the others; None for a single process."""
  if processes == 1 and coordinator is None and process in (None, 0):
    return None
  if not (coordinator is None and processes is None and process is None):
    return _explicit(coordinator, processes, process)
  if (tasks := _slurm_tasks(environment)) > 1:
    return Place(None, tasks, int(environment['SLURM_PROCID']), 'SLURM', _slurm_devices(environment))
  return Place(None, None, None, 'the Cloud TPU') if _tpu_hosts(environment) else None


def _explicit(coordinator: str | None, processes: int | None, process: int | None) -> Place:
  given = {'--coordinator': coordinator, '--num_processes': processes, '--process_id': process}
  if coordinator is None or processes is None or process is None:
    present = ', '.join(name for name, value in given.items() if value is not None)
    missing = ' and '.join(name for name, value in given.items() if value is None)
    raise ValueError(f'{present} without {missing}; several processes need all three: '
                     '--coordinator=HOST:PORT --num_processes=N --process_id=0 ... N-1')
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ValueError(f'--coordinator is {coordinator!r}; expected HOST:PORT of process 0, such as 10.0.0.2:8476')
  if processes < 1:
    raise ValueError(f'--num_processes is {processes}; expected a number from 1')
  if not 0 <= process < processes:
    raise ValueError(f'--process_id is {process}; expected 0 to {processes - 1}, as --num_processes is {processes}')
  return Place(coordinator, processes, process, 'the flags')


def _slurm_tasks(environment: Mapping[str, str]) -> int:
  """The number of tasks of this SLURM step; 0 outside of srun, as in the script that sbatch runs."""
  if not all(name in environment for name in _SLURM):
    return 0
  # A step may have fewer tasks than its job.
  return int(environment.get('SLURM_STEP_NUM_TASKS') or environment['SLURM_NTASKS'])


def _slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
  """The GPUs of this task: all that it sees if it is alone on its node or has its own; else jax assigns one each."""
  visible = [name for name in environment.get('CUDA_VISIBLE_DEVICES', '').split(',') if name]
  on_node = int(environment.get('SLURM_GPUS_ON_NODE') or 0)
  seen = len(visible) or on_node
  alone = environment.get('SLURM_STEP_NUM_TASKS') == environment.get('SLURM_STEP_NUM_NODES')
  return list(range(seen)) if seen and (alone or 0 < len(visible) < on_node) else None


def _tpu_hosts(environment: Mapping[str, str]) -> bool:
  """Whether jax sees a Cloud TPU that may have several hosts."""
  # When jax is imported and finds TPUs with their library, it sets its platforms; otherwise it sets TPU_SKIP_MDS_QUERY.
  if not (jax.config.values['jax_platforms'] or '').startswith('tpu') or 'TPU_SKIP_MDS_QUERY' in environment:
    return False
  names = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES')
  alone = names is not None and len(names.split(',')) == 1  # in a notebook, or on a single host under Kubernetes
  return not alone or int(environment.get('MEGASCALE_NUM_SLICES') or 1) > 1


def _check_port(coordinator: str, place: Place) -> None:
  """Raises ValueError if process 0 cannot listen: jax may crash then."""
  port = int(coordinator.rpartition(':')[2])
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  try:
    socket.create_server(('', port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
  except OSError as error:
    why = os.strerror(error.errno or 0).lower()
    raise ValueError(
        f'process 0 of {place.processes} cannot listen on port {port} ({why}). {_advice(place)}') from error


def _advice(place: Place) -> str:
  if place.coordinator and place.processes:
    host, _, port = place.coordinator.rpartition(':')
    return (f'Start all {place.processes} with the same --coordinator and --num_processes, and --process_id 0 to '
            f'{place.processes - 1}, each once; process 0 must run on {host}, with port {port} free and reachable from '
            'the others')
  return (f'{place.found[0].upper()}{place.found[1:]} says that there are others: run the same command in all of them, '
          'or this one alone with --num_processes=1')


def _exit_unconnected(message: str) -> None:
  log.error('error: %s', message)
  sys.stderr.flush()
  os._exit(1)  # the main thread is blocked inside of jax
