"""Training step of a ResNet: this project's convolution and pooling against XLA's own, and against torch where it is
installed.

    python benchmarks/resnet_step.py [--name resnet18] [--width 64] [--size 64] [--batch 32]

The forms take turns in one process; the medians and their ratio are printed.
"""

import argparse
from collections.abc import Callable
import os
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
import optax

from ft_jax import parallel
from ft_jax.models import build, conv, resnet
from ft_jax.training.step import create_state, make_train_step


def make_step(name: str, width: int, size: int, batch: int) -> Callable[[], None]:
  """A function of no arguments that runs one step and waits for it."""
  model = build(name, {'source': 200}, width=width)
  images = np.random.default_rng(0).integers(0, 255, (batch, size, size, 3)).astype(np.uint8)
  variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), images[:1]))
  optimizer = optax.sgd(0.01, 0.9, nesterov=True)
  step = make_train_step(model, optimizer, {'source': 1.0})
  state = [parallel.replicate(create_state(variables, optimizer))]
  data = {'source': parallel.shard({'input': images, 'label': np.zeros(batch, np.int32)})}

  def run() -> None:
    state[0], _ = step(state[0], data)
    jax.block_until_ready(state[0])

  return run


def with_xla(function: Callable[..., Callable[[], None]], *args: Any) -> Callable[[], None]:
  """The same with XLA's own convolution and pooling."""
  ours = resnet.conv2d, resnet.max_pool
  step = function(*args)

  def run() -> None:
    # In every run: nothing of ours can come in where the step is traced again.
    resnet.conv2d, resnet.max_pool = conv.conv2d_xla, conv.max_pool_xla
    try:
      step()
    finally:
      resnet.conv2d, resnet.max_pool = ours

  return run


def torch_step(name: str, width: int, size: int, batch: int) -> Callable[[], None] | None:
  """The same network and optimiser in torch, or None without it."""
  try:
    import torch
  except ImportError:
    return None
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests' / 'fixtures'))
  import make_torch_resnet as peer

  model = peer.ResNet(name, width, 200).to(memory_format=torch.channels_last).train()
  optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True)
  images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
  labels = torch.zeros(batch, dtype=torch.long)

  def run() -> None:
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images)['logits'], labels).backward()
    optimizer.step()

  return run


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--name', default='resnet18')
  for key, value in (('width', 64), ('size', 64), ('batch', 32), ('rounds', 7)):
    parser.add_argument(f'--{key}', type=int, default=value)
  a = parser.parse_args()
  setting = (a.name, a.width, a.size, a.batch)
  runs = {'ours': make_step(*setting), "XLA's own": with_xla(make_step, *setting), 'torch': torch_step(*setting)}
  times: dict[str, list[float]] = {name: [] for name, run in runs.items() if run}
  for k in range(a.rounds + 1):
    for name in times:
      start = time.perf_counter()
      runs[name]()
      if k:  # the first one compiles
        times[name].append(time.perf_counter() - start)
  medians = {name: statistics.median(values) for name, values in times.items()}
  print(f'{a.name}, width {a.width}, {a.size} px, batch {a.batch}, training, on {jax.device_count()} x '
        f'{jax.devices()[0].device_kind}, '
        f'{os.cpu_count()} cores')
  for name, median in medians.items():
    print(f'  {name:10s} {a.batch / median:8.1f} images/s   ours is {median / medians["ours"]:.2f} times as fast')


if __name__ == '__main__':
  main()
