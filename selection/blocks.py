"""Blocks: the costs between all rows of a pool and all rows of the target, one block at a time, on all devices.

The matrix is never held as a whole unless a caller asks for it: a strategy is a function of one block, and its results
are either one value per row (`map`) or sums over all rows (`sum`). The rows of each chunk are sharded over the devices
of all processes; only vectors of the target's length are exchanged between devices.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from selection.journal import Journal
from selection.pools import ArrayRows, Rows
from selection.progress import bar

P = jax.sharding.PartitionSpec
# A function of (entries [b, m], valid [b], operands): [b, ...] for `map`, [m] for `sum`. Rows that are not valid are
# padding: `sum` must leave them out.
BlockFunction = Callable[..., jax.Array]


class Settings(NamedTuple):
  """How passes are run.

  memory: most bytes of stored entries, over all devices; None is 1 GiB on the CPU, else half of the devices' memory.
  chunk: rows per chunk; None is 64 MiB of features on the CPU, else 256 MiB.
  progress: whether passes of more than two seconds show a progress bar.
  journal: where passes save their progress.
  """
  memory: int | None = None
  chunk: int | None = None
  progress: bool = False
  journal: Journal = Journal()


DEFAULTS = Settings()


def cosine(rows: jax.Array, target: jax.Array) -> jax.Array:
  """1 - cos, from 0 to 2; the rows of the target must have unit length."""
  return 1 - jnp.matmul(_unit(rows), target.T, precision=jax.lax.Precision.HIGHEST)


def unit_euclidean(rows: jax.Array, target: jax.Array) -> jax.Array:
  """Distance of the unit vectors, from 0 to 2: sqrt(2 (1 - cos)); in float32 up to 5e-4 off for equal rows."""
  return jnp.sqrt(2 * jnp.maximum(cosine(rows, target), 0))


def euclidean(rows: jax.Array, target: jax.Array) -> jax.Array:
  """Euclidean distance of the features, centred on the mean of the target to lose few digits in float32."""
  centre = target.mean(0)
  rows, target = rows - centre, target - centre
  squares = jnp.sum(rows**2, 1)[:, None] + jnp.sum(target**2, 1)
  return jnp.sqrt(jnp.maximum(squares - 2 * jnp.matmul(rows, target.T, precision=jax.lax.Precision.HIGHEST), 0))


def row_sums(entries: jax.Array, valid: jax.Array, v: jax.Array) -> jax.Array:
  """A block function for `map`: entries times v."""
  del valid
  return jnp.matmul(entries, v, precision=jax.lax.Precision.HIGHEST)


def given(rows: jax.Array, target: jax.Array) -> jax.Array:
  """The "cost" of rows that are entries already."""
  del target
  return rows


class Blocks:
  """Entries `[n, m]`: the costs C, or the kernel exp(-C / epsilon) if `epsilon` is given.

  `target` is None if, and only if, `cost` is `given`.

  Attributes:
    m: rows of the target.
  """

  def __init__(self, pool: Rows, target: np.ndarray | None, cost: Callable[[jax.Array, jax.Array], jax.Array],
               epsilon: float | None = None, settings: Settings = DEFAULTS):
    self.pool, self.target, self.cost, self.epsilon, self.settings = pool, target, cost, epsilon, settings
    self.m = pool.dimension if target is None else len(target)
    self._mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ('rows',))
    prepared = np.zeros((1, 1)) if target is None else np.asarray(target, np.float64)
    if cost in (cosine, unit_euclidean):  # once here instead of in each block
      prepared = prepared / np.linalg.norm(prepared, axis=1, keepdims=True)
    self._target = self._put(prepared, P())
    self._stored: list[tuple[int, jax.Array, jax.Array]] | None = None

  @property
  def n(self) -> int:
    """Rows of the pool; counting those of an iterator takes one pass, the first time."""
    return len(self.pool)

  def kernel(self, epsilon: float) -> 'Blocks':
    """The kernel exp(-C / epsilon) of these costs; raises ValueError unless epsilon is above 0."""
    if not isinstance(epsilon, numbers.Real) or not 0 < epsilon < np.inf:
      raise ValueError(f'epsilon is {epsilon!r}; expected a finite number above 0')
    return Blocks(self.pool, self.target, self.cost, epsilon, self.settings)

  def of(self, rows: np.ndarray) -> 'Blocks':
    """The entries of some rows, by their numbers; passes over them are not saved in the journal."""
    settings = self.settings._replace(journal=Journal())
    if self._stored is None:
      some = ArrayRows(self.pool.take(rows), check=self.cost is not given)
      return Blocks(some, self.target, self.cost, self.epsilon, settings)
    firsts = np.cumsum([0] + [count for count, _, _ in self._stored])
    taken = np.empty((len(rows), self.m), np.float32)
    for first, (count, entries, _) in zip(firsts, self._stored):
      inside = (rows >= first) & (rows < first + count)
      taken[inside] = self._gathered(entries, rows[inside] - first)
    return Blocks(ArrayRows(taken, check=False), None, given, settings=settings)

  def store(self) -> 'Blocks':
    """Computes the entries and stores them on the devices, if they fit in `settings.memory`; later passes are fast."""
    # The rows of an iterator are not counted just for this: it would take another pass.
    fits = self.pool.known_length is not None and 4 * self.n * self.m <= self._memory()
    if self._stored is None and fits:
      self._stored = [(count, self._run(_entries, False, True, rows, valid, ()), valid)
                      for _, count, rows, valid in self._chunks(0, 'cost')]
    return self

  @property
  def is_stored(self) -> bool:
    """Whether the entries are on the devices."""
    return self._stored is not None

  def stored(self) -> 'StoredKernel':
    """The stored entries, for use in a compiled function; requires `is_stored`."""
    assert self._stored is not None
    _, entries, valid = zip(*self._stored)
    return StoredKernel(entries, valid, self._block(len(entries[0])), self._mesh)

  def sum(self, function: BlockFunction, *operands: Any, name: str, turn: int = 0, what: str = '') -> np.ndarray:
    """The sum over all blocks of function(entries, valid, *operands), float64.

    Args:
      function: a module-level function: it is compiled once, and a new lambda would be compiled at each call.
      *operands: arrays or numbers, the same for all blocks.
      name: of the pass, in the journal.
      turn: the number of the pass among those of this name; a pass resumes only from its own turn.
      what: the label of the progress bar; '' uses `name`.
    """
    if self._stored is not None:
      operands = tuple(self._put(x, P()) for x in operands)
      _, entries, valid = zip(*self._stored)
      compiled = _stored_sum(function, self._block(len(entries[0])), self._mesh)
      return np.asarray(compiled(entries, valid, operands), np.float64)
    journal = self.settings.journal
    before = journal.load(name)
    total, first = (before['total'], int(before['first'])) if before and before['turn'] == turn else (np.zeros(()), 0)
    for end, part in self._results(function, True, first, what or name, operands):
      total = total + part.astype(np.float64)
      journal.save(name, turn=turn, total=total, first=end)
    return total

  def map(self, function: BlockFunction, *operands: Any, name: str = 'scores') -> np.ndarray:
    """function(entries, valid, *operands) of all blocks, concatenated: float32 `[n, ...]`; `name` names the pass."""
    # Passes over stored entries are too short to be worth saving.
    scores = (self.settings.journal if self._stored is None else Journal()).scores(name)
    for _, part in self._results(function, False, scores.done, name, operands):
      scores.append(part)
    if scores.done != self.n:
      raise ValueError(f'the saved pass holds {scores.done:,d} {name} and the source has {self.n:,d} rows; '
                       'use another workdir')
    return scores.all()

  def _results(self, function: BlockFunction, reduce: bool, first: int, what: str,
               operands: tuple[Any, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (end row of the chunk, its result); results are fetched while the devices compute the next chunk."""
    operands = tuple(self._put(x, P()) for x in operands)
    pending = None
    for start, count, rows, valid in self._chunks(first, what):
      result = self._run(function, reduce, False, rows, valid, operands)
      if pending is not None:
        yield pending[0], _read(pending)
      pending = start + count, result, None if reduce else count
    if pending is not None:
      yield pending[0], _read(pending)

  def _run(self, function: BlockFunction, reduce: bool, spread: bool, rows: jax.Array, valid: jax.Array,
           operands: tuple[Any, ...]) -> jax.Array:
    stored = self._stored is not None
    cost, epsilon = (given, None) if stored else (self.cost, self.epsilon)
    compiled = _compiled(function, reduce, spread, cost, epsilon is not None, self._block(len(rows)), self._mesh)
    return compiled(rows, valid, self._target, np.float32(1 if epsilon is None else epsilon), operands)

  def _chunks(self, first: int, what: str) -> Iterator[tuple[int, int, jax.Array, jax.Array]]:
    """(first row, rows, entries or features on the devices, which rows are valid)."""
    if self._stored is not None:
      start = 0
      for count, rows, valid in self._stored:
        yield start, count, rows, valid
        start += count
      return
    size = self._chunk_rows()
    shown = self.settings.progress
    with bar(what, self.pool.known_length, 'rows', shown=shown, initial=first, unit_scale=True) as progress:
      for start, chunk in self.pool.read(size, first):
        count = len(chunk)
        if count < size:  # the last chunk; all others have the same shape, so that they are compiled once
          size = size if 2 * count > size else self._padded(count)
          chunk = np.concatenate([chunk, np.zeros((size - count, chunk.shape[1]), np.float32)])
        yield start, count, self._put(chunk, P('rows')), self._put(np.arange(size) < count, P('rows'))
        progress.update(count)

  def _put(self, array: Any, spec: P) -> jax.Array:
    """Puts an array onto the devices; every process has the whole array and copies its devices' shards."""
    array = np.asarray(array)
    if array.dtype not in (bool, np.float32):
      array = array.astype(np.float32)
    sharding = jax.sharding.NamedSharding(self._mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  def _gathered(self, entries: jax.Array, rows: np.ndarray) -> np.ndarray:
    """Some rows of the stored entries, on every process."""
    if jax.process_count() == 1:
      return np.asarray(entries)[rows] if _on_cpu() else np.asarray(entries[rows])
    everywhere = jax.sharding.NamedSharding(self._mesh, P())
    take = jax.jit(lambda entries, rows: entries[rows.astype(int)], out_shardings=everywhere)
    return np.asarray(take(entries, self._put(rows, P())))

  def _chunk_rows(self) -> int:
    rows = self.settings.chunk or (1 << (26 if _on_cpu() else 28)) // (4 * self.pool.dimension)
    n = self.pool.known_length
    # Nearly equal chunks, so that the last one is not compiled separately.
    return self._padded(rows if n is None else -(-n // -(-n // rows)))

  def _padded(self, rows: int) -> int:
    """The number of rows, rounded up so that devices and blocks divide it evenly."""
    each = -(-rows // self._mesh.size)
    block = self._block(each * self._mesh.size)
    return -(-each // block) * block * self._mesh.size

  def _block(self, rows: int) -> int:
    """Rows of a block: on the CPU its entries should fit in the cache; elsewhere only memory limits it."""
    if self._stored is not None and not _on_cpu():
      return max(1, rows // self._mesh.size)  # they are in memory already
    most = max(8, (1 << (22 if _on_cpu() else 30)) // (4 * self.m))
    most = min(1 << (most.bit_length() - 1), 4096 if _on_cpu() else 1 << 20)
    return min(most, max(1, rows // self._mesh.size))

  def _memory(self) -> int:
    if self.settings.memory is not None:
      return self.settings.memory
    if _on_cpu():
      return 1 << 30
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get('bytes_limit', 8 << 30) // 2 * self._mesh.size


@functools.partial(jax.tree_util.register_dataclass, data_fields=('entries', 'valid_rows'),
                   meta_fields=('block', 'mesh'))
@dataclasses.dataclass(frozen=True)
class StoredKernel:
  """Stored entries `[n', m]` in chunks, with n' - n rows of padding; a pytree.

  Products are summed block by block: in float32 XLA's product of a vector and a matrix of a million rows has an error
  of 3e-4.
  """
  entries: tuple[jax.Array, ...]
  valid_rows: tuple[jax.Array, ...]
  block: int
  mesh: jax.sharding.Mesh

  @property
  def shape(self) -> tuple[int, int]:
    """(n', m)."""
    return sum(len(part) for part in self.entries), self.entries[0].shape[1]

  def valid(self) -> jax.Array:
    """1 for rows of the pool and 0 for padding, float32 `[n']`."""
    return jnp.concatenate(self.valid_rows).astype(jnp.float32)

  def row_sums(self, v: jax.Array) -> jax.Array:
    """Entries times v `[m]`: `[n']`."""
    return jnp.concatenate([self._run(row_sums, False, part, valid, v)
                            for part, valid in zip(self.entries, self.valid_rows)])

  def column_sums(self, u: jax.Array) -> jax.Array:
    """u `[n']` times entries: `[m]`."""
    ends = np.cumsum([len(part) for part in self.entries])[:-1]
    sums = [self._run(_weighted_rows, True, part, weights)
            for part, weights in zip(self.entries, jnp.split(u, ends))]
    return functools.reduce(jnp.add, sums)

  def _run(self, function: BlockFunction, reduce: bool, entries: jax.Array, by_row: jax.Array,
           *operands: jax.Array) -> jax.Array:
    block = min(self.block, len(entries) // self.mesh.size)
    compiled = _compiled(function, reduce, False, given, False, block, self.mesh)
    return compiled(entries, by_row, jnp.zeros((1, 1)), np.float32(1), operands)


@functools.cache
def _stored_sum(function: BlockFunction, block: int, mesh: jax.sharding.Mesh) -> Callable[..., jax.Array]:
  """`_compiled` for all stored chunks, in one program."""
  def total(entries: tuple[jax.Array, ...], valid: tuple[jax.Array, ...], operands: tuple[Any, ...]) -> jax.Array:
    none = jnp.zeros((1, 1))
    each = [_compiled(function, True, False, given, False, min(block, len(part) // mesh.size), mesh)(
        part, rows, none, np.float32(1), operands) for part, rows in zip(entries, valid)]
    return sum(each[1:], each[0])

  return jax.jit(total, out_shardings=jax.sharding.NamedSharding(mesh, P()))


@functools.cache
def _compiled(function: BlockFunction, reduce: bool, spread: bool, cost: Callable[[jax.Array, jax.Array], jax.Array],
              gibbs: bool, block: int, mesh: jax.sharding.Mesh) -> Callable[..., jax.Array]:
  def local(rows: jax.Array, valid: jax.Array, target: jax.Array, epsilon: jax.Array,
            operands: tuple[Any, ...]) -> jax.Array:
    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
      entries = cost(part[0], target)
      return function(jnp.exp(-entries / epsilon) if gibbs else entries, part[1], *operands)

    results = jax.lax.map(one, (rows.reshape(-1, block, rows.shape[1]), valid.reshape(-1, block)))
    return jax.lax.psum(results.sum(0), 'rows') if reduce else results.reshape(-1, *results.shape[2:])

  mapped = jax.shard_map(local, mesh=mesh, in_specs=(P('rows'), P('rows'), P(), P(), P()),
                         out_specs=P() if reduce else P('rows'))
  return jax.jit(mapped, out_shardings=jax.sharding.NamedSharding(mesh, P('rows') if spread else P()))


def _entries(entries: jax.Array, valid: jax.Array) -> jax.Array:
  del valid
  return entries


def _weighted_rows(entries: jax.Array, weights: jax.Array) -> jax.Array:
  # Not a vector-matrix product: on the CPU, over 4,096 rows, its error is 3e-6, and that of this sum 2e-7.
  return jnp.sum(weights[:, None] * entries, 0)


def _read(pending: tuple[int, jax.Array, int | None]) -> np.ndarray:
  return np.asarray(pending[1])[:pending[2]]


def _unit(rows: jax.Array) -> jax.Array:
  # Zero rows of the pool raise an error where they are read; those of the padding are ignored.
  return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _on_cpu() -> bool:
  return jax.default_backend() == 'cpu'
