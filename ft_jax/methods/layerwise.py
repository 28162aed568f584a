"""Layer-wise distance constraints: weights stay in balls around their start, with larger radii in higher layers
(RegSL).
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, ClassVar

import flax
import jax
import jax.numpy as jnp

from ft_jax.methods.base import (
  check_above_zero,
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
)
from ft_jax.models.network import head_of, Network

EPSILON = 1e-6  # added to running variances, as in the published code


@dataclasses.dataclass(frozen=True)
class Layerwise(Method):
  """After each step, every kernel w of a stage goes back to w0 + t * min(1, r / |t|), t = w - w0, with the norm of the
  whole kernel (frobenius) or the L1 norm of the weights into each output (mars); r is D in the first two stages
  (`Network.stage`), D * growth in the third and D * growth^2 in the fourth. Li and Zhang, "Improved Regularization and
  Robustness for Fine-tuning in Neural Networks" (NeurIPS 2021); MARS-PGM: Gouk, Hospedales and Pontil (ICLR 2021), with
  one radius for all stages.

  As in the published code, shortcut convolutions are constrained, the stem and all biases are free, and for BatchNorm s
  = scale / sqrt(running variance + 1e-6) stays within r of its start, with the current variance. Fresh heads stay
  around zero. Our own choices: pre-trained heads stay around their start; the Frobenius radius of a head with another
  number of classes than the target's grows with the root of that number, so that it is the same for each class; a
  kernel inside its ball does not change by a bit.

  The penalties instead add weight * |t|^2 (frobenius) or weight * the largest L1 norm (mars) of each kernel and
  BatchNorm scale, times the same powers of growth, and likewise of the heads.
  """
  published: ClassVar[Mapping[str, Any]] = {'distance': 'frobenius'}
  distance: str = ''  # frobenius (of a whole kernel) or mars (L1 of the weights into each output); '' for none
  form: str = 'constraint'  # constraint (projection after each step) or penalty (a term of the loss)
  radius: float = 0.136810  # constraint: D; published for MIT-Indoor, ResNet-101; see configs/regsl.py
  growth: float = 2.528838  # gamma: radius or weight of stages 3 and 4 over the stage before; published likewise
  head_radius: float = 6.407802  # constraint: of the target head; published likewise
  weight: float = 0.01  # penalty: of the first two stages; ours, published ones were not found
  head_weight: float = 0.01  # penalty: of the heads; ours

  def check(self, context: SetupContext) -> None:
    if self.distance not in NORMS:
      raise ValueError(f"methods.layerwise.distance is {self.distance!r}; known: {', '.join(NORMS)}, or '' for none")
    check_known('layerwise', FORMS, form=self.form)
    check_above_zero('layerwise', radius=self.radius, growth=self.growth, head_radius=self.head_radius)
    check_not_negative('layerwise', weight=self.weight, head_weight=self.head_weight)

  def needs(self, model: Network) -> Needs:
    return Needs(start=True)

  def loss(self, context: StepContext, state: State) -> LossTerm:
    if self.form != 'penalty':
      return LossTerm(None, state)
    start, norm, variances = flat(context.start['params']), NORMS[self.distance], flat(context.batch_stats)
    total: Any = 0.0
    for path, value in flat(of_network(context.params)).items():
      if (grown := self._grown(context.model, path)) and (path.endswith('kernel') or variance_of(path) in variances):
        weight = self.head_weight if head_of(path) else self.weight * grown
        total += weight * norm.penalty(value - start.get(path, 0.0))
    return LossTerm(total, state)

  def project(self, model: Network, params: Any, batch_stats: Any, start: Any) -> Any:
    if self.form != 'constraint':
      return params
    first, now, then = flat(start['params']), flat(batch_stats), flat(start['batch_stats'])
    classes = params['heads']['target']['kernel'].shape[-1]

    def projected(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
      name = '/'.join(path)
      grown, variance = self._grown(model, name), variance_of(name)
      if grown and variance in now:
        return into_interval(value, now[variance], first[name], then[variance], self.radius * grown)
      if not grown or path[-1] != 'kernel':
        return value
      radius = self.radius * grown
      if head_of(name):
        radius = self.head_radius * NORMS[self.distance].heads(value.shape[-1] / classes)
      return into_ball(value, first.get(name, jnp.zeros_like(value)), radius, NORMS[self.distance].norm)

    return flax.traverse_util.path_aware_map(projected, params)

  def _grown(self, model: Network, path: str) -> float:
    """The factor of the radius or weight: powers of growth in the stages, 1 in heads, 0 where nothing is constrained.
    """
    if head_of(path):
      return 1.0
    stage = model.stage(path)
    return self.growth ** max(stage - 2, 0) if stage else 0.0


def variance_of(path: str) -> str:
  """The running variance of the layer whose scale a path is; '' for other parameters."""
  return f'{path.removesuffix("scale")}var' if path.endswith('/scale') else ''


def into_ball(value: jax.Array, center: jax.Array, radius: float, norm: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """The value moved towards the center until its distance is at most the radius; the value itself where it is inside.
  """
  offset = value - center
  length = norm(offset)
  return jnp.where(length > radius, center + offset * (radius / jnp.maximum(length, radius)), value)


def into_interval(scale: jax.Array, variance: jax.Array, first: jax.Array, first_variance: jax.Array,
                  radius: float) -> jax.Array:
  """BatchNorm's scale `[c]`, with scale / sqrt(variance) within the radius of its first value; all arrays are `[c]`."""
  deviation = jnp.sqrt(variance + EPSILON)
  center = first / jnp.sqrt(first_variance + EPSILON)
  offset = scale / deviation - center
  return jnp.where(jnp.abs(offset) > radius, (center + jnp.clip(offset, -radius, radius)) * deviation, scale)


def frobenius(x: jax.Array) -> jax.Array:
  """The root of the sum of squares, a number."""
  return jnp.sqrt(jnp.sum(x * x))


def outputs_l1(x: jax.Array) -> jax.Array:
  """Sums of absolute values of the weights into each output: `[..., c]` to `[1, ..., c]`."""
  return jnp.sum(jnp.abs(x), axis=tuple(range(x.ndim - 1)), keepdims=True)


@dataclasses.dataclass(frozen=True)
class Norm:
  """A norm of kernels (`[h, w, in, out]` or `[in, out]`), its penalty, and how the norm of a head grows with its
  classes.
  """
  norm: Callable[[jax.Array], jax.Array]
  penalty: Callable[[jax.Array], jax.Array]
  heads: Callable[[float], float]


FORMS = ('constraint', 'penalty')

NORMS: Mapping[str, Norm] = {
    'frobenius': Norm(frobenius, lambda x: jnp.sum(x * x), math.sqrt),
    'mars': Norm(outputs_l1, lambda x: jnp.max(outputs_l1(x)), lambda ratio: 1.0),
}
