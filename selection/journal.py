"""Journal: how far long passes over a pool have come, in a folder, so that a killed one goes on from its last finished chunk."""

import hashlib
import json
import os
import pathlib
from typing import Any
import zipfile

import jax
import numpy as np


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
      ValueError: the folder cannot be made, or holds passes of another selection.
    """
    self._folder = pathlib.Path(folder) if folder is not None else None
    if self._folder is None:
      return
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ValueError(f'workdir {os.fspath(folder)!r} cannot be made ({error}); name a folder that can be written to') from error
    path, key = self._folder / 'selection_passes.json', json.loads(json.dumps(key, default=lambda number: number.item()))
    if path.exists():
      try:
        before = json.loads(path.read_text(encoding='utf-8'))
      except ValueError as error:
        raise ValueError(f'{path} cannot be read ({error}); remove the folder to begin again') from error
      different = [name for name in {**key, **before} if key.get(name) != before.get(name)]
      if different:
        raise ValueError(f'{folder} holds passes of another selection ({", ".join(sorted(different))} differ); '
                         'use another workdir, or remove this one to begin again')
    elif jax.process_index() == 0:
      _replace(path, json.dumps(key, indent=1).encode())

  def load(self, name: str) -> dict[str, np.ndarray]:
    """What was saved last by this name; {} where nothing was, or where a file is damaged (that pass then begins again)."""
    if self._folder is None:
      return {}
    try:
      with open(self._folder / f'{name}.npz', 'rb') as stream, np.load(stream, allow_pickle=False) as saved:
        return dict(saved)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
      return {}

  def save(self, name: str, **arrays: Any) -> None:
    """Replaces what is saved by this name."""
    if self._folder is None or jax.process_index():
      return
    temporary = self._folder / f'.{name}.{os.getpid()}.npz'
    np.savez(temporary, **arrays)
    os.replace(temporary, self._folder / f'{name}.npz')

  def scores(self, name: str) -> 'ScoreFile':
    """The growing file of a pass that scores all rows."""
    return ScoreFile(None if self._folder is None else self._folder / f'{name}.f32')


class ScoreFile:
  """float32 scores of rows in their order, appended chunk by chunk; in memory, and in a file where a path is given."""

  def __init__(self, path: pathlib.Path | None):
    self._path, self._parts = path, []
    if path is not None and path.exists():
      whole = path.stat().st_size // 4
      self._parts.append(np.fromfile(path, np.float32, whole))
      if jax.process_index() == 0:
        os.truncate(path, 4 * whole)  # a number that was cut short

  @property
  def done(self) -> int:
    """Rows that are there."""
    return sum(map(len, self._parts))

  def append(self, scores: np.ndarray) -> None:
    """Adds the scores of the next rows."""
    self._parts.append(np.asarray(scores, np.float32))
    if self._path is not None and jax.process_index() == 0:
      with open(self._path, 'ab') as stream:
        stream.write(self._parts[-1].tobytes())
        stream.flush()
        os.fsync(stream.fileno())  # the length of the file says how far the pass is, also after a power cut

  def all(self) -> np.ndarray:
    """All scores, float32 `[n]`."""
    return np.concatenate(self._parts) if self._parts else np.zeros(0, np.float32)


def array_digest(*arrays: np.ndarray) -> str:
  """A short digest of the contents of arrays."""
  digest = hashlib.sha256()
  for array in arrays:
    digest.update(f'{array.dtype}{array.shape}'.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()[:16]


def _replace(path: pathlib.Path, data: bytes) -> None:
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  temporary.write_bytes(data)
  os.replace(temporary, path)
