"""Pools: rows of features in memory, in a memory-mapped file or from an iterator, read in chunks and several passes."""

from collections.abc import Callable, Iterable, Iterator
import os
from typing import Any, Protocol

import numpy as np


class Rows(Protocol):
  """Rows of features `[n, d]` that can be read in chunks."""

  @property
  def dimension(self) -> int:
    """The d of `[n, d]`."""

  @property
  def known_length(self) -> int | None:
    """The number of rows; None for an iterator that has not been read to its end yet."""

  def __len__(self) -> int:
    """The number of rows; an iterator is read to its end to count them."""

  def read(self, size: int, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number of the chunk's first row, float32 `[size, d]`), starting at row `first`.

    The last chunk may be smaller.
    """

  def take(self, rows: np.ndarray) -> np.ndarray:
    """The features of some rows, float32 `[k, d]`, in the order of `rows`."""


class ArrayRows:
  """Rows of one array `[n, d]`, which may be a `numpy.memmap`: only the requested rows are read.

  `check`: whether rows that are zero or not finite raise ValueError. Turn it off for costs, which may be zero.
  """

  def __init__(self, features: np.ndarray, what: str = 'source', check: bool = True):
    self._features, self._what, self._checked = features, what, 0 if check else len(features)
    self.dimension, self.known_length = features.shape[1], len(features)

  def __len__(self) -> int:
    return self.known_length

  def read(self, size: int, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """See `Rows`."""
    for start in range(first, len(self), size):
      chunk = np.asarray(self._features[start:start + size], np.float32)
      if start + len(chunk) > self._checked:
        check_rows(chunk, start, self._what)
        self._checked = start + len(chunk)
      yield start, chunk

  def take(self, rows: np.ndarray) -> np.ndarray:
    """See `Rows`."""
    order = np.argsort(rows)  # a file is read from front to back
    taken = np.empty((len(rows), self.dimension), np.float32)
    taken[order] = self._features[rows[order]]
    return taken


class IteratedRows:
  """Rows of chunks `[c, d]` of any sizes.

  `chunks` must return a new iterator over all chunks at every call, always in the same order.
  """

  def __init__(self, chunks: Callable[[], Iterable[np.ndarray]], length: int | None = None, what: str = 'source'):
    self._chunks, self._what, self._checked = chunks, what, 0
    self.known_length = length
    once, again = chunks(), chunks()
    if once is again and isinstance(once, Iterator):
      raise ValueError(f'the function of {what} chunks returned the same iterator twice, which can be read only once; '
                       'return a new iterator at each call')
    first = next((array for array in self._arrays() if len(array)), None)
    if first is None or not first.shape[1]:
      raise ValueError(f'the iterator of {what} chunks yielded no rows; expected arrays [c, d]')
    self.dimension = first.shape[1]

  def __len__(self) -> int:
    if self.known_length is None:
      self.known_length = sum(len(array) for array in self._arrays())
    return self.known_length

  def read(self, size: int, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """See `Rows`."""
    start, end = first, 0
    parts: list[np.ndarray] = []
    for array in self._arrays():
      begin, end = end, end + len(array)
      array = array[max(0, first - begin):]
      while len(array):
        need = size - sum(map(len, parts))
        parts.append(np.array(array[:need], np.float32))  # a copy: an iterator may fill the same array again
        array = array[need:]
        if sum(map(len, parts)) == size:
          yield start, self._joined(parts, start)
          start, parts = start + size, []
    if parts:
      yield start, self._joined(parts, start)
    if self.known_length is not None and self.known_length != end:
      raise ValueError(f'the {self._what} chunks had {end:,d} rows in this pass and {self.known_length:,d} before; '
                       'every pass must yield the same rows in the same order')
    self.known_length = end

  def take(self, rows: np.ndarray) -> np.ndarray:
    """See `Rows`."""
    order = np.argsort(rows)
    wanted, taken = rows[order], np.empty((len(rows), self.dimension), np.float32)
    end = high = 0
    for array in self._arrays():
      begin, end = end, end + len(array)
      low, high = np.searchsorted(wanted, (begin, end))
      taken[order[low:high]] = array[wanted[low:high] - begin]
    if high < len(rows):
      raise ValueError(f'the {self._what} chunks had {end:,d} rows in this pass, and an earlier pass had row '
                       f'{wanted[-1]:,d}; every pass must yield the same rows in the same order')
    return taken

  def _joined(self, parts: list[np.ndarray], start: int) -> np.ndarray:
    chunk = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if start + len(chunk) > self._checked:
      check_rows(chunk, start, self._what)
      self._checked = start + len(chunk)
    return chunk

  def _arrays(self) -> Iterator[np.ndarray]:
    dimension = getattr(self, 'dimension', None)
    for number, array in enumerate(self._chunks()):
      array = np.asarray(array)
      if array.ndim != 2 or array.shape[1] != (dimension or array.shape[1]):
        raise ValueError(f'chunk {number} of {self._what} has shape {array.shape}; expected [c, {dimension or "d"}]')
      yield array


def open_rows(source: Any, what: str = 'source') -> Rows | None:
  """Rows of an iterable of chunks, or of a function that returns an iterator; None if `source` is neither.

  Raises:
    ValueError: `source` is an iterator, which can be read only once.
  """
  if callable(source):
    return IteratedRows(source, what=what)
  if isinstance(source, Iterator):
    raise ValueError(f'{what} is an iterator, which can be read only once, and several passes are needed; pass the '
                     'function that creates it, or a list of arrays')
  if isinstance(source, list) and source and all(np.ndim(part) == 2 for part in source):
    return IteratedRows(lambda: iter(source), sum(map(len, source)), what)
  is_array_or_path = isinstance(source, (list, tuple, str, os.PathLike)) or hasattr(source, '__array__')
  if isinstance(source, Iterable) and not is_array_or_path:
    return IteratedRows(lambda: iter(source), what=what)
  return None


def check_rows(features: np.ndarray, start: int = 0, what: str = 'source') -> None:
  """Raises ValueError if rows are zero or not finite, with their count and the number of the first one.

  `start` is the number of row 0 of `features` in the whole pool.
  """
  for first in range(0, len(features), 16384):  # no second copy of all features
    with np.errstate(all='ignore'):
      part = np.asarray(features[first:first + 16384])
      squares = np.einsum('ij,ij->i', part, part, dtype=np.float64 if part.dtype.itemsize < 4 else part.dtype)
    if np.isfinite(squares).all() and squares.all():
      continue
    # Something is wrong: go through all rows to count them.
    finite = np.concatenate([np.isfinite(features[k:k + 16384]).all(1) for k in range(0, len(features), 16384)])
    zero = ~np.concatenate([np.asarray(features[k:k + 16384]).any(1) for k in range(0, len(features), 16384)])
    rows = f' of the {len(features):,d} from row {start:,d}' if start else ''
    for bad, reason in ((~finite, 'are not finite'), (zero, 'are zero, and so have no direction')):
      if bad.any():
        raise ValueError(f'{bad.sum():,d} rows{rows} of {what} features {reason}, the first is row '
                         f'{start + np.flatnonzero(bad)[0]:,d}; leave them out, or embed them again')
    limit = np.sqrt(np.finfo(np.float32).max)
    too_long = ~np.isfinite(squares)
    if too_long.any():
      raise ValueError(f'row {start + first + np.flatnonzero(too_long)[0]:,d} of {what} features is longer than '
                       f'{limit:.0e}, too long for float32; scale the features down')
    raise ValueError(f'row {start + first + np.flatnonzero(squares == 0)[0]:,d} of {what} features is shorter than '
                     f'{1 / limit:.0e}, too short for float32; scale the features up')
