"""Devices and processes: how a batch is shared out, how state is copied to all and read back, how processes agree."""

from collections.abc import Mapping
import json
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

# The pmapped axis: all devices of all hosts.
AXIS = 'batch'


def is_main() -> bool:
  """Whether this process writes what is written once."""
  return jax.process_index() == 0


def agreed(value: Any) -> Any:
  """Process 0's value, on every process, which all must ask for alike.

  What follows from the clock or from a file decides what is computed together; where processes decided differently they would wait for
  each other for ever.

  Args:
    value: anything that JSON has; only that of process 0 counts.
  """
  if jax.process_count() == 1:
    return value
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  # What other processes bring must have the same shape.
  text = multihost_utils.broadcast_one_to_all(text if is_main() else np.zeros(length, np.uint8))
  return json.loads(bytes(text.astype(np.uint8)).decode())


def barrier(name: str) -> None:
  """Waits until every process is here: behind it all see what process 0 wrote before it."""
  multihost_utils.sync_global_devices(name)


def check_batch(size: int, what: str) -> None:
  """Raises ValueError where the devices cannot share a batch evenly."""
  devices = jax.device_count()
  if size < 1 or size % devices:
    below, above = size // devices * devices, -(-max(size, 1) // devices) * devices
    choice = f'{below} or {above}' if below else f'{above}'
    raise ValueError(f'{what} is {size}, which {devices} devices cannot share evenly; use {choice}')


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


def gather(tree: Any) -> Any:
  """In a pmapped function: arrays `[b, ...]` of all devices as one, `[devices * b, ...]`, the same on every device."""
  return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), tree)


def reverse(tree: Any) -> Any:
  """In a pmapped function: this device's part of arrays `[b, ...]` that are, over all devices, in reverse order."""
  devices = jax.lax.axis_size(AXIS)
  if devices > 1:
    tree = jax.lax.ppermute(tree, AXIS, [(device, devices - 1 - device) for device in range(devices)])
  return jax.tree.map(lambda x: x[::-1], tree)
