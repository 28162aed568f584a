"""LwF: the network keeps answering as before (Learning without Forgetting; Li and Hoiem, ECCV 2016)."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from ft_jax.methods.base import LossTerm, Method, Needs, Plan, State, StepContext
from ft_jax.models.network import Network


@dataclasses.dataclass(frozen=True)
class LwF(Method):
  """weight * mean over target images of KL(p || q), p and q = softmax(logits / temperature) of the pre-trained classifier.

  p is of the pre-trained network, q of the features as they are now; the classifier itself stays as it was. After the
  Transfer-Learning-Library, which leaves out the factor temperature^2 of Hinton et al. (2015). There p is of one random crop, made before
  training; here it is of the very image that the network sees.
  """
  published: ClassVar = {'weight': 4.0}
  weight: float = 0.0  # published 4
  temperature: float = 3.0  # published

  def check(self, plan: Plan) -> None:
    if not 0 < self.temperature < math.inf:
      raise ValueError(f'methods.lwf.temperature is {self.temperature}; expected a number above 0')

  def needs(self, model: Network) -> Needs:
    return Needs(start=True, teacher=True, classifier=True)

  def loss(self, seen: StepContext, state: State) -> LossTerm:
    head = seen.start['params']['heads']['pretrained']
    logits = seen.outputs['target'].features @ head['kernel'] + head['bias']
    log_p, log_q = (jax.nn.log_softmax(x / self.temperature) for x in (seen.teacher.logits['pretrained'], logits))
    return LossTerm(self.weight * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1).mean(), state)
