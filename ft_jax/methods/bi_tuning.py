"""Bi-Tuning: contrast with momentum keys of the same and other classes (Zhong, Wang, Kou, Wang and Long, 2020)."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import parallel
from ft_jax.methods.base import LossTerm, Method, Needs, of_network, Plan, SetupContext, State, StepContext
from ft_jax.models.network import Network

_MIXED = 'it compares images of the same class, and a mixed image has no class of its own'


@dataclasses.dataclass(frozen=True)
class BiTuning(Method):
  """weight * mean_b(KL(u | softmax(z_b . [z'_b, Z] / T)) + KL(u | softmax(w_y . [h_b, H] / T))), u uniform on the 1 + K of class y_b.

  h = [features, 1], z = a linear projection of the features, w = [weights, bias] of a class of the target head, each divided by its norm.
  The key encoder, an average of the network (`momentum`, updated before it is used), sees a second view of each image in training mode:
  z' is its projection, and Z and H hold the last K keys z' and h' of each class. They start with random directions.

  As in the published code (tllib, regularization/bi_tuning.py): Z is as it was before the batch's keys are put in and H as it is after, the
  second term does not train the head, and the projection has the learning rate of the backbone. Unlike there, the target head starts as
  `models.network.Heads` does (there with N(0, 0.01)). The key encoder sees target images alone, also in joint fine-tuning.

  Its state is a copy of the backbone and C * K * (d + 1 + `projection`) numbers: 140 MB for 397 classes of 2048 features.
  """
  excludes: ClassVar = {'mixup': _MIXED, 'cutmix': _MIXED}
  published: ClassVar = {'weight': 1.0}
  weight: float = 0.0  # published 1
  queue: int = 40  # K, keys of each class; published 40
  temperature: float = 0.07  # T; published 0.07
  momentum: float = 0.999  # part of the key encoder that a step keeps; published 0.999
  projection: int = 128  # numbers of z; published 128

  def check(self, plan: Plan) -> None:
    for name in ('queue', 'projection'):
      if not 1 <= getattr(self, name) < 2**16:  # more would not fit into any memory
        raise ValueError(f'methods.bi_tuning.{name} is {getattr(self, name)}; expected a whole number from 1 to {2**16 - 1}')
    if not 0 < self.temperature < math.inf:
      raise ValueError(f'methods.bi_tuning.temperature is {self.temperature}; expected a number above 0')
    if not 0 <= self.momentum <= 1:
      raise ValueError(f'methods.bi_tuning.momentum is {self.momentum}; expected a number from 0 to 1')

  def needs(self, model: Network) -> Needs:
    return Needs(views=(('target', 'key'),))

  def params(self, begin: SetupContext) -> dict[str, np.ndarray]:
    """The projection, as torch starts a linear layer."""
    width, rng = begin.model.features_dim, np.random.default_rng((begin.seed, 1))
    draw = lambda *shape: rng.uniform(-width ** -0.5, width ** -0.5, shape).astype(np.float32)
    return {'kernel': draw(width, self.projection), 'bias': draw(self.projection)}

  def setup(self, begin: SetupContext) -> State:
    rng = np.random.default_rng((begin.seed, 2))
    shapes = begin.model.shapes()
    network = {'params': _without_heads(shapes['params']), 'batch_stats': shapes['batch_stats']}
    # A copy of the network, once the first step knows it.
    key = {**jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), network), 'projection': self.params(begin)}
    draw = lambda width: _directions(rng.normal(size=(begin.classes, self.queue, width)).astype(np.float32))
    return {'key': key, 'h': draw(begin.model.features_dim + 1), 'z': draw(self.projection),
            'next': np.zeros(begin.classes, np.int32)}

  def loss(self, seen: StepContext, state: State) -> LossTerm:
    projection = seen.params['methods']['bi_tuning']
    key = jax.lax.stop_gradient(self._key(seen, projection, state['key']))
    heads = jax.lax.stop_gradient(seen.params['heads'])
    keys, batch_stats = seen.forward({'params': {**key['params'], 'heads': heads}, 'batch_stats': key['batch_stats']},
                                     seen.images['target/key'])
    features, keys = seen.outputs['target'].features, jax.lax.stop_gradient(keys.features)
    of_class = jnp.concatenate([heads['target']['kernel'], heads['target']['bias'][None]]).T
    w = _unit(of_class)[seen.labels]
    h, z = _hidden(features), _projected(projection, features)
    new_h, new_z = _hidden(keys), _projected(key['projection'], keys)
    by_z = self._divergence(jnp.sum(z * new_z, -1), z, state['z'], seen.labels)
    new_h, new_z, labels = parallel.gather((new_h, new_z, seen.labels))
    slots, after = places(labels, state['next'], self.queue)
    put = lambda queue, new: queue.at[labels, slots].set(new, mode='drop')
    state = {'key': key | {'batch_stats': batch_stats}, 'h': put(state['h'], new_h), 'z': put(state['z'], new_z), 'next': after}
    by_y = self._divergence(jnp.sum(w * h, -1), w, state['h'], seen.labels)
    return LossTerm(self.weight * (by_z + by_y), state, {'by_projection': by_z, 'by_class': by_y})

  def _key(self, seen: StepContext, projection: Any, key: State) -> State:
    """The key encoder of this step; the network itself in the first one."""
    first = seen.step == 0
    now = {'params': _without_heads(of_network(seen.params)), 'projection': projection}
    # In this form, what is equal stays equal to the last bit, as frozen layers do.
    average = lambda old, new: jnp.where(first, new, old + (1.0 - self.momentum) * (new - old))
    averaged = jax.tree.map(average, {name: key[name] for name in now}, now)
    return {**averaged, 'batch_stats': jax.tree.map(functools.partial(jnp.where, first), seen.batch_stats, key['batch_stats'])}

  def _divergence(self, current: jax.Array, queries: jax.Array, queue: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean KL divergence of the uniform distribution on a class from the similarities.

    Args:
      current: `[b]`, similarity with what is of the image itself.
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
  """Where the keys of a batch go: one after the other in the ring of their class, so that each ring has the last `size` of its class.

  Args:
    labels: int `[B]`.
    first: int `[C]`, the next place of each ring.
    size: of each ring.

  Returns:
    The place of each key, int `[B]`, all different within a class; `size` where later keys of the batch would overwrite it. And `first`
    for the next batch.
  """
  counts = jnp.zeros_like(first).at[labels].add(1)
  rank = jnp.sum(jnp.tril(labels[:, None] == labels, -1), -1)  # how many of its class come before it
  place = jnp.where(rank >= counts[labels] - size, (first[labels] + rank) % size, size)
  return place, (first + counts) % size


def _without_heads(params: Any) -> dict[str, Any]:
  return {name: value for name, value in params.items() if name != 'heads'}


def _directions(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _unit(x: jax.Array) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def _hidden(features: jax.Array) -> jax.Array:
  return _unit(jnp.concatenate([features, jnp.ones_like(features[:, :1])], -1))


def _projected(projection: Any, features: jax.Array) -> jax.Array:
  return _unit(features @ projection['kernel'] + projection['bias'])
