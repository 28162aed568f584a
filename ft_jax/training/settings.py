"""The settings of one training, and what they mean for each parameter of a network."""

from collections.abc import Collection, Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import flax
import jax
from ml_collections import ConfigDict
import optax

from ft_jax import parallel
from ft_jax.methods import Method, SetupContext
from ft_jax.models.batch_norm import BatchNorm
from ft_jax.models.network import frozen_mask, head_of, head_pattern, Network
from ft_jax.progress import log
from ft_jax.training.optimizer import (
  Factors,
  Groups,
  make_optimizer,
  make_schedule,
  OPTIMIZERS,
  parameter_factors,
  SCHEDULES,
)

METRICS = ('top1', 'mean_per_class')


class Plan(NamedTuple):
  """Lengths in steps.

  Attributes:
    steps: of the whole training.
    eval_every: between evaluations.
    log_every: between lines of metrics.jsonl.
    keep: whose checkpoints stay for good.
  """
  steps: int
  eval_every: int
  log_every: int
  keep: tuple[int, ...] = ()

  def due(self, step: int) -> bool:
    """Whether the state after so many steps is evaluated."""
    return step > 0 and (step == self.steps or step % self.eval_every == 0 or step in self.keep)


@dataclasses.dataclass(frozen=True)
class Training:
  """The fields of `ft_jax.config.train_config`, which documents them, and `metric`, which chooses the best checkpoint.

  Raises:
    ValueError: fields that cannot be right, alone or together.
  """
  batch_size: int
  epochs: float
  steps: int
  learning_rate: float
  learning_rate_groups: Groups
  layer_decay: float
  schedule: str
  milestones: tuple[float, ...]
  decay: float
  warmup: float
  optimizer: str
  momentum: float
  nesterov: bool
  clip_norm: float
  weight_decay: float
  weight_decay_groups: Groups
  freeze: str
  ema_decay: float
  accumulate_steps: int
  eval_every: int
  keep_epochs: tuple[float, ...]
  skip_diverged: int
  log_every: int
  metric: str = 'top1'

  def __post_init__(self) -> None:
    if self.metric not in METRICS:
      raise ValueError(f'config.target.metric is {self.metric!r}; known: {", ".join(METRICS)}')
    if not self.steps and not self.epochs:
      raise ValueError('train.steps and train.epochs are both 0; one of them gives the length')
    if self.schedule not in SCHEDULES:
      raise ValueError(f'train.schedule is {self.schedule!r}; known: {", ".join(SCHEDULES)}')
    if self.optimizer not in OPTIMIZERS:
      raise ValueError(f'train.optimizer is {self.optimizer!r}; known: {", ".join(OPTIMIZERS)}')
    self.check_batch(self.batch_size, 'train.batch_size')

  @classmethod
  def from_config(cls, config: ConfigDict, metric: str = 'top1') -> 'Training':
    """Of the fields of `config.train` or `config.pretrain`, which `settings.check_fields` has checked one by one."""
    return cls(**config.to_dict(), metric=metric)

  def check_batch(self, size: int, what: str) -> None:
    """Raises ValueError where devices cannot share a batch evenly, or cut their share into microbatches."""
    parallel.check_batch(size, what)
    each = size // jax.device_count()
    if each % self.accumulate_steps:
      raise ValueError(f'train.accumulate_steps is {self.accumulate_steps}, into which the {each} images of a device '
                       f'({what} {size}) cannot be cut evenly')

  def plan(self, examples: int) -> Plan:
    """The length of a training on so many examples.

    Raises:
      ValueError: it has no step, or more than an int32 counts.
    """
    steps = self.steps or round(self.epochs * examples / self.batch_size)
    if not 1 <= steps < 2**31:
      raise ValueError(f'train.epochs {self.epochs} of {examples} images in batches of {self.batch_size} are {steps} '
                       'steps; expected at least one, and fewer than 2^31 (train.steps sets the number itself)')
    keep = {max(1, round(epoch * examples / self.batch_size)) for epoch in self.keep_epochs}
    return Plan(steps, self.eval_every or math.ceil(steps / 10), self.log_every or math.ceil(steps / 100),
                tuple(sorted(step for step in keep if step <= steps)))

  def factors(self, model: Network, params: Any, fresh: Collection[str] = ()) -> Factors:
    """The factors of each parameter's learning rate and weight decay.

    Args:
      model: the network.
      params: the parameters, or their shapes; how many classes a head has does not matter.
      fresh: the heads that start fresh on weights that do not: they learn ten times as fast where nothing else is set.

    Raises:
      ValueError: groups that do not fit the parameters.
    """
    groups = self.learning_rate_groups or (*((head_pattern(head), 10.0) for head in sorted(fresh)), ('.*', 1.0))
    return parameter_factors(params, groups, self.weight_decay_groups, model.depth, self.layer_decay)

  def make_schedule(self, steps: int, restart: int = 0) -> optax.Schedule:
    """The learning rate of each of so many steps; with `restart`, the whole schedule before that step, and once more
    from there on.
    """
    if restart:
      return optax.join_schedules([self.make_schedule(restart), self.make_schedule(steps - restart)], [restart])
    return make_schedule(self.schedule, self.learning_rate, steps, milestones=self.milestones,
                                   decay=self.decay, warmup=self.warmup)

  def make_optimizer(self, schedule: optax.Schedule, factors: Factors) -> optax.GradientTransformation:
    """The optimizer with these rates."""
    return make_optimizer(self.optimizer, schedule, factors, momentum=self.momentum, nesterov=self.nesterov,
                                    weight_decay=self.weight_decay, clip_norm=self.clip_norm)


@dataclasses.dataclass(frozen=True)
class Trainable:
  """What training does to each parameter of a network; trees in the shape of its parameters.

  Attributes:
    factors: of the learning rate and the weight decay; also of the parameters that methods have of their own.
    fixed: bools, of the network alone: which parameters training leaves as they are.
  """
  factors: Factors
  fixed: Any

  @classmethod
  def of(cls, training: Training, model: Network, images: int, *, fresh: Collection[str] = (),
         own: Mapping[str, Any] | None = None) -> 'Trainable':
    """What a training means for a network.

    Args:
      training: its settings.
      model: with all of its heads, of any number of classes.
      images: how many go through the network in a step together, over all devices.
      fresh: the heads that start fresh on weights that do not.
      own: parameters of methods, as of `own_params`.

    Raises:
      ValueError: groups or a pattern of frozen parameters that do not fit the network, or BatchNorm over single values.
    """
    shapes = model.shapes()
    factors = training.factors(model, {**shapes['params'], **(own or {})}, fresh)
    fixed = frozen_mask(model, shapes['params'])
    if model.frozen and not any(jax.tree.leaves(frozen_mask(model.clone(batch_norm='train'), shapes['params']))):
      raise ValueError(f'train.freeze is {training.freeze!r}, which no parameter matches; paths look like '
                       f'{next(iter(flax.traverse_util.flatten_dict(shapes["params"], sep="/")))!r}')
    if all(jax.tree.leaves(fixed)):
      raise ValueError(f'train.freeze is {training.freeze!r}, which leaves no parameter to train')
    check_batch_norm(training, model, images)
    return cls(factors, fixed)

  @property
  def only_heads(self) -> bool:
    """Whether nothing but heads is trained."""
    paths = flax.traverse_util.flatten_dict(self.fixed, sep='/')
    return all(fixed for path, fixed in paths.items() if not head_of(path))


def check_batch_norm(training: Training, model: Network, images: int) -> None:
  """Raises ValueError where BatchNorm takes its statistics of one value per channel: its output is then constant.

  Args:
    training: its settings.
    model: as it is trained.
    images: how many go through the network in a step together, over all devices.
  """
  devices, options = jax.device_count(), ', '.join(f'model.{name} {value}' for name, value in model.options.items())
  each, shared = images // devices // training.accumulate_steps, devices if model.axis_name else 1
  if each * shared != 1 or not model.has_batch_norm:
    return
  variables = model.shapes()
  is_norm = lambda module, _: isinstance(module, BatchNorm)
  _, captured = jax.eval_shape(
      lambda *args: model.apply(*args, mutable=['intermediates'], capture_intermediates=is_norm), variables,
      model.example(each))
  stays = flax.traverse_util.flatten_dict(frozen_mask(model, variables['batch_stats']), sep='/')
  for path, (output, *_) in flax.traverse_util.flatten_dict(captured['intermediates'], sep='/').items():
    layer = path.removesuffix('/__call__')
    if not stays[f'{layer}/mean'] and math.prod(output.shape[:-1]) == 1:
      raise ValueError(
          f'BatchNorm {layer} would see one value per channel, so its output would not depend on the image: {each} '
          f'image of {output.shape[1]}x{output.shape[2]} pixels there (images per step {images}, train.batch_size '
          f'{training.batch_size}, devices {devices}, train.accumulate_steps {training.accumulate_steps}, image_size '
          f'{model.size}, {options}); use larger batches or images, a smaller train.accumulate_steps, '
          f'model.stem=3x3, {"model.sync_batch_norm=true " if devices > shared else ""}or model.batch_norm=frozen')


def log_doubts(training: Training, random_features: bool) -> None:
  """Warns of settings with which a training ends well and means nothing.

  Args:
    training: its settings.
    random_features: whether the network starts from random weights and only its heads are trained.
  """
  if not training.learning_rate:
    log.warning('warning: train.learning_rate is 0, so nothing is learnt: only the statistics of BatchNorm change')
  if random_features:
    log.warning('warning: train.freeze is %r and model.weights is empty, so all parameters but the heads stay random; '
                'give weights, or freeze less', training.freeze)


def own_params(methods: Mapping[str, Method], begin: SetupContext) -> dict[str, Any]:
  """Parameters that methods have of their own, as `{'methods': {method: ...}}`; {} where none has."""
  own = {name: params for name, method in methods.items() if (params := method.params(begin))}
  return {'methods': own} if own else {}
