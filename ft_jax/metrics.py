"""The metrics of a run as files: metrics.jsonl and TensorBoard events, which are added to while it trains."""

from collections.abc import Mapping
import json
import os
import socket
import struct
import time
from typing import NamedTuple

from etils import epath
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from ft_jax import parallel
from ft_jax.workdir import metrics_line, resumable, Workdir
from selection import storage

# Where nothing can be appended, as on object storage, a growing file is written again at most this often.
SECONDS = 10.0


class _Files(NamedTuple):
  lines: 'GrowingFile'
  events: 'GrowingFile'


class MetricsWriter:
  """metrics.jsonl, one JSON object a line with its `step`, and the same as TensorBoard events; process 0 writes."""

  def __init__(self, workdir: Workdir, start: int):
    """Resumes at `start`: lines of later steps are removed, as these steps are about to run again.

    Raises:
      OSError: as of every other function here, where something cannot be written.
    """
    self._files: _Files | None = None
    self._begun: dict[str, float] = parallel.agreed(lambda: self._open(workdir, start))

  def _open(self, workdir: Workdir, start: int) -> dict[str, float]:
    """See `__init__`; on process 0; returns the line of the step `start`, where there is one."""
    path = workdir.metrics_jsonl
    text = path.read_text() if path.exists() else ''
    # A line that was cut short has no newline at its end.
    whole = [line for line in text.splitlines(keepends=True) if line.endswith('\n')]
    lines = [line for line in whole if metrics_line(path, line)['step'] <= start]
    name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}'
    begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    # What follows replaces what an earlier start wrote of these steps.
    events = (event_pb2.Event(file_version='brain.Event:2'), event_pb2.Event(step=start + 1, session_log=begin))
    self._files = _Files(GrowingFile(path, ''.join(lines).encode()),
                         GrowingFile(workdir.path / 'tensorboard' / name, b''.join(map(_record, events))))
    last = json.loads(lines[-1]) if lines else {}
    self._before = ''.join(lines[:-1])
    return last if last.get('step') == start else {}

  def write(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    """Adds the metrics of a step, to those that it has if it is the one to resume from; returns all of them."""
    before = self._begun if self._begun.get('step') == step else {}
    line = {'step': step, **before, **metrics}
    if self._files is None:
      return line
    text = json.dumps(line) + '\n'
    if before:
      self._files.lines.replace((self._before + text).encode())
    else:
      self._files.lines.add(text.encode())
    events = (event_pb2.Event(step=step, summary=scalar(key, value)) for key, value in metrics.items())
    self._files.events.add(b''.join(map(_record, events)))
    return line

  def flush(self) -> None:
    """Writes what is only in memory; called before each checkpoint, up to which no line may be missing."""
    if self._files is not None:
      self._files.lines.flush()
      self._files.events.flush()

  def close(self) -> None:
    """Likewise, at the end."""
    self.flush()


class GrowingFile:
  """A file that grows; on object storage it is kept in memory, and written again as a whole from time to time."""

  def __init__(self, path: epath.Path, begin: bytes):
    """Starts with `begin`, whatever the file holds."""
    self._path, self._url = path, storage.is_url(path)
    with resumable(path):
      if not self._url:
        path.parent.mkdir(exist_ok=True)
      same = path.exists() and path.read_bytes() == begin
    self._data, self._behind, self._written = bytearray(begin), False, time.monotonic()
    if not same:
      self.replace(begin)

  def replace(self, data: bytes) -> None:
    """Replaces all of it."""
    self._data, self._behind = bytearray(data), True
    self.flush()

  def add(self, data: bytes) -> None:
    """Appends to it."""
    if self._url:
      self._data += data
      self._behind = True
      if time.monotonic() - self._written > SECONDS:
        self.flush()
      return
    with resumable(self._path):
      storage.append(self._path, data)

  def flush(self) -> None:
    """Writes what is only in memory, ours or the system's, which a power cut would lose."""
    with resumable(self._path):
      if self._behind:
        storage.write_whole(self._path, bytes(self._data))
        self._behind, self._written = False, time.monotonic()
      elif not self._url:
        with self._path.open('rb') as stream:
          os.fsync(stream.fileno())


def _record(event: event_pb2.Event) -> bytes:
  """An event as TensorBoard's files hold it: its length, the data, and a checksum of each.

  tensorboardX's own writer is not used: a full disk ends its thread, and the next event waits for that thread for ever.
  """
  event.wall_time = time.time()
  data = event.SerializeToString()
  length = struct.pack('<Q', len(data))
  return length + struct.pack('<I', masked_crc32c(length)) + data + struct.pack('<I', masked_crc32c(data))
