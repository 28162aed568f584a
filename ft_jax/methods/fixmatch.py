"""FixMatch: source images without labels teach the target's head to say the same of a weak and of a strong view of an image."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from ft_jax import parallel
from ft_jax.methods.base import LossTerm, Method, Needs, Plan, State, StepContext
from ft_jax.models.network import Network

LABELS = ('soft', 'hard')


@dataclasses.dataclass(frozen=True)
class FixMatch(Method):
  """weight * mean over kept images of -sum_c q_c log softmax(strong view)_c, q = softmax(weak view / temperature); kept: max q >= threshold

  Liu et al., NeurIPS 2022, for pre-training data without labels: soft labels, every image kept. Sohn et al., NeurIPS 2020, have hard
  labels and threshold 0.95, and divide by all images of the batch. Here the mean is over the kept images of all devices, and 0 where
  none is kept (the published code divides by zero). `config.source_weight` has no part in it.
  """
  weight: float = 0.0  # lambda; published 1.0
  threshold: float = 0.0  # least probability of the likeliest class with which an image is kept; published 0.0 (all), in FixMatch 0.95
  labels: str = 'soft'  # soft (published): the probabilities; hard (as in FixMatch): the likeliest class
  temperature: float = 1.0  # published 1.0; below it pseudo-labels are surer
  published: ClassVar = {'weight': 1.0}
  unlabelled_source: ClassVar = True

  def check(self, plan: Plan) -> None:
    if not plan.source:
      raise ValueError('methods.fixmatch needs source images (their labels are not used), but config.selection.method is none; name a pool '
                       'in config.source.name and choose from it, such as --config.selection.method=uot --config.selection.by=cluster')
    if self.labels not in LABELS:
      raise ValueError(f'methods.fixmatch.labels is {self.labels!r}; known: {", ".join(LABELS)}')
    if not 0 <= self.threshold < 1:
      raise ValueError(f'methods.fixmatch.threshold is {self.threshold}; expected a probability from 0 (every image) to below 1')
    if not 0 < self.temperature < math.inf:
      raise ValueError(f'methods.fixmatch.temperature is {self.temperature}; expected a number above 0')

  def needs(self, model: Network) -> Needs:
    return Needs(views=(('source', 'strong'),), seen=(('source', 'strong'),))

  def loss(self, seen: StepContext, state: State) -> LossTerm:
    weak = jax.lax.stop_gradient(seen.outputs['source'].logits['target']) / self.temperature
    probabilities = jax.nn.softmax(weak)
    sure = probabilities.max(-1)
    answers = probabilities if self.labels == 'soft' else jax.nn.one_hot(weak.argmax(-1), weak.shape[-1])
    losses = -jnp.sum(answers * jax.nn.log_softmax(seen.outputs['source/strong'].logits['target']), -1)
    kept = (sure >= self.threshold).astype(losses.dtype)
    # Divided by the part that all devices keep, the mean over devices of what follows is the mean over all that are kept.
    part = jax.lax.pmean(kept.mean(), parallel.AXIS)
    loss = jnp.mean(kept * losses) / jnp.where(part > 0, part, 1.0)
    return LossTerm(self.weight * loss, state, {'kept': part, 'sure': sure.mean()})
