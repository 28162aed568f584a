"""Bi-Tuning: contrast with momentum keys of the same and other classes (Zhong, Wang, Kou, Wang and Long, 2020)."""

import dataclasses
import functools
import math
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

_MIXED = 'it compares images of the same class, and a mixed image has no class of its own'
KEY = View('target', 'key')


@dataclasses.dataclass(frozen=True)
class BiTuning(Method):
  """weight * mean_b(KL(u | softmax(z_b . [z'_b, Z] / T)) + KL(u | softmax(w_y . [h_b, H] / T))), u uniform on the 1 + K
  of class y_b.

  h = [features, 1], z = a linear projection of the features, w = [weights, bias] of a class of the target head, each
  divided by its norm. The key encoder, a moving average of the network (`momentum`, updated before it is used), gets a
  second view of each image in training mode: z' is its projection, and Z and H hold the last K keys z' and h' of each
  class. They start with random directions.

  As in the published code (tllib, regularization/bi_tuning.py): Z is used before the batch's keys are added and H
  after, the second term does not train the head, and the projection has the learning rate of the backbone. Unlike
  there, the target head starts as `models.network.Heads` does (there with N(0, 0.01)). The key encoder gets target
  images alone, also in joint fine-tuning.

  Its state is a copy of the backbone and C * K * (d + 1 + `projection`) numbers: 140 MB for 397 classes and 2048
  features.
  """
  excludes: ClassVar = {'mixup': _MIXED, 'cutmix': _MIXED}
  published: ClassVar = {'weight': 1.0}
  weight: float = 0.0  # published 1
  queue: int = 40  # K, keys of each class; published 40
  temperature: float = 0.07  # T; published 0.07
  momentum: float = 0.999  # fraction of the key encoder that a step keeps; published 0.999
  projection: int = 128  # numbers of z; published 128

  def check(self, context: SetupContext) -> None:
    for name, size in (('queue', self.queue), ('projection', self.projection)):
      if not 1 <= size < 2**16:  # more would not fit into any memory
        raise ValueError(f'methods.bi_tuning.{name} is {size}; expected a whole number from 1 to {2**16 - 1}')
    check_above_zero('bi_tuning', temperature=self.temperature)
    if not 0 <= self.momentum <= 1:
      raise ValueError(f'methods.bi_tuning.momentum is {self.momentum}; expected a number from 0 to 1')

  def needs(self, model: Network) -> Needs:
    return Needs(views=(KEY,))

  def params(self, context: SetupContext) -> dict[str, np.ndarray]:
    """The projection, initialised like a linear layer of torch."""
    width, rng = context.model.features_dim, np.random.default_rng((context.seed, 1))
    draw = lambda *shape: rng.uniform(-width ** -0.5, width ** -0.5, shape).astype(np.float32)
    return {'kernel': draw(width, self.projection), 'bias': draw(self.projection)}

  def setup(self, context: SetupContext) -> State:
    rng = np.random.default_rng((context.seed, 2))
    shapes = context.model.shapes()
    network = {'params': without_heads(shapes['params']), 'batch_stats': shapes['batch_stats']}
    # The first step replaces it by a copy of the network.
    key = {**jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), network), 'projection': self.params(context)}
    draw = lambda width: _directions(rng.normal(size=(context.classes, self.queue, width)).astype(np.float32))
    return {'key': key, 'h': draw(context.model.features_dim + 1), 'z': draw(self.projection),
            'next': np.zeros(context.classes, np.int32)}

  def loss(self, context: StepContext, state: State) -> LossTerm:
    projection = context.params['methods']['bi_tuning']
    key = jax.lax.stop_gradient(self._key(context, projection, state['key']))
    heads = jax.lax.stop_gradient(context.params['heads'])
    variables = {'params': {**key['params'], 'heads': heads}, 'batch_stats': key['batch_stats']}
    outputs, batch_stats = context.forward(variables, context.images[KEY.path])
    features, keys = context.outputs['target'].features, jax.lax.stop_gradient(outputs.features)
    of_class = jnp.concatenate([heads['target']['kernel'], heads['target']['bias'][None]]).T
    w = unit(of_class)[context.labels]
    h, z = _hidden(features), _projected(projection, features)
    new_h, new_z = _hidden(keys), _projected(key['projection'], keys)
    by_z = self._divergence(jnp.sum(z * new_z, -1), z, state['z'], context.labels)
    new_h, new_z, labels = parallel.gather((new_h, new_z, context.labels))
    slots, after = places(labels, state['next'], self.queue)
    put = lambda queue, new: queue.at[labels, slots].set(new, mode='drop')
    state = {'key': key | {'batch_stats': batch_stats}, 'h': put(state['h'], new_h), 'z': put(state['z'], new_z),
             'next': after}
    by_y = self._divergence(jnp.sum(w * h, -1), w, state['h'], context.labels)
    return LossTerm(self.weight * (by_z + by_y), state, {'by_projection': by_z, 'by_class': by_y})

  def _key(self, context: StepContext, projection: Any, key: State) -> State:
    """The key encoder of this step; the network itself in the first one."""
    first = context.step == 0
    now = {'params': without_heads(context.params), 'projection': projection}
    averaged = moved_towards({name: key[name] for name in now}, now, self.momentum, first)
    batch_stats = jax.tree.map(functools.partial(jnp.where, first), context.batch_stats, key['batch_stats'])
    return {**averaged, 'batch_stats': batch_stats}

  def _divergence(self, current: jax.Array, queries: jax.Array, queue: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean KL divergence of the uniform distribution on a class from the similarities.

    Args:
      current: `[b]`, similarity with the key of the image itself.
      queries: `[b, n]`.
      queue: `[C, K, n]`.
      labels: int `[b]`.
    """
    classes, size, width = queue.shape
    queued = jnp.dot(queries, queue.reshape(-1, width).T, precision='highest')
    logs = jax.nn.log_softmax(jnp.concatenate([current[:, None], queued], -1) / self.temperature)
    same = jnp.take_along_axis(logs[:, 1:].reshape(-1, classes, size), labels[:, None, None], 1)[:, 0]
    return jnp.mean(-math.log(size + 1) - (logs[:, 0] + same.sum(-1)) / (size + 1))


def places(labels: jax.Array, first: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """Where the keys of a batch go: one after the other in the ring of their class, so that each ring holds the last
  `size` keys of its class.

  Args:
    labels: int `[B]`.
    first: int `[C]`, the next place of each ring.
    size: of each ring.

  Returns:
    The place of each key, int `[B]`, all different within a class; `size` where later keys of the batch would overwrite
    it; and `first` for the next batch.
  """
  counts = jnp.zeros_like(first).at[labels].add(1)
  rank = jnp.sum(jnp.tril(labels[:, None] == labels, -1), -1)  # how many of its class come before it
  place = jnp.where(rank >= counts[labels] - size, (first[labels] + rank) % size, size)
  return place, (first + counts) % size


def _directions(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _hidden(features: jax.Array) -> jax.Array:
  return unit(jnp.concatenate([features, jnp.ones_like(features[:, :1])], -1))


def _projected(projection: Any, features: jax.Array) -> jax.Array:
  return unit(features @ projection['kernel'] + projection['bias'])
