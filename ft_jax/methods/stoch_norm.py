"""Stochastic normalization: running statistics take part in training (Kou, You, Long and Wang, NeurIPS 2020)."""

from collections.abc import Callable
import dataclasses
import functools
from typing import ClassVar

from flax import linen as nn
import jax
import jax.numpy as jnp

from ft_jax.methods.base import Method, SetupContext
from ft_jax.models.batch_norm import BatchNorm
from ft_jax.models.network import frozen_mask


@dataclasses.dataclass(frozen=True)
class StochNorm(Method):
  """Every BatchNorm, channel by channel: statistics of the batch with `probability`, else the running ones; drawn anew
  in each step.

  As in the published code (thuml/StochNorm): the running statistics are those before the batch is added to them,
  gradients go through the batch's statistics where these are used, and scale and bias are the same either way. All
  devices and all microbatches of a step draw the same. Unlike there, the gradient of channels with running statistics
  is that of the forward pass (there these statistics are overwritten before the backward pass reads them); unlike in
  tllib, where --prob has no effect, `probability` is used.
  """
  published: ClassVar = {'enabled': True}
  enabled: bool = False  # switches it on
  probability: float = 0.5  # of the batch's statistics; published 0.5; 1 is plain BatchNorm, 0 running ones

  def check(self, context: SetupContext) -> None:
    if not 0 <= self.probability <= 1:
      raise ValueError(f'methods.stoch_norm.probability is {self.probability}; expected a number from 0 to 1')
    if not context.model.has_batch_norm:
      raise ValueError('methods.stoch_norm replaces BatchNorm, which this network (model.name) does not have; leave '
                       'the method out')
    if all(jax.tree.leaves(frozen_mask(context.model, context.model.shapes()['batch_stats']))):
      raise ValueError("methods.stoch_norm has no layer to replace: model.batch_norm = 'frozen' or train.freeze keeps "
                       'running statistics in all of them; unfreeze some, or leave the method out')

  def norm(self) -> Callable[..., nn.Module]:
    return functools.partial(StochNormLayer, probability=self.probability)


class StochNormLayer(BatchNorm):
  """BatchNorm that, in training, uses running statistics for some channels, drawn with the random stream 'norm'.

  Attributes:
    probability: that a channel uses the batch's statistics.
  """
  probability: float = 0.5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # as in BatchNorm, flax's switches are gone
    """`[b, h, w, c]` to the same."""
    if not self.trains or self.is_initializing():
      return super().__call__(x)
    mean: jax.Array = self.get_variable('batch_stats', 'mean')
    var: jax.Array = self.get_variable('batch_stats', 'var')
    by_batch = super().__call__(x)
    scale: jax.Array = self.get_variable('params', 'scale')
    bias: jax.Array = self.get_variable('params', 'bias')
    by_running = ((x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias).astype(by_batch.dtype)
    return jnp.where(jax.random.bernoulli(self.make_rng('norm'), self.probability, mean.shape), by_batch, by_running)
