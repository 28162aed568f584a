"""BYOL: pre-training without labels and without negatives, by predicting another view (Grill et al., NeurIPS 2020)."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import parallel
from ft_jax.methods.base import (
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

# The published augmentations of the second view; the first one's are those of config.augment: always blurred, never
# solarized.
SECOND = View('source', 'second', blur=0.1, solarize=0.2)
# Of BatchNorm in the projector and the predictor, as in the network.
EPSILON, KEPT = 1e-5, 0.9


@dataclasses.dataclass(frozen=True)
class BYOL(Method):
  """mean_b(2 - 2 cos(p(z_1), z'_2)) + mean_b(2 - 2 cos(p(z_2), z'_1)): z_1 and z_2 are projections of two views of an
  image, z' those of the target network, p the predictor.

  The target network is a moving average of network and projector, t = m t + (1 - m) o after each step k of n, with m
  = 1 - (1 - momentum) (cos(pi k / n) + 1) / 2. Projector and predictor are linear, BatchNorm, ReLU, linear. Both
  views go through the network in one pass, so its BatchNorm sees the two together (in the published code each alone);
  those of projector and predictor see one view at a time. Metric `spread`: the standard deviation of the normalised
  projections over the images times the root of their dimensions, near 1 where they are spread evenly, 0 where they
  collapsed.
  """
  pretrains: ClassVar[bool] = True
  published: ClassVar[Mapping[str, Any]] = {'enabled': True}
  excludes: ClassVar[Mapping[str, str]] = {'moco': 'each is a whole pre-training; switch on one of them'}
  enabled: bool = False  # switches it on
  momentum: float = 0.996  # fraction of the target network that the first step keeps; published 0.996 (1,000 epochs)
  hidden: int = 4096  # numbers in the hidden layer of projector and predictor; published 4096
  projection: int = 256  # numbers of a projection; published 256

  def check(self, context: SetupContext) -> None:
    for name, size in (('hidden', self.hidden), ('projection', self.projection)):
      if not 1 <= size < 2**16:  # more would not fit into any memory
        raise ValueError(f'methods.byol.{name} is {size}; expected a whole number from 1 to {2**16 - 1}')
    if not 0 <= self.momentum <= 1:
      raise ValueError(f'methods.byol.momentum is {self.momentum}; expected a number from 0 to 1')
    if context.model.batch_norm == 'frozen':
      raise ValueError("model.batch_norm is 'frozen', with which methods.byol may collapse: it compares an image with "
                       'no other one, and only BatchNorm over the images of a batch keeps all features from becoming '
                       'the same; use --config.model.batch_norm=train')
    each = context.batch_size if context.model.axis_name else context.batch_size // jax.device_count()
    if each < 2:
      raise ValueError(f'train.batch_size is {context.batch_size}, {each} image for each device; methods.byol takes '
                       'BatchNorm statistics over the images: use at least 2 for each device')

  def needs(self, model: Network) -> Needs:
    return Needs(views=(SECOND,), forwarded_views=(SECOND,))

  def params(self, context: SetupContext) -> dict[str, Any]:
    rng = np.random.default_rng((context.seed, 1))
    return {'projector': self._mlp(context.model.features_dim, rng), 'predictor': self._mlp(self.projection, rng)}

  def _mlp(self, width: int, rng: np.random.Generator) -> dict[str, Any]:
    """Linear layers initialised like torch's, without biases, which BatchNorm has or the loss needs not."""
    draw = lambda n, m: rng.uniform(-n ** -0.5, n ** -0.5, (n, m)).astype(np.float32)
    return {'0': {'kernel': draw(width, self.hidden)},
            '1': {'scale': np.ones(self.hidden, np.float32), 'bias': np.zeros(self.hidden, np.float32)},
            '2': {'kernel': draw(self.hidden, self.projection)}}

  def setup(self, context: SetupContext) -> State:
    # The first step replaces the parameters by a copy of the network's.
    network = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), context.model.shapes()['params'])
    return {'target': {'network': without_heads(network), 'projector': self.params(context)['projector']},
            'statistics': {'mean': np.zeros(self.hidden, np.float32), 'var': np.ones(self.hidden, np.float32)},
            'steps': np.asarray(context.steps, np.int32)}

  def loss(self, context: StepContext, state: State) -> LossTerm:
    own = context.params['methods']['byol']
    now = {'network': without_heads(context.params), 'projector': own['projector']}
    kept = target_momentum(self.momentum, context.step - 1, state['steps'])
    target = jax.lax.stop_gradient(moved_towards(state['target'], now, kept, context.step == 0))
    axis = context.model.axis_name
    views = [context.images['source'], context.images[SECOND.path]]
    features = [context.outputs['source'].features, context.outputs[SECOND.path].features]
    outputs, _ = context.forward({'params': target['network'], 'batch_stats': context.batch_stats},
                                 jnp.concatenate(views))
    others = jax.lax.stop_gradient(
        [unit(mlp(target['projector'], x, axis)[0]) for x in jnp.split(outputs.features, 2)])
    projected = [mlp(own['projector'], x, axis) for x in features]
    predicted = [unit(mlp(own['predictor'], z, axis)[0]) for z, _ in projected]
    distances = [jnp.mean(2 - 2 * jnp.sum(p * z, -1)) for p, z in zip(predicted, reversed(others))]
    state = {**state, 'target': target, 'statistics': running(state['statistics'], [found for _, found in projected])}
    spread = jnp.std(parallel.gather(unit(projected[0][0])), axis=0).mean() * math.sqrt(self.projection)
    return LossTerm(distances[0] + distances[1], state, {'spread': spread})

  def projection_head(self, params: Any, state: State) -> dict[str, Any]:
    """The projector with its BatchNorm, in evaluation mode, as part of the first layer."""
    linear, norm, last = (params['projector'][name] for name in ('0', '1', '2'))
    factor = norm['scale'] / np.sqrt(state['statistics']['var'] + EPSILON)
    return {'0': {'kernel': linear['kernel'] * factor, 'bias': norm['bias'] - state['statistics']['mean'] * factor},
            '2': {'kernel': last['kernel'], 'bias': np.zeros(last['kernel'].shape[-1], np.float32)}}


def target_momentum(first: float, step: jax.Array, steps: jax.Array) -> jax.Array:
  """The fraction of the target network that is kept after step `step`, counted from 0, of `steps`."""
  return 1 - (1 - first) * (jnp.cos(math.pi * step / jnp.maximum(steps, 1)) + 1) / 2


def mlp(params: Any, x: jax.Array, axis: str | None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Linear, BatchNorm over the batch, ReLU, linear: `[b, d]` to `[b, n]`; and mean and variance before the ReLU.

  Args:
    params: of the layers '0', '1' and '2'.
    x: the features.
    axis: the pmapped axis over which BatchNorm averages; None keeps the statistics of each device apart.
  """
  x = x @ params['0']['kernel']
  mean = x.mean(0) if axis is None else jax.lax.pmean(x.mean(0), axis)
  variance = jnp.mean((x - mean) ** 2, 0)
  variance = variance if axis is None else jax.lax.pmean(variance, axis)
  x = (x - mean) * (jax.lax.rsqrt(variance + EPSILON) * params['1']['scale']) + params['1']['bias']
  return jax.nn.relu(x) @ params['2']['kernel'], {'mean': mean, 'var': variance}


def running(before: State, views: list[dict[str, jax.Array]]) -> State:
  """The running statistics after those of some views, averaged over all devices."""
  mean = jax.tree.map(lambda *each: jax.lax.pmean(sum(each) / len(each), parallel.AXIS), *views)
  return jax.tree.map(lambda old, new: KEPT * old + (1 - KEPT) * new, before, mean)
