"""Stochastic gradient descent with learning-rate groups, and its schedules."""

from collections.abc import Sequence
import re
from typing import Any

import flax
import jax
import optax

Groups = Sequence[tuple[str, float]]


def make_schedule(kind: str, learning_rate: float, steps: int, *, milestones: Sequence[float], decay: float,
                  warmup: float) -> optax.Schedule:
  """The learning rate of each step.

  Args:
    kind: a name of `SCHEDULES`.
    learning_rate: the highest one.
    steps: of the whole run.
    milestones: parts of the run (0 to 1) after which the rate is multiplied by `decay`; for 'milestones'.
    decay: see there.
    warmup: part of the run (0 to 1) over which the rate rises from zero.

  Raises:
    ValueError: an unknown kind, or parts outside of [0, 1].
  """
  if kind not in SCHEDULES:
    raise ValueError(f'train.schedule is {kind!r}; known: {", ".join(SCHEDULES)}')
  if not 0 <= warmup < 1:
    raise ValueError(f'train.warmup is {warmup}; expected a part of the run from 0 to below 1')
  outside = [m for m in milestones if not 0 < m < 1]
  if outside:
    raise ValueError(f'train.milestones has {outside[0]}; expected parts of the run between 0 and 1, such as (0.6, 0.8)')
  rise = round(warmup * steps)
  if kind == 'cosine':
    main = optax.cosine_decay_schedule(learning_rate, steps - rise)
  elif kind == 'milestones':
    main = optax.piecewise_constant_schedule(learning_rate, {round(m * steps) - rise: decay for m in milestones})
  else:
    main = optax.constant_schedule(learning_rate)
  if not rise:
    return main
  # The first step already moves: (step + 1) / rise.
  return optax.join_schedules([lambda step: learning_rate * (step + 1) / rise, main], [rise])


def sgd(schedule: optax.Schedule, params: Any, *, momentum: float, nesterov: bool, weight_decay: float,
        learning_rate_groups: Groups, weight_decay_groups: Groups) -> optax.GradientTransformation:
  """SGD as torch has it: weight decay goes into the gradient, the rate is applied after the momentum.

  Args:
    schedule: the learning rate of each step.
    params: the parameters (or their shapes), for their paths.
    momentum: 0 to below 1.
    nesterov: look ahead along the momentum.
    weight_decay: times the parameter, added to its gradient.
    learning_rate_groups: (pattern, factor) pairs; see `by_pattern`.
    weight_decay_groups: likewise for the weight decay.

  Raises:
    ValueError: a momentum outside [0, 1), or groups that do not fit the parameters.
  """
  if not 0 <= momentum < 1:
    raise ValueError(f'train.momentum is {momentum}; expected a number from 0 to below 1')
  rates = by_pattern(params, learning_rate_groups, 'train.learning_rate_groups')
  decays = by_pattern(params, weight_decay_groups, 'train.weight_decay_groups')
  return optax.chain(
      optax.stateless(lambda updates, params: jax.tree.map(
          lambda g, p, d: g + weight_decay * d * p, updates, params, decays)),
      optax.trace(momentum, nesterov),
      optax.stateless(lambda updates, params: jax.tree.map(lambda g, r: r * g, updates, rates)),
      optax.scale_by_learning_rate(schedule))


def by_pattern(params: Any, groups: Groups, what: str) -> Any:
  """A tree of numbers in the shape of `params`: that of the first pattern that matches the whole path.

  Paths look like `layer4/1/conv2/kernel` and `heads/target/bias`.

  Raises:
    ValueError: a parameter that no pattern covers, a pattern that is used for none, or one that is no regular expression.
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
