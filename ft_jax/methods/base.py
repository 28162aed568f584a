"""What a fine-tuning method may add to a training step.

A method is a frozen dataclass of its settings; `Method` has every hook as a no-op. The step (`ft_jax.training.step`)
runs on every device with its share of the batch, and gradients and losses are averaged over the devices. So a term that
is a mean over examples is a local mean; a term of the batch as a whole must be the same number on every device,
computed from what `parallel.gather` collects.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
import math
from typing import Any, cast, ClassVar, NamedTuple

import flax
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import parallel
from ft_jax.models.network import Network, network_variables, Outputs

State = dict[str, Any]  # nested dicts of arrays, the same on every device; saved in every checkpoint


@dataclasses.dataclass(frozen=True)
class View:
  """One more random view of each image of a stream, with random numbers of its own.

  Attributes:
    stream: 'target' or 'source'.
    name: its name in the batch.
    randaugment, magnitude, cutout, blur, solarize: as in `config.augment`, for this view alone; None keeps the
      config's.
  """
  stream: str
  name: str
  randaugment: int | None = None
  magnitude: int | None = None
  cutout: float | None = None
  blur: float | None = None
  solarize: float | None = None

  @property
  def path(self) -> str:
    """How `StepContext.images` and `StepContext.outputs` name it, such as 'source/strong'."""
    return f'{self.stream}/{self.name}'

  @property
  def recipe(self) -> dict[str, Any]:
    """The fields of the training transform that are different for this view."""
    fields = {'randaugment': self.randaugment, 'magnitude': self.magnitude, 'cutout': self.cutout, 'blur': self.blur,
              'solarize': self.solarize}
    return {name: value for name, value in fields.items() if value is not None}


class Needs(NamedTuple):
  """What is computed for a method; what several methods need is computed once.

  Attributes:
    start: the variables that training began with, in the state and in `StepContext.start`: the pre-trained ones,
      without fresh heads.
    teacher: the outputs of the network with these variables for the target images of the step (evaluation mode):
      `StepContext.teacher`.
    classifier: the pre-trained classifier, as head 'pretrained' of `start` and of the teacher.
    trained_classifier: it is a head of the trained network too, and is trained on.
    layers: paths of modules whose outputs are in `taps` of the network and of the teacher, such as 'layer4' or
      'layer4/1/conv2'.
    views: more random views of each image, for `StepContext.images`.
    forwarded_views: views that go through the network together with the rest of the step, for `StepContext.outputs`.
  """
  start: bool = False
  teacher: bool = False
  classifier: bool = False
  trained_classifier: bool = False
  layers: tuple[str, ...] = ()
  views: tuple[View, ...] = ()
  forwarded_views: tuple[View, ...] = ()

  @property
  def all_views(self) -> tuple[View, ...]:
    """Every view that a batch must have, once."""
    return tuple(dict.fromkeys((*self.views, *self.forwarded_views)))


@dataclasses.dataclass(frozen=True)
class SetupContext:
  """What methods are checked against before anything long begins, and set up with when training begins.

  Attributes:
    model: the network that is trained.
    classes: number of classes of the target (in pre-training: of the source).
    labels: int32 `[n]`, labels of the training examples as they are trained on, by row.
    true_labels: int32 `[n]`, the labels before noise was added; the same array where none was.
    batch_size: target images a step, over all devices.
    seed: the run's.
    pretrained: whether training starts from pre-trained weights.
    has_source: whether source images take part in the step.
    start: `{'params', 'batch_stats'}` that training starts with, numpy arrays, without fresh heads; {} for random
      weights, and while methods are checked, before weights are loaded.
    batches: the evaluation batches of 'train' or 'val', padded and masked, as `data.pipeline.EvalBatches` makes them;
      the optional second argument is the rows that are wanted (int `[n]`).
    steps: of the whole training; 0 while methods are checked, where it is not known.
    microbatches: how many passes through the network a batch is divided into.
  """
  model: Network
  classes: int
  labels: np.ndarray
  true_labels: np.ndarray
  batch_size: int
  seed: int
  pretrained: bool
  has_source: bool
  start: Mapping[str, Any]
  batches: Callable[..., Iterable[Mapping[str, np.ndarray]]]
  steps: int = 0
  microbatches: int = 1

  @property
  def teacher(self) -> Network:
    """See `teacher_of`; with exact products, as its outputs before training decide what methods do in all of it."""
    return teacher_of(self.model, self.start).clone(precision='highest')

  def teacher_outputs(self, split: str) -> dict[str, np.ndarray]:
    """The teacher's outputs for each example of a split, in order; computed once and shared by the methods that ask.

    Returns:
      `features` float32 `[n, d]`, `label` int32 `[n]` and, where the teacher has its head, `logits` float32 `[n,
      classes of the pre-training]`.
    """
    return self._teacher_outputs(split)

  @functools.cached_property
  def _teacher_outputs(self) -> Callable[[str], dict[str, np.ndarray]]:
    model, variables = self.teacher, parallel.replicate(teacher_variables(self.start))

    def predict(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
      outputs = cast(Outputs, model.apply(variables, batch['input'], train=False))
      result = {'features': outputs.features, **{key: batch[key] for key in ('label', 'row', 'mask')}}
      if outputs.logits:
        result['logits'] = outputs.logits['pretrained']
      return parallel.gather(result)

    mapped = parallel.pmap(predict)

    @functools.cache
    def of_split(split: str) -> dict[str, np.ndarray]:
      results = list(parallel.read_late(mapped(variables, parallel.shard(batch)) for batch in self.batches(split)))
      whole = {key: np.concatenate([result[key][result['mask']] for result in results]) for key in results[0]}
      order = np.argsort(whole['row'])
      return {key: value[order] for key, value in whole.items() if key not in ('row', 'mask')}

    return of_split


class StepContext(NamedTuple):
  """One training step on one device: the forward pass and what led to it.

  Attributes:
    model: the network that is trained.
    params: the network's, and `params['methods'][<method>]` of the methods.
    batch_stats: running statistics before the step; {} of a network without.
    start: see `Needs.start`; {} where nothing needs it.
    teacher: see `Needs.teacher`, for the target images; None where nothing needs it.
    outputs: the network's, by stream ('target', 'source') and by the path of each forwarded view ('source/strong').
    images: those of the streams, and the further views by path, uint8 `[b, h, w, 3]`.
    labels: of the target images (in pre-training: of the source images): int32 `[b]`, or float32 `[b, K]` where images
      were mixed.
    rows: int32 `[b]`, rows of these images among the training examples.
    step: int32, number of updates before this one.
    key: random key of this step, the same on every device; `relabel` and `loss` get one of the method's own.
    forward: (variables, images) -> (outputs, running statistics averaged over devices): a pass of another network in
      training mode.
  """
  model: Network
  params: Any
  batch_stats: Any
  start: Any
  teacher: Outputs | None
  outputs: Mapping[str, Outputs]
  images: Mapping[str, jax.Array]
  labels: jax.Array
  rows: jax.Array
  step: jax.Array
  key: jax.Array
  forward: Callable[[Any, jax.Array], tuple[Outputs, Any]]


class LossTerm(NamedTuple):
  """What a method adds to the loss (with its weight; None for nothing), its state after the step, and further metrics
  by name.
  """
  loss: jax.Array | None
  state: State
  metrics: dict[str, jax.Array] = {}


@dataclasses.dataclass(frozen=True)
class Method:
  """A method: its settings are its fields, and the first one switches it on; zero, False and '' are off."""
  # Settings that switch it on as published, where that takes more than the defaults.
  published: ClassVar[Mapping[str, Any]] = {}
  # Methods that it cannot be combined with, and why.
  excludes: ClassVar[Mapping[str, str]] = {}
  # Whether it pre-trains a network on source images without their labels (job pretrain), instead of taking part in a
  # fine-tuning.
  pretrains: ClassVar[bool] = False
  # Whether source images take part without their labels, and so without a head of their own.
  unlabelled_source: ClassVar[bool] = False
  # Whether it has the hook `mix`; the hook `soften`.
  mixes: ClassVar[bool] = False
  softens: ClassVar[bool] = False

  @property
  def switch(self) -> tuple[str, Any]:
    """The name and the value of the field that switches it on."""
    name, value = next(iter(vars(self).items()))
    return name, value

  @property
  def active(self) -> bool:
    """Whether it is switched on."""
    return bool(self.switch[1])

  def check(self, context: SetupContext) -> None:
    """Raises ValueError for settings that cannot be right."""

  def needs(self, model: Network) -> Needs:
    """What has to be computed for it."""
    return Needs()

  def norm(self) -> Callable[..., nn.Module] | None:
    """The normalisation layer that replaces BatchNorm, with the arguments of `models.batch_norm.BatchNorm`."""
    return None

  def params(self, context: SetupContext) -> Any:
    """The initial values of trainable parameters of its own; {} for none."""
    return {}

  def setup(self, context: SetupContext) -> State:
    """Its state before the first step. Whatever takes long happens here, once in a run."""
    return {}

  def mix(self, images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixes target images (float32 `[b, h, w, 3]`, normalised) and their labels (float32 `[b, K]`) before the forward
    pass.

    Used where `mixes` is True. Of several such methods, each step draws one.
    """
    return images, labels

  def relabel(self, context: StepContext, state: State) -> tuple[jax.Array, State, dict[str, jax.Array]]:
    """The labels (like `context.labels`) to use in this step, its state, and metrics. No gradient goes through it."""
    return context.labels, state, {}

  def soften(self, labels: jax.Array) -> jax.Array:
    """Labels float32 `[b, K]` for the cross-entropy alone. Used where `softens` is True."""
    return labels

  def weigh(self, losses: jax.Array, context: StepContext, state: State) -> jax.Array | None:
    """Weights float32 `[b]` of the target examples, with mean one over all devices; None for no weights. No gradient
    goes through it.
    """
    return None

  def loss(self, context: StepContext, state: State) -> LossTerm:
    """What it adds to the loss."""
    return LossTerm(None, state)

  def project(self, model: Network, params: Any, batch_stats: Any, start: Any) -> Any:
    """The parameters after the update, projected to where they may be."""
    return params

  def projection_head(self, params: Any, state: State) -> dict[str, Any] | None:
    """The projection head that a pre-training leaves, as `models.weights.project` applies it; None for none.

    Args:
      params: its own parameters.
      state: its state.
    """
    return None


def teacher_of(model: Network, start: Mapping[str, Any]) -> Network:
  """The network of the variables `start`, with the head 'pretrained' where they have it."""
  heads = start['params'].get('heads', {})
  return model.clone(heads={name: heads[name]['bias'].shape[0] for name in ('pretrained',) if name in heads})


def teacher_variables(start: Mapping[str, Any]) -> dict[str, Any]:
  """Those of the variables `start` that the teacher has: without a source head."""
  params = {key: value for key, value in start['params'].items() if key != 'heads'}
  heads = start['params'].get('heads', {})
  if 'pretrained' in heads:
    params['heads'] = {'pretrained': heads['pretrained']}
  return network_variables({**start, 'params': params})


def of_network(params: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters of the network, without those of methods."""
  return {key: value for key, value in params.items() if key != 'methods'}


def without_heads(params: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters of the backbone: without those of heads and methods."""
  return {key: value for key, value in params.items() if key not in ('heads', 'methods')}


def moved_towards(old: Any, new: Any, momentum: float | jax.Array, first: jax.Array) -> Any:
  """momentum * old + (1 - momentum) * new for each array of two trees; `new` itself in the first step.

  In this form equal numbers stay equal to the last bit, as in frozen layers.
  """
  return jax.tree.map(lambda a, b: jnp.where(first, b, a + (1.0 - momentum) * (b - a)), old, new)


def unit(x: jax.Array) -> jax.Array:
  """Vectors `[..., d]`, each divided by its length."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def flat(tree: Any) -> dict[str, Any]:
  """A nested dict by path, such as `layer4/1/conv2/kernel`."""
  return flax.traverse_util.flatten_dict(tree, sep='/')


def check_above_zero(method: str, **values: float) -> None:
  """Raises ValueError for a setting of `methods.<method>` that is not a finite number above 0."""
  for name, value in values.items():
    if not 0 < value < math.inf:
      raise ValueError(f'methods.{method}.{name} is {value}; expected a number above 0')


def check_not_negative(method: str, **values: float) -> None:
  """Raises ValueError for a setting of `methods.<method>` that is negative or not finite."""
  for name, value in values.items():
    if not 0 <= value < math.inf:
      raise ValueError(f'methods.{method}.{name} is {value}; expected a number from 0')


def check_known(method: str, known: Iterable[str], **values: str) -> None:
  """Raises ValueError for a setting of `methods.<method>` that is not one of the known names."""
  for name, value in values.items():
    if value not in known:
      raise ValueError(f'methods.{method}.{name} is {value!r}; known: {", ".join(known)}')
