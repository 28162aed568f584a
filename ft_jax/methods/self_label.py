"""Self-labeling: labels are corrected where the network is sure of another class, and examples that it finds unlikely
get less weight (RegSL).
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import parallel
from ft_jax.methods.base import check_above_zero, Method, SetupContext, State, StepContext

MIXED = 'it gives each example one class, and the label of a mixture is several; switch either off'
# The schedule of the temperature: how fast it falls, the lowest fraction of its first value, and the epochs of
# reweighting until then.
DECAY, LOWEST, EPOCHS = 0.1, 0.5, 9


@dataclasses.dataclass(frozen=True)
class SelfLabel(Method):
  """From correct_epoch on, an example's label becomes argmax p where max p > threshold, for good, before the loss; from
  reweight_epoch on, the loss is sum_i w_i CE_i, w = softmax(-CE / tau) over the batch, without a gradient through w.
  tau is the temperature, times max(1/2, exp(-(e - 1 - reweight_epoch) / 10)) in epochs e > reweight_epoch + 1. Li and
  Zhang, "Improved Regularization and Robustness for Fine-tuning in Neural Networks" (NeurIPS 2021), and its code.

  p comes from the training step: training mode, augmented image. The batch is that of all devices. The epoch of a step,
  counted from 1, is that of its first image. An example that occurs twice in a batch gets the label of the last sure
  view. Metrics: `corrected`, the number of labels that differ from the given ones; where label noise was added,
  `precision`, the fraction of them that are true now (0 while there are none), and `true`, the fraction of all labels
  that are true.
  """
  published: ClassVar[Mapping[str, Any]] = {'enabled': True}
  excludes: ClassVar[Mapping[str, str]] = {'mixup': MIXED, 'cutmix': MIXED}
  enabled: bool = False  # switches it on
  reweight_epoch: int = 5  # the first epoch, from 1, whose examples are weighted; published
  correct_epoch: int = 10  # the first epoch, from 1, in which labels are corrected; published
  threshold: float = 0.9  # a label is corrected where another class has a probability above; published
  temperature: float = 1.0  # of the weights; published 1.0, and 1.5 to 2.0 in the noisy experiments (configs/noisy.py)

  def check(self, context: SetupContext) -> None:
    for name, epoch in (('reweight_epoch', self.reweight_epoch), ('correct_epoch', self.correct_epoch)):
      if epoch < 1:
        raise ValueError(f'methods.self_label.{name} is {epoch}; expected an epoch from 1 (one beyond the last is '
                         'never reached)')
    if not 0 <= self.threshold < 1:
      raise ValueError(f'methods.self_label.threshold is {self.threshold}; expected a probability from 0 to below 1')
    check_above_zero('self_label', temperature=self.temperature)

  def setup(self, context: SetupContext) -> State:
    state = {'labels': context.labels.astype(np.int32), 'given': context.labels.astype(np.int32),
             'correct_from': first_steps(context, [self.correct_epoch])[0],
             'reweight_from': first_steps(context, range(self.reweight_epoch, self.reweight_epoch + EPOCHS))}
    if context.true_labels is not context.labels:
      state['true'] = context.true_labels.astype(np.int32)
    return state

  def relabel(self, context: StepContext, state: State) -> tuple[jax.Array, State, dict[str, jax.Array]]:
    logits = context.outputs['target'].logits['target']
    sure = (jax.nn.softmax(logits).max(-1) > self.threshold) & (context.step >= state['correct_from'])
    labels = corrected(state['labels'], *parallel.gather((context.rows, jnp.argmax(logits, -1), sure)))
    changed = labels != state['given']
    metrics = {'corrected': jnp.sum(changed)}
    if 'true' in state:
      metrics['precision'] = jnp.sum(changed & (labels == state['true'])) / jnp.maximum(metrics['corrected'], 1)
      metrics['true'] = jnp.mean(labels == state['true'])
    return labels[context.rows], {**state, 'labels': labels}, metrics

  def weigh(self, losses: jax.Array, context: StepContext, state: State) -> jax.Array:
    epochs = jnp.sum(context.step >= state['reweight_from'])  # epochs that have begun since reweighting did
    scores = -losses / (self.temperature * schedule(epochs - 2))
    all_scores = parallel.gather(scores)
    weights = jnp.exp(scores - jax.nn.logsumexp(all_scores)) * len(all_scores)
    return jnp.where(epochs > 0, weights, 1.0)


def schedule(epochs: jax.Array) -> jax.Array:
  """The temperature, as a fraction of its first value, so many epochs after it began to fall."""
  return jnp.maximum(LOWEST, jnp.exp(-DECAY * jnp.maximum(epochs, 0)))


def first_steps(context: SetupContext, epochs: Sequence[int]) -> np.ndarray:
  """The first step of each epoch (the first one whose first image is of that epoch), int32; the largest int32 for steps
  beyond it.
  """
  steps = [-(-(epoch - 1) * len(context.labels) // context.batch_size) for epoch in epochs]
  return np.asarray([min(step, np.iinfo(np.int32).max) for step in steps], np.int32)


def corrected(labels: jax.Array, rows: jax.Array, classes: jax.Array, sure: jax.Array) -> jax.Array:
  """Labels int32 `[n]` after those of `rows` `[b]` became `classes` `[b]` where `sure` bool `[b]`.

  Of several sure views of one row the last one counts: a scatter does not define which of them it takes.
  """
  nowhere = len(labels)
  places = jnp.arange(len(rows))
  last = jnp.full(nowhere, -1).at[jnp.where(sure, rows, nowhere)].max(places, mode='drop')
  wins = sure & (last[rows] == places)
  return labels.at[jnp.where(wins, rows, nowhere)].set(classes.astype(labels.dtype), mode='drop')
