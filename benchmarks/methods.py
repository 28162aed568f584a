"""What a fine-tuning method costs: time and memory of a training step with it, relative to plain fine-tuning, and of
its set-up.

    python benchmarks/methods.py [--name resnet18] [--width 64] [--size 64] [--batch 32] [--source] [--only delta ...]

Each method is as published. Its steps and plain ones take turns in one process; the median of their ratios is printed.
Memory is what
the compiled step says of itself: arguments (the state) and temporary buffers, on one device.
"""

import argparse
from collections.abc import Sequence
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
import optax

from ft_jax import methods, parallel
from ft_jax.methods import METHODS
from ft_jax.methods.base import SetupContext
from ft_jax.models import build, NETWORKS
from ft_jax.training.step import create_state, make_train_step

TARGETS, SOURCES = 100, 1000
FINE_TUNING = [name for name, method in METHODS.items() if not method.pretrains]


class Step:
  """The step with some methods, ready to run."""

  def __init__(self, args: argparse.Namespace, names: list[str], parts: int = 1):
    active = methods.active({name: dict(METHODS[name].published) for name in names})
    unlabelled = any(method.unlabelled_source for method in active.values())
    needs = methods.all_needs(active, build(args.name, {}, width=args.width))
    joint = args.source and not unlabelled
    heads = {'target': TARGETS} | ({'source': SOURCES} if joint else {}) | ({'pretrained': SOURCES}
                                                                            if needs.trained_classifier else {})
    model = build(args.name, heads, width=args.width)
    data = batch_of(args, ['target', *(['source'] if args.source or unlabelled else [])])
    start = jax.device_get(jax.jit(model.clone(heads={'pretrained': SOURCES}).init)(jax.random.key(1),
                                                                                    data['target']['input'][:1]))
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), data['target']['input'][:1]))

    def batches(split: str, rows: Sequence[int] | None = None) -> list[dict[str, np.ndarray]]:
      whole = data['target']
      return [whole if rows is None else {key: value[np.resize(rows, len(value))] for key, value in whole.items()}]

    labels = data['target']['label']
    begin = SetupContext(model=model, classes=TARGETS, labels=labels, true_labels=labels, batch_size=args.batch, seed=0,
                         pretrained=True, has_source='source' in data, start=start, batches=batches)
    began = time.perf_counter()
    states = {name: method.setup(begin) for name, method in active.items()}
    self.setup_seconds = time.perf_counter() - began
    own = {name: params for name, method in active.items() if (params := method.params(begin))}
    optimizer = optax.sgd(0.001, 0.9, nesterov=True)
    kept = start if needs.start or needs.teacher or needs.classifier else None
    state = create_state({**variables, 'params': {**variables['params'], **({'methods': own} if own else {})}},
                         optimizer,
                               start=kept, methods=states)
    step = make_train_step(model, optimizer, {'target': 1.0, **({'source': 1.0} if joint else {})}, methods=active,
                           microbatches=parts)
    self._state, self._batch = parallel.replicate(state), {name: parallel.shard(part) for name, part in data.items()}
    self._step = step.lower(self._state, self._batch).compile()
    memory = self._step.memory_analysis()
    self.temporary, self.arguments = memory.temp_size_in_bytes, memory.argument_size_in_bytes

  def run(self) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    self._state, _ = jax.block_until_ready(self._step(self._state, self._batch))
    return time.perf_counter() - began


def batch_of(args: argparse.Namespace, streams: list[str]) -> dict[str, dict[str, np.ndarray]]:
  rng = np.random.default_rng(0)
  made = {}
  for stream in streams:
    image = rng.integers(0, 255, (args.batch, args.size, args.size, 3)).astype(np.uint8)
    made[stream] = {'input': image, 'key': image[:, :, ::-1].copy(), 'strong': image[:, :, ::-1].copy(),
                    'label': rng.integers(0, TARGETS, args.batch).astype(np.int32),
                    'row': np.arange(args.batch, dtype=np.int32),
                    'mask': np.ones(args.batch, bool)}
  return made


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--name', default='resnet18', choices=NETWORKS)
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--size', type=int, default=64)
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--steps', type=int, default=15)
  parser.add_argument('--source', action='store_true', help='joint fine-tuning: as many source images a step')
  parser.add_argument('--only', nargs='*', default=FINE_TUNING, choices=FINE_TUNING)
  args = parser.parse_args()
  model = build(args.name, {})
  teachers = [name for name in args.only if METHODS[name](**METHODS[name].published).needs(model).teacher]
  cases = {name: ([name], 1) for name in args.only} | {'plain, accumulate_steps=4': ([], 4)}
  if len(teachers) > 1:
    cases['+'.join(teachers)] = (teachers, 1)
  plain = Step(args, [])
  usual = statistics.median([plain.run() for _ in range(args.steps + 2)][2:])
  print(f'{args.name}, width {args.width}, {args.size} pixels, batch '
        f'{args.batch}{" and as many source images" if args.source else ""}, '
        f'{jax.devices()[0].device_kind}; plain: {1e3 * usual:.1f} ms a step, state {plain.arguments / 1e6:.0f} MB, '
        f'temporary {plain.temporary / 1e6:.0f} MB')
  print('| method | time of a step | temporary memory | state | set-up of a run, s |\n|---|---|---|---|---|',
        flush=True)
  for name, (names, parts) in cases.items():
    step = Step(args, names, parts)
    # in turns: what slows the machine slows both
    ratios = [step.run() / plain.run() for _ in range(args.steps + 2)][2:]
    print(f'| {name} | {statistics.median(ratios):.2f} | {step.temporary / plain.temporary:.2f} | '
          f'{step.arguments / plain.arguments:.2f} '
          f'| {step.setup_seconds:.1f} |', flush=True)


if __name__ == '__main__':
  main()
