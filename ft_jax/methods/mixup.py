"""Mixup (Zhang, Cisse, Dauphin and Lopez-Paz, ICLR 2018)."""

import dataclasses
from typing import ClassVar

import jax

from ft_jax import parallel
from ft_jax.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Mixup(Method):
  """x = l * x_i + (1 - l) * x_j, y = l * y_i + (1 - l) * y_j, with one l ~ Beta(alpha, alpha) a step, for target
  images.

  Section 2 of the paper. The j-th image is the i-th of the whole batch in reverse order (as in timm; the paper's code
  shuffles), so that the result does not depend on the number of devices. Where CutMix is on too, each step applies one
  of the two, each equally often.
  """
  published: ClassVar = {'alpha': 0.2}
  mixes: ClassVar = True
  alpha: float = 0.0  # both parameters of the Beta distribution; published 0.1 to 0.4 on ImageNet, 1 on CIFAR

  def mix(self, images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    fraction = jax.random.beta(key, self.alpha, self.alpha)
    other_images, other_labels = parallel.reverse((images, labels))
    return fraction * images + (1.0 - fraction) * other_images, fraction * labels + (1.0 - fraction) * other_labels
