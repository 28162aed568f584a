"""Pools: rows of features in memory, in a memory-mapped file, or from an iterator; read in chunks, as often as needed."""

from collections.abc import Callable, Iterable, Iterator
import os
from typing import Any, Protocol

import numpy as np


class Rows(Protocol):
  """What is read in chunks: `dimension` is d; `known_length` is None before the first whole pass of an iterator; `len` makes that pass."""
  dimension: int
  known_length: int | None

  def __len__(self) -> int: ...  # noqa: D105

  def read(self, size: int, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Goes through the rows from row `first`: (number of the first row, float32 `[size, d]`); the last chunk may be smaller."""

  def take(self, rows: np.ndarray) -> np.ndarray:
    """The features of some rows, float32 `[k, d]`, in the order of `rows`."""


class ArrayRows:
  """Rows of one array `[n, d]`, which may be a `numpy.memmap`: only the rows that are asked for are read.

  `check`: whether rows that are zero or not finite are refused; rows of costs may well be zero.
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
  """Rows of chunks `[c, d]` of any sizes; `chunks` gives a new iterator over all of them at every call, always in the same order."""

  def __init__(self, chunks: Callable[[], Iterable[np.ndarray]], length: int | None = None, what: str = 'source'):
    self._chunks, self.known_length, self._what, self._checked = chunks, length, what, 0
    once, again = chunks(), chunks()
    if once is again and isinstance(once, Iterator):
      raise ValueError(f'the function of {what} chunks gives the same iterator twice, which can be read only once; make a new one in it')
    first = next((array for array in self._arrays() if len(array)), None)
    if first is None or not first.shape[1]:
      raise ValueError(f'the iterator of {what} chunks gives none with a row; expected arrays [c, d]')
    self.dimension = first.shape[1]

  def __len__(self) -> int:
    if self.known_length is None:
      self.known_length = sum(len(array) for array in self._arrays())
    return self.known_length

  def read(self, size: int, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """See `Rows`."""
    start, end, parts = first, 0, []
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
      raise ValueError(f'the {self._what} chunks held {end:,d} rows in this pass and {self.known_length:,d} before; '
                       'every pass must give the same rows in the same order')
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
      raise ValueError(f'the {self._what} chunks held {end:,d} rows in this pass, and row {wanted[-1]:,d} in one before')
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
  """Chunks from an iterable or a function that returns an iterator; None where `source` is none of the two.

  Raises:
    ValueError: an iterator, which can be read only once.
  """
  if callable(source):
    return IteratedRows(source, what=what)
  if isinstance(source, Iterator):
    raise ValueError(f'{what} is an iterator, which can be read only once, and several passes are needed; give the function that '
                     'makes it, or a list of arrays')
  if isinstance(source, list) and source and all(np.ndim(part) == 2 for part in source):
    return IteratedRows(lambda: iter(source), sum(map(len, source)), what)
  if isinstance(source, Iterable) and not isinstance(source, (list, tuple, str, os.PathLike)) and not hasattr(source, '__array__'):
    return IteratedRows(lambda: iter(source), what=what)
  return None


def check_rows(features: np.ndarray, start: int = 0, what: str = 'source') -> None:
  """Raises ValueError for rows that are zero or not finite: how many, and the number of the first; `start` is that of row 0."""
  for first in range(0, len(features), 16384):  # no second copy of all features
    with np.errstate(all='ignore'):
      part = np.asarray(features[first:first + 16384])
      squares = np.einsum('ij,ij->i', part, part, dtype=np.float64 if part.dtype.itemsize < 4 else part.dtype)
    if np.isfinite(squares).all() and squares.all():
      continue
    # Something is wrong: now all rows are looked at, to say how many.
    finite = np.concatenate([np.isfinite(features[k:k + 16384]).all(1) for k in range(0, len(features), 16384)])
    zero = ~np.concatenate([np.asarray(features[k:k + 16384]).any(1) for k in range(0, len(features), 16384)])
    rows = f' of the {len(features):,d} from row {start:,d}' if start else ''
    for bad, reason in ((~finite, 'are not finite'), (zero, 'are zero, and so have no direction')):
      if bad.any():
        raise ValueError(f'{bad.sum():,d} rows{rows} of {what} features {reason}, the first is row {start + np.flatnonzero(bad)[0]:,d}; '
                         'leave them out, or embed them again')
    limit = np.sqrt(np.finfo(np.float32).max)
    if not np.isfinite(squares).all():
      raise ValueError(f'row {start + first + np.flatnonzero(~np.isfinite(squares))[0]:,d} of {what} features is longer than {limit:.0e}, '
                       'too long for float32; scale the features down')
    raise ValueError(f'row {start + first + np.flatnonzero(squares == 0)[0]:,d} of {what} features is shorter than {1 / limit:.0e}, '
                     'too short for float32; scale the features up')
