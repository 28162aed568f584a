"""Devices and processes: how a batch is shared out, how state is copied to all and read back, how processes agree."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import json
import time
from typing import Any
import uuid

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

# The pmapped axis: all devices of all hosts.
AXIS = 'batch'
# Seconds after which a shared disk shows a new file for sure: NFS may look for changes of a folder once a minute only.
_SEEN_SECONDS = 90
# How the name of a file begins that is there for a moment.
MARK = '.seen-by-all-'


def is_main() -> bool:
  """Whether this process writes what is written once."""
  return jax.process_index() == 0


def agreed(value: Any) -> Any:
  """Process 0's value, on every process, which all must ask for alike.

  What follows from the clock or from a file decides what is computed together; where processes decided differently they would wait for
  each other for ever. Behind it all see what process 0 wrote before it.

  Args:
    value: anything that JSON has; only that of process 0 counts. Of a function without arguments, which process 0 alone calls, it is what
      that returns.

  Raises:
    ValueError: what the function raised there, on every process.
  """
  if jax.process_count() == 1:
    return value() if callable(value) else value
  told, cause = None, None
  if is_main():
    try:
      told = {'value': value() if callable(value) else value}
    except (ValueError, OSError, RuntimeError) as error:
      told, cause = {'error': str(error)}, error
  told = _from_main(told)
  if cause is not None:
    raise cause
  if 'error' in told:
    raise ValueError(told['error'])
  return told['value']


def same_arrays(tree: Any) -> Any:
  """Process 0's arrays on every process, which all must ask for alike, with arrays of the same shapes: what a host computed by itself may
  differ from another host's in its last bits.
  """
  return tree if jax.process_count() == 1 else jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def everyone(value: Any) -> list[Any]:
  """The value of each process (anything that JSON has), in their order, on every process."""
  if jax.process_count() == 1:
    return [value]
  text = json.dumps(value).encode()
  lengths = multihost_utils.process_allgather(np.int32(len(text)))
  texts = multihost_utils.process_allgather(_padded(text, _room(int(lengths.max()))))
  return [json.loads(bytes(row[:length].astype(np.uint8))) for row, length in zip(texts, lengths.tolist())]


def _from_main(value: Any) -> Any:
  """Process 0's value on all of them; what the others bring does not count."""
  text = json.dumps(value).encode()
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  # What other processes bring must have the same shape.
  padded = _padded(text if is_main() else b'', _room(length))
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)[:length].astype(np.uint8)))


def _room(length: int) -> int:
  """A length that texts of about one length share: for each a program is compiled."""
  return max(256, 1 << (length - 1).bit_length())


def _padded(text: bytes, length: int) -> np.ndarray:
  return np.frombuffer(text.ljust(length, b' '), np.uint8)


def barrier(name: str) -> None:
  """Waits until every process is here: behind it all see what process 0 wrote before it."""
  multihost_utils.sync_global_devices(name)


def check_same(values: Mapping[str, Any], what: str) -> None:
  """Raises ValueError, on every process, where one has other values than process 0; `what` says what they are of."""
  first, *others = everyone(dict(values))
  for process, other in enumerate(others, 1):
    if differing := [name for name, value in first.items() if other.get(name) != value]:
      raise ValueError(f'process {process} has other {what} than process 0: {", ".join(differing)}; every host must see the same files')


def check_shared(folder: epath.Path, what: str) -> None:
  """Raises ValueError, on every process, where a folder is not the same one on every host; it is made. `what` names its setting."""
  if jax.process_count() == 1:
    return

  def leave_mark() -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f'{MARK}{uuid.uuid4().hex}'  # not a file that is there: its copy may be, from before
    (folder / name).write_text('')
    return name

  mark = folder / agreed(leave_mark)
  until = time.monotonic() + _SEEN_SECONDS
  while not (seen := mark.exists()) and time.monotonic() < until:
    time.sleep(0.2)
  blind = [process for process, sees in enumerate(everyone(seen)) if not sees]
  if is_main():
    mark.unlink()
  if blind:
    raise ValueError(f'process {blind[0]} ({len(blind)} of {jax.process_count()} processes) does not see what process 0 writes to '
                     f'{folder}; {what} must be a folder that all hosts share, such as one on NFS or gs://')


def check_batch(size: int, what: str) -> None:
  """Raises ValueError where the devices cannot share a batch evenly."""
  devices = jax.device_count()
  if size < 1 or size % devices:
    below, above = size // devices * devices, -(-max(size, 1) // devices) * devices
    choice = f'{below} or {above}' if below > 0 else f'{above}'
    raise ValueError(f'{what} is {size}, which {devices} devices cannot share evenly; use {choice}')


def pmap(function: Callable[..., Any], *, in_axes: Any = 0, donate: bool = False) -> Callable[..., Any]:
  """A function of one device's share, run on all devices at once, which know each other by the name `AXIS`.

  Every program that runs on several devices is made here, so that this is the one place to change where jax changes how it is done.

  Args:
    function: of arrays without the axis of devices.
    in_axes: as of `jax.pmap`: 0 for arguments that have an axis of devices in front, None for those that are the same on all.
    donate: whether the memory of the first argument is given up to the result.
  """
  return jax.pmap(function, axis_name=AXIS, in_axes=in_axes, donate_argnums=(0,) if donate else ())


def shard(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """This host's batch `[b, ...]` as `[local devices, b / local devices, ...]`."""
  devices = jax.local_device_count()
  return {key: value.reshape(devices, -1, *value.shape[1:]) for key, value in batch.items()}


def replicate(tree: Any) -> Any:
  """A copy on each local device, laid out as a pmapped function returns it: with any other layout it would be compiled twice."""
  devices = jax.local_devices()
  layout = jax.sharding.NamedSharding(jax.sharding.Mesh(np.asarray(devices), (AXIS,)), jax.sharding.PartitionSpec(AXIS))
  # `stack` copies: the memory of a donated argument must be nobody else's.
  return jax.tree.map(lambda x: jax.device_put(np.stack([np.asarray(x)] * len(devices)), layout), tree)


def unreplicate(tree: Any) -> Any:
  """The first local device's copy, on the host."""
  return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)).reshape(x.shape[1:]), tree)


def read_late(results: Iterable[Any], read: Callable[[Any], Any] | None = None) -> Iterator[Any]:
  """Results of the devices on the host, in order, each read after the next one was dispatched.

  So the devices work on a batch while the host reads what they made of the one before. Two results at most are in memory.

  Args:
    results: dispatches one each time it is asked for the next: `(predict(variables, shard(batch)) for batch in batches)`.
    read: waits for a result and copies it to the host; None is `unreplicate`, for those of pmapped functions.
  """
  read = read or unreplicate
  pending = None
  for result in results:
    if pending is not None:
      yield read(pending)
    pending = result
  if pending is not None:
    yield read(pending)


def gather(tree: Any) -> Any:
  """In a pmapped function: arrays `[b, ...]` of all devices as one, `[devices * b, ...]`, the same on every device."""
  return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), tree)


def reverse(tree: Any) -> Any:
  """In a pmapped function: this device's part of arrays `[b, ...]` that are, over all devices, in reverse order."""
  devices = jax.lax.axis_size(AXIS)
  if devices > 1:
    tree = jax.lax.ppermute(tree, AXIS, [(device, devices - 1 - device) for device in range(devices)])
  return jax.tree.map(lambda x: x[::-1], tree)
