"""Weighted k-nearest-neighbours on features, by cosine similarity.

As Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018): the k training
images of the largest cosine similarity vote for their classes, each with the weight exp(similarity / 0.07).
"""

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import parallel

TEMPERATURE = 0.07  # of the votes, Wu et al. (CVPR 2018)
BLOCK = 1 << 22  # similarities in memory at once


def directions(features: np.ndarray) -> np.ndarray:
  """Features `[n, d]`, each divided by its length; a feature of zeros stays zero, and is similar to nothing."""
  lengths = np.linalg.norm(features, axis=1, keepdims=True)
  return features / np.where(lengths > 0, lengths, 1)


def voters(training: np.ndarray, labels: np.ndarray, features: np.ndarray,
           most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """The classes of the nearest training images and the weights of their votes, the nearest first.

  Args:
    training: `directions` of the training images, `[n, d]`.
    labels: int `[n]`, their classes.
    features: `[m, d]`; some at a time.
    most: how many training images vote.

  Yields:
    Classes int `[b, most]` and weights float64 `[b, most]`, for the next b of the m images.
  """
  step, on_device = max(1, BLOCK // len(labels)), jnp.asarray(training)
  blocks = (directions(features[begin:begin + step]) for begin in range(0, len(features), step))
  nearest = (_nearest(block, on_device, most) for block in blocks)
  for similarities, near in parallel.read_late(nearest, jax.device_get):
    yield labels[near], np.exp(similarities.astype(np.float64) / TEMPERATURE)


def votes(classes_of: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
  """The sum of the votes for each class, `[b, classes]`, from the classes and weights of the voters, `[b, k]`."""
  counted = np.zeros((len(classes_of), classes))
  np.add.at(counted, (np.arange(len(classes_of))[:, None], classes_of), weights)
  return counted


def elected(classes_of: np.ndarray, counted: np.ndarray) -> np.ndarray:
  """The class with most votes, `[b]`; of classes with as many, that of the nearest image.

  Args:
    classes_of: of the voters, `[b, k]`, the nearest first.
    counted: see `votes`.
  """
  rows = np.arange(len(classes_of))
  own = counted[rows[:, None], classes_of]  # of each neighbour's class
  # Equal sums in another order differ by rounding, that of the similarities divided by the temperature.
  return classes_of[rows, np.argmax(own >= own.max(1, keepdims=True) * (1 - 1e-5), 1)]


@functools.partial(jax.jit, static_argnames='most')
def _nearest(rows: jax.Array, training: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
  """Similarities and rows of the nearest training images, `[b, most]`, the nearest first; of equals, the first one."""
  return jax.lax.top_k(jnp.dot(rows, training.T, precision=jax.lax.Precision.HIGHEST), most)
