"""Optimizers with learning-rate groups, and the schedules of the learning rate."""

from collections import Counter
from collections.abc import Callable, Sequence
import re
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax

Groups = Sequence[tuple[str, float]]


class Factors(NamedTuple):
  """Of each parameter, as trees of numbers in the shape of the parameters.

  Attributes:
    learning_rate: what the learning rate is multiplied by.
    weight_decay: likewise for the weight decay.
  """
  learning_rate: Any
  weight_decay: Any


def parameter_factors(params: Any, learning_rate_groups: Groups = (('.*', 1.0),),
                      weight_decay_groups: Groups = (('.*', 1.0),),
                      depth: Callable[[str], int] = lambda path: 0, layer_decay: float = 1.0) -> Factors:
  """The factors of each parameter.

  Args:
    params: the parameters (or their shapes), for their paths.
    learning_rate_groups: (pattern, factor) pairs; see `by_pattern`.
    weight_decay_groups: likewise for the weight decay.
    depth: how far from the heads the parameter of a path is: `Network.depth`.
    layer_decay: the rate is multiplied by layer_decay ** depth (Howard and Ruder, ACL 2018; Clark et al., ICLR 2020).

  Raises:
    ValueError: groups that do not fit the parameters.
  """
  groups = by_pattern(params, learning_rate_groups, 'train.learning_rate_groups')
  decays = by_pattern(params, weight_decay_groups, 'train.weight_decay_groups')
  decayed = lambda path, factor: factor * layer_decay ** depth('/'.join(path))
  return Factors(flax.traverse_util.path_aware_map(decayed, groups), decays)


def make_schedule(kind: str, learning_rate: float, steps: int, *, milestones: Sequence[float], decay: float,
                  warmup: float) -> optax.Schedule:
  """The learning rate of each step.

  Args:
    kind: a name of `SCHEDULES`.
    learning_rate: the highest one.
    steps: of the whole run.
    milestones: of kind 'milestones': fractions of the run (0 to 1), in any order, after which the rate is multiplied by
      `decay`. In a short run several may fall on one step, which then multiplies the rate as many times.
    decay: of kind 'milestones'.
    warmup: fraction of the run (0 to 1) over which the rate rises from zero; at least the last step follows the
      schedule itself.
  """
  rise = min(round(warmup * steps), steps - 1)
  if kind == 'cosine':
    main = optax.cosine_decay_schedule(learning_rate, steps - rise)
  elif kind == 'milestones':
    times = Counter(round(m * steps) - rise for m in milestones)
    main = optax.piecewise_constant_schedule(learning_rate, {step: decay**count for step, count in times.items()})
  else:
    main = optax.constant_schedule(learning_rate)
  if not rise:
    return main
  # The first step already moves: (step + 1) / rise.
  return optax.join_schedules([lambda step: learning_rate * (step + 1) / rise, main], [rise])


def make_optimizer(kind: str, schedule: optax.Schedule, factors: Factors, *, momentum: float = 0.9,
                   nesterov: bool = True, weight_decay: float = 0.0,
                   clip_norm: float = 0.0) -> optax.GradientTransformation:
  """An optimizer of the table below, with torch's weight decay: added to the gradient, or to the update by adamw.

  Args:
    kind: a name of `OPTIMIZERS`.
    schedule: the learning rate of each step.
    factors: of each parameter.
    momentum: of sgd and lars, 0 to below 1.
    nesterov: of sgd and lars: look ahead along the momentum.
    weight_decay: times the parameter.
    clip_norm: the gradient is scaled down to this norm over all parameters; 0 leaves it.
  """
  decayed = lambda g, p, factor: g + weight_decay * factor * p
  decay = optax.stateless(lambda updates, params: jax.tree.map(decayed, updates, params, factors.weight_decay))
  main = OPTIMIZERS[kind](momentum, nesterov)
  return optax.chain(
      *([optax.clip_by_global_norm(clip_norm)] if clip_norm else []),
      *((main, decay) if kind == 'adamw' else (decay, main)),
      optax.stateless(lambda updates, params: jax.tree.map(lambda g, r: r * g, updates, factors.learning_rate)),
      optax.scale_by_learning_rate(schedule))


def restarted(optimizer: optax.GradientTransformation, params: Any, state: Any, begins: jax.Array) -> Any:
  """An optimizer's state where `begins` is False, else that before the first step; schedules count on in both."""
  is_count = lambda node: isinstance(node, optax.ScaleByScheduleState)
  choose = lambda new, old: old if is_count(new) else jnp.where(begins, new, old)
  return jax.tree.map(choose, optimizer.init(params), state, is_leaf=is_count)


def make_weight_schedule(kind: str, weight: float, first: int, end: int) -> float | optax.Schedule:
  """The weight of a loss in the steps from `first` to before `end`.

  Args:
    kind: a name of `WEIGHT_SCHEDULES`: 'constant'; or 'linear' or 'cosine', with which it falls from `weight` in the
      first of these steps to zero, which it would reach at `end`.
    weight: the largest one.
    first: the first step; a step before it has `weight`.
    end: the step after the last one.
  """
  if kind == 'constant':
    return weight
  steps = max(1, end - first)
  falling = optax.linear_schedule(weight, 0.0, steps)
  if kind == 'cosine':
    falling = optax.cosine_decay_schedule(weight, steps)
  return lambda step: falling(jnp.maximum(step - first, 0))


def scale_by_amsgrad(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
  """AMSGrad as torch has it (Reddi, Kale and Kumar, ICLR 2018): the maximum is of the second moments before their bias
  correction.

  optax.scale_by_amsgrad takes the maximum after it, where the large corrections of the first steps stay for good.
  """

  def update(updates: Any, state: optax.ScaleByAmsgradState,
             params: Any = None) -> tuple[Any, optax.ScaleByAmsgradState]:
    count = state.count + 1
    mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mu)
    nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, updates, state.nu)
    most = jax.tree.map(jnp.maximum, state.nu_max, nu)
    steps = count.astype(jnp.float32)
    scaled = jax.tree.map(lambda m, v: m / (1 - b1**steps) / (jnp.sqrt(v) / jnp.sqrt(1 - b2**steps) + eps), mu, most)
    return scaled, optax.ScaleByAmsgradState(count=count, mu=mu, nu=nu, nu_max=most)

  return optax.GradientTransformation(optax.scale_by_amsgrad(b1, b2, eps).init, update)


def scale_by_trust_ratios(coefficient: float = 0.001) -> optax.GradientTransformation:
  """LARS (You, Gitman and Ginsburg, 2017): each update is scaled to `coefficient` times the norm of its parameter.

  As in BYOL, biases and the parameters of normalisation layers, which have one axis, keep their updates.
  """
  several_axes = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
  return optax.masked(optax.scale_by_trust_ratio(trust_coefficient=coefficient), several_axes)


def by_pattern(params: Any, groups: Groups, what: str) -> Any:
  """A tree of numbers in the shape of `params`: that of the first pattern that matches the whole path.

  Paths look like `layer4/1/conv2/kernel` and `heads/target/bias`.

  Raises:
    ValueError: a parameter that no pattern covers, a pattern that is used for none, or one that is no regular
      expression.
  """
  try:
    patterns = [(re.compile(pattern), float(value)) for pattern, value in groups]
  except (re.error, TypeError, ValueError) as error:
    raise ValueError(f'{what} is {groups!r}; expected (regular expression, number) pairs ({error})') from error
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  values, used = {}, set()
  for path in flat:
    match = next((i for i, (pattern, _) in enumerate(patterns) if pattern.fullmatch(path)), None)
    if match is None:
      raise ValueError(f'{what} covers no parameter {path!r}; end it with (".*", 1.0)')
    used.add(match)
    values[path] = patterns[match][1]
  unused = [groups[i][0] for i in range(len(patterns)) if i not in used]
  if unused:
    raise ValueError(f'{what}: pattern {unused[0]!r} matches no parameter before an earlier pattern does; '
                     f'paths look like {next(iter(flat))!r}')
  return flax.traverse_util.unflatten_dict(values, sep='/')


SCHEDULES = ('milestones', 'cosine', 'constant')

WEIGHT_SCHEDULES = ('constant', 'linear', 'cosine')

# Gradients to updates, from (momentum, nesterov).
OPTIMIZERS: dict[str, Callable[[float, bool], optax.GradientTransformation]] = {
    'sgd': lambda momentum, nesterov: optax.trace(momentum, nesterov),
    'adam': lambda momentum, nesterov: optax.scale_by_adam(),
    'adamw': lambda momentum, nesterov: optax.scale_by_adam(),
    'amsgrad': lambda momentum, nesterov: scale_by_amsgrad(),
    'lars': lambda momentum, nesterov: optax.chain(scale_by_trust_ratios(), optax.trace(momentum, nesterov)),
}
