"""Log lines and bars that a library shows leave the logging of its caller as it was."""

import importlib.util
import logging
import sys
import threading
import types

from absl import logging as absl_logging
import pytest

from ft_jax import progress


def state():
  loggers = [progress.log, logging.getLogger('selection'), absl_logging.get_absl_logger()]
  return [(logger.level, logger.propagate, list(logger.handlers), list(logger.filters)) for logger in loggers]


@pytest.fixture
def quiet(monkeypatch):
  """Loggers as in a program that has configured nothing, whatever other tests did."""
  for logger in (progress.log, logging.getLogger('selection')):
    monkeypatch.setattr(logger, 'handlers', [])
    monkeypatch.setattr(logger, 'propagate', True)
    monkeypatch.setattr(logger, 'level', logging.NOTSET)
    logger.manager._clear_cache()
  yield
  progress.log.manager._clear_cache()


def test_log_shown_leaves_nothing_behind(quiet, capsys):
  before = state()
  progress.log.info('before')
  with progress.log_shown(str.upper):
    progress.log.info('%d within', 1)
    assert absl_logging.get_absl_logger().level == logging.WARNING
    with progress.log_shown():
      progress.log.info('inside')
    progress.log.info('again')
  progress.log.info('after')
  assert capsys.readouterr().err.split('\n') == ['1 WITHIN', 'INSIDE', 'AGAIN', '']
  assert state() == before


def test_calls_in_several_threads(quiet, capsys):
  """The lines are shown until the last of them ends, each once."""
  before, both = state(), threading.Barrier(2)

  def work(name, last):
    with progress.log_shown():
      both.wait()
      if not last:
        return
      thread_one.join()
      progress.log.info(name)

  thread_one = threading.Thread(target=work, args=('one', False))
  thread_two = threading.Thread(target=work, args=('two', True))
  for thread in (thread_one, thread_two):
    thread.start()
  for thread in (thread_one, thread_two):
    thread.join()
  assert capsys.readouterr().err == 'two\n' and state() == before


def test_a_program_that_shows_the_log_itself_keeps_doing_so(quiet, capsys):
  progress.show_log()
  before = state()
  with progress.log_shown(str.upper):
    progress.log.info('once')
  progress.log.info('after')
  assert capsys.readouterr().err == 'once\nafter\n' and state()[:2] == before[:2]


def test_in_a_notebook(quiet, capsys, monkeypatch):
  """Lines are plain output there, and bars are widgets; without ipywidgets, they are hidden."""
  monkeypatch.setitem(sys.modules, 'ipykernel', types.ModuleType('ipykernel'))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with progress.log_shown():
    progress.log.info('line')
    for _ in progress.bar(range(2), 'counting', 2):
      pass
  assert capsys.readouterr() == ('line\n', '')
