"""CutMix (Yun et al., ICCV 2019)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ft_jax import parallel
from ft_jax.methods.base import Method, SetupContext


@dataclasses.dataclass(frozen=True)
class CutMix(Method):
  """A box of x_j replaces that of x_i, y = l * y_i + (1 - l) * y_j with 1 - l the box's fraction of the image, for
  target images.

  Section 3.1 of the paper: l ~ Beta(alpha, alpha) once a step, a box of sqrt(1 - l) of each side around a uniform
  pixel, clipped at the borders, after which l is computed from what is left. The j-th image is the i-th of the whole
  batch in reverse order (as in timm; the published code shuffles), so that the result does not depend on the number of
  devices. Where Mixup is on too, each step applies one of the two, each equally often.
  """
  published: ClassVar = {'alpha': 1.0}
  mixes: ClassVar = True
  alpha: float = 0.0  # both parameters of the Beta distribution; published 1
  probability: float = 1.0  # that a step cuts at all; published 1 on ImageNet, 0.5 on CIFAR

  def check(self, context: SetupContext) -> None:
    if not 0 < self.probability <= 1:
      raise ValueError(f'methods.cutmix.probability is {self.probability}; expected a number above 0, up to 1')

  def mix(self, images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    box = self.box(key, *images.shape[1:3])
    other_images, other_labels = parallel.reverse((images, labels))
    fraction = 1.0 - jnp.mean(box, dtype=jnp.float32)
    return jnp.where(box[..., None], other_images, images), fraction * labels + (1.0 - fraction) * other_labels

  def box(self, key: jax.Array, height: int, width: int) -> jax.Array:
    """A random box, bool `[height, width]`; empty where this step does not cut."""
    of_area, of_row, of_column, of_step = jax.random.split(key, 4)
    side = jnp.sqrt(1.0 - jax.random.beta(of_area, self.alpha, self.alpha))
    rows, columns = _inside(of_row, side, height), _inside(of_column, side, width)
    return rows[:, None] & columns & (jax.random.uniform(of_step) < self.probability)


def _inside(key: jax.Array, fraction: jax.Array, size: int) -> jax.Array:
  """Pixels, bool `[size]`, within half of `fraction * size` of a random one; whole pixels, rounded down as in the
  published code.
  """
  half = jnp.floor(fraction * size).astype(jnp.int32) // 2
  middle, at = jax.random.randint(key, (), 0, size), jnp.arange(size)
  return (at >= middle - half) & (at < middle + half)
