"""The joint step and the loop around it.

A step sees one batch of each stream: `target` alone, `target` and `source`, or (pre-training) `source` alone. Each labelled stream has
the head of its own name; all streams go through the network in one forward pass, so BatchNorm sees their mixture
(Liu et al., NeurIPS 2022). The loss is the weighted sum of the streams' cross-entropies, and what the methods add.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import math
import time
from typing import Any, Protocol
import zlib

import flax
import jax
import jax.numpy as jnp
import optax

from ft_jax import parallel
from ft_jax.methods import all_needs, Method, norm, State, StepContext
from ft_jax.methods.base import of_network, teacher_of, teacher_variables
from ft_jax.models import precision
from ft_jax.models.network import frozen_mask, Network, network_variables, Outputs
from ft_jax.training.forward import forward

StepFn = Callable[['TrainState', Mapping[str, Mapping[str, jax.Array]]], tuple['TrainState', dict[str, jax.Array]]]


class TrainState(flax.struct.PyTreeNode):
  """What a step reads and writes.

  Attributes:
    step: updates done.
    params: of the network; those of methods are under 'methods'.
    batch_stats: running statistics; {} of a network without.
    opt_state: of the optimizer.
    start: what methods compare with: the variables that training began with, without fresh heads; {} where none does.
    methods: the state of each method, by name.
    average: moving averages `{'params', 'batch_stats'}`; {} where none are kept.
  """
  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState
  start: Any = flax.struct.field(default_factory=dict)
  methods: dict[str, State] = flax.struct.field(default_factory=dict)
  average: Any = flax.struct.field(default_factory=dict)

  @property
  def evaluated(self) -> dict[str, Any]:
    """The `{'params', 'batch_stats'}` that are evaluated and used: the averages where there are any."""
    return self.average or {'params': of_network(self.params), 'batch_stats': self.batch_stats}


def create_state(variables: Mapping[str, Any], optimizer: optax.GradientTransformation, *, start: Any = None,
                 methods: Mapping[str, State] | None = None, averaged: bool = False) -> TrainState:
  """The state before the first step, from the variables of a model; see `TrainState`."""
  params, batch_stats = (network_variables(variables)[name] for name in ('params', 'batch_stats'))
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, batch_stats=batch_stats, opt_state=optimizer.init(params),
                    start=start or {}, methods=dict(methods or {}),
                    average={'params': of_network(params), 'batch_stats': batch_stats} if averaged else {})


def make_train_step(model: Network, optimizer: optax.GradientTransformation, loss_weights: Mapping[str, float], **kwargs: Any) -> StepFn:
  """The pmapped step, over all devices, with the state donated: of a replicated state and sharded batches. Arguments as `make_step`."""
  return parallel.pmap(make_step(model, optimizer, loss_weights, **kwargs), donate=True)


def make_step(model: Network, optimizer: optax.GradientTransformation, loss_weights: Mapping[str, float], *,
              methods: Mapping[str, Method] | None = None, seed: int = 0, parts: int = 1, average: float = 0.0) -> StepFn:
  """The step of one device: (state, {stream: batch}) -> (state, metrics).

  Args:
    model: with a head for each labelled stream; what it freezes comes out as it went in, whatever the optimizer does.
    optimizer: of its parameters.
    loss_weights: the weight of each labelled stream's loss, by name: {'target': 1, 'source': lambda}.
    methods: what is done beside that, by name.
    seed: of what methods draw.
    parts: the pass through the network goes in so many parts; see `forward`.
    average: the part of the moving averages that a step keeps, where the state has averages; less in the first steps.

  Returns:
    A function to be mapped over devices by the name `parallel.AXIS`. Metrics (the same everywhere): `loss`; `gradient_norm`, over all
    parameters; for each labelled stream
    `loss_<stream>` and `top1_<stream>` on the training batch; for each method `loss_<method>` and `<method>/<metric>`.
  """
  methods = methods or {}
  needs = all_needs(methods, model)
  if (layer := norm(methods)) is not None:
    model = model.clone(norm=layer)

  def run(variables: Any, images: Mapping[str, jax.Array], key: jax.Array, **kwargs: Any) -> tuple[dict[str, Outputs], Any]:
    return forward(model, variables, images, key=key, parts=parts, **kwargs)

  # For the products of the methods: those of the network have it by themselves.
  @precision.default_of(model.precision)
  def step(state: TrainState, batch: Mapping[str, Mapping[str, jax.Array]]) -> tuple[TrainState, dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    keys = {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in methods}
    streams = [*loss_weights, *(stream for stream in sorted(batch) if stream not in loss_weights)]
    images = {stream: batch[stream]['input'] for stream in streams}
    labels = {stream: batch[stream]['label'] for stream in loss_weights}
    images, labels = _mixed(methods, keys, images, labels, model,
                            jax.random.fold_in(key, zlib.crc32(b'mix')))
    teacher = None
    if needs.teacher:
      teacher = forward(teacher_of(model, state.start), teacher_variables(state.start), {'target': images['target']}, train=False,
                        layers=needs.layers, parts=parts)[0]['target']
    images |= {f'{stream}/{view}': batch[stream][view] for stream, view in needs.seen}
    fixed, fixed_stats = frozen_mask(model, state.params), frozen_mask(model, state.batch_stats)

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, Any, dict[str, jax.Array]]]:
      params = _stopped(fixed, params)
      outputs, batch_stats = run({'params': of_network(params), 'batch_stats': state.batch_stats}, images, key, layers=needs.layers)
      seen = None
      if methods:
        seen = StepContext(model, params, state.batch_stats, state.start, teacher, outputs,
                    {f'{stream}/{view}': batch[stream][view] for stream, view in needs.views}, labels['target'],
                    batch['target']['row'], state.step, key, lambda *args: _apart(model, run, key, *args))
      loss, states, metrics = _losses(methods, keys, loss_weights, outputs, labels, seen, state.methods)
      return loss, (batch_stats, states, {'loss': loss, **metrics})

    gradients, (batch_stats, states, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
    # Running statistics are averaged too, so that the state is the same on every device.
    gradients, batch_stats, metrics = jax.lax.pmean((gradients, batch_stats, metrics), parallel.AXIS)
    metrics['gradient_norm'] = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    for method in methods.values():
      params = method.project(model, params, batch_stats, state.start)
    params, batch_stats = _kept(fixed, state.params, params), _kept(fixed_stats, state.batch_stats, batch_stats)
    averages = state.average
    if averages:  # in the first steps little is worth keeping
      rest = 1.0 - jnp.minimum(average, (1.0 + state.step) / (10.0 + state.step))
      averages = jax.tree.map(lambda old, new: old + rest * (new - old), averages,
                              {'params': of_network(params), 'batch_stats': batch_stats})
    return state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, methods=states,
                         average=averages), metrics

  return step


def _mixed(methods: Mapping[str, Method], keys: Mapping[str, jax.Array], images: dict[str, jax.Array], labels: dict[str, jax.Array],
           model: Network, key: jax.Array) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Images and labels after the target's were mixed by one of the methods that do so, drawn by `key`; what they were where none does."""
  mixing = [functools.partial(method.mix, key=keys[name]) for name, method in methods.items() if type(method).mix is not Method.mix]
  if not mixing:
    return images, labels
  image = model.input.normalize(images['target'])
  chosen = jax.random.randint(key, (), 0, len(mixing))
  mixed, soft = jax.lax.switch(chosen, mixing, image, _distribution(labels['target'], model.heads['target']))
  return images | {'target': mixed}, labels | {'target': soft}


def _losses(methods: Mapping[str, Method], keys: Mapping[str, jax.Array], loss_weights: Mapping[str, float],
            outputs: Mapping[str, Outputs], labels: Mapping[str, jax.Array], seen: StepContext | None,
            states: Mapping[str, State]) -> tuple[jax.Array, dict[str, State], dict[str, jax.Array]]:
  """The whole loss, the states of the methods after the step, and the metrics."""
  states, metrics = dict(states), {}
  for name, method in methods.items():
    relabelled, states[name], told = method.relabel(_constant(seen)._replace(key=keys[name]), states[name])
    seen = seen._replace(labels=relabelled)
    metrics |= {f'{name}/{key}': value for key, value in told.items()}
  for stream in loss_weights:
    logits, answers = outputs[stream].logits[stream], seen.labels if methods and stream == 'target' else labels[stream]
    metrics[f'top1_{stream}'] = jnp.mean(jnp.argmax(logits, -1) == (answers if answers.ndim == 1 else jnp.argmax(answers, -1)))
    losses = _cross_entropy(logits, answers, methods if stream == 'target' else {})
    for name, method in methods.items() if stream == 'target' else ():
      weights = method.weigh(jax.lax.stop_gradient(losses), _constant(seen), states[name])
      losses = losses if weights is None else losses * weights
    metrics[f'loss_{stream}'] = losses.mean()
  loss = sum(weight * metrics[f'loss_{stream}'] for stream, weight in loss_weights.items())
  for name, method in methods.items():
    term = method.loss(seen._replace(key=keys[name]), states[name])
    states[name] = jax.lax.stop_gradient(term.state)
    metrics |= {f'{name}/{key}': value for key, value in term.metrics.items()}
    if isinstance(term.loss, jax.Array):  # and not the number 0: there is a term
      metrics[f'loss_{name}'] = term.loss
      loss = loss + term.loss
  return loss, states, metrics


def _cross_entropy(logits: jax.Array, labels: jax.Array, methods: Mapping[str, Method]) -> jax.Array:
  """Of each example, `[b]`, with the labels softened where a method does that."""
  softening = [method for method in methods.values() if type(method).soften is not Method.soften]
  if labels.ndim == 1 and not softening:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  soft = _distribution(labels, logits.shape[-1])
  for method in softening:
    soft = method.soften(soft)
  return optax.softmax_cross_entropy(logits, soft)


def _distribution(labels: jax.Array, classes: int) -> jax.Array:
  return jax.nn.one_hot(labels, classes) if labels.ndim == 1 else labels


def _apart(model: Network, run: Callable[..., Any], key: jax.Array, variables: Any, images: jax.Array) -> tuple[Outputs, Any]:
  """Another network's pass in training mode: `Pass.forward`."""
  before = variables['batch_stats']
  outputs, batch_stats = run(variables, {'images': images}, key)
  return outputs['images'], _kept(frozen_mask(model, before), before, jax.lax.pmean(batch_stats, parallel.AXIS))


def _constant(seen: StepContext) -> StepContext:
  """The same, without a gradient."""
  return jax.lax.stop_gradient(seen._replace(model=None, forward=None))._replace(model=seen.model, forward=seen.forward)


def _stopped(fixed: Any, params: Any) -> Any:
  """The parameters; no gradient is computed for those that stay fixed."""
  return jax.tree.map(lambda stays, value: jax.lax.stop_gradient(value) if stays else value, fixed, params)


def _kept(fixed: Any, old: Any, new: Any) -> Any:
  """The new values, and the old arrays where they stay fixed: a mean of equal numbers, or an update of zero, need not keep every bit."""
  return jax.tree.map(lambda stays, before, after: before if stays else after, fixed, old, new)


class Diverged(RuntimeError):
  """Loss, gradient or parameters are not finite any more.

  Attributes:
    step: the first step that shows it; counted from 1.
    what: is not finite.
  """

  def __init__(self, step: int, what: str, message: str = ''):
    self.step, self.what = step, what
    super().__init__(message or f'{what} at step {step}')


class Observer(Protocol):
  """What the loop tells the outside."""

  def wrote(self, step: int, metrics: dict[str, float]) -> None:
    """A window of steps ended at `step`: means of its metrics, with those of val where it was evaluated."""

  def evaluate(self, step: int, state: TrainState) -> dict[str, float] | None:
    """Val metrics of the state after `step` steps; None where the run was asked to stop meanwhile."""

  def save(self, step: int, state: TrainState, val: dict[str, float] | None) -> None:
    """Keeps the state after `step` steps, with its val metrics where it was evaluated; what there is to tell of `step` was told before.

    Raises:
      Diverged: a parameter is not finite: a step is measured before its update, which may have been too much.
    """


def run_steps(
    train_step: StepFn, state: TrainState, batches: Iterator[Mapping[str, Mapping[str, jax.Array]]], *, start: int, steps: int,
    images: int, log_every: int, due: Callable[[int], bool], observer: Observer, stop: Callable[[], bool],
    progress: Callable[[int, float], None], evaluated: bool = True,
    clock: Callable[[], float] = time.perf_counter) -> tuple[TrainState, int]:
  """Runs steps `start` to `steps`; returns the state and the number of steps done.

  It ends before `steps` where `stop()` said so or the batches came to an end; what was done is saved then.

  The metrics of a step are read when the next one is under way, so the device does not wait for the host. The metrics of a window also say
  how fast it was, and whether the device waited for images: `images_per_second`, and `waiting_share`, the fraction of its time that went
  by until a batch was there, counted where the device was through with everything before. It had been for a part of that wait at least,
  so this is an upper bound. Neither counts evaluations, checkpoints, or the first step, which is compiled: a window of that step alone has
  neither.

  Args:
    train_step: of `make_train_step`.
    state: replicated; donated.
    batches: sharded, from step `start` on.
    start, steps: steps done before, and in the end.
    images: of a step.
    log_every: steps of a window of metrics; one also ends where the state is evaluated.
    due: whether the state after so many steps is evaluated and saved; at the end it always is.
    observer: gets metrics, evaluates and saves.
    stop: asked after each step.
    progress: told (steps done, loss) after each step, one step late.
    evaluated: whether that was done for `start`, where it is due.
    clock: gives seconds.

  Raises:
    Diverged: loss, gradient or the loss on val were not finite.
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
      raise Diverged(step, f'the loss is {metrics["loss"]}')
    if not math.isfinite(metrics['gradient_norm']):
      raise Diverged(step, f'the norm of the gradient is {metrics["gradient_norm"]}')
    window.append(metrics)
    progress(step, metrics['loss'])

  def keep(step: int, evaluates: bool, means: dict[str, float]) -> bool:
    """Evaluates, tells and saves, in this order: what is saved has been told of. Whether the evaluation came to its end."""
    val = observer.evaluate(step, state) if evaluates else None
    if val and not math.isfinite(val['val/loss']):
      raise Diverged(step, f'the loss on val is {val["val/loss"]}')
    if means or val:
      observer.wrote(step, means | (val or {}))
    observer.save(step, state, val)
    return val is not None or not evaluates

  # A run that was stopped in the middle of an evaluation.
  if not evaluated and (start == steps or due(start)) and not keep(start, True, {}):
    return state, start
  done, timed, waited, began = start, 0, 0.0, None
  while done < steps:
    asked = clock()
    batch = next(batches, None)
    if batch is not None:
      if began is not None and (unread is None or all(value.is_ready() for value in unread.values())):
        waited += clock() - asked
      state, metrics = train_step(state, batch)
      read(done)
      unread = metrics
      done += 1
      if began is None:  # the clock starts when the first step is through
        read(done)
        began = clock()
      else:
        timed += 1
    stops = batch is None or done < steps and stop()
    evaluates = batch is not None and (done == steps or due(done))
    if stops or evaluates or done % log_every == 0:
      read(done)
      means = {f'train/{key}': sum(m[key] for m in window) / len(window) for key in window[0]} if window else {}
      if timed and (elapsed := clock() - began) > 0:
        means |= {'images_per_second': timed * images / elapsed, 'waiting_share': waited / elapsed}
      window.clear()
      if stops and done > start or evaluates:
        stops = not keep(done, evaluates and not stops, means) or stops
      elif means:
        observer.wrote(done, means)
      timed, waited, began = 0, 0.0, clock()
    if stops:
      break
  return state, done
