"""How flat the minimum is that a training found, and how far from its start it lies.

The measures with which Li and Zhang (NeurIPS 2021) explain regularized fine-tuning, as in the code of their companion
paper (Ju, Li and Zhang, "Robust Fine-Tuning of Deep Neural Networks with Hessian-based Generalization Guarantees", ICML
2022): the loss under noise on the weights, the distance of each weight from where it began, and the trace of the
Hessian of the loss. All are taken in evaluation mode.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import flax
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from ft_jax import parallel
from ft_jax.methods.base import flat
from ft_jax.models.network import head_of, Network
from ft_jax.training.evaluate import evaluate, make_predict

# A few random vectors can agree by chance: no decision before so many.
FEWEST_PROBES = 10


class Estimate(NamedTuple):
  """The mean of independent draws and its standard error, which one draw alone does not have."""
  mean: float
  error: float | None


def estimate(draws: Sequence[float]) -> Estimate:
  """The mean of some draws, with the standard error of the mean."""
  error = float(np.std(draws, ddof=1) / len(draws) ** 0.5) if len(draws) > 1 else None
  return Estimate(float(np.mean(draws)), error)


def order(model: Network, path: str) -> tuple[Any, ...]:
  """A key that sorts parameters from the input to the classes: a block's layers, each with its normalisation, then its
  shortcut.
  """
  *modules, leaf = path.split('/')
  digits = ''.join(c for c in modules[-1] if c.isdigit())
  return -model.depth(path), model.is_shortcut(path), int(digits or 0), model.is_norm(path), leaf != 'kernel', path


def stage_of(model: Network, path: str) -> str:
  """The stage of a parameter by name; 'heads', or 'stem' for what comes before the first stage."""
  if head_of(path):
    return 'heads'
  stage = model.stage(path)
  return model.stage_names[stage - 1] if stage else 'stem'


def is_perturbed(model: Network, path: str) -> bool:
  """Whether noise is added to a parameter, as published: the weights of layers and of the head.

  Normalisation, biases, and the weights of shortcuts are left as they are.
  """
  return path.endswith('/kernel') and not model.is_shortcut(path)


def losses_under_noise(model: Network, head: str, variables: Any, batches: Iterable[Mapping[str, np.ndarray]], *,
                       classes: int, sigma: float, seed: int, numbers: Iterable[int]) -> Iterator[float]:
  """The mean loss of each perturbed network: every weight of `is_perturbed` plus sigma times a normal number of its
  own.

  Args:
    model: the network; its BatchNorm uses the running statistics.
    head: whose cross-entropy is the loss.
    variables: `{'params', 'batch_stats'}`, replicated.
    batches: padded and masked, as `data.pipeline.EvalBatches` makes them; gone through for each network.
    classes: of the head.
    sigma: standard deviation of the noise; 0 gives the loss of the network itself.
    seed: of the noise.
    numbers: of the draws: each number is one network, whichever others are asked for.
  """
  def perturb(variables: Any, number: jax.Array) -> Any:
    noise = flat(_drawn(jax.random.normal, variables['params'], jax.random.fold_in(jax.random.key(seed), number)))

    def add_noise(path: tuple[Any, ...], w: jax.Array) -> jax.Array:
      name = '/'.join(path)
      return w + sigma * noise[name] if is_perturbed(model, name) else w

    return {**variables, 'params': flax.traverse_util.path_aware_map(add_noise, variables['params'])}

  perturbed, predict = parallel.pmap(perturb, in_axes=(0, None)), make_predict(model, head)
  for number in numbers:
    yield evaluate(predict, perturbed(variables, number), batches, classes).loss


def distances(params: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
  """Of each parameter (|W - W0|, |W0|), Frobenius norms, by path; the heads', which start fresh, around zero."""
  began = flat(start)
  norms = {}
  for path, value in flat(params).items():
    w, w0 = np.asarray(value, np.float64), 0.0 if head_of(path) else np.asarray(began[path], np.float64)
    norms[path] = (float(np.linalg.norm(w - w0)), float(np.linalg.norm(w0)))
  return norms


def curvature(loss: Callable[[Any], jax.Array], params: Any, key: jax.Array) -> dict[str, jax.Array]:
  """v_p . (H v)_p of each parameter p, by path, where H is the Hessian of the loss and v a vector of random signs over
  all parameters.

  Its mean over the keys is the trace of p's own block of H (Hutchinson, 1990); the sum over the parameters is v . H v.
  """
  v = signs(params, key)
  product = jax.jvp(jax.grad(loss), (params,), (v,))[1]  # forward over reverse: H v without H
  return flat(jax.tree.map(functools.partial(jnp.vdot, precision='highest'), v, product))


def signs(params: Any, key: jax.Array) -> Any:
  """A random 1 or -1 for each number of the parameters."""
  return _drawn(jax.random.rademacher, params, key)


def curvatures(model: Network, head: str, variables: Any, batches: Iterable[Mapping[str, np.ndarray]], *, seed: int,
               numbers: Iterable[int], after_batch: Callable[[], object] = lambda: None) -> Iterator[dict[str, float]]:
  """`curvature` of the mean loss over all examples, for each random vector; batches are added up, so that one at a time
  is in memory.

  Args:
    model, head, variables, batches, seed: as of `losses_under_noise`.
    numbers: of the random vectors.
    after_batch: called after each batch.
  """
  def of_batch(variables: Any, batch: Mapping[str, jax.Array], number: jax.Array) -> dict[str, jax.Array]:
    def loss(params: Any) -> jax.Array:
      logits = model.predict({**variables, 'params': params}, batch['input']).logits[head]
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
      return jnp.sum(jnp.where(batch['mask'], losses, 0.0))

    products = curvature(loss, variables['params'], jax.random.fold_in(jax.random.key(seed), number))
    return jax.lax.psum({'products': products, 'examples': batch['mask'].sum()}, parallel.AXIS)

  mapped = parallel.pmap(of_batch, in_axes=(0, 0, None))
  for number in numbers:
    total: dict[str, float] = {}
    examples = 0
    for result in parallel.read_late(mapped(variables, parallel.shard(batch), number) for batch in batches):
      examples += int(result['examples'])
      total = {path: total.get(path, 0.0) + float(value) for path, value in result['products'].items()}
      after_batch()
    yield {path: value / examples for path, value in total.items()}


def settled(totals: Sequence[float], tolerance: float) -> bool:
  """Whether the last random vector changed the mean of v . H v by less than a part of it: the published rule, from ten
  vectors on.
  """
  if len(totals) < FEWEST_PROBES:
    return False
  before, after = np.mean(totals[:-1]), np.mean(totals)
  return bool(abs(after - before) < tolerance * abs(before))


def _drawn(draw: Callable[..., jax.Array], params: Any, key: jax.Array) -> Any:
  """A random number in the place of each one of the parameters, all drawn at once: a draw for each array takes long to
  compile.
  """
  vector, unravel = jax.flatten_util.ravel_pytree(params)
  return unravel(draw(key, vector.shape, vector.dtype))
