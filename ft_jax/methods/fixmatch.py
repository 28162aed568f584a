"""FixMatch: from source images without labels, the target's head learns to predict the same for a weak and a strong
view of an image.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ft_jax import parallel
from ft_jax.methods.base import (
  check_above_zero,
  check_known,
  LossTerm,
  Method,
  Needs,
  SetupContext,
  State,
  StepContext,
  View,
)
from ft_jax.models.network import Network

LABELS = ('soft', 'hard')
STRONG = View('source', 'strong', randaugment=2, magnitude=10, cutout=0.5)


@dataclasses.dataclass(frozen=True)
class FixMatch(Method):
  """weight * mean over kept images of -sum_c q_c log softmax(strong view)_c, q = softmax(weak view / temperature);
  kept: max q >= threshold

  Liu et al., NeurIPS 2022, for pre-training data without labels: soft labels, every image kept. Sohn et al., NeurIPS
  2020, have hard labels and threshold 0.95, and divide by all images of the batch. Here the mean is over the kept
  images of all devices, and 0 where none is kept (the published code divides by zero). `config.source_weight` is not
  used.
  """
  weight: float = 0.0  # lambda; published 1.0
  threshold: float = 0.0  # least probability of the likeliest class of a kept image; published 0.0, in FixMatch 0.95
  labels: str = 'soft'  # soft (published): the probabilities; hard (as in FixMatch): the likeliest class
  temperature: float = 1.0  # published 1.0; below it pseudo-labels are surer
  published: ClassVar = {'weight': 1.0}
  unlabelled_source: ClassVar = True

  def check(self, context: SetupContext) -> None:
    if not context.has_source:
      raise ValueError('methods.fixmatch needs source images (their labels are not used), but config.selection.method '
                       'is none; name a pool in config.source.name and select from it, for example with '
                       '--config.selection.method=uot --config.selection.by=cluster')
    check_known('fixmatch', LABELS, labels=self.labels)
    if not 0 <= self.threshold < 1:
      raise ValueError(f'methods.fixmatch.threshold is {self.threshold}; expected a probability from 0 (every image) '
                       'to below 1')
    check_above_zero('fixmatch', temperature=self.temperature)

  def needs(self, model: Network) -> Needs:
    return Needs(forwarded_views=(STRONG,))

  def loss(self, context: StepContext, state: State) -> LossTerm:
    weak = jax.lax.stop_gradient(context.outputs['source'].logits['target']) / self.temperature
    probabilities = jax.nn.softmax(weak)
    confidence = probabilities.max(-1)
    labels = probabilities if self.labels == 'soft' else jax.nn.one_hot(weak.argmax(-1), weak.shape[-1])
    losses = -jnp.sum(labels * jax.nn.log_softmax(context.outputs[STRONG.path].logits['target']), -1)
    kept = (confidence >= self.threshold).astype(losses.dtype)
    # Divided by the fraction that all devices keep, so that the mean over devices is the mean over all kept images.
    fraction = jax.lax.pmean(kept.mean(), parallel.AXIS)
    loss = jnp.mean(kept * losses) / jnp.where(fraction > 0, fraction, 1.0)
    return LossTerm(self.weight * loss, state, {'kept': fraction, 'sure': confidence.mean()})
