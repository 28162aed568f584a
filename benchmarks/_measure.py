"""Clocks and memory: what benchmarks share."""

from collections.abc import Callable
import pathlib
import resource
import time
from typing import Any


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
  """Seconds, and the result."""
  start = time.perf_counter()
  result = function()
  return time.perf_counter() - start, result


def best(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
  """The best time of each, after one run that compiles; they take turns."""
  times: dict[str, list[float]] = {name: [] for name in functions}
  for k in range(rounds + 1):
    for name, function in functions.items():
      seconds = timed(function)[0]
      if k:
        times[name].append(seconds)
  return {name: min(values) for name, values in times.items()}


def peak_megabytes() -> float:
  """Peak resident memory of this process, of mapped files too."""
  status = pathlib.Path('/proc/self/status')
  if status.exists():  # ru_maxrss begins with that of the process which started this one
    return next(int(line.split()[1]) for line in status.read_text().splitlines()
                if line.startswith('VmHWM')) * 1024 / 1e6
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def verdict(met: bool, what: str) -> str:
  """A line on a target."""
  return f'target: {what}: {"met" if met else "MISSED"}'
