"""k-means for pools without labels: Lloyd's iteration from k-means++ centres, in chunks of rows, over all devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from selection.blocks import Blocks, DEFAULTS, given, Settings
from selection.pools import Rows

# Rows per cluster from which the first centres are drawn.
SEED_ROWS = 20


class Clusters(NamedTuple):
  """`centres` [k, d]; `labels` [n], the nearest centre of each row; `counts` [k], rows of each.

  `inertia`: the mean squared distance of rows to their centres, before the last update of the centres.
  """
  centres: np.ndarray
  labels: np.ndarray
  counts: np.ndarray
  inertia: float


def kmeans(pool: Rows, clusters: int, rng: np.random.Generator, settings: Settings = DEFAULTS, *,
           max_iterations: int = 50, tolerance: float = 1e-4) -> Clusters:
  """Minimises the mean squared distance of rows to their centres.

  Lloyd (1982), initialised by k-means++ (Arthur and Vassilvitskii, 2007) on a random sample of at most 20 rows per
  cluster. A centre that loses all its rows is moved to the drawn row that is farthest from all centres.

  Args:
    pool: rows `[n, d]`, not normalised.
    clusters: how many; fewer are returned if rows are equal or a cluster stays empty.
    rng: draws the sample and the first centres.
    settings: of the passes, one per iteration.
    max_iterations: when to stop at the latest.
    tolerance: it also stops when the mean squared distance falls by less than this fraction of itself.

  Raises:
    ValueError: more clusters than rows, or fewer than one.
  """
  n = len(pool)
  if not 0 < clusters <= n:
    raise ValueError(f'clusters is {clusters}; expected 1 to {n}, the number of source rows')
  drawn = pool.take(np.sort(rng.choice(n, min(n, SEED_ROWS * clusters), replace=False)))
  seed, rows, journal = int(rng.integers(1 << 31)), Blocks(pool, None, given, settings=settings), settings.journal
  before = journal.load('k-means')
  if before:
    centres, inertia, iteration = before['centres'], float(before['inertia']), int(before['iteration'])
  else:
    centres, inertia, iteration = _plus_plus(drawn, clusters, seed), np.inf, 0
  done = bool(before) and bool(before['done'])
  while not done and iteration < max_iterations:
    iteration += 1
    sums = rows.sum(_cluster_sums, centres, name='k-means iteration', turn=iteration,
                    what=f'k-means, iteration {iteration}')
    counts, new_inertia = sums[:, -2], float(sums[:, -1].sum() / n)
    done, inertia = new_inertia >= (1 - tolerance) * inertia, new_inertia
    empty = np.flatnonzero(counts == 0)
    centres = np.where(counts[:, None] > 0, sums[:, :-2] / np.maximum(counts, 1)[:, None], centres)
    if len(empty):
      farthest = np.argsort(-np.asarray(_squares(drawn, centres)).min(1), kind='stable')[:len(empty)]
      centres[empty[:len(farthest)]] = drawn[farthest]
    journal.save('k-means', centres=centres, inertia=inertia, iteration=iteration, done=done)
  labels = rows.map(_nearest, centres, name='clusters').astype(np.int32)
  counts = np.bincount(labels, minlength=clusters)
  number = np.cumsum(counts > 0) - 1  # empty clusters are left out
  return Clusters(centres[counts > 0].astype(np.float32), number[labels].astype(np.int32), counts[counts > 0], inertia)


def _plus_plus(drawn: np.ndarray, clusters: int, seed: int) -> np.ndarray:
  """The first centres `[k, d]`: rows drawn with probability proportional to the squared distance to earlier centres."""
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ('rows',))
  extra = -len(drawn) % mesh.size
  padded = np.concatenate([drawn, np.zeros((extra, drawn.shape[1]), np.float32)])
  by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('rows'))
  put = lambda array: jax.make_array_from_callback(array.shape, by_row, lambda index: array[index])
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  chosen = jax.jit(_draw_centres, static_argnames='clusters', out_shardings=everywhere)(
      put(padded), put(np.arange(len(padded)) < len(drawn)), jax.random.key(seed), clusters=clusters)
  return drawn[np.asarray(chosen)].astype(np.float64)


def _draw_centres(rows: jax.Array, valid: jax.Array, key: jax.Array, clusters: int) -> jax.Array:
  norms = jnp.sum(rows**2, 1)

  def step(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    nearest, row = carry
    centre = rows[row]
    squares = norms - 2 * jnp.matmul(rows, centre, precision=jax.lax.Precision.HIGHEST) + jnp.sum(centre**2)
    nearest = jnp.minimum(nearest, jnp.maximum(squares, 0))
    following = jax.random.categorical(key, jnp.where(valid, jnp.log(nearest), -jnp.inf))
    return (nearest, following), row

  keys = jax.random.split(key, clusters + 1)
  first = jax.random.categorical(keys[0], jnp.where(valid, 0.0, -jnp.inf))
  _, chosen = jax.lax.scan(step, (jnp.full(len(rows), jnp.inf), first), keys[1:])
  return chosen


def _cluster_sums(rows: jax.Array, valid: jax.Array, centres: jax.Array) -> jax.Array:
  """`[k, d + 2]`: the sum of the rows of each cluster, their number, the sum of their squared distances."""
  squares = _squares(rows, centres)
  values = jnp.concatenate([rows, jnp.ones((len(rows), 1)), jnp.min(squares, 1, keepdims=True)], 1)
  return jax.ops.segment_sum(jnp.where(valid[:, None], values, 0), jnp.argmin(squares, 1), len(centres))


def _nearest(rows: jax.Array, valid: jax.Array, centres: jax.Array) -> jax.Array:
  del valid
  return jnp.argmin(_squares(rows, centres), 1).astype(jnp.float32)  # exact for up to 2**24 clusters


@jax.jit
def _squares(rows: jax.Array, centres: jax.Array) -> jax.Array:
  """Squared distances `[b, k]`; centred on the mean of the centres to lose few digits in float32."""
  middle = centres.mean(0)
  rows, centres = rows - middle, centres - middle
  products = jnp.matmul(rows, centres.T, precision=jax.lax.Precision.HIGHEST)
  return jnp.maximum(jnp.sum(rows**2, 1)[:, None] - 2 * products + jnp.sum(centres**2, 1), 0)

