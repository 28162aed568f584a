"""MoCo-v2: pre-training without labels, by contrast with a queue of keys (He, Fan, Wu, Xie and Girshick, CVPR 2020)."""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import parallel
from ft_jax.methods.base import (
  check_above_zero,
  LossTerm,
  Method,
  moved_towards,
  Needs,
  SetupContext,
  State,
  StepContext,
  unit,
  View,
  without_heads,
)
from ft_jax.models.network import Network
from ft_jax.models.weights import project
from ft_jax.progress import log

KEY = View('source', 'key')


@dataclasses.dataclass(frozen=True)
class MoCo(Method):
  """mean_b(-log softmax([q_b . k_b, q_b . Q] / T)_0): q and k are two views of an image, Q the K keys before them.

  q = MLP(features) of the network, k the same of the key encoder, a moving average of both (updated before it is used),
  each divided by its length; the MLP is linear, ReLU, linear (Chen, Fan, Girshick and He, 2020, arXiv 2003.04297). The
  queue starts with random directions. The keys of a batch replace the oldest ones after the loss was computed.

  Where each device has BatchNorm statistics of its own, the batch of keys is shuffled over all devices: the statistics
  would give away which key belongs to a query. It is shuffled over microbatches (train.accumulate_steps) too. With
  model.sync_batch_norm or frozen BatchNorm nothing is shuffled.
  """
  pretrains: ClassVar[bool] = True
  published: ClassVar[Mapping[str, Any]] = {'queue': 65536}
  excludes: ClassVar[Mapping[str, str]] = {'byol': 'each is a whole pre-training; switch on one of them'}
  queue: int = 0  # K, a multiple of the batch; published 65536
  temperature: float = 0.2  # T; published 0.2
  momentum: float = 0.999  # fraction of the key encoder that a step keeps; published 0.999
  projection: int = 128  # numbers of a key; published 128

  def check(self, context: SetupContext) -> None:
    check_above_zero('moco', temperature=self.temperature)
    if not 0 <= self.momentum <= 1:
      raise ValueError(f'methods.moco.momentum is {self.momentum}; expected a number from 0 to 1')
    if not 1 <= self.projection < 2**16:  # more would not fit into any memory
      raise ValueError(f'methods.moco.projection is {self.projection}; expected a whole number from 1 to {2**16 - 1}')
    size = context.batch_size
    if size < 2:
      raise ValueError(f'train.batch_size is {size}; methods.moco compares the images of a batch: use at least 2')
    if self.queue % size:
      below = self.queue // size * size
      choice = f'{below} or {below + size}' if below else f'{size}'
      raise ValueError(f'methods.moco.queue is {self.queue}, which batches of {size} images (train.batch_size) do not '
                       f'fill evenly; use {choice}')
    if 0 < len(context.labels) < self.queue:
      raise ValueError(f'methods.moco.queue is {self.queue}, but there are only {len(context.labels):,d} training '
                       'images, so an image would be compared with keys of its own; use at most '
                       f'{len(context.labels) // size * size}')

  def needs(self, model: Network) -> Needs:
    return Needs(views=(KEY,))

  def params(self, context: SetupContext) -> dict[str, Any]:
    """The MLP, initialised like linear layers of torch."""
    width, rng = context.model.features_dim, np.random.default_rng((context.seed, 1))
    draw = lambda *shape: rng.uniform(-width ** -0.5, width ** -0.5, shape).astype(np.float32)
    return {'0': {'kernel': draw(width, width), 'bias': draw(width)},
            '2': {'kernel': draw(width, self.projection), 'bias': draw(self.projection)}}

  def setup(self, context: SetupContext) -> State:
    if _shuffles(context.model) and jax.device_count() * context.microbatches == 1:
      log.warning('warning: methods.moco shuffles keys over devices, and there is one device: the BatchNorm statistics '
                  'of a batch may give away which keys are of that batch. train.accumulate_steps=4 computes statistics '
                  'over each quarter of the batch, and keys are then shuffled over them')
    # The first step replaces the parameters by a copy of the network's.
    network = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), context.model.shapes()['params'])
    queue = np.random.default_rng((context.seed, 2)).normal(size=(self.queue, self.projection)).astype(np.float32)
    return {'key': {'network': without_heads(network), 'projection': self.params(context)},
            'queue': queue / np.linalg.norm(queue, axis=-1, keepdims=True), 'next': np.zeros((), np.int32)}

  def loss(self, context: StepContext, state: State) -> LossTerm:
    mlp = context.params['methods']['moco']
    now = {'network': without_heads(context.params), 'projection': mlp}
    key = jax.lax.stop_gradient(moved_towards(state['key'], now, self.momentum, context.step == 0))
    queries = unit(project(mlp, context.outputs['source'].features))
    keys, new = jax.lax.stop_gradient(self._keys(context, key))
    logits = jnp.concatenate([jnp.sum(queries * keys, -1)[:, None], queries @ state['queue'].T], -1) / self.temperature
    loss = jnp.mean(jax.nn.logsumexp(logits, -1) - logits[:, 0])
    top1 = jnp.mean(jnp.argmax(logits, -1) == 0)
    queue = jax.lax.dynamic_update_slice(state['queue'], new, (state['next'], 0))
    return LossTerm(loss, {'key': key, 'queue': queue, 'next': (state['next'] + len(new)) % self.queue}, {'top1': top1})

  def _keys(self, context: StepContext, key: State) -> tuple[jax.Array, jax.Array]:
    """The keys of this device's images `[b, n]`, and those of all devices, `[B, n]`."""
    images = context.images[KEY.path]
    count = len(images)
    mine = jax.lax.axis_index(parallel.AXIS) * count + jnp.arange(count)
    order = jnp.arange(count * jax.lax.axis_size(parallel.AXIS))
    if _shuffles(context.model):
      order = jax.random.permutation(context.key, order)
      images = parallel.gather(images)[order[mine]]
    variables = {'params': key['network'], 'batch_stats': context.batch_stats}
    outputs, _ = context.forward(variables, images)
    keys = parallel.gather(unit(project(key['projection'], outputs.features)))[jnp.argsort(order)]
    return keys[mine], keys

  def projection_head(self, params: Any, state: State) -> dict[str, Any]:
    return dict(params)


def _shuffles(model: Network) -> bool:
  """Whether each device, and each microbatch, has BatchNorm statistics of its own."""
  return model.has_batch_norm and model.batch_norm != 'frozen' and model.axis_name is None
