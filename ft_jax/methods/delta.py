"""DELTA: feature maps stay close to the pre-trained ones, closer in channels that the target needs (Li et al., ICLR
2019).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
import time
from typing import Any, cast, ClassVar

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ft_jax import logistic, parallel, progress
from ft_jax.methods.base import (
  check_known,
  check_not_negative,
  flat,
  LossTerm,
  Method,
  Needs,
  of_network,
  SetupContext,
  State,
  StepContext,
  teacher_variables,
)
from ft_jax.models.network import Network, Outputs
from ft_jax.training.forward import forward


@dataclasses.dataclass(frozen=True)
class Delta(Method):
  """weight / 2 * mean over target images of sum_layers sum_c C a_c |F_c - F0_c|^2 / (H W) + head_weight / 2 * |w'|^2.

  F and F0 are the C feature maps of H x W of the network and of the pre-trained one (evaluation mode), w' the fresh
  heads. a_c is the channel attention: softmax over c of z_c / 5, z_c the standardised rise of the target's loss when
  filter c gives zero. Without attention ('feature_map') it is |F - F0|^2 itself, not divided by H W. After the
  Transfer-Learning-Library (with weight decay 0), with two differences. That sums over its batch of 48; here it is the
  mean, so its weight of 0.01 is 0.48 here, whatever the batch size. And that means to measure attention with a
  classifier on frozen features, but trains the whole network; here the classifier is a logistic regression.
  """
  published: ClassVar = {'weight': 0.48}
  weight: float = 0.0  # published 0.01 for the sum over 48 images, which is 0.48 for the mean
  head_weight: float = 0.01  # of the fresh heads; published
  form: str = 'attention'  # attention (published), or feature_map: all channels alike
  layers: tuple = ()  # paths of modules, such as ('layer4/1/conv2',); () is `Network.stage_layers`, as published
  attention_images: int = 320  # training images that attention is measured on; published 10 batches of 32

  def check(self, context: SetupContext) -> None:
    check_known('delta', FORMS, form=self.form)
    check_not_negative('delta', head_weight=self.head_weight)
    if self.attention_images < 1:
      raise ValueError(f'methods.delta.attention_images is {self.attention_images}; expected a number of images from 1')
    _check_layers(self.layers, context)

  def needs(self, model: Network) -> Needs:
    return Needs(start=True, teacher=True, layers=self.layers or model.stage_layers)

  def setup(self, context: SetupContext) -> State:
    if self.form != 'attention':
      return {}
    rows = np.sort(np.random.default_rng(context.seed).permutation(len(context.labels))[:self.attention_images])
    layers = self.needs(context.model).layers
    features = context.teacher_outputs('train')['features']
    classifier = logistic.fit(features, context.labels, context.classes, strength=1 / len(context.labels))
    rises = loss_rises(context.teacher, teacher_variables(context.start), classifier, context.batches('train', rows),
                       len(rows), layers)
    return {'attention': {_key(layer): attention(rise) for layer, rise in rises.items()}}

  def loss(self, context: StepContext, state: State) -> LossTerm:
    start, params = flat(context.start['params']), flat(of_network(context.params))
    heads: Any = sum(jnp.sum(value ** 2) for path, value in params.items() if path not in start)
    assert context.teacher is not None
    student, teacher = context.outputs['target'].taps, context.teacher.taps
    distance: Any = 0.0
    for layer in teacher:
      squares = (student[layer].astype(jnp.float32) - teacher[layer].astype(jnp.float32)) ** 2
      if self.form == 'attention':
        weights = state['attention'][_key(layer)]
        distance += jnp.sum(squares.mean(tuple(range(squares.ndim - 1))) * weights * len(weights))
      else:
        distance += jnp.sum(squares.mean(0))
    return LossTerm(0.5 * self.weight * distance + 0.5 * self.head_weight * heads, state)


def attention(rise: np.ndarray) -> np.ndarray:
  """Attention float32 `[C]` of sum one, from the rise of the loss without each channel; uniform where all rises are
  equal.
  """
  rise = rise.astype(np.float64)
  spread = rise.std()
  z = (rise - rise.mean()) / spread if spread > 0 else np.zeros_like(rise)
  weights = np.exp((z - z.max()) / 5)
  return (weights / weights.sum()).astype(np.float32)


def loss_rises(model: Network, variables: Mapping[str, Any], classifier: logistic.Classifier,
               batches: Iterable[Mapping[str, np.ndarray]], count: int,
               layers: Sequence[str]) -> dict[str, np.ndarray]:
  """How much the mean cross-entropy rises when one channel of a layer gives zero, for each channel.

  Channels go through the network side by side, in groups: all layers before this one are computed once a group.

  Args:
    model: the network, used in evaluation mode.
    variables: its variables.
    classifier: of its features.
    batches: of this host, masked, as `data.pipeline.EvalBatches` makes them.
    count: examples in the batches of all hosts.
    layers: by path.

  Returns:
    float64 `[C]` for each layer.
  """
  examples = _examples(batches, count)
  replicated = parallel.replicate((variables, classifier.weights, classifier.bias))
  a_group = jax.ShapeDtypeStruct(examples['input'].shape[2:], examples['input'].dtype)

  def taps(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    outputs, _ = forward(model, variables, {'target': images}, train=False, layers=layers)
    return outputs['target'].taps

  shapes = {layer: tap.shape for layer, tap in jax.eval_shape(taps, variables, a_group).items()}
  rises, began, filters = {}, time.perf_counter(), sum(shape[-1] for shape in shapes.values())
  progress.log.info('channel attention: measuring %s filters on %s images', f'{filters:,d}', f'{count:,d}')
  with progress.counter('channel attention', filters, 'filter') as shown:
    for layer, shape in shapes.items():
      size = max(1, min(shape[-1], _ELEMENTS // math.prod(shape)))
      measure = parallel.pmap(_rises(model, layer), in_axes=(0, 0, None))
      groups = [np.minimum(np.arange(first, first + size), shape[-1] - 1) for first in range(0, shape[-1], size)]
      found = []
      for sums in parallel.read_late(measure(replicated, examples, channels) for channels in groups):
        found.append(sums)
        shown.update(min(size, shape[-1] - (len(found) - 1) * size))
      rises[layer] = np.concatenate(found)[:shape[-1]].astype(np.float64) / count
  progress.log.info('channel attention: measured in %.0f s', time.perf_counter() - began)
  return rises


def _examples(batches: Iterable[Mapping[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
  """This host's examples in groups: `[local devices, groups, images a group, ...]`, masked; as many on every host."""
  batches = list(batches)
  each = len(batches[0]['mask'])  # of a host; host 0 has the most examples: the padding is at the end of the last batch
  most = (len(batches) - 1) * each + min(each, count - (len(batches) - 1) * each * jax.process_count())
  kept = [{key: batch[key][batch['mask']] for key in ('input', 'label', 'mask')} for batch in batches]
  examples = {key: np.concatenate([part[key] for part in kept]) for key in kept[0]}
  devices = jax.local_device_count()
  groups = -(-most // (devices * _IMAGES))
  images = -(-most // (devices * groups))
  padding = devices * groups * images - len(examples['mask'])
  padded = {key: np.pad(value, [(0, padding)] + [(0, 0)] * (value.ndim - 1)) for key, value in examples.items()}
  return {key: value.reshape(devices, groups, images, *value.shape[1:]) for key, value in padded.items()}


def _rises(model: Network, layer: str) -> Callable[[Any, Mapping[str, jax.Array], jax.Array], jax.Array]:
  """A function to be mapped over devices: (variables, classifier), examples and channels `[c]` to sums over examples,
  `[c]`.
  """

  def run(network: Any, examples: Mapping[str, jax.Array], channels: jax.Array) -> jax.Array:
    variables, weights, bias = network

    def without(channel: jax.Array, group: Mapping[str, jax.Array]) -> jax.Array:

      def zeroed(following: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = following(*args, **kwargs)
        if context.method_name == '__call__' and '/'.join(context.module.path) == layer:
          y = jnp.where(jnp.arange(y.shape[-1]) == channel, 0, y)
        return y

      with nn.intercept_methods(zeroed):
        features = cast(Outputs, model.apply(variables, group['input'], train=False)).features
      logits = jnp.dot(features, weights, precision='highest') + bias
      return optax.softmax_cross_entropy_with_integer_labels(logits, group['label'])

    def of_group(group: Mapping[str, jax.Array]) -> jax.Array:
      losses = jax.vmap(without, (0, None))(jnp.append(-1, channels), group)  # no channel is -1
      whole, without_channels = jnp.split(losses, [1])
      return jnp.sum(jnp.where(group['mask'], without_channels - whole, 0.0), -1)

    return jax.lax.psum(jax.lax.map(of_group, examples).sum(0), parallel.AXIS)

  return run


def _check_layers(layers: Sequence[str], context: SetupContext) -> None:
  """Raises ValueError for a layer that the network lacks, with the names that it has there."""
  if not layers:
    return
  if isinstance(layers, str):
    raise ValueError(f"methods.delta.layers is {layers!r}; expected a tuple of paths, such as ('{layers}',)")
  params = context.model.clone(heads={}).shapes()['params']
  for layer in layers:
    here: list[str] = []
    inside: Mapping[str, Any] = params
    for name in layer.split('/'):
      below = {key: value for key, value in inside.items() if isinstance(value, Mapping)}
      if name not in below:
        known = ', '.join('/'.join((*here, key)) for key in below) if below else '/'.join(here)
        raise ValueError(f'methods.delta.layers has {layer!r}, which the network lacks; known there: {known}')
      here, inside = [*here, name], below[name]


def _key(layer: str) -> str:
  return layer.replace('/', '.')  # a slash separates the levels of a checkpoint


FORMS = ('attention', 'feature_map')
# Images that go through the network at once on a device, and the size of the outputs of a layer for all channels side
# by side.
_IMAGES, _ELEMENTS = 8, 2**26
