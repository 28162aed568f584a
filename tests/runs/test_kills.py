"""A run that is killed again and again ends as the one that nobody disturbed; the long form of this is `make
stress`."""

import ast
import shutil
import signal

import jax
import killed
from killed import Moment
import numpy as np
from orbax import checkpoint as ocp
import pytest
from stress import WORKLOADS

FLAGS = WORKLOADS['short'].flags
# One after the other in one run; what is finished before a moment is not done again, so each is the first chance of its
# kind.
MOMENTS = (
    # The first checkpoint of the pre-training is written and not yet in its place.
    (Moment(kind='checkpoint', count=20), 'checkpoint being written'),
    # So late that C++ writes the arrays of the next one.
    (Moment(kind='checkpoint', count=12, seconds=0.02), ''),
    # The results are written and not yet in their place.
    (Moment(kind='results', count=2), 'results and report'))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The undisturbed run, and what it compiled."""
  folder = tmp_path_factory.mktemp('kills')
  done = killed.run(folder / 'whole', FLAGS, cache=folder / 'compiled')
  assert done.code == 0, done.printed
  return folder / 'whole', folder / 'compiled'


@pytest.mark.slow
def test_killed_again_and_again(whole, tmp_path):
  """By kill -9 between the halves of writing a file, and in the middle of writing: nothing differs, no file is ever
  half there."""
  expected, cache = whole
  workdir = tmp_path / 'run'
  for moment, met in MOMENTS:
    done = killed.run(workdir, FLAGS, moment, cache=cache)
    assert done.code == -signal.SIGKILL and met in done.met, (moment, done)
    assert killed.broken(workdir) == []
  done = killed.run(workdir, FLAGS, cache=cache)
  assert done.code == 0, done.printed
  assert killed.differences(workdir, expected) == []


@pytest.mark.slow
def test_differences_are_seen(whole, tmp_path):
  """One number of one array, a step that is there twice, another result."""
  expected, _ = whole
  changes = {
      'params': lambda run: _change_a_number(run / 'checkpoints' / '8' / 'state'),
      'not each once': lambda run: _edit(run / 'metrics.jsonl', lambda text: text + text.splitlines(keepends=True)[-1]),
      'results.json: best_step differs': lambda run: _edit(
          run / 'results.json', lambda text: text.replace('"best_step": ', '"best_step": 1'))}
  for number, (words, change) in enumerate(changes.items()):
    run = tmp_path / str(number)
    shutil.copytree(expected, run)
    _edit(run / 'results.json', lambda text, run=run: text.replace(str(expected), str(run)))
    assert killed.differences(run, expected) == []
    change(run)
    assert any(words in line for line in killed.differences(run, expected)), words


def test_phases_name_functions_that_exist():
  """A phase whose function is renamed or moved would never be met."""
  for file, function, *_ in (*killed.PHASES, killed.LOOP, killed.PRETRAIN):
    tree = ast.parse((killed.ROOT / file).read_text())
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (file, function)


def _edit(path, change):
  path.write_text(change(path.read_text()))


def _change_a_number(folder):
  with ocp.StandardCheckpointer() as checkpointer:
    state = jax.tree.map(np.array, checkpointer.restore(folder))
    state['params']['bn1']['bias'][0] += 1e-6
    checkpointer.save(folder, state, force=True)
