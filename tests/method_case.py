"""What tests of methods share: a small network on real images, and its step on any number of devices.

Devices are those of `jax.vmap` with the axis of the step: the collectives are the real ones, and nothing is compiled
for each device.
"""

from collections.abc import Mapping
import functools
import types
from typing import Any

import flax
import jax
import numpy as np
import optax
from sklearn import datasets

from ft_jax import methods
from ft_jax.methods.base import SetupContext
from ft_jax.models import resnet
from ft_jax.parallel import AXIS
from ft_jax.training.step import create_state, make_step, TrainState

# Of a few small steps most of the time is the compiler's.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
SIZE, TARGETS, SOURCES, BATCH = 16, 4, 6, 16


def network(heads: Mapping[str, int] | None = None, **kwargs: Any) -> resnet.ResNet:
  """One block a stage, four channels in the first one: compiled in a few seconds."""
  heads = {'target': TARGETS, 'source': SOURCES} if heads is None else heads
  return resnet.ResNet((1, 1, 1, 1), resnet.BasicBlock, heads=dict(heads), width=4, **kwargs)


def variables(model: resnet.ResNet, seed: int = 0) -> dict[str, Any]:
  """Fresh ones, drawn by numpy (compiling `init` takes longer than a test), with running statistics that say something.
  """
  rng = np.random.default_rng(seed)

  def draw(path: tuple[str, ...], leaf: Any) -> np.ndarray:
    if path[-1] == 'kernel':
      return (rng.normal(size=leaf.shape) * (2 / np.prod(leaf.shape[:-1])) ** 0.5).astype(np.float32)
    return (float(path[-1] in ('scale', 'var')) + rng.uniform(0.0, 0.2, leaf.shape)).astype(np.float32)

  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.uint8))
  return flax.traverse_util.path_aware_map(draw, shapes)


def images(count: int, classes: int, seed: int = 0) -> dict[str, np.ndarray]:
  """A batch of crops of photographs: class k is a region of its own."""
  photos = datasets.load_sample_images().images
  rng = np.random.default_rng(seed)
  labels = (np.arange(count) % classes).astype(np.int32)
  crops = []
  for k in labels.tolist():
    y, x = rng.integers(0, 60, 2)
    crops.append(photos[k % 2][60 * k + y:, 80 * k + x:][:4 * SIZE:4, :4 * SIZE:4])
  return {'input': np.stack(crops), 'label': labels, 'row': np.arange(count, dtype=np.int32),
          'mask': np.ones(count, bool)}


def batch(size: int = BATCH, source: bool = True, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
  """A batch of each stream, with a further view of each image under every name that methods ask for."""
  streams = {'target': images(size, TARGETS, seed)} | ({'source': images(size, SOURCES, seed + 1)} if source else {})
  flipped = {name: np.ascontiguousarray(part['input'][:, :, ::-1]) for name, part in streams.items()}
  return {name: part | {'key': flipped[name], 'strong': flipped[name]} for name, part in streams.items()}


def start_of(model: resnet.ResNet, seed: int = 1) -> dict[str, Any]:
  """Pre-trained variables of that network: the backbone, and a classifier of eight classes as head 'pretrained'."""
  return variables(model.clone(heads={'pretrained': 8}), seed)


def context(model: resnet.ResNet, start: Mapping[str, Any] = types.MappingProxyType({}),
            examples: Mapping[str, np.ndarray] | None = None,
            **kwargs: Any) -> SetupContext:
  """What methods are checked against and set up with; `examples` are the training images, and val as well."""
  examples = images(BATCH, TARGETS) if examples is None else examples

  def batches(split: str, rows: Any = slice(None)) -> list[dict[str, np.ndarray]]:
    chosen = {key: value[rows] for key, value in examples.items()}
    devices = jax.device_count()
    padded = {key: np.resize(value, (-(-len(value) // devices) * devices, *value.shape[1:]))
              for key, value in chosen.items()}
    return [padded | {'mask': np.arange(len(padded['mask'])) < len(chosen['label'])}]

  known = dict(classes=TARGETS, labels=examples['label'], true_labels=examples['label'], batch_size=BATCH, seed=0,
               pretrained=True, has_source=True)
  return SetupContext(model=model, start=start, batches=batches, **{**known, **kwargs})


def run(active: Mapping[str, methods.Method], *, steps: int = 1, devices: int = 1, microbatches: int = 1,
        model: resnet.ResNet | None = None,
        batches: Any = None, rate: float = 0.05, start: Mapping[str, Any] | None = None, state: Any = None,
        loss_weights: Mapping[str, float] | None = None,
        examples: Any = None) -> tuple[TrainState, list[dict[str, float]]]:
  """The state after some steps of plain gradient descent (so what changes is the gradient), and the metrics of each
  step.

  Args:
    active: by name.
    steps, devices, microbatches: see `step.make_step`.
    model: 'network()' with frozen BatchNorm by default, where nothing depends on how a batch is split.
    batches: gives the batch of a step; the same one by default.
    rate: of gradient descent.
    start: pre-trained variables; those of `start_of` by default.
    state: the state to start from.
    loss_weights: of the labelled streams.
    examples: see `context`.
  """
  needs = methods.all_needs(active, network())
  unlabelled = any(method.unlabelled_source for method in active.values())
  heads = {'target': TARGETS} | ({} if unlabelled else {'source': SOURCES}) | ({'pretrained': 8}
                                                                               if needs.trained_classifier else {})
  model = (model or network(batch_norm='frozen')).clone(heads=heads)
  start = start_of(model) if start is None else start
  loss_weights = loss_weights or ({'target': 1.0} if unlabelled else {'target': 1.0, 'source': 0.5})
  optimizer = optax.sgd(rate)
  if state is None:
    setup = context(model, start, examples)
    own = {name: params for name, method in active.items() if (params := method.params(setup))}
    fresh = variables(model, 2)
    fresh['params'] = fresh['params'] | {key: value for key, value in start['params'].items() if key != 'heads'}
    if needs.trained_classifier:
      fresh['params']['heads']['pretrained'] = start['params']['heads']['pretrained']
    fresh['batch_stats'] = start['batch_stats']
    state = create_state({**fresh, 'params': fresh['params'] | ({'methods': own} if own else {})}, optimizer,
                         start=start,
                               methods={name: method.setup(setup) for name, method in active.items()})
  step = compiled(model.clone(heads=()), tuple(heads.items()), rate, tuple(loss_weights.items()), tuple(active.items()),
                  microbatches, devices)
  split = lambda x: x.reshape(devices, -1, *x.shape[1:])
  history = []
  for number in range(steps):
    state, metrics = step(state, jax.tree.map(split, batches(number) if batches else batch()))
    # the same on every device
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), state)
    state, metrics = jax.tree.map(lambda x: x[0], (state, metrics))
    history.append({key: float(value) for key, value in metrics.items()})
  return jax.device_get(state), history


def pretrain(active: Mapping[str, methods.Method], *, steps: int = 1, devices: int = 1, microbatches: int = 1,
             model: resnet.ResNet | None = None, rate: float = 0.05, state: Any = None, first: int = 0,
             total: int = 10) -> tuple[TrainState, list[dict[str, float]]]:
  """The same for a pre-training without labels: the batch of step k is that of seed first + k.

  Args:
    active, steps, devices, microbatches, model, rate, state: see `run`.
    first: the number of the first step.
    total: steps that the methods are told of.
  """
  model = (model or network(batch_norm='frozen')).clone(heads={})
  optimizer = optax.sgd(rate)
  if state is None:
    setup = context(model, {}, images(BATCH, SOURCES), pretrained=False, steps=total)
    own = {name: method.params(setup) for name, method in active.items()}
    fresh = variables(model, 2)
    state = create_state({**fresh, 'params': fresh['params'] | {'methods': own}}, optimizer,
                         methods={name: method.setup(setup) for name, method in active.items()})
  step = compiled(model.clone(heads=()), (), rate, (), tuple(active.items()), microbatches, devices)
  split = lambda x: x.reshape(devices, -1, *x.shape[1:])
  history = []
  for number in range(first, first + steps):
    source = images(BATCH, SOURCES, number)
    flipped = np.ascontiguousarray(source['input'][:, :, ::-1])
    state, metrics = step(state, jax.tree.map(split, {'source': source | {'key': flipped, 'second': flipped}}))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), state)
    state, metrics = jax.tree.map(lambda x: x[0], (state, metrics))
    history.append({key: float(value) for key, value in metrics.items()})
  return jax.device_get(state), history


def assert_same(one: TrainState, other: TrainState, rtol: float = 1e-4) -> None:
  """Parameters and states of methods agree, but for rounding."""
  jax.tree.map(functools.partial(_assert_close, rtol), (one.params, one.methods), (other.params, other.methods))


@functools.cache
def compiled(model: resnet.ResNet, heads: tuple[tuple[str, int], ...], rate: float,
             loss_weights: tuple[tuple[str, float], ...],
             active: tuple[tuple[str, methods.Method], ...], microbatches: int, devices: int) -> Any:
  """The step on so many devices; kept for the next test that asks for the same one."""
  model = model.clone(heads=dict(heads))
  step = make_step(model, optax.sgd(rate), dict(loss_weights), methods=dict(active), microbatches=microbatches)
  return jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name=AXIS, axis_size=devices), compiler_options=QUICK)


def assert_same_whatever_the_split(active: Mapping[str, methods.Method], rtol: float = 1e-4, **kwargs: Any) -> None:
  """Two steps on one device, and on four with two microbatches each: losses, parameters and states agree."""
  state, history = run(active, steps=2, **kwargs)
  other, metrics = run(active, steps=2, devices=4, microbatches=2, **kwargs)
  for a, b in zip(history, metrics):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_allclose(b[key], a[key], rtol=rtol, atol=1e-6, err_msg=key)
  jax.tree.map(functools.partial(_assert_close, rtol), (other.params, other.methods), (state.params, state.methods))


def _assert_close(rtol: float, actual: np.ndarray, expected: np.ndarray) -> None:
  atol = rtol * float(np.max(np.abs(expected), initial=0.0)) + 1e-7
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)
