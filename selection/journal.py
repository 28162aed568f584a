"""Journal: the progress of long passes over images or features, in a folder, from which a killed pass resumes."""

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

# Seconds between saves of a pass with many small chunks.
SECONDS = 60.0


class Journal:
  """Small arrays by name, each in a file that is replaced whole, and one growing file of scores per pass.

  On several hosts `folder` must be shared by all of them; only process 0 writes. Without a folder nothing is saved.
  """

  def __init__(self, folder: str | os.PathLike[str] | None = None, key: dict[str, Any] | None = None):
    """Opens the folder, or creates it.

    Args:
      folder: where to save; None saves nothing.
      key: what the passes depend on, serializable as JSON.

    Raises:
      ValueError: the folder cannot be created, or holds passes with another key.
    """
    self._folder: epath.Path | None = None
    self._due = time.monotonic() + SECONDS
    if folder is None:
      return
    self._folder = storage.located(folder)
    try:
      storage.make_folder(self._folder)
    except OSError as error:
      raise ValueError(f'workdir {os.fspath(folder)!r} cannot be created ({error}); '
                       'give a folder that can be written to') from error
    path = self._folder / 'selection_passes.json'
    key = json.loads(json.dumps(key or {}, default=lambda number: number.item()))
    if path.exists():
      try:
        before = json.loads(path.read_bytes().decode())
      except ValueError as error:
        raise ValueError(f'{path} cannot be read ({error}); use another workdir, or delete that file') from error
      different = [name for name in {**key, **before} if key.get(name) != before.get(name)]
      if different:
        raise ValueError(f'{folder} holds the passes of another selection or embedding '
                         f'({", ".join(sorted(different))} differ); use another workdir')
    elif jax.process_index() == 0:
      storage.write_whole(path, json.dumps(key, indent=1).encode())

  def load(self, name: str) -> dict[str, np.ndarray]:
    """What was saved last under this name; {} if there is none or the file is damaged (the pass then starts over)."""
    if self._folder is None:
      return {}
    try:
      with (self._folder / f'{name}.npz').open('rb') as stream, np.load(stream, allow_pickle=False) as saved:
        return dict(saved)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
      return {}

  def save(self, name: str, **arrays: Any) -> None:
    """Replaces what is saved under this name."""
    if self._folder is None or jax.process_index():
      return
    with storage.whole_file(self._folder / f'{name}.npz') as stream:
      np.savez(stream, **arrays)
    self._due = time.monotonic() + SECONDS

  def due(self) -> bool:
    """Whether the last `save` was a minute ago, on process 0: passes with short chunks save only then."""
    return self._folder is not None and jax.process_index() == 0 and time.monotonic() >= self._due

  def scores(self, name: str) -> 'ScoreFile':
    """The growing file of a pass that scores all rows."""
    if self._folder is not None and storage.is_url(self._folder):
      return _ScoreObjects(self._folder, name)
    return ScoreFile(None if self._folder is None else self._folder / f'{name}.f32')


class ScoreFile:
  """float32 scores of the rows in order, appended chunk by chunk; in memory, and in a file if a path is given."""

  def __init__(self, path: epath.Path | None):
    self._path = path
    self._parts: list[np.ndarray] = []
    if path is not None and path.exists():
      whole = path.stat().length // 4
      self._parts.append(np.fromfile(path, np.float32, whole))
      if jax.process_index() == 0:
        os.truncate(path, 4 * whole)  # drops a number that was only partly written

  @property
  def done(self) -> int:
    """The number of rows that have scores."""
    return sum(map(len, self._parts))

  def append(self, scores: np.ndarray) -> None:
    """Adds the scores of the next rows."""
    begin = self.done
    self._parts.append(np.asarray(scores, np.float32))
    if jax.process_index() == 0:
      self._write(begin, self._parts[-1].tobytes())

  def _write(self, begin: int, data: bytes) -> None:
    """Writes scores whose first row is `begin`."""
    del begin
    if self._path is None:
      return
    if not self._path.exists():
      storage.write_whole(self._path, b'')
    storage.append(self._path, data, sync=True)  # the length of the file is the progress of the pass

  def all(self) -> np.ndarray:
    """All scores, float32 `[n]`."""
    return np.concatenate(self._parts) if self._parts else np.zeros(0, np.float32)


class _ScoreObjects(ScoreFile):
  """The same on object storage, which cannot append: one object per chunk, `<name>-<its first row>.f32`."""

  def __init__(self, folder: epath.Path, name: str):
    super().__init__(None)
    self._folder, self._name = folder, name
    try:
      stored = {path.name: path for path in folder.iterdir()}
    except FileNotFoundError:  # nothing has been written yet
      stored = {}
    while path := stored.get(self._file_name(self.done)):
      part = np.frombuffer(path.read_bytes(), np.float32)
      if not len(part):
        break
      self._parts.append(part)

  def _file_name(self, row: int) -> str:
    return f'{self._name}-{row:012d}.f32'

  def _write(self, begin: int, data: bytes) -> None:
    if data:
      storage.write_whole(self._folder / self._file_name(begin), data)


def array_digest(*arrays: np.ndarray) -> str:
  """A short digest of the contents of arrays."""
  digest = hashlib.sha256()
  for array in arrays:
    digest.update(f'{array.dtype}{array.shape}'.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()[:16]
