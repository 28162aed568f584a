"""Journal: how far long passes over images or features have come, in a folder, so that a killed one goes on from there."""

import hashlib
import json
import os
import time
from typing import Any
import zipfile

from etils import epath
import jax
import numpy as np

from selection import storage

# A pass of many small chunks is kept so often.
SECONDS = 60.0


class Journal:
  """Small arrays by name, each in a file that is replaced whole, and one growing file of scores a pass.

  On several hosts `folder` must be one that all of them see; only process 0 writes. A journal without a folder keeps nothing.
  """

  def __init__(self, folder: str | os.PathLike[str] | None = None, key: dict[str, Any] | None = None):
    """Opens the folder, or makes it.

    Args:
      folder: where to keep it; None keeps nothing.
      key: what the passes depend on, as JSON can hold it.

    Raises:
      ValueError: the folder cannot be made, or holds passes over something else.
    """
    self._folder = storage.located(folder) if folder is not None else None
    self._due = time.monotonic() + SECONDS
    if self._folder is None:
      return
    try:
      storage.make_folder(self._folder)
    except OSError as error:
      raise ValueError(f'workdir {os.fspath(folder)!r} cannot be made ({error}); name a folder that can be written to') from error
    path, key = self._folder / 'selection_passes.json', json.loads(json.dumps(key, default=lambda number: number.item()))
    if path.exists():
      try:
        before = json.loads(path.read_bytes().decode())
      except ValueError as error:
        raise ValueError(f'{path} cannot be read ({error}); use another workdir, or move that file aside to start anew') from error
      different = [name for name in {**key, **before} if key.get(name) != before.get(name)]
      if different:
        raise ValueError(f'{folder} holds passes over something else ({", ".join(sorted(different))} differ); '
                         'use another workdir')
    elif jax.process_index() == 0:
      storage.write_whole(path, json.dumps(key, indent=1).encode())

  def load(self, name: str) -> dict[str, np.ndarray]:
    """What was saved last by this name; {} where nothing was, or where a file is damaged (that pass then begins again)."""
    if self._folder is None:
      return {}
    try:
      with (self._folder / f'{name}.npz').open('rb') as stream, np.load(stream, allow_pickle=False) as saved:
        return dict(saved)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
      return {}

  def save(self, name: str, **arrays: Any) -> None:
    """Replaces what is saved by this name."""
    if self._folder is None or jax.process_index():
      return
    with storage.whole_file(self._folder / f'{name}.npz') as stream:
      np.savez(stream, **arrays)
    self._due = time.monotonic() + SECONDS

  def due(self) -> bool:
    """Whether there has been no `save` for a minute, on process 0: for passes whose chunks take less."""
    return self._folder is not None and jax.process_index() == 0 and time.monotonic() >= self._due

  def scores(self, name: str) -> 'ScoreFile':
    """The growing file of a pass that scores all rows."""
    if self._folder is not None and storage.is_url(self._folder):
      return _ScoreObjects(self._folder, name)
    return ScoreFile(None if self._folder is None else self._folder / f'{name}.f32')


class ScoreFile:
  """float32 scores of rows in their order, appended chunk by chunk; in memory, and in a file where a path is given."""

  def __init__(self, path: epath.Path | None):
    self._path, self._parts = path, []
    if path is not None and path.exists():
      whole = path.stat().length // 4
      self._parts.append(np.fromfile(path, np.float32, whole))
      if jax.process_index() == 0:
        os.truncate(path, 4 * whole)  # a number that was cut short

  @property
  def done(self) -> int:
    """Rows that are there."""
    return sum(map(len, self._parts))

  def append(self, scores: np.ndarray) -> None:
    """Adds the scores of the next rows."""
    begin = self.done
    self._parts.append(np.asarray(scores, np.float32))
    if jax.process_index() == 0:
      self._keep(begin, self._parts[-1].tobytes())

  def _keep(self, begin: int, data: bytes) -> None:
    """Writes the scores of the rows from `begin` on."""
    del begin
    if self._path is None:
      return
    if not self._path.exists():
      storage.write_whole(self._path, b'')
    storage.append(self._path, data, sync=True)  # the length of the file says how far the pass is

  def all(self) -> np.ndarray:
    """All scores, float32 `[n]`."""
    return np.concatenate(self._parts) if self._parts else np.zeros(0, np.float32)


class _ScoreObjects(ScoreFile):
  """The same where nothing can be added to: an object for each chunk, `<name>-<its first row>.f32`."""

  def __init__(self, folder: epath.Path, name: str):
    super().__init__(None)
    self._folder, self._name = folder, name
    try:
      stored = {path.name: path for path in folder.iterdir()}
    except FileNotFoundError:  # nothing is in it yet
      stored = {}
    while path := stored.get(self._of(self.done)):
      part = np.frombuffer(path.read_bytes(), np.float32)
      if not len(part):
        break
      self._parts.append(part)

  def _of(self, row: int) -> str:
    return f'{self._name}-{row:012d}.f32'

  def _keep(self, begin: int, data: bytes) -> None:
    if data:
      storage.write_whole(self._folder / self._of(begin), data)


def array_digest(*arrays: np.ndarray) -> str:
  """A short digest of the contents of arrays."""
  digest = hashlib.sha256()
  for array in arrays:
    digest.update(f'{array.dtype}{array.shape}'.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()[:16]
