"""The files of a checkpoint: whether they are whole and hold the numbers that were saved, and how a damaged one is set
aside.
"""

from collections.abc import Iterator, Mapping
import errno
import hashlib
import itertools
import json
import os
from typing import Any

from etils import epath
import jax
import numpy as np
from orbax import checkpoint as ocp
import tensorstore

from ft_jax.names import short
from ft_jax.progress import log
from ft_jax.workdir import saved_steps
from selection import storage

# Errors of the system that say nothing about what is in a file.
_NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Damaged(ValueError):
  """A checkpoint that exists and is incomplete, or does not hold what was saved."""


def read_about(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """What a checkpoint records of itself.

  Raises:
    Damaged: it cannot be read.
  """
  folder = manager.directory / str(step)
  try:
    about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
  except (ValueError, OSError) as error:
    raise Damaged(f'the checkpoint {folder} cannot be read ({short(error)})') from error
  if not {'format_version', 'made_from'} <= set(about):
    raise Damaged(f'the checkpoint {folder} does not record its format version and its data')
  return about


def read_shapes(folder: epath.Path) -> dict[str, Any]:
  """Shapes and types of a checkpoint's state, as nested dicts, after all of its files were read, one after the other.

  Orbax reads everything at once, and where files are missing or cut short, its threads print tracebacks in addition
  to the error.

  Raises:
    Damaged: a file is missing or cannot be read.
    OSError: this process may not read it, or has too many open files.
  """
  state = folder / 'state'
  try:
    if not (state / '_METADATA').exists():
      raise FileNotFoundError(state / '_METADATA')
    store = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': _kvstore(storage.absolute(state))}).result()
    keys = store.list().result()
    if not keys:
      raise FileNotFoundError('its arrays are missing')
    for key in keys:
      store.read(key).result()
    # Not the manager, which knows no structure before it has restored something.
    saved = ocp.StandardCheckpointHandler().metadata(state).tree
  except (KeyError, ValueError, OSError, RuntimeError) as error:
    if (number := storage.error_number(error)) in _NOT_DAMAGE:
      raise OSError(f'the checkpoint {folder} cannot be read here ({os.strerror(number)}), which does not mean that it '
                    'is damaged; it is left as it is. Fix that and start again') from error
    raise Damaged(f'the checkpoint {folder} cannot be read; it is not whole ({short(error)})') from error
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)


def _kvstore(folder: epath.Path) -> dict[str, str]:
  """Tensorstore's description of a folder: in a URL, a name with `#`, `?`, `%` or `|` would mean something else."""
  if not storage.is_url(folder):
    return {'driver': 'file', 'path': f'{folder}/'}
  bucket, _, path = os.fspath(folder).partition('://')[2].partition('/')
  return {'driver': 'gcs', 'bucket': bucket, 'path': f'{path}/'}


def digest(state: Any) -> str:
  """Sixteen hexadecimal digits that depend on every number, but not on the names: a restored tree has other containers.
  """
  leaves = (np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state)))
  each = sorted(hashlib.sha256(_bytes(leaf)).digest() for leaf in leaves)
  return hashlib.sha256(b''.join(each)).hexdigest()[:16]


def _bytes(leaf: np.ndarray) -> bytes:
  return f'{leaf.dtype} {leaf.shape} '.encode() + np.ascontiguousarray(leaf).tobytes()


def check_digest(folder: epath.Path, state: Any, about: Mapping[str, Any]) -> None:
  """Raises Damaged for a state with other numbers than were saved; checkpoints of older versions have no digest."""
  if about.get('digest') not in (None, digest(state)):
    raise Damaged(f'the checkpoint {folder} holds other numbers than were saved')


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
  """The names, in order, of fingerprints that are not the same in two records.

  What only one of them names is not compared: the versions that wrote them recorded different things.
  """
  return sorted(name for name in one.keys() & other.keys() if one[name] != other[name])


def check_metrics(folder: epath.Path, read_only: bool) -> None:
  """Sets aside checkpoints in a folder whose metrics cannot be read, as the manager reads those of all checkpoints.

  Raises:
    Damaged: there is such a checkpoint, and it may not be moved.
  """
  for step in (folder / str(step) for step in saved_steps(folder.parent)):
    metrics = step / 'metrics' / 'metrics'
    try:
      if metrics.exists() and not {'score', 'loss'} <= set(json.loads(metrics.read_text())):
        raise ValueError('no score and loss')
    except (ValueError, TypeError) as error:
      why = f'the metrics of the checkpoint {step} cannot be read ({short(error)})'
      if read_only:
        raise Damaged(f'{why}; run the command of {folder.parent} again, which moves it to '
                      f'{folder.parent / "damaged"}') from error
      set_aside(step, why)


def set_aside(checkpoint: epath.Path, why: str) -> None:
  """Moves a damaged checkpoint to `damaged/` beside its folder, and logs it; for process 0.

  Raises:
    Damaged: it is the only one, and stays where it is.
  """
  folder = checkpoint.parent
  if len(saved_steps(folder.parent)) < 2:
    raise Damaged(f'{why}. There is no other checkpoint in {folder}, so it stays there: restore it from a copy, or '
                  'give another --workdir to start over')
  # Nothing is replaced.
  names = itertools.chain([checkpoint.name], (f'{checkpoint.name}-{n}' for n in itertools.count(2)))
  aside = next(path for name in names if not (path := folder.parent / 'damaged' / name).exists())
  _move(checkpoint, aside)
  log.warning('warning: %s. It is set aside in %s', why, aside)


def _move(folder: epath.Path, to: epath.Path) -> None:
  """Moves a folder; on object storage object by object, and nothing is removed before all are there."""
  if not storage.is_url(folder):
    to.parent.mkdir(exist_ok=True)
    folder.rename(to)
    return
  for source in _objects(folder):
    (to / source.relative_to(folder)).write_bytes(source.read_bytes())
  folder.rmtree()


def _objects(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    if path.is_dir():
      yield from _objects(path)
    elif path.exists():  # some clients list a folder in itself
      yield path
