"""L2-SP: weights are drawn back to where they started (Li, Grandvalet and Davoine, ICML 2018)."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp

from ft_jax.methods.base import flat, LossTerm, Method, Needs, of_network, Plan, State, StepContext
from ft_jax.models.network import Network


@dataclasses.dataclass(frozen=True)
class L2SP(Method):
  """weight / 2 * |w - w0|^2 + head_weight / 2 * |w'|^2: w what was pre-trained (also BatchNorm's scales and biases), w' the fresh heads.

  In the published comparisons weight decay is then 0.
  """
  published: ClassVar = {'weight': 0.01}
  weight: float = 0.0  # alpha; published 0.01
  head_weight: float = 0.01  # beta, of the fresh heads

  def check(self, plan: Plan) -> None:
    if not 0 <= self.head_weight < math.inf:
      raise ValueError(f'methods.l2_sp.head_weight is {self.head_weight}; expected a number from 0')

  def needs(self, model: Network) -> Needs:
    return Needs(start=True)

  def loss(self, seen: StepContext, state: State) -> LossTerm:
    start = flat(seen.start['params'])
    squares = {path: jnp.sum((value - start.get(path, 0.0)) ** 2) for path, value in flat(of_network(seen.params)).items()}
    weights = {path: self.weight if path in start else self.head_weight for path in squares}
    return LossTerm(0.5 * sum(weights[path] * square for path, square in squares.items()), state)
