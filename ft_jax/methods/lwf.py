"""LwF: the network keeps its old answers (Learning without Forgetting; Li and Hoiem, ECCV 2016)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ft_jax.methods.base import check_above_zero, LossTerm, Method, Needs, SetupContext, State, StepContext
from ft_jax.models.network import Network


@dataclasses.dataclass(frozen=True)
class LwF(Method):
  """weight * mean over target images of KL(p || q), p and q = softmax(logits / temperature) of the pre-trained
  classifier.

  p is the pre-trained network's; q applies the classifier, which stays as it was, to the features of the network that
  is trained. After the Transfer-Learning-Library, which leaves out the factor temperature^2 of Hinton et al. (2015).
  There p comes from one random crop, made before training; here it comes from the very image that the network sees.
  """
  published: ClassVar = {'weight': 4.0}
  weight: float = 0.0  # published 4
  temperature: float = 3.0  # published

  def check(self, context: SetupContext) -> None:
    check_above_zero('lwf', temperature=self.temperature)

  def needs(self, model: Network) -> Needs:
    return Needs(start=True, teacher=True, classifier=True)

  def loss(self, context: StepContext, state: State) -> LossTerm:
    assert context.teacher is not None
    head = context.start['params']['heads']['pretrained']
    logits = context.outputs['target'].features @ head['kernel'] + head['bias']
    log_p, log_q = (jax.nn.log_softmax(x / self.temperature) for x in (context.teacher.logits['pretrained'], logits))
    return LossTerm(self.weight * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1).mean(), state)
