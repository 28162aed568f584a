"""The joint step and the loop around it.

A step sees one batch of each stream: `target` alone, `target` and `source`, or (pre-training) `source` alone. Each stream has
the head of its own name; all streams go through the network in one forward pass, so BatchNorm sees their mixture
(Liu et al., NeurIPS 2022). The loss is the weighted sum of the streams' cross-entropies.
"""

from collections.abc import Callable, Iterator, Mapping
import math
import time
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
import optax

from ft_jax import parallel
from ft_jax.models import resnet
from ft_jax.models.resnet import ResNet

StepFn = Callable[['TrainState', Mapping[str, Mapping[str, jax.Array]]], tuple['TrainState', dict[str, jax.Array]]]


class TrainState(flax.struct.PyTreeNode):
  """What a step reads and writes; `step` counts the updates done."""
  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState


def create_state(variables: Mapping[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first step, from the variables of a model."""
  return TrainState(step=jnp.zeros((), jnp.int32), params=variables['params'], batch_stats=variables['batch_stats'],
                    opt_state=optimizer.init(variables['params']))


def make_train_step(model: ResNet, optimizer: optax.GradientTransformation, loss_weights: Mapping[str, float]) -> StepFn:
  """The pmapped step: (state, {stream: batch}) -> (state, metrics), over all devices, with the state donated.

  Args:
    model: with a head for each stream; where its `batch_norm` is 'frozen', statistics, scales and biases of BatchNorm come out
      as they went in, whatever the optimizer does.
    optimizer: of its parameters.
    loss_weights: the weight of each stream's loss, by name: {'target': 1, 'source': lambda}.

  Returns:
    A function of a replicated state and sharded batches. Metrics (replicated scalars): `loss`; for each stream
    `loss_<stream>` and `top1_<stream>` on the training batch.
  """

  def step(state: TrainState, batch: Mapping[str, Mapping[str, jax.Array]]) -> tuple[TrainState, dict[str, jax.Array]]:
    images = jnp.concatenate([batch[stream]['image'] for stream in loss_weights])

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
      outputs, updates = model.apply({'params': params, 'batch_stats': state.batch_stats}, images, train=True,
                                     mutable=['batch_stats'])
      metrics, first = {}, 0
      for stream in loss_weights:
        labels = batch[stream]['label']
        logits = outputs.logits[stream][first:first + len(labels)]
        first += len(labels)
        metrics[f'loss_{stream}'] = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        metrics[f'top1_{stream}'] = jnp.mean(jnp.argmax(logits, -1) == labels)
      loss = sum(weight * metrics[f'loss_{stream}'] for stream, weight in loss_weights.items())
      return loss, (updates['batch_stats'], {'loss': loss, **metrics})

    gradients, (batch_stats, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
    # Running statistics are averaged too, so that the state is the same on every device.
    gradients, batch_stats, metrics = jax.lax.pmean((gradients, batch_stats, metrics), parallel.AXIS)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if model.batch_norm == 'frozen':  # the old arrays: a mean of equal numbers, or an update of zero, need not keep every bit
      batch_stats = state.batch_stats
      params = jax.tree.map(lambda frozen, old, new: old if frozen else new, resnet.normalisation(params), state.params, params)
    return TrainState(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state), metrics

  return jax.pmap(step, axis_name=parallel.AXIS, donate_argnums=(0,))


class Diverged(RuntimeError):
  """The loss is not finite any more."""


class Observer(Protocol):
  """What the loop tells the outside."""

  def wrote(self, step: int, metrics: dict[str, float]) -> None:
    """A window of steps ended at `step`: means of its metrics, with those of val where it was evaluated."""

  def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
    """Val metrics of the state after `step` steps; also the place to keep a checkpoint."""


def run_steps(
    train_step: StepFn, state: TrainState, batches: Iterator[Mapping[str, Mapping[str, jax.Array]]], *, start: int, steps: int,
    log_every: int, eval_every: int, observer: Observer, stop: Callable[[], bool], progress: Callable[[int, float], None],
    clock: Callable[[], float] = time.perf_counter) -> tuple[TrainState, int]:
  """Runs steps `start` to `steps`; returns the state and the number of steps done, fewer than `steps` if `stop()` said so.

  The loss of a step is read when the next one is under way, so the device does not wait for the host. Whether it waits for images is
  measured: the metrics of a window have `waiting_share`, the part of its time (without evaluation) that went by until a batch was there,
  counted where the device was through with everything before. It had been for a part of that wait at least, so this is an upper bound.

  Args:
    train_step: of `make_train_step`.
    state: replicated; donated.
    batches: sharded, from step `start` on.
    start, steps: steps done before, and in the end.
    log_every, eval_every: in steps; both also happen at the end.
    observer: gets metrics and evaluates.
    stop: asked after each step.
    progress: told (steps done, loss) after each step, one step late.
    clock: gives seconds.

  Raises:
    Diverged: the loss is not finite; says at which step.
  """
  window: list[dict[str, float]] = []
  unread: dict[str, jax.Array] | None = None

  def read(step: int) -> None:
    """Reads the metrics of the step that ended with `step` steps done."""
    nonlocal unread
    if unread is None:
      return
    metrics = {key: float(value) for key, value in parallel.unreplicate(unread).items()}
    unread = None
    if not math.isfinite(metrics['loss']):
      raise Diverged(f'the loss is {metrics["loss"]} at step {step}; use a smaller train.learning_rate or some train.warmup')
    window.append(metrics)
    progress(step, metrics['loss'])

  done, waited, began = start, 0.0, None
  while done < steps:
    asked = clock()
    batch = next(batches)
    # The first batch of a run is not counted, nor is compiling the step: both come once.
    if began is not None and (unread is None or all(value.is_ready() for value in unread.values())):
      waited += clock() - asked
    state, metrics = train_step(state, batch)
    if began is None:
      began = clock()
    read(done)
    unread = metrics
    done += 1
    last = done == steps or stop()
    if last or done % eval_every == 0 or done % log_every == 0:
      read(done)
      means = {f'train/{key}': sum(m[key] for m in window) / len(window) for key in window[0]}
      elapsed = clock() - began
      means['waiting_share'] = waited / elapsed if elapsed > 0 else 0.0
      window.clear()
      if done == steps or done % eval_every == 0:
        means |= observer.evaluate(done, state)
      observer.wrote(done, means)
      waited, began = 0.0, clock()
    if last:
      break
  return state, done
