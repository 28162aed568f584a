"""Self-labeling: labels that the network is sure are others are corrected, and examples that it finds unlikely weigh less (RegSL)."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import parallel
from ft_jax.methods.base import Method, Plan, SetupContext, State, StepContext

MIXED = 'it gives each example one class, and the label of a mixture is several; switch either off'
# Of the schedule of the temperature: how fast it falls, down to which part, and after how many epochs of reweighting it is there.
DECAY, LOWEST, EPOCHS = 0.1, 0.5, 9


@dataclasses.dataclass(frozen=True)
class SelfLabel(Method):
  """From correct_epoch on, an example's label becomes argmax p where max p > threshold, for good, before the loss; from reweight_epoch on,
  the loss is sum_i w_i CE_i, w = softmax(-CE / tau) over the batch, without a gradient through w. tau is the temperature, times
  max(1/2, exp(-(e - 1 - reweight_epoch) / 10)) in epochs e > reweight_epoch + 1. Li and Zhang, "Improved Regularization and Robustness for
  Fine-tuning in Neural Networks" (NeurIPS 2021), and its code.

  p is that of the training step: training mode, augmented image. The batch is that of all devices. The epoch of a step, counted from 1, is
  that of its first image. An example that comes twice in a batch gets the label of the last sure view. Metrics: `corrected`, labels that
  differ from the given ones; where noise was put in, `precision`, the part of them that is true now (0 while there are none), and `true`,
  the part of all labels that is.
  """
  published: ClassVar[Mapping[str, Any]] = {'enabled': True}
  excludes: ClassVar[Mapping[str, str]] = {'mixup': MIXED, 'cutmix': MIXED}
  enabled: bool = False  # whether it is used
  reweight_epoch: int = 5  # the first epoch, from 1, whose examples are weighted; published
  correct_epoch: int = 10  # the first epoch, from 1, in which labels are corrected; published
  threshold: float = 0.9  # a label is corrected where another class has a probability above; published
  temperature: float = 1.0  # of the weights; published 1.0, and 1.5 to 2.0 in the noisy experiments (configs/noisy.py)

  def check(self, plan: Plan) -> None:
    for name in ('reweight_epoch', 'correct_epoch'):
      if getattr(self, name) < 1:
        raise ValueError(f'methods.self_label.{name} is {getattr(self, name)}; expected an epoch from 1 (one beyond the last is never)')
    if not 0 <= self.threshold < 1:
      raise ValueError(f'methods.self_label.threshold is {self.threshold}; expected a probability from 0 to below 1')
    if not 0 < self.temperature:
      raise ValueError(f'methods.self_label.temperature is {self.temperature}; expected a number above 0')

  def setup(self, begin: SetupContext) -> State:
    known = begin.true_labels is not begin.labels
    return {'labels': begin.labels.astype(np.int32), 'given': begin.labels.astype(np.int32),
            **({'true': begin.true_labels.astype(np.int32)} if known else {}),
            'correct_from': first_steps(begin, [self.correct_epoch])[0],
            'reweight_from': first_steps(begin, range(self.reweight_epoch, self.reweight_epoch + EPOCHS))}

  def relabel(self, seen: StepContext, state: State) -> tuple[jax.Array, State, dict[str, jax.Array]]:
    logits = seen.outputs['target'].logits['target']
    sure = (jax.nn.softmax(logits).max(-1) > self.threshold) & (seen.step >= state['correct_from'])
    labels = corrected(state['labels'], *parallel.gather((seen.index, jnp.argmax(logits, -1), sure)))
    changed = labels != state['given']
    metrics = {'corrected': jnp.sum(changed)}
    if 'true' in state:
      metrics['precision'] = jnp.sum(changed & (labels == state['true'])) / jnp.maximum(metrics['corrected'], 1)
      metrics['true'] = jnp.mean(labels == state['true'])
    return labels[seen.index], {**state, 'labels': labels}, metrics

  def weigh(self, losses: jax.Array, seen: StepContext, state: State) -> jax.Array:
    epochs = jnp.sum(seen.step >= state['reweight_from'])  # that have begun since the reweighting did
    scores = -losses / (self.temperature * schedule(epochs - 2))
    everyone = parallel.gather(scores)
    weights = jnp.exp(scores - jax.nn.logsumexp(everyone)) * len(everyone)
    return jnp.where(epochs > 0, weights, 1.0)


def schedule(epochs: jax.Array) -> jax.Array:
  """The part of the first temperature that is left so many epochs after it began to fall."""
  return jnp.maximum(LOWEST, jnp.exp(-DECAY * jnp.maximum(epochs, 0)))


def first_steps(begin: SetupContext, epochs: Sequence[int]) -> np.ndarray:
  """The first step of each epoch, int32: that whose first image is of the epoch. Those beyond int32 do not come."""
  steps = [-(-(epoch - 1) * len(begin.labels) // begin.batch_size) for epoch in epochs]
  return np.asarray([min(step, np.iinfo(np.int32).max) for step in steps], np.int32)


def corrected(labels: jax.Array, index: jax.Array, classes: jax.Array, sure: jax.Array) -> jax.Array:
  """Labels int32 `[n]` after those of the rows `index` `[b]` became `classes` `[b]` where `sure` bool `[b]`.

  Of several sure views of one row the last one counts: a scatter does not say which of them it would take.
  """
  nowhere = len(labels)
  places = jnp.arange(len(index))
  last = jnp.full(nowhere, -1).at[jnp.where(sure, index, nowhere)].max(places, mode='drop')
  wins = sure & (last[index] == places)
  return labels.at[jnp.where(wins, index, nowhere)].set(classes.astype(labels.dtype), mode='drop')
