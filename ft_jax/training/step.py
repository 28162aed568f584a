"""The joint training step: forward pass, losses, update.

A step gets one batch of each stream: `target` alone, `target` and `source`, or `source` alone (in pre-training, and
before the target comes). Each labelled stream has the head of its own name (a pre-training without labels has none);
all streams go through the network in one forward pass, so BatchNorm sees their mixture (Liu et al., NeurIPS 2022). The
loss is the weighted sum of the streams' cross-entropies, and what the methods add.
"""

from collections.abc import Callable, Collection, Mapping
import functools
import operator
from typing import Any, TypeAlias
import zlib

import flax
import jax
import jax.numpy as jnp
import optax

from ft_jax import parallel
from ft_jax.methods import all_needs, Method, norm, State, StepContext
from ft_jax.methods.base import of_network, teacher_of, teacher_variables
from ft_jax.models import precision
from ft_jax.models.network import frozen_mask, head_of, is_backbone, Network, Outputs
from ft_jax.training.forward import forward
from ft_jax.training.optimizer import restarted

Metrics = dict[str, jax.Array]
Batch = Mapping[str, Mapping[str, jax.Array]]  # by stream
StepFn = Callable[['TrainState', Batch], tuple['TrainState', Metrics]]
Weight: TypeAlias = float | optax.Schedule  # of a loss: in every step, or by the step


class TrainState(flax.struct.PyTreeNode):
  """What a step reads and writes.

  Attributes:
    step: number of updates so far.
    params: the network's; those of methods are under 'methods'.
    batch_stats: running statistics; {} of a network without.
    opt_state: the optimizer's.
    start: the variables that training began with, without fresh heads, for methods that need them; else {}.
    methods: the state of each method, by name.
    average: moving averages `{'params', 'batch_stats'}`; {} where `train.ema_decay` is 0.
  """
  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState
  start: Any = flax.struct.field(default_factory=dict)
  methods: dict[str, State] = flax.struct.field(default_factory=dict)
  average: Any = flax.struct.field(default_factory=dict)

  @property
  def eval_variables(self) -> dict[str, Any]:
    """The `{'params', 'batch_stats'}` that are evaluated and used: the averages where there are any."""
    return self.average or _network_variables(self.params, self.batch_stats)


def create_state(variables: Mapping[str, Any], optimizer: optax.GradientTransformation, *, start: Any = None,
                 methods: Mapping[str, State] | None = None, averaged: bool = False) -> TrainState:
  """The state before the first step, from the variables of a model; see `TrainState`."""
  params, batch_stats = variables['params'], variables.get('batch_stats', {})
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, batch_stats=batch_stats,
                    opt_state=optimizer.init(params), start=start or {}, methods=dict(methods or {}),
                    average=_network_variables(params, batch_stats) if averaged else {})


def make_train_step(model: Network, optimizer: optax.GradientTransformation, loss_weights: Mapping[str, Weight],
                    **kwargs: Any) -> StepFn:
  """The step on all devices (pmapped), of a replicated state, which is donated, and sharded batches.

  Arguments as of `make_step`.
  """
  return parallel.pmap(make_step(model, optimizer, loss_weights, **kwargs), donate=True)


def make_step(model: Network, optimizer: optax.GradientTransformation, loss_weights: Mapping[str, Weight], *,
              methods: Mapping[str, Method] | None = None, seed: int = 0, microbatches: int = 1,
              ema_decay: float = 0.0, restart: int = 0) -> StepFn:
  """The step of one device: (state, {stream: batch}) -> (state, metrics).

  The first labelled stream (the source where there is none) is the one that methods work on. In a step without it, the
  others have their losses with weight one, methods do nothing, and parameters that no stream uses stay as they are. A
  method that uses source images without labels does nothing in a step without them.

  Args:
    model: with a head for each labelled stream; what it freezes does not change, whatever the optimizer does.
    optimizer: of its parameters.
    loss_weights: the weight of each labelled stream's loss, by name: {'target': 1, 'source': lambda}; a number, or a
      function of the step; {} where methods alone give the loss.
    methods: the methods that are switched on, by name.
    seed: of the random numbers of methods.
    microbatches: how many passes through the network a batch is divided into; see `forward`.
    ema_decay: the fraction of the moving averages that a step keeps, where the state has averages; less in the first
      steps.
    restart: the step (counted from 0) with which the first stream begins, where others come before it: optimizer and
      averages start anew there, and methods count steps and draw random numbers from there.

  Returns:
    A function to be mapped over devices with the axis name `parallel.AXIS`. Metrics (the same everywhere): `loss`;
    `gradient_norm`, over all parameters; for each labelled stream `loss_<stream>` and `top1_<stream>` on the training
    batch; `weight_<stream>` of a weight that changes; for each method `loss_<method>` and `<method>/<metric>`.
  """
  methods = methods or {}
  main = next(iter(loss_weights), 'source')
  if (layer := norm(methods)) is not None:
    model = model.clone(norm=layer)
  run = functools.partial(forward, model, microbatches=microbatches)

  # For the products in methods: the network's own layers have the precision as an argument.
  @precision.default_of(model.precision)
  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    active = active_methods(methods, main, batch)
    needs = all_needs(active, model)
    weights = step_weights(loss_weights, main, batch, state.step)
    number = state.step - restart if restart and main in batch else state.step
    if restart:
      state = restarted_state(state, optimizer, state.step == restart)
    key = jax.random.fold_in(jax.random.key(seed), number)
    images = {stream: batch[stream]['input'] for stream in (*weights, *sorted(batch.keys() - weights.keys()))}
    labels = {stream: batch[stream]['label'] for stream in weights}
    images, labels = mix_target(active, key, images, labels, model)
    teacher = None
    if needs.teacher:
      teacher = forward(teacher_of(model, state.start), teacher_variables(state.start), {'target': images['target']},
                        train=False, layers=needs.layers, microbatches=microbatches)[0]['target']
    images |= {view.path: batch[view.stream][view.name] for view in needs.forwarded_views}
    fixed = fixed_mask(model, state.params, loss_weights, main, batch)

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, dict[str, State], Metrics]]:
      params = stop_fixed_gradients(fixed, params)
      outputs, batch_stats = run(_network_variables(params, state.batch_stats), images, key=key, layers=needs.layers)
      context = None
      if active:
        views = {view.path: batch[view.stream][view.name] for view in needs.views}
        context = StepContext(model, params, state.batch_stats, state.start, teacher, outputs, images | views,
                              labels.get(main, batch[main]['label']), batch[main]['row'], number, key,
                              functools.partial(forward_other, model, functools.partial(run, key=key)))
      loss, states, metrics = total_loss(active, weights, outputs, labels, context, state.methods)
      return loss, (batch_stats, states, {'loss': loss, **metrics})

    gradients, (batch_stats, states, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
    # Running statistics are averaged too, so that the state is the same on every device.
    gradients, batch_stats, metrics = jax.lax.pmean((gradients, batch_stats, metrics), parallel.AXIS)
    metrics['gradient_norm'] = optax.tree.norm(gradients)
    metrics |= {f'weight_{stream}': weights[stream] for stream in weights if callable(loss_weights[stream])}
    state = update(state, gradients, batch_stats, model, optimizer, active, fixed).replace(methods=states)
    return update_averages(state, ema_decay, number), metrics

  return step


def active_methods(methods: Mapping[str, Method], main: str, streams: Collection[str]) -> dict[str, Method]:
  """The methods that take part in a step with these streams; `main` is the one that they work on."""
  if main not in streams:
    return {}
  return {name: method for name, method in methods.items() if 'source' in streams or not method.unlabelled_source}


def step_weights(loss_weights: Mapping[str, Weight], main: str, streams: Collection[str],
                 step: jax.Array) -> dict[str, float | jax.Array]:
  """The weights of the losses of the labelled streams that a step has."""
  weights: dict[str, float | jax.Array] = {}
  for stream, weight in loss_weights.items():
    if stream in streams:
      weights[stream] = weight(step) if callable(weight) else weight
  return weights if main in streams else dict.fromkeys(weights, 1.0)


def restarted_state(state: TrainState, optimizer: optax.GradientTransformation, begins: jax.Array) -> TrainState:
  """The state with a new optimizer state, and averages that begin with its variables, where `begins` is True."""
  now = _network_variables(state.params, state.batch_stats)
  average = jax.tree.map(lambda new, old: jnp.where(begins, new, old), now, state.average) if state.average else {}
  return state.replace(opt_state=restarted(optimizer, state.params, state.opt_state, begins), average=average)


def fixed_mask(model: Network, params: Any, labelled: Collection[str], main: str, streams: Collection[str]) -> Any:
  """Which parameters a step leaves as they are: those that are frozen, heads of labelled streams that it does not have,
  and, without the stream `main`, other heads and the parameters of methods. A tree of bools.
  """

  def is_idle(keys: tuple[Any, ...], _: Any) -> bool:
    path = '/'.join(keys)
    if main in streams:
      return head_of(path) in labelled and head_of(path) not in streams
    return not is_backbone(path) and head_of(path) not in streams

  idle = flax.traverse_util.path_aware_map(is_idle, params)
  return jax.tree.map(operator.or_, frozen_mask(model, params), idle)


def mix_target(methods: Mapping[str, Method], key: jax.Array, images: dict[str, jax.Array],
               labels: dict[str, jax.Array], model: Network) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Images and labels by stream, where the target's are mixed by one of the methods that mix, drawn with `key`.

  Without such a method they are returned as they are.
  """
  mixing = [functools.partial(method.mix, key=_fold_in_name(key, name))
            for name, method in methods.items() if method.mixes]
  if not mixing:
    return images, labels
  target = model.input.normalize(images['target'])
  chosen = jax.random.randint(_fold_in_name(key, 'mix'), (), 0, len(mixing))
  mixed, soft = jax.lax.switch(chosen, mixing, target, _distribution(labels['target'], model.heads['target']))
  return images | {'target': mixed}, labels | {'target': soft}


def total_loss(methods: Mapping[str, Method], loss_weights: Mapping[str, float | jax.Array],
               outputs: Mapping[str, Outputs], labels: Mapping[str, jax.Array], context: StepContext | None,
               states: Mapping[str, State]) -> tuple[jax.Array, dict[str, State], Metrics]:
  """The loss, the states of the methods after the step, and the metrics.

  Args:
    methods: the methods that are switched on, by name.
    loss_weights: the weight of each labelled stream.
    outputs: the network's, by stream.
    labels: by labelled stream.
    context: what methods get; None without methods.
    states: of the methods.
  """
  states = dict(states)
  metrics: Metrics = {}
  if context is not None:
    context, states, metrics = relabel(methods, context, states)
    labels = {**labels, 'target': context.labels}
  for stream in loss_weights:
    logits, answers = outputs[stream].logits[stream], labels[stream]
    true_class = answers if answers.ndim == 1 else jnp.argmax(answers, -1)
    metrics[f'top1_{stream}'] = jnp.mean(jnp.argmax(logits, -1) == true_class)
    losses = cross_entropy(logits, answers, methods if stream == 'target' else {})
    if stream == 'target' and context is not None:
      losses = reweigh(methods, losses, context, states)
    metrics[f'loss_{stream}'] = losses.mean()
  loss: Any = sum(weight * metrics[f'loss_{stream}'] for stream, weight in loss_weights.items())
  if context is not None:
    loss, states, metrics = add_terms(methods, loss, context, states, metrics)
  return loss, states, metrics


def relabel(methods: Mapping[str, Method], context: StepContext,
            states: dict[str, State]) -> tuple[StepContext, dict[str, State], Metrics]:
  """The context with the target's labels after the methods changed them, the methods' states, and their metrics."""
  metrics: Metrics = {}
  for name, method in methods.items():
    labels, state, own = method.relabel(detach(_for_method(context, name)), states[name])
    context, states = context._replace(labels=labels), {**states, name: state}
    metrics |= {f'{name}/{metric}': value for metric, value in own.items()}
  return context, states, metrics


def reweigh(methods: Mapping[str, Method], losses: jax.Array, context: StepContext,
            states: Mapping[str, State]) -> jax.Array:
  """The losses of the target's examples, `[b]`, times the weights that methods give them."""
  for name, method in methods.items():
    weights = method.weigh(jax.lax.stop_gradient(losses), detach(context), states[name])
    losses = losses if weights is None else losses * weights
  return losses


def add_terms(methods: Mapping[str, Method], loss: jax.Array, context: StepContext, states: dict[str, State],
              metrics: Metrics) -> tuple[jax.Array, dict[str, State], Metrics]:
  """The loss with the terms of the methods, the methods' states after the step, and all metrics."""
  for name, method in methods.items():
    term = method.loss(_for_method(context, name), states[name])
    states = {**states, name: jax.lax.stop_gradient(term.state)}
    metrics = metrics | {f'{name}/{metric}': value for metric, value in term.metrics.items()}
    if term.loss is not None:
      metrics[f'loss_{name}'] = term.loss
      loss = loss + term.loss
  return loss, states, metrics


def cross_entropy(logits: jax.Array, labels: jax.Array, methods: Mapping[str, Method]) -> jax.Array:
  """The cross-entropy of each example, `[b]`, with the labels softened by the methods that do so."""
  softening = [method for method in methods.values() if method.softens]
  if labels.ndim == 1 and not softening:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  soft = _distribution(labels, logits.shape[-1])
  for method in softening:
    soft = method.soften(soft)
  return optax.softmax_cross_entropy(logits, soft)


def update(state: TrainState, gradients: Any, batch_stats: Any, model: Network, optimizer: optax.GradientTransformation,
           methods: Mapping[str, Method], fixed: Any) -> TrainState:
  """The state after the optimizer's update and the methods' projections; the parameters that `fixed` has True for, and
  frozen statistics, stay.
  """
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  for method in methods.values():
    params = method.project(model, params, batch_stats, state.start)
  params = keep_fixed(fixed, state.params, params)
  batch_stats = keep_fixed(frozen_mask(model, state.batch_stats), state.batch_stats, batch_stats)
  return state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)


def update_averages(state: TrainState, ema_decay: float, before: jax.Array) -> TrainState:
  """The state of a finished step with its moving averages, where it has any, moved towards the new variables.

  Args:
    state: after the step.
    ema_decay: see `make_step`.
    before: number of steps before this one, since the averages began.
  """
  if not state.average:
    return state
  # In the first steps the averages are hardly worth keeping.
  rate = 1.0 - jnp.minimum(ema_decay, (1.0 + before) / (10.0 + before))
  return state.replace(average=jax.tree.map(lambda old, new: old + rate * (new - old), state.average,
                                            _network_variables(state.params, state.batch_stats)))


def forward_other(model: Network, run: Callable[..., tuple[dict[str, Outputs], Any]], variables: Any,
                  images: jax.Array) -> tuple[Outputs, Any]:
  """A pass of other variables of the network in training mode: `StepContext.forward`."""
  before = variables['batch_stats']
  outputs, batch_stats = run(variables, {'images': images})
  fixed = frozen_mask(model, before)
  return outputs['images'], keep_fixed(fixed, before, jax.lax.pmean(batch_stats, parallel.AXIS))


def detach(context: StepContext) -> StepContext:
  """The same without gradients."""
  return jax.tree.map(lambda x: x if callable(x) else jax.lax.stop_gradient(x), context)


def stop_fixed_gradients(fixed: Any, params: Any) -> Any:
  """The parameters; no gradient is computed for those that stay fixed."""
  return jax.tree.map(lambda stays, value: jax.lax.stop_gradient(value) if stays else value, fixed, params)


def keep_fixed(fixed: Any, old: Any, new: Any) -> Any:
  """The new values, and the old arrays where they stay fixed: a mean of equal numbers, or an update of zero, may change
  the last bits.
  """
  return jax.tree.map(lambda stays, before, after: before if stays else after, fixed, old, new)


def _network_variables(params: Any, batch_stats: Any) -> dict[str, Any]:
  return {'params': of_network(params), 'batch_stats': batch_stats}


def _distribution(labels: jax.Array, classes: int) -> jax.Array:
  return jax.nn.one_hot(labels, classes) if labels.ndim == 1 else labels


def _for_method(context: StepContext, name: str) -> StepContext:
  """The context with a random key of the method's own."""
  return context._replace(key=_fold_in_name(context.key, name))


def _fold_in_name(key: jax.Array, name: str) -> jax.Array:
  return jax.random.fold_in(key, zlib.crc32(name.encode()))
