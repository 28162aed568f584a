"""Devices and processes: how a batch is divided, how state is copied to all devices and read back, how processes agree.
"""

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
# Seconds after which a shared disk certainly shows a new file: NFS may look for changes of a folder only once a minute.
_VISIBLE_SECONDS = 90
# How the name of a file begins that exists for a moment.
MARK = '.seen-by-all-'


def is_main() -> bool:
  """Whether this process writes the files of the run: it is process 0."""
  return jax.process_index() == 0


def agreed(value: Any) -> Any:
  """Process 0's value, on every process; all processes must call it in the same order.

  What follows from the clock or from a file decides what is computed together; if processes decided differently, they
  would wait for each other for ever. After the call all processes see the files that process 0 wrote before it.

  Args:
    value: anything that JSON can represent; only process 0's counts. A function without arguments is called on process
      0 alone, and its result is the value.

  Raises:
    ValueError: the function raised it (or OSError, RuntimeError) on process 0; on every process.
  """
  if jax.process_count() == 1:
    return value() if callable(value) else value
  message, cause = None, None
  if is_main():
    try:
      message = {'value': value() if callable(value) else value}
    except (ValueError, OSError, RuntimeError) as error:
      message, cause = {'error': str(error)}, error
  message = _from_main(message)
  if cause is not None:
    raise cause
  if 'error' in message:
    raise ValueError(message['error'])
  return message['value']


def same_arrays(tree: Any) -> Any:
  """Process 0's arrays on every process; all processes must call it with arrays of the same shapes.

  Arrays that each host computed by itself may differ in their last bits.
  """
  return tree if jax.process_count() == 1 else jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def everyone(value: Any) -> list[Any]:
  """The values of all processes (anything that JSON can represent), in their order, on every process."""
  if jax.process_count() == 1:
    return [value]
  text = json.dumps(value).encode()
  lengths = multihost_utils.process_allgather(np.int32(len(text)))
  texts = multihost_utils.process_allgather(_padded(text, _room(int(lengths.max()))))
  return [json.loads(bytes(row[:length].astype(np.uint8))) for row, length in zip(texts, lengths.tolist())]


def _from_main(value: Any) -> Any:
  """Process 0's value, on every process; those of the others do not count."""
  text = json.dumps(value).encode()
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  # The arrays of other processes must have the same shape.
  padded = _padded(text if is_main() else b'', _room(length))
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)[:length].astype(np.uint8)))


def _room(length: int) -> int:
  """A length shared by texts of similar lengths: a program is compiled for each."""
  return max(256, 1 << (length - 1).bit_length())


def _padded(text: bytes, length: int) -> np.ndarray:
  return np.frombuffer(text.ljust(length, b' '), np.uint8)


def barrier(name: str) -> None:
  """Waits until every process is here; after it all see the files that process 0 wrote before it."""
  multihost_utils.sync_global_devices(name)


def check_same(values: Mapping[str, Any], what: str) -> None:
  """Raises ValueError, on every process, where one has other values than process 0; the message calls them `what`."""
  first, *others = everyone(dict(values))
  for process, other in enumerate(others, 1):
    if differing := [name for name, value in first.items() if other.get(name) != value]:
      raise ValueError(f'process {process} has other {what} than process 0: {", ".join(differing)}; every host must '
                       'see the same files')


def check_shared(folder: epath.Path, what: str) -> None:
  """Makes a folder; raises ValueError, on every process, where it is not the same on all hosts. `what` is its setting.
  """
  if jax.process_count() == 1:
    return

  def leave_mark() -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f'{MARK}{uuid.uuid4().hex}'  # a new file: on another disk there may be a copy of an old one
    (folder / name).write_text('')
    return name

  mark = folder / agreed(leave_mark)
  until = time.monotonic() + _VISIBLE_SECONDS
  while not (visible := mark.exists()) and time.monotonic() < until:
    time.sleep(0.2)
  blind = [process for process, sees in enumerate(everyone(visible)) if not sees]
  if is_main():
    mark.unlink()
  if blind:
    raise ValueError(f'process {blind[0]} ({len(blind)} of {jax.process_count()} processes) does not see what process '
                     f'0 writes to {folder}; {what} must be a folder that all hosts share, such as one on NFS or gs://')


def check_batch(size: int, what: str) -> None:
  """Raises ValueError where a batch cannot be divided evenly among the devices; the message calls its size `what`."""
  devices = jax.device_count()
  if size < 1 or size % devices:
    below, above = size // devices * devices, -(-max(size, 1) // devices) * devices
    choice = f'{below} or {above}' if below > 0 else f'{above}'
    raise ValueError(f'{what} is {size}, which {devices} devices cannot share evenly; use {choice}')


def pmap(function: Callable[..., Any], *, in_axes: Any = 0, donate: bool = False) -> Callable[..., Any]:
  """A function of one device's share, run on all devices at once, with collectives over the axis `AXIS`.

  Every program that runs on several devices is made here, so that there is one place to change when jax changes.

  Args:
    function: takes arrays without the axis of devices.
    in_axes: as of `jax.pmap`: 0 for arguments whose first axis is that of devices, None for those that are the same on
      all.
    donate: whether the result may reuse the memory of the first argument.
  """
  return jax.pmap(function, axis_name=AXIS, in_axes=in_axes, donate_argnums=(0,) if donate else ())


def shard(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """This host's batch `[b, ...]` as `[local devices, b / local devices, ...]`."""
  devices = jax.local_device_count()
  return {key: value.reshape(devices, -1, *value.shape[1:]) for key, value in batch.items()}


def replicate(tree: Any) -> Any:
  """A copy on each local device, in the layout that a pmapped function returns: another one would be compiled again."""
  devices = jax.local_devices()
  layout = jax.sharding.NamedSharding(jax.sharding.Mesh(np.asarray(devices), (AXIS,)), jax.sharding.PartitionSpec(AXIS))
  # `stack` copies: the memory of a donated argument must not be used by anything else.
  return jax.tree.map(lambda x: jax.device_put(np.stack([np.asarray(x)] * len(devices)), layout), tree)


def unreplicate(tree: Any) -> Any:
  """The first local device's copy, on the host."""
  return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)).reshape(x.shape[1:]), tree)


def read_late(results: Iterable[Any], read: Callable[[Any], Any] | None = None) -> Iterator[Any]:
  """Results of the devices on the host, in order, each read after the next one was dispatched.

  So the devices work on a batch while the host reads the results of the one before. At most two results are in memory.

  Args:
    results: dispatches one whenever it is asked for the next: `(predict(variables, shard(batch)) for batch in
      batches)`.
    read: waits for a result and copies it to the host; None is `unreplicate`, for pmapped functions.
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
  """In a pmapped function: the arrays `[b, ...]` of all devices joined, `[devices * b, ...]`, on every device."""
  return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), tree)


def reverse(tree: Any) -> Any:
  """In a pmapped function: this device's share of arrays `[b, ...]` whose order over all devices is reversed."""
  devices = jax.lax.axis_size(AXIS)
  if devices > 1:
    tree = jax.lax.ppermute(tree, AXIS, [(device, devices - 1 - device) for device in range(devices)])
  return jax.tree.map(lambda x: x[::-1], tree)
