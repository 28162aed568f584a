"""What a fine-tuning method may add to a training step.

A method is a frozen dataclass of its settings; `Method` has every hook as a no-op. The step (`ft_jax.training.step`) runs on every device with
its own share of the batch, and gradients and losses are averaged over the devices. So a term that is a mean over examples is a local mean;
a term of the batch as a whole has to be the same number on every device, from what `gather` brings together.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import flax
from flax import linen as nn
import jax
import numpy as np

from ft_jax import parallel
from ft_jax.models.network import Network, network_variables, Outputs

State = dict[str, Any]  # nested dicts of arrays, the same on every device; part of every checkpoint


class Needs(NamedTuple):
  """What is computed for a method; what several need is computed once.

  Attributes:
    start: the variables that training began with, in the state and in `Pass.start`: the pre-trained ones, without fresh heads.
    teacher: what the network made of these variables gives for the target images of the step (evaluation mode): `Pass.teacher`.
    classifier: the pre-trained classifier, as head 'pretrained' of `start` and of the teacher.
    trained_classifier: also as a head of the network, trained on.
    layers: modules whose outputs are in `taps` of the network and of the teacher, by path: 'layer4' or 'layer4/1/conv2'.
    views: (stream, view) pairs: further random views of each image, `Pass.images['target/key']`.
    seen: those of them that go through the network with the rest of the step: `Pass.outputs['source/strong']`.
  """
  start: bool = False
  teacher: bool = False
  classifier: bool = False
  trained_classifier: bool = False
  layers: tuple[str, ...] = ()
  views: tuple[tuple[str, str], ...] = ()
  seen: tuple[tuple[str, str], ...] = ()


class Plan(NamedTuple):
  """What is known of a run before anything long begins.

  Attributes:
    model: the network; the numbers of classes of its heads may not be known yet.
    batch_size: target images a step, over all devices.
    source: whether source images take part in the step.
    weights: `config.model.weights`.
  """
  model: Network
  batch_size: int
  source: bool
  weights: str


@dataclasses.dataclass(frozen=True)
class SetupContext:
  """What is known when training begins.

  Attributes:
    model: the network that is trained.
    start: `{'params', 'batch_stats'}` that it starts with, numpy arrays, without fresh heads; {} where nothing is pre-trained.
    classes: of the target.
    labels: int32 `[n]`, labels of the training examples as they are trained on, by `index`.
    true_labels: int32 `[n]`, what they were before noise was put in; the same array where none was.
    batch_size: target images a step, over all devices.
    seed: of the run.
    batches: gives the evaluation batches of 'train' or 'val', padded and masked, as `data.pipeline.EvalBatches` makes them; as a second
      argument it takes rows (int `[n]`), where not all are wanted.
  """
  model: Network
  start: Mapping[str, Any]
  classes: int
  labels: np.ndarray
  true_labels: np.ndarray
  batch_size: int
  seed: int
  batches: Callable[..., Iterable[Mapping[str, np.ndarray]]]

  @property
  def steps_per_epoch(self) -> float:
    """Steps in which every training example is seen once."""
    return len(self.labels) / self.batch_size

  @property
  def teacher(self) -> Network:
    """See `teacher_of`; exact, as what it says before training decides what methods do in all of it."""
    return teacher_of(self.model, self.start).clone(precision='highest')

  def taught(self, split: str) -> dict[str, np.ndarray]:
    """What the teacher gives for each example of a split, in order; one pass, shared by the methods that ask.

    Returns:
      `features` float32 `[n, d]`, `label` int32 `[n]` and, where there is the head, `logits` float32 `[n, classes of the pre-training]`.
    """
    return self._taught(split)

  @functools.cached_property
  def _taught(self) -> Callable[[str], dict[str, np.ndarray]]:
    model, variables = self.teacher, parallel.replicate(teacher_variables(self.start))

    def predict(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
      outputs = model.apply(variables, batch['input'], train=False)
      kept = {'features': outputs.features, **{key: batch[key] for key in ('label', 'row', 'mask')}}
      return parallel.gather(kept | ({'logits': outputs.logits['pretrained']} if outputs.logits else {}))

    mapped = parallel.pmap(predict)

    @functools.cache
    def taught(split: str) -> dict[str, np.ndarray]:
      results = list(parallel.read_late(mapped(variables, parallel.shard(batch)) for batch in self.batches(split)))
      whole = {key: np.concatenate([result[key][result['mask']] for result in results]) for key in results[0] if key != 'mask'}
      order = np.argsort(whole.pop('row'))
      return {key: value[order] for key, value in whole.items()}

    return taught


class StepContext(NamedTuple):
  """One training step on one device: the forward pass and what led to it.

  Attributes:
    model: the network that is trained.
    params: of the network, and `params['methods'][<method>]` of the methods.
    batch_stats: running statistics before the step; {} of a network without.
    start: see `Needs.start`; {} where nothing needs it.
    teacher: see `Needs.teacher`, for the target images; None where nothing needs it.
    outputs: of the network by stream ('target', 'source'), and by 'stream/view' for the views that go through it.
    images: further views by 'stream/view', uint8 `[b, h, w, 3]`.
    labels: of the target images: int32 `[b]`, or float32 `[b, K]` where images were mixed.
    index: int32 `[b]`, rows of the target images among the training examples.
    step: int32, updates done before this one.
    key: random, of this step and method, the same on every device.
    forward: (variables, images) -> (outputs, running statistics averaged over devices): another network's pass in training mode.
  """
  model: Network
  params: Any
  batch_stats: Any
  start: Any
  teacher: Outputs | None
  outputs: Mapping[str, Outputs]
  images: Mapping[str, jax.Array]
  labels: jax.Array
  index: jax.Array
  step: jax.Array
  key: jax.Array
  forward: Callable[[Any, jax.Array], tuple[Outputs, Any]]


class LossTerm(NamedTuple):
  """What a method adds to the loss (its weight is in it), its state after the step, and further metrics by name."""
  loss: jax.Array | float
  state: State
  metrics: dict[str, jax.Array] = {}


@dataclasses.dataclass(frozen=True)
class Method:
  """A method: its settings are its fields, and the first one switches it on; zero, False and '' are off."""
  # Settings that switch it on as published, where that takes more than the defaults.
  published: ClassVar[Mapping[str, Any]] = {}
  # Methods that it cannot be together with, and why.
  excludes: ClassVar[Mapping[str, str]] = {}
  # Whether source images take part without their labels, and so without a head of their own.
  unlabelled_source: ClassVar[bool] = False

  @property
  def active(self) -> bool:
    """Whether it is switched on."""
    return bool(getattr(self, dataclasses.fields(self)[0].name))

  def check(self, plan: Plan) -> None:
    """Raises ValueError for settings that cannot be right."""

  def needs(self, model: Network) -> Needs:
    """What has to be computed for it."""
    return Needs()

  def norm(self) -> Callable[..., nn.Module] | None:
    """The normalisation layer to use in place of BatchNorm, with the arguments of `models.batch_norm.BatchNorm`."""

  def params(self, begin: SetupContext) -> Any:
    """Trainable parameters of its own, which start as these; {} for none."""
    return {}

  def setup(self, begin: SetupContext) -> State:
    """Its state before the first step. What takes long happens here, once in a run."""
    return {}

  def mix(self, images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixes target images (float32 `[b, h, w, 3]`, normalised) and their labels (float32 `[b, K]`) before the forward pass.

    Of several methods that do, each step draws one.
    """
    return images, labels

  def relabel(self, seen: StepContext, state: State) -> tuple[jax.Array, State, dict[str, jax.Array]]:
    """The labels (like `seen.labels`) to use in this step, its state, and metrics. Outside of differentiation."""
    return seen.labels, state, {}

  def soften(self, labels: jax.Array) -> jax.Array:
    """Labels float32 `[b, K]` for the cross-entropy alone."""
    return labels

  def weigh(self, losses: jax.Array, seen: StepContext, state: State) -> jax.Array | None:
    """Weights float32 `[b]` of the target examples, whose mean over all devices is one; None leaves them. Outside of differentiation."""
    return None

  def loss(self, seen: StepContext, state: State) -> LossTerm:
    """What it adds to the loss."""
    return LossTerm(0.0, state)

  def project(self, model: Network, params: Any, batch_stats: Any, start: Any) -> Any:
    """The parameters after the update, brought back to where they may be."""
    return params


def teacher_of(model: Network, start: Mapping[str, Any]) -> Network:
  """The network that `start` is of, with the head 'pretrained' where that is there."""
  heads = {name: head['bias'].shape[0] for name, head in start['params'].get('heads', {}).items() if name == 'pretrained'}
  return model.clone(heads=heads)


def teacher_variables(start: Mapping[str, Any]) -> dict[str, Any]:
  """The part of the starting variables that the teacher is of: without a source head."""
  params = {key: value for key, value in start['params'].items() if key != 'heads'}
  heads = start['params'].get('heads', {})
  if 'pretrained' in heads:
    params['heads'] = {'pretrained': heads['pretrained']}
  return network_variables({**start, 'params': params})


def of_network(params: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters without those that methods have of their own."""
  return {key: value for key, value in params.items() if key != 'methods'}


def flat(tree: Any) -> dict[str, Any]:
  """A nested dict by path, such as `layer4/1/conv2/kernel`."""
  return flax.traverse_util.flatten_dict(tree, sep='/')
