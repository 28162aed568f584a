"""L2-SP: weights are pulled back to where they started (Li, Grandvalet and Davoine, ICML 2018)."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from ft_jax.methods.base import (
  check_not_negative,
  flat,
  LossTerm,
  Method,
  Needs,
  of_network,
  SetupContext,
  State,
  StepContext,
)
from ft_jax.models.network import Network


@dataclasses.dataclass(frozen=True)
class L2SP(Method):
  """weight / 2 * |w - w0|^2 + head_weight / 2 * |w'|^2: w all pre-trained parameters (also BatchNorm's scales and
  biases), w' fresh heads.

  In the published comparisons weight decay is then 0.
  """
  published: ClassVar = {'weight': 0.01}
  weight: float = 0.0  # alpha; published 0.01
  head_weight: float = 0.01  # beta, of the fresh heads

  def check(self, context: SetupContext) -> None:
    check_not_negative('l2_sp', head_weight=self.head_weight)

  def needs(self, model: Network) -> Needs:
    return Needs(start=True)

  def loss(self, context: StepContext, state: State) -> LossTerm:
    start = flat(context.start['params'])
    params = flat(of_network(context.params))
    squares = {path: jnp.sum((value - start.get(path, 0.0)) ** 2) for path, value in params.items()}
    weights = {path: self.weight if path in start else self.head_weight for path in squares}
    penalty: Any = 0.5 * sum(weights[path] * square for path, square in squares.items())
    return LossTerm(penalty, state)
