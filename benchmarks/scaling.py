"""What a training step sends between devices, and how its time changes with devices and processes at fixed work.

    python benchmarks/scaling.py [--name resnet18] [--width 64] [--size 32] [--batch 32] [--steps 10] [--only
    bytes,time] [--small]

Bytes are read from the compiled step: the operands of its all-reduces, all-gathers and the like on one device, beside
  the size of the
gradients. Times are of the same joint step, with the same images over all devices together, on 1 to 8 fake devices of
this CPU and on 1 and 2 processes (gloo, over the loopback). Fake devices share the cores: the time says what dividing
the work costs, not what it gains.
"""

import argparse
from collections import Counter
import json
import math
import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
import optax

from ft_jax import methods, parallel
from ft_jax.methods import METHODS
from ft_jax.methods.base import SetupContext
from ft_jax.models import build, NETWORKS
from ft_jax.training.step import create_state, make_train_step

TARGETS, SOURCES, DEVICES = 37, 1000, 4
# Methods, and fields of the network.
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    'plain': ((), {}), 'sync BatchNorm': ((), {'axis_name': parallel.AXIS}),
    'frozen BatchNorm': ((), {'batch_norm': 'frozen'}),
    'frozen backbone': ((), {'batch_norm': 'frozen', 'frozen': '(?!heads).*'}), 'bss': (('bss',), {}),
    'bi_tuning': (('bi_tuning',), {}),
    'fixmatch': (('fixmatch',), {})}
_SENDING = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')
_WIDTHS = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}


class Sent(NamedTuple):
  """Of one kind of operation: how often it is in a step, how many arrays it takes together, and their bytes on one
  device."""
  operations: int
  arrays: int
  size: int


def sent(text: str) -> dict[str, Sent]:
  """What the text of a compiled step sends: each kind of operation by its results, which for a gather are what
  arrives."""
  found: dict[str, Sent] = {}
  for result, kind in re.findall(rf'= (.*?) ({"|".join(_SENDING)})(?:-start)?\(', text):
    shapes = re.findall(r'(\w+)\[([\d,]*)\]', result)
    size = sum(_WIDTHS[dtype] * math.prod(int(n) for n in shape.split(',') if n) for dtype, shape in shapes)
    before = found.get(kind, Sent(0, 0, 0))
    found[kind] = Sent(before.operations + 1, before.arrays + len(shapes), before.size + size)
  return found


def make(args: argparse.Namespace, names: tuple[str, ...], fields: dict[str, Any]) -> tuple[Any, Any, Any]:
  """The joint step with some methods, a state for it (on the host), and a batch for all devices together."""
  active = methods.active({name: dict(METHODS[name].published) for name in names})
  labelled = not any(method.unlabelled_source for method in active.values())
  heads = {'target': TARGETS, **({'source': SOURCES} if labelled else {})}
  model = build(args.name, heads, width=args.width, **fields)
  rng = np.random.default_rng(0)
  data = {}
  for stream in ('target', 'source'):
    image = rng.integers(0, 255, (args.batch, args.size, args.size, 3)).astype(np.uint8)
    data[stream] = {'input': image, 'key': image[:, :, ::-1].copy(), 'strong': image[:, ::-1].copy(),
                    'label': rng.integers(0, TARGETS, args.batch).astype(np.int32),
                    'row': np.arange(args.batch, dtype=np.int32),
                    'mask': np.ones(args.batch, bool)}
  shapes = jax.eval_shape(model.clone(axis_name=None).init, jax.random.key(0), data['target']['input'][:1])
  variables = jax.tree.map(
      lambda x: rng.normal(1.0, 0.1, x.shape).astype(np.float32) / max(1, math.prod(x.shape[:-1])) ** 0.5, shapes)
  begin = SetupContext(model, variables, TARGETS, data['target']['label'], data['target']['label'], args.batch,
                       0, lambda *_: [data['target']])
  states = {name: method.setup(begin) for name, method in active.items()}
  own = {name: params for name, method in active.items() if (params := method.params(begin))}
  needs = methods.all_needs(active, model)
  optimizer = optax.sgd(0.001, 0.9, nesterov=True)
  state = create_state({**variables, 'params': {**variables['params'], **({'methods': own} if own else {})}}, optimizer,
                             start=variables if needs.start or needs.teacher else None, methods=states)
  step = make_train_step(model, optimizer, {'target': 1.0, **({'source': 1.0} if labelled else {})}, methods=active)
  return step, state, data


def count_bytes(args: argparse.Namespace) -> list[dict[str, Any]]:
  """A row a case: gradients, statistics, and what is sent."""
  rows = []
  for name, (names, fields) in CASES.items():
    if name not in args.cases.split(','):
      continue
    step, state, data = make(args, names, fields)
    size = lambda tree: sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))
    lowered = step.lower(parallel.replicate(state), {stream: parallel.shard(part) for stream, part in data.items()})
    rows.append({'case': name, 'gradients': size(state.params), 'statistics': size(state.batch_stats),
                 **{kind: list(of) for kind, of in sent(lowered.compile().as_text()).items()}})
    jax.clear_caches()
  return rows


def time_steps(args: argparse.Namespace) -> dict[str, Any]:
  """Median seconds of a joint step on this process's share of the batch, and the loss after the last one."""
  step, state, data = make(args, (), {'axis_name': parallel.AXIS})
  share = args.batch // jax.process_count()
  first = jax.process_index() * share
  batch = {stream: parallel.shard({key: value[first:first + share] for key, value in part.items()})
           for stream, part in data.items()}
  state, seconds = parallel.replicate(state), []
  for _ in range(args.steps + 2):
    began = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, batch))
    seconds.append(time.perf_counter() - began)
  return {'seconds': statistics.median(seconds[2:]), 'devices': jax.device_count(),
          'loss': float(parallel.unreplicate(metrics)['loss'])}


def child(args: argparse.Namespace, what: str, devices: int, process: int = 0, processes: int = 1,
          port: int = 0) -> subprocess.Popen:
  """This script in a process of its own, whose last line is JSON."""
  flags = [f'--{name}={getattr(args, name)}' for name in ('name', 'width', 'size', 'batch', 'steps', 'cases')]
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}
  return subprocess.Popen([sys.executable, __file__, *flags, f'--child={what},{process},{processes},{port}'], env=env,
                          stdout=subprocess.PIPE, text=True)


def results(children: list[subprocess.Popen]) -> Any:
  """What the first one says when all are through; RuntimeError where one failed."""
  said = [process.communicate()[0] for process in children]
  if any(process.returncode for process in children):
    raise RuntimeError('a part of the measurement failed; its error is above')
  return json.loads(said[0].splitlines()[-1])


def run_child(args: argparse.Namespace) -> None:
  what, process, processes, port = args.child.split(',')
  if int(processes) > 1:
    jax.distributed.initialize(f'127.0.0.1:{port}', int(processes), int(process))
  print(json.dumps(count_bytes(args) if what == 'bytes' else time_steps(args)))


def free_port() -> int:
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    return taken.getsockname()[1]


def show_bytes(args: argparse.Namespace) -> None:
  rows = results([child(args, 'bytes', DEVICES)])
  print(f'\nSent by each of {DEVICES} devices in a step: {args.name}, width {args.width}, {args.size} pixels, '
        f'{args.batch} target and as '
        f'many source images, heads of {TARGETS} and {SOURCES} classes')
  print('| step | gradients, MB | statistics, MB | all-reduced, MB (operations, arrays) | gathered, MB | all, against '
        'gradients |')
  print('|---|---|---|---|---|---|')
  total = {}
  for row in rows:
    reduced, other = Sent(*row.get('all-reduce', (0, 0, 0))), [Sent(*row[kind]) for kind in _SENDING[1:] if kind in row]
    total[row['case']] = (reduced.size + sum(of.size for of in other)) / row['gradients']
    print(f'| {row["case"]} | {row["gradients"] / 1e6:.2f} | {row["statistics"] / 1e6:.3f} | {reduced.size / 1e6:.2f} '
          f'({reduced.operations}, {reduced.arrays}) | {sum(of.size for of in other) / 1e6:.3f} | '
          f'{total[row["case"]]:.3f} |')
  if 'plain' in total:
    print(f'So a plain step sends its gradients, its running statistics and a few numbers: '
          f'{100 * (total["plain"] - 1):.1f} % more than '
          f'the gradients alone; the case that sends most sends {max(total.values()):.3f} times its gradients.')


def show_times(args: argparse.Namespace) -> None:
  found = {}
  for devices, processes in ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2)):
    port = free_port()
    found[devices, processes] = results([child(args, 'time', devices // processes, k, processes, port)
                                         for k in range(processes)])
  one = found[1, 1]
  print(f'\nA joint step with synchronised BatchNorm at fixed work, {2 * args.batch} images over all devices; '
        f'{os.cpu_count()} cores')
  print('| devices | processes | ms a step | against one device | loss after the last step |\n|---|---|---|---|---|')
  for (devices, processes), of in found.items():
    print(f'| {devices} | {processes} | {1e3 * of["seconds"]:.0f} | {of["seconds"] / one["seconds"]:.2f} | '
          f'{of["loss"]:.5f} |')
  two = found[2, 2]['seconds'] / found[2, 1]['seconds']
  losses = Counter(round(of['loss'], 3) for of in found.values())
  eight = found[8, 1]['seconds'] / one['seconds']
  print(f'So the same work takes {eight:.2f} times as long on 8 devices of one machine as on one, and {two:.2f} times '
        f'as long on two '
        f'processes as on two devices of one; the loss is {"the same" if len(losses) == 1 else "NOT the same"}.')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--name', default='resnet18', choices=NETWORKS)
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--size', type=int, default=32)
  parser.add_argument('--batch', type=int, default=32,
                      help='target images, and as many source images, over all devices')
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--cases', default=','.join(CASES))
  parser.add_argument('--only', default='bytes,time')
  parser.add_argument('--small', action='store_true', help='a narrow network and few steps: whether it runs')
  parser.add_argument('--child', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.small:
    args.width, args.size, args.batch, args.steps = 8, 16, 16, 2
  if args.child:
    run_child(args)
    return
  if 'bytes' in args.only.split(','):
    show_bytes(args)
  if 'time' in args.only.split(','):
    show_times(args)


if __name__ == '__main__':
  main()
