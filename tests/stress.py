"""Kills real runs at random moments and file operations, again and again, and checks that nothing is lost and nothing
differs.

    python tests/stress.py --kills=100 --seed=0 --workdir=/tmp/stress

Each run is started, killed (kill -9, SIGTERM, or Ctrl-C once or twice), started again by the same command, killed
again, and in the end left alone. Then it must be the undisturbed run: every array of every checkpoint bit for bit,
selection, results, metrics with each step once. The undisturbed run itself is made twice. The exit code is 1 where
anything differs; what differs is kept in the workdir.
"""

import argparse
import collections
from collections.abc import Mapping
import concurrent.futures
import dataclasses
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from typing import NamedTuple

import killed
from killed import Done, Moment

TINY = ('--config=configs/digits.py:finetune', '--config.model.width=4', '--config.image_size=16',
        '--config.augment.short_side=16',
        '--config.selection.size=5', '--config.pretrain.epochs=0', '--config.train.log_every=2',
        '--config.train.batch_size=16')
SMALL = (*TINY, '--config.pretrain.steps=8', '--config.pretrain.eval_every=2', '--config.pretrain.log_every=2',
         '--config.train.steps=12',
         '--config.train.eval_every=3')


def _methods(**fields: Mapping[str, float]) -> tuple[str, ...]:
  return tuple(f'--config.methods.{method}.{name}={value}' for method, each in fields.items()
               for name, value in each.items())


class Workload(NamedTuple):
  """A command whose runs are killed.

  Attributes:
    flags: of main.py.
    devices: fake ones.
  """
  flags: tuple[str, ...]
  devices: int = 1


WORKLOADS = {
    # The shortest run with all its parts, which `make test` kills too: pre-training, selection, a method with a state,
    # averages.
    'short': Workload((
        *TINY, '--config.pretrain.steps=4', '--config.pretrain.eval_every=1', '--config.train.steps=8',
        '--config.train.eval_every=2',
        '--config.selection.method=nearest', '--config.train.ema_decay=0.9',
        *_methods(self_label={'enabled': True, 'reweight_epoch': 1, 'correct_epoch': 2, 'threshold': 0.5}))),
    # Pre-training, embedding, selection and joint fine-tuning with all methods that can go together and have labels of
    # the source.
    'joint': Workload((
        *SMALL, '--config.train.ema_decay=0.9', '--config.train.keep_epochs=(1.2,)', *_methods(
            self_label={'enabled': True, 'reweight_epoch': 1, 'correct_epoch': 2, 'threshold': 0.5},
            l2_sp={'weight': 0.01},
            layerwise={'distance': 'frobenius'}, delta={'weight': 0.1, 'attention_images': 8},
            co_tuning={'weight': 2.3},
            lwf={'weight': 4.0}, stoch_norm={'enabled': True},
            bi_tuning={'weight': 1.0, 'queue': 4, 'projection': 8}))),
    # What mixes images, and source images without labels; on two devices, chosen one by one.
    'mixed': Workload((
        *SMALL, '--config.selection.by=example', '--config.train.optimizer=adamw', *_methods(
            mixup={'alpha': 0.2}, cutmix={'alpha': 1.0}, fixmatch={'weight': 1.0})), devices=2),
}
# How often each kind of disturbance comes.
KINDS = {'operation': 10, 'moment': 6, 'SIGTERM': 2, 'SIGINT': 1, 'SIGINT twice': 1}
SECONDS_TO_LEAVE = 30


@dataclasses.dataclass
class Tally:
  """What came of all runs; shared by threads."""
  kills: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  problems: list[str] = dataclasses.field(default_factory=list)
  recovered: int = 0
  chains: int = 0
  litter: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  slowest: float = 0.0
  lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


@dataclasses.dataclass(frozen=True)
class Reference:
  """An undisturbed run: its folder, its file operations by kind, its seconds."""
  folder: pathlib.Path
  operations: Mapping[str, int]
  seconds: float


def reference(name: str, folder: pathlib.Path, cache: pathlib.Path, tally: Tally) -> Reference:
  """The undisturbed run, made twice: first compiling everything, then with what was compiled."""
  each = []
  for number in ('first', 'second'):
    workdir = folder / name / number
    workdir.parent.mkdir(parents=True, exist_ok=True)
    done = killed.run(workdir, WORKLOADS[name].flags, devices=WORKLOADS[name].devices, cache=cache)
    if done.code:
      raise SystemExit(f'the undisturbed run of {name} failed:\n{done.printed}')
    say(f'{name}: undisturbed in {done.seconds:.1f} s')
    each.append(done)
  if wrong := killed.differences(folder / name / 'second', folder / name / 'first'):
    tally.problems += [f'{name}: the same command twice: {line}' for line in wrong]
  return Reference(folder / name / 'first', collections.Counter(each[1].operations), each[1].seconds)


def moment(random_: random.Random, operations: Mapping[str, int], seconds: float) -> tuple[str, Moment]:
  """A kind of disturbance, and when it comes."""
  kind = random_.choices(list(KINDS), list(KINDS.values()))[0]
  if kind == 'operation':
    # Kinds of few operations come as often as those of many.
    of = random_.choices([*operations, 'checkpoint'])[0]
    late = random_.choice((0.0, 0.0, random_.uniform(0.0, 0.05)))
    return kind, Moment(kind=of, count=random_.randint(1, operations[of]), seconds=late)
  number = {'moment': signal.SIGKILL, 'SIGTERM': signal.SIGTERM}.get(kind, signal.SIGINT)
  return kind, Moment(signal=number, seconds=random_.uniform(0.0, seconds),
                      again=0.3 if kind == 'SIGINT twice' else 0.0)


def chain(name: str, number: int, seed: int, wanted: int, whole: Reference, cache: pathlib.Path, tally: Tally) -> None:
  """One run, disturbed up to `wanted` times and then left alone."""
  random_ = random.Random(f'{seed} {name} {number}')
  workdir = whole.folder.parent / f'run{number}'
  load, history, stopped, problems = WORKLOADS[name], [], False, []
  for _ in range(wanted):
    kind, when = moment(random_, whole.operations, whole.seconds)
    done = killed.run(workdir, load.flags, when, devices=load.devices, cache=cache)
    if not done.met:  # it came to its end before
      if done.code:
        problems.append(f'it ended with code {done.code} undisturbed: {_last(done)}')
      break
    history.append(f'{kind} in {done.met}{f" ({done.what})" if done.what else ""}')
    say(f'  {name} run{number}: {history[-1]}')
    stopped = stopped or when.signal != signal.SIGKILL
    problems += [f'{history[-1]}: {line}' for line in [*left(kind, when, done), *killed.broken(workdir)]]
    with tally.lock:
      tally.kills[kind, done.met] += 1
      tally.slowest = max(tally.slowest, done.leaving if when.signal != signal.SIGKILL else 0.0)
  last = killed.run(workdir, load.flags, devices=load.devices, cache=cache)
  if last.code:
    problems.append(f'started again, it ended with code {last.code}: {_last(last)}')
  else:
    problems += [*killed.differences(workdir, whole.folder, stopped), *killed.broken(workdir)]
  with tally.lock:
    tally.chains += 1
    tally.litter.update(pathlib.Path(path).name.split('-')[0] for path in killed.litter(workdir))
    tally.recovered += 0 if problems else len(history)
    tally.problems += [f'{name} run{number} after [{"; ".join(history)}]: {line}' for line in problems]
    say(f'{name} run{number}: {"DIFFERS" if problems else "the same"} after {len(history)}: {"; ".join(history)}   '
        f'(kills so far: {sum(tally.kills.values())})')
    for line in problems:
      say(f'  {line}')
  if not problems:
    shutil.rmtree(workdir)


def left(kind: str, when: Moment, done: Done) -> list[str]:
  """What is wrong with how a disturbed run ended; one that was about to end may do so."""
  # While it starts, signals do what they do to any program, which a shell calls 143 and 130 too.
  expected = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15, 0), signal.SIGINT: (130, -2, 0)}[when.signal]
  found = []
  if done.code not in expected:
    found.append(f'exit code {done.code} and not {expected[0]}: {_last(done)}')
  if when.signal != signal.SIGKILL and done.leaving > SECONDS_TO_LEAVE:
    found.append(f'it took {done.leaving:.0f} s to leave with code {done.code}: {_last(done)}')
  if 'Traceback' in done.printed:
    found.append(f'it printed a traceback: {_last(done, 2000)}')
  return found


def _last(done: Done, most: int = 400) -> str:
  return done.printed[-most:].strip()


def say(line: str) -> None:
  print(f'{time.strftime("%H:%M:%S")} {line}', flush=True)


def table(tally: Tally) -> str:
  """Counts by phase and kind."""
  phases = sorted({phase for _, phase in tally.kills},
                  key=lambda phase: -sum(n for (_, p), n in tally.kills.items() if p == phase))
  rows = [('phase', *KINDS, 'all')]
  for phase in phases:
    each = [tally.kills[kind, phase] for kind in KINDS]
    rows.append((phase, *map(str, each), str(sum(each))))
  sums = [sum(tally.kills[kind, phase] for phase in phases) for kind in KINDS]
  rows.append(('all', *map(str, sums), str(sum(sums))))
  return '\n'.join(f'{row[0]:<26}' + ''.join(f'{cell:>14}' for cell in row[1:]) for row in rows)


def main() -> int:
  """Runs until so many kills are done; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--kills', type=int, default=100, help='at least so many')
  parser.add_argument('--seed', type=int, default=0, help='of the moments')
  parser.add_argument('--workdir', type=pathlib.Path,
                      help='where the runs are (default: a temporary folder); what differs stays there')
  parser.add_argument('--chain', type=int, default=6, help='most kills of one run')
  parser.add_argument('--jobs', type=int, default=2, help='runs side by side')
  parser.add_argument('--workloads', nargs='+', default=list(WORKLOADS), choices=list(WORKLOADS))
  arguments = parser.parse_args()
  folder = (arguments.workdir or pathlib.Path(tempfile.mkdtemp(prefix='stress-'))).resolve()
  tally, cache = Tally(), folder / 'compiled'
  with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
    wholes = dict(zip(arguments.workloads,
                      pool.map(lambda name: reference(name, folder, cache, tally), arguments.workloads)))
    number, pending = 0, set()
    while sum(tally.kills.values()) < arguments.kills:
      while len(pending) < arguments.jobs:
        name = arguments.workloads[number % len(arguments.workloads)]
        wanted = random.Random(f'{arguments.seed} length {number}').randint(1, arguments.chain)
        pending.add(pool.submit(chain, name, number, arguments.seed, wanted, wholes[name], cache, tally))
        number += 1
      done, pending = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
      for each in done:
        each.result()
    for each in pending:
      each.result()
  kills = sum(tally.kills.values())
  print(f'\n{table(tally)}\n\n{kills} kills in {tally.chains} runs, {tally.recovered} recovered; slowest clean exit '
        f'{tally.slowest:.1f} s; '
        f'left behind: {dict(tally.litter) or "nothing"}')
  for line in tally.problems:
    print(f'PROBLEM {line}')
  return int(bool(tally.problems) or tally.recovered != kills)


if __name__ == '__main__':
  sys.exit(main())
