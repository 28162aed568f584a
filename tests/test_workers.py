"""Processes that share a job: their cores, and that none is left behind."""

import os
import pathlib
import time

import pytest

from ft_jax import workers


def test_cores_are_shared_evenly(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2, 3, 6, 7})
  assert workers.core_shares(2) == [{0, 1, 2}, {3, 6, 7}]
  assert workers.core_shares(4) == [{0}, {1, 2}, {3}, {6, 7}]
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1})
  assert workers.core_shares(3) == [{0}, {0}, {1}], 'more processes than cores'


def write_and_wait(folder: str, seconds: float) -> None:
  """What a process of the test does."""
  (pathlib.Path(folder) / str(os.getpid())).write_text(str(len(os.sched_getaffinity(0))))
  time.sleep(seconds)


def test_an_error_ends_all_processes(tmp_path):
  """They have their share of the cores, and are gone when the block is left."""
  with pytest.raises(ValueError, match='enough'):
    with workers.started(2, write_and_wait, (str(tmp_path), 600.0), tmp_path / 'logs') as started:
      until = time.monotonic() + 120
      while len(list(tmp_path.glob('[0-9]*'))) < 2 and time.monotonic() < until:
        time.sleep(0.1)
      raise ValueError('enough')
  assert not any(process.is_alive() for process in started)
  shares = [int(file.read_text()) for file in tmp_path.glob('[0-9]*')]
  assert sorted(shares) == sorted(len(cores) for cores in workers.core_shares(2))
  assert [workers.describe_end(process) for process in started] == ['worker 1 ended with code 143',
                                                                   'worker 2 ended with code 143']
  assert 'stopped (SIGTERM)' in (tmp_path / 'logs' / 'worker-1.log').read_text()
