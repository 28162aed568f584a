"""Multinomial logistic regression: a linear classifier on features that stay as they are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Classifier(NamedTuple):
  """A linear classifier, logits = features @ weights + bias, and how it was found.

  Attributes:
    weights: `[d, K]`.
    bias: `[K]`; zeros where there is none.
    loss: of the last iteration, penalty included.
    iterations: done.
    converged: whether it ended before the largest number of iterations.
  """
  weights: np.ndarray
  bias: np.ndarray
  loss: float
  iterations: int
  converged: bool


def fit(features: np.ndarray, labels: np.ndarray, classes: int, *, strength: float, bias: bool = True,
        start: Classifier | None = None, tolerance: float = 1e-5, max_iterations: int = 1000) -> Classifier:
  """The minimum of mean cross-entropy + strength / 2 * |weights|^2, by L-BFGS with a line search; computed in the
  features' precision.

  scikit-learn's C is 1 / (strength * n). Classes without examples have logits too. The result depends on nothing
  random.

  Args:
    features: `[n, d]`; float32, or float64 where jax has it enabled.
    labels: int `[n]`, 0 to classes - 1.
    classes: K.
    strength: of the penalty, which leaves the bias out; from 0, where there need not be a minimum.
    bias: whether there is one.
    start: begins there and not at zero; such as the result of a larger strength.
    tolerance: it ends where no entry of the gradient exceeds this fraction of the loss; or where the loss stops falling
      in this precision.
    max_iterations: it ends there in any case.

  Raises:
    ValueError: arrays that do not fit each other, labels out of range, features that are not finite, or a strength
      below 0.
  """
  features, labels = np.asarray(features), np.asarray(labels)
  if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
    raise ValueError(f'features are {features.shape} and labels {labels.shape}; expected [n, d] and [n] with n above 0')
  if labels.min() < 0 or labels.max() >= classes:
    raise ValueError(f'labels are {labels.min()} to {labels.max()}; expected 0 to {classes - 1}, as there are '
                     f'{classes} classes')
  if not np.isfinite(features).all():
    raise ValueError('features have values that are not finite; the weights that made them are damaged or of a '
                     'training that diverged')
  if not 0 <= strength < np.inf:
    raise ValueError(f'strength is {strength}; expected a number from 0')
  dtype = jax.dtypes.canonicalize_dtype(np.result_type(features.dtype, np.float32))
  # Without their mean the problem is the same and better conditioned: half the iterations on features after a ReLU.
  mean = features.mean(0, dtype=np.float64) if bias else np.zeros(features.shape[1])
  weights = np.zeros((features.shape[1], classes)) if start is None else start.weights.astype(np.float64)
  first = {'weights': weights}
  if bias:
    first['bias'] = (np.zeros(classes) if start is None else start.bias) + mean @ weights
  first = jax.tree.map(lambda x: jnp.asarray(x, dtype), first)
  params, loss, iterations, ended = jax.device_get(_minimise(
      jnp.asarray(features - mean, dtype), jnp.asarray(labels, jnp.int32), first,
      jnp.asarray(strength, dtype), jnp.asarray(tolerance, dtype), max_iterations))
  offset = params['bias'] - mean @ params['weights'] if bias else np.zeros(classes)
  return Classifier(params['weights'], offset.astype(dtype), float(loss), int(iterations),
                    bool(ended))


class _Carry(NamedTuple):
  params: dict[str, jax.Array]
  state: optax.OptState
  loss: jax.Array
  largest: jax.Array  # entry of the gradient
  iterations: jax.Array
  falling: jax.Array


@jax.jit
def _minimise(
    features: jax.Array, labels: jax.Array, params: dict[str, jax.Array], strength: jax.Array, tolerance: jax.Array,
    max_iterations: int) -> tuple[dict[str, jax.Array], jax.Array, jax.Array, jax.Array]:
  """Parameters, loss, iterations, and whether there is nothing left to do."""
  answers = jax.nn.one_hot(labels, params['weights'].shape[1], dtype=features.dtype)

  def objective(params: dict[str, jax.Array]) -> jax.Array:
    # A line search compares close values: products in full precision, also where an accelerator has a faster one.
    logits = jnp.dot(features, params['weights'], precision=jax.lax.Precision.HIGHEST) + params.get('bias', 0.0)
    return optax.softmax_cross_entropy(logits, answers).mean() + 0.5 * strength * jnp.sum(params['weights'] ** 2)

  solver = optax.lbfgs(memory_size=10)
  value_and_grad = optax.value_and_grad_from_state(objective)  # the line search has just computed them

  def iterate(carry: _Carry) -> _Carry:
    value, gradient = value_and_grad(carry.params, state=carry.state)
    updates, state = solver.update(gradient, carry.state, carry.params, value=value, grad=gradient, value_fn=objective)
    loss, gradient = optax.tree.get(state, 'value'), optax.tree.get(state, 'grad')
    return _Carry(optax.apply_updates(carry.params, updates), state, loss, optax.tree.norm(gradient, ord=jnp.inf),
                  carry.iterations + 1, loss < value)

  def is_unfinished(carry: _Carry) -> jax.Array:
    return (carry.largest > tolerance * carry.loss) & carry.falling

  infinite = jnp.asarray(jnp.inf, features.dtype)
  begin = _Carry(params, solver.init(params), jnp.zeros((), features.dtype), infinite,
                 iterations=jnp.zeros((), jnp.int32), falling=jnp.asarray(True))
  end = jax.lax.while_loop(
      lambda carry: (carry.iterations < max_iterations) & is_unfinished(carry), iterate, begin)
  return end.params, end.loss, end.iterations, ~is_unfinished(end)
