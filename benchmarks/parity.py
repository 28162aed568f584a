"""How near this project's networks are to torch's, at full width: outputs, BatchNorm's statistics, gradients, a step of
SGD, and the exported state dict.

    pip install torch && python benchmarks/parity.py [--names resnet18,resnet34,resnet50,resnet101] [--size 224]
    [--batch 8]

Every number is the largest difference of a tensor relative to its largest value, and of several tensors the largest.
`ours` is float32 here against float64 in torch, `torch` is float32 in torch against the same: what rounding alone does.
Weights are random with statistics of a batch, images are noise. Gradients of a ReLU jump where its input is near zero,
so that one bit of rounding shows in them, in torch's as in ours; the last row has them with softplus in place of every
ReLU, on both sides, where nothing jumps.
"""

import argparse
from collections.abc import Iterator
import contextlib
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests' / 'fixtures'))

try:
  import torch
except ImportError:
  sys.exit('this benchmark compares with torch: pip install torch')
import jax
import make_torch_resnet as peer
import numpy as np
import optax
from safetensors.numpy import load_file, save_file

from ft_jax.models import build, export, resnet, weights
from ft_jax.models.network import Outputs
from ft_jax.training import optimizer, step

CLASSES = 1000
Arrays = dict[str, dict[str, np.ndarray]]


def in_torch(state: dict[str, np.ndarray], name: str, images: np.ndarray, labels: np.ndarray,
             dtype: torch.dtype) -> Arrays:
  """Arrays by kind and name, computed by torch in some precision."""
  torch.set_default_dtype(dtype)
  model = peer.ResNet(name, 64, CLASSES)
  model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=True)
  x = peer.normalized(images)
  with torch.no_grad():
    evaluated = {key: peer.as_array(value) for key, value in model.eval()(x).items()}
  optimizer = torch.optim.SGD(model.parameters(), **peer.SGD)
  outputs = model.train()(x)
  torch.nn.functional.cross_entropy(outputs['logits'], torch.from_numpy(labels)).backward()
  gradients = {key: value.grad.float().numpy() for key, value in model.named_parameters()}
  optimizer.step()
  torch.set_default_dtype(torch.float32)
  return {'eval': evaluated, 'train': {key: peer.as_array(value) for key, value in outputs.items()},
          'statistics': {key: value.float().numpy() for key, value in model.named_buffers() if 'running' in key},
          'gradients': gradients,
          'after a step': {key: value.detach().float().numpy() for key, value in model.named_parameters()}}


def ours(state: dict[str, np.ndarray], name: str, images: np.ndarray,
         labels: np.ndarray) -> tuple[Arrays, dict[str, np.ndarray]]:
  """The same by this project, and the state dict that it exports."""
  model = build(name, {'source': CLASSES})
  with tempfile.TemporaryDirectory() as folder:
    save_file(state, f'{folder}/weights.safetensors')
    variables = weights.read(f'{folder}/weights.safetensors', model).variables
    save_file(export.state_dict(model, variables, 'source'), f'{folder}/exported.safetensors')
    exported = load_file(f'{folder}/exported.safetensors')

  def loss_fn(params: Any) -> tuple[jax.Array, tuple[Outputs, Any]]:
    outputs, updates = model.apply({**variables, 'params': params}, images, train=True, mutable=['batch_stats'])
    return optax.softmax_cross_entropy_with_integer_labels(outputs.logits['source'], labels).mean(), (outputs, updates)

  evaluated = jax.jit(model.apply)(variables, images)
  gradients, (trained, updates) = jax.jit(jax.grad(loss_fn, has_aux=True))(variables['params'])
  everything = (('.*', 1.0),)
  tx = optimizer.make_optimizer('sgd', optax.constant_schedule(peer.SGD['lr']), variables['params'],
                                momentum=peer.SGD['momentum'],
                     nesterov=peer.SGD['nesterov'], weight_decay=peer.SGD['weight_decay'],
                                learning_rate_groups=everything,
                     weight_decay_groups=everything)
  state = step.create_state(variables, tx)
  after = optax.apply_updates(state.params, tx.update(gradients, state.opt_state, state.params)[0])
  named = lambda outputs: {'features': outputs.features, 'logits': outputs.logits['source'], **outputs.taps}
  return {'eval': named(evaluated), 'train': named(trained), 'statistics': export.state_dict(model, updates, None),
          'gradients': export.state_dict(model, {'params': gradients}, 'source'),
          'after a step': export.state_dict(model, {'params': after}, 'source')}, exported


@contextlib.contextmanager
def smooth() -> Iterator[None]:
  """Softplus in place of every ReLU, here and in torch."""
  before = torch.relu, resnet.nn.relu
  torch.relu, resnet.nn.relu = torch.nn.functional.softplus, jax.nn.softplus
  try:
    yield
  finally:
    torch.relu, resnet.nn.relu = before


def errors(values: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
  """Of each tensor."""
  return {key: float(np.abs(np.asarray(values[key], np.float64) - want).max() / np.abs(want).max())
          for key, want in expected.items()}


def rows(got: Arrays, want: Arrays) -> dict[str, float]:
  """The numbers of one column of the table."""
  found = {kind: errors(got[kind], want[kind]) for kind in want}
  table = {}
  for kind in ('eval', 'train'):
    table |= {f'{kind}: taps': max(found[kind][f'layer{i}'] for i in range(1, 5)),
              f'{kind}: features': found[kind]['features'],
              f'{kind}: logits': found[kind]['logits']}
  return table | {'running statistics': max(found['statistics'].values()),
                  'gradients, median': statistics.median(found['gradients'].values()),
                  'gradients, largest': max(found['gradients'].values()),
                  'parameters after a step': max(found['after a step'].values())}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--names', default=','.join(peer.NETWORKS))
  parser.add_argument('--size', type=int, default=224)
  parser.add_argument('--batch', type=int, default=8)
  a = parser.parse_args()
  torch.manual_seed(0)
  rng = np.random.default_rng(0)
  draw = lambda: rng.integers(0, 256, (a.batch, a.size, a.size, 3), np.uint8)
  print(f'width 64, {a.size} px, batch {a.batch}, on {jax.devices()[0].device_kind}, {os.cpu_count()} cores; jax '
        f'{jax.__version__}, '
        f'torch {torch.__version__}\n')
  columns = {}
  for name in a.names.split(','):
    model = peer.ResNet(name, 64, CLASSES)
    peer.randomize(model)
    peer.settle(model, peer.normalized(draw()))
    state = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    images, labels = draw(), rng.integers(0, CLASSES, a.batch)
    got, exported = ours(state, name, images, labels)
    want = in_torch(state, name, images, labels, torch.float64)
    single = in_torch(state, name, images, labels, torch.float32)
    with smooth():
      smooth_want = in_torch(state, name, images, labels, torch.float64)
      extra = [{'gradients with softplus': max(errors(one['gradients'], smooth_want['gradients']).values())}
               for one in (
          ours(state, name, images, labels)[0], in_torch(state, name, images, labels, torch.float32))]
    columns[name] = rows(got, want) | extra[0], rows(single, want) | extra[1]
    # Bit for bit; torch itself loads it with strict=True above, where it came from.
    assert exported.keys() == state.keys() and all(np.array_equal(exported[key], state[key]) for key in state)
    print(f'{name}: exported state dict: {len(exported)} tensors, bit for bit those that were loaded with strict=True',
          flush=True)
  print('\n' + ' ' * 26 + ''.join(f'{name:>20s}' for name in columns))
  print(' ' * 26 + ''.join(f'{"ours":>11s}{"torch":>9s}' for _ in columns))
  for row in next(iter(columns.values()))[0]:
    print(f'{row:26s}' + ''.join(f'{one[row]:11.1e}{other[row]:9.1e}' for one, other in columns.values()))


if __name__ == '__main__':
  main()
