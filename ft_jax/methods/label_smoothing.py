"""Label smoothing (Szegedy et al., CVPR 2016)."""

import dataclasses
from typing import ClassVar

import jax

from ft_jax.methods.base import Method, SetupContext


@dataclasses.dataclass(frozen=True)
class LabelSmoothing(Method):
  """Cross-entropy with (1 - amount) * y + amount / K: y the target's labels in this step (which may be mixed or
  corrected), K its classes.

  Section 7 of the paper. Source images keep their labels, and other methods get the labels without smoothing.
  """
  published: ClassVar = {'amount': 0.1}
  softens: ClassVar = True
  amount: float = 0.0  # weight of the uniform distribution in every label, below 1; published 0.1

  def check(self, context: SetupContext) -> None:
    if self.amount >= 1:
      raise ValueError(f'methods.label_smoothing.amount is {self.amount}; expected a number below 1 (1 leaves nothing '
                       'of the labels)')

  def soften(self, labels: jax.Array) -> jax.Array:
    return (1.0 - self.amount) * labels + self.amount / labels.shape[-1]
