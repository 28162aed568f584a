"""Batch normalisation as torch computes it."""

import re

from flax import linen as nn
import jax


class BatchNorm(nn.BatchNorm):
  """flax's, with torch's running variance: that of the batch times n / (n - 1), where n is its number of pixels (of all
  devices where they share statistics). A batch is normalised with the variance itself in both.

  It matters where n is small: at 2x2 pixels and 8 images it changes every update by a thirty-second.

  Attributes:
    train: whether the statistics of the batch normalise, and update the running ones.
    frozen: a pattern of paths of parameters; a layer whose scale it matches behaves as if `train` were False.
  """
  train: bool = False
  frozen: str = ''

  @property
  def trains(self) -> bool:
    """Whether the statistics of the batch are used."""
    return self.train and not (self.frozen and re.fullmatch(self.frozen, '/'.join((*self.path, 'scale'))))

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # `train` and `frozen` say the rest
    """`[..., c]` to the same."""
    before: jax.Array = self.get_variable('batch_stats', 'var')
    y = super().__call__(x, use_running_average=not self.trains)
    if self.trains and not self.is_initializing():
      n = x.size // x.shape[-1] * (jax.lax.axis_size(self.axis_name) if self.axis_name else 1)
      after: jax.Array = self.get_variable('batch_stats', 'var')
      # The update added (1 - momentum) times the variance.
      self.put_variable('batch_stats', 'var', after + (after - self.momentum * before) / max(n - 1, 1))
    return y
