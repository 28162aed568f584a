"""Several processes as one: the same run whatever their number, nothing hangs where one ends, and each is told what to
do."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from orbax import checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 12
FLAGS = ['--config=configs/miniature.py:finetune', '--config.model.weights=', '--config.model.width=4',
         '--config.image_size=16',
         '--config.augment.short_side=18', '--config.model.sync_batch_norm=true', '--config.selection.size=2',
         '--config.model.stem=3x3', '--config.train.batch_size=16', f'--config.train.steps={STEPS}',
         '--config.train.eval_every=4',
         '--config.train.log_every=1', '--config.train.keep_epochs=(1.45,)',  # step 4
         # Random weights and small batches of alike images make much of a rounding: with more, nothing could be
         # compared.
         '--config.train.learning_rate=0.00001']
# The long form begins with as many processes as there are devices.
STRESS = bool(os.environ.get('FT_JAX_STRESS'))


def free_port() -> int:
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


def start(command: list[str], devices: int, flags: str = '') -> subprocess.Popen:
  env = {**os.environ, 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} {flags}', 'JAX_PLATFORMS': 'cpu',
         'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # the runs are so short that compiling is most of them
         # The exception is ml_collections' own, when it reads a config on Python 3.11.
         'PYTHONWARNINGS': 'error,ignore:the load_module() method is deprecated:DeprecationWarning'}
  return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def job(workdir: pathlib.Path, data: list[str], processes: int) -> list[subprocess.Popen]:
  """The job on four devices, shared by so many processes."""
  port = free_port()
  common = [sys.executable, 'main.py', *FLAGS, *data, f'--workdir={workdir}']
  several = [[f'--coordinator=localhost:{port}', f'--num_processes={processes}', f'--process_id={i}']
             for i in range(processes)]
  return [start(common + flags, 4 // processes) for flags in (several if processes > 1 else [[]])]


def ended(processes: list[subprocess.Popen], seconds: float = 300) -> list[tuple[int, str]]:
  """Exit codes and what was printed; a process that hangs is a failure, and does not outlive the test."""
  try:
    return [(process.returncode, printed)
            for process, (_, printed) in [(p, p.communicate(timeout=seconds)) for p in processes]]
  finally:
    for process in processes:
      process.kill()


def wait_for(path: pathlib.Path, processes: list[subprocess.Popen]) -> None:
  deadline = time.monotonic() + 300
  while not path.exists():
    assert all(process.poll() is None for process in processes), ended(processes)
    assert time.monotonic() < deadline
    time.sleep(0.01)


def states(workdir: pathlib.Path) -> list[dict]:
  """What is kept of the beginning and of the end."""
  with ocp.CheckpointManager(workdir / 'checkpoints', item_names=('state', 'about')) as manager:
    assert manager.latest_step() == STEPS
    return [manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))['state']
            for step in (4, STEPS)]


def difference(one: dict, other: dict) -> np.ndarray:
  """Of all numbers of two trees, in one row."""
  assert jax.tree.structure(one) == jax.tree.structure(other)
  return np.concatenate([np.ravel(np.asarray(a, np.float64) - b)
                         for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other))])


def told(workdir: pathlib.Path) -> tuple[dict, list[dict], dict]:
  """The selection, the metrics and the results of a run."""
  selection, metrics, results = ((workdir / name).read_text()
                                 for name in ('selection.json', 'metrics.jsonl', 'results.json'))
  return json.loads(selection), [json.loads(line) for line in metrics.splitlines()], json.loads(results)


_DRAWN = """
import sys
from ft_jax import cluster
cluster.start(sys.argv[1], 2, int(sys.argv[2]))
from ft_jax.training import initial_weights
from ft_jax.models import build
variables = initial_weights.init_variables(build('resnet18', {'target': 3}, width=4, stem='3x3', size=16), 0, None)
print('drawn', initial_weights.weights_fingerprint(variables), file=sys.stderr)
"""


@pytest.mark.slow
def test_fresh_weights_are_the_same_on_hosts_with_other_processors():
  """The last bits of drawn numbers depend on what the compiler makes of a processor, and every host must start from the
  same."""
  address = f'localhost:{free_port()}'
  processes = [start([sys.executable, '-c', _DRAWN, address, str(process)], 1, flags)
               for process, flags in enumerate(('', '--xla_cpu_max_isa=SSE4_2'))]
  codes, printed = zip(*ended(processes))
  assert codes == (0, 0), printed
  first, second = ([line for line in lines.splitlines() if line.startswith('drawn')] for lines in printed)
  assert first == second and len(first) == 1


@pytest.mark.slow
def test_any_number_of_processes_comes_to_the_same(photos, pool, tmp_path):
  """A whole job by one process, and the same by two: one of them is asked to stop, both save the same step, and two go
  on and finish.

  In the long form four begin, of which one is killed, and the others end by themselves; the newest checkpoint is
  damaged, and the two go on from the one before.
  """
  one, many, data = tmp_path / 'one', tmp_path / 'many', [f'--config.target.name=folder:{photos}',
                                                          f'--config.source.name=folder:{pool}']
  [(code, printed)] = ended(job(one, data, 1))
  assert code == 0, printed

  damaged = kill_one_of_four(many, data) if STRESS else None
  two = job(many, data, 2)
  # before the step is compiled: the twelve of them take less than a second
  wait_for(damaged or many / 'selection.json', two)
  two[1].terminate()
  codes, printed = zip(*ended(two))
  assert codes == (143, 143), printed
  assert '2 processes with 4 devices' in printed[0] and 'training 12 steps' in printed[0]
  # The first one alone tells how it goes.
  assert 'training' not in printed[1] and 'process 1: warning: config.model.weights is empty' in printed[1]
  if damaged:
    assert f'It is set aside in {damaged}' in printed[0] and 'resuming from step' in printed[0]
  assert 'the same command resumes from there' in printed[0] and 'the same command' not in printed[1]

  codes, printed = zip(*ended(job(many, data, 2)))
  assert codes == (0, 0) and 'resuming from step' in printed[0], printed

  (chosen, lines, results), (chosen_many, lines_many, results_many) = told(one), told(many)
  assert chosen_many['units'] == chosen['units']
  np.testing.assert_allclose(chosen_many['scores'], chosen['scores'], rtol=1e-4)
  for path in (one / 'embeddings').iterdir():
    with np.load(path) as expected, np.load(many / 'embeddings' / path.name) as found:
      assert set(found) == set(expected)
      for name in found:
        np.testing.assert_array_equal(found[name],
                                      expected[name]) if name != 'features' else np.testing.assert_allclose(
            found[name], expected[name], rtol=1e-4, atol=1e-5)
  assert [line['step'] for line in lines_many] == [line['step'] for line in lines] == list(range(1, STEPS + 1))
  np.testing.assert_allclose([line['train/loss'] for line in lines_many], [line['train/loss'] for line in lines],
                             rtol=1e-4)
  for split, images in (('val', 4), ('test', 20)):  # neither a multiple of the batch
    assert results_many[split]['images'] == results[split]['images'] == images
    assert [row['images'] for row in results_many[split]['per_class']] == [row['images']
                                                                           for row in results[split]['per_class']]
  predicted, predicted_many = (json.loads((folder / 'predictions.json').read_text()) for folder in (one, many))
  assert predicted_many == predicted and len(predicted['ids']) == len(set(predicted['ids'])) == 20
  assert results_many['cost']['images'] == results['cost']['images'] == STEPS * 32
  assert results_many['best_step'] == results['best_step'] and results_many['devices'] == results['devices']
  np.testing.assert_allclose(results_many['test']['loss'], results['test']['loss'], rtol=1e-4)
  (begun, end), (begun_many, end_many) = states(one), states(many)
  moved, moved_many = difference(end['params'], begun['params']), difference(end_many['params'], begun_many['params'])
  # float32 keeps no more of such small steps
  assert np.linalg.norm(moved_many - moved) < 0.02 * np.linalg.norm(moved) != 0
  assert np.abs(difference(end_many['batch_stats'], end['batch_stats'])).max() < 1e-4
  assert not [path for path in many.iterdir() if path.name.startswith('.')]


def kill_one_of_four(workdir, data):
  """Also damages the newest checkpoint; returns where it is to be set aside."""
  started = job(workdir, data, 4)
  wait_for(workdir / 'checkpoints' / '8', started)
  started[-1].kill()
  *others, (killed, _) = ended(started)
  assert killed == -signal.SIGKILL
  for code, printed in others:
    assert code in (1, -signal.SIGABRT), printed
    assert 'another process ended' in printed or 'another task died' in printed, printed
  newest = max((path for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()),
               key=lambda path: int(path.name))
  largest = max((newest / 'state' / 'd').iterdir(), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-100])
  return workdir / 'damaged' / newest.name


TOGETHER = """
import json, pathlib, sys
from etils import epath
from ft_jax import cluster, command, parallel, progress
process, port, folder = int(sys.argv[1]), sys.argv[2], epath.Path(sys.argv[3])
progress.show_log(process)
with command.exit_codes(False):
  assert cluster.start(f'localhost:{port}', 2, process) == process
  import jax
  import numpy as np
  from ft_jax.data import open_set, unreadable
  from ft_jax.data.pipeline import EvalBatches, Transform, train_batches

  def refusal(function, *args):
    try:
      function(*args)
    except ValueError as error:
      return str(error)

  def no_such():
    raise ValueError('only process 0 asks')

  told = {'agreed': parallel.agreed([process, 'x' * 300]), 'asked': parallel.agreed(lambda: {'process': process}),
          'everyone': parallel.everyone({'process': process, 'padding': 'x' * (10 + 500 * process)}),
          'refused': refusal(parallel.agreed, no_such), 'same': refusal(parallel.check_same, {'a': 1, 'b': 2}, 'files'),
          'differ': refusal(parallel.check_same, {'a': 1, 'b': process}, 'files')}
  parallel._VISIBLE_SECONDS = 1
  told['shared'] = refusal(parallel.check_shared, folder / 'shared', '--workdir')
  told['apart'] = refusal(parallel.check_shared, folder / f'of_{process}', '--workdir')
  source, transform = open_set(f'folder:{folder / "good"}', 'train', ''), Transform(16, short_side=16)
  told['train'] = [np.concatenate([batch['row'], batch['input'].sum((1, 2, 3))]).tolist() for batch, _ in zip(
      train_batches(source, transform, 8, stream='target', seed=3, start=5), range(3))]
  told['eval'] = [[batch['row'].tolist(), batch['mask'].tolist()] for batch in EvalBatches(source, transform, 8)]
  told['damaged'] = unreadable.drop(open_set(f'folder:{folder / "damaged"}', 'train', ''), 'train', False)[1]
  (folder / f'{process}.json').write_text(json.dumps(told))
  list(EvalBatches(open_set(f'folder:{folder / "damaged"}', 'train', ''), transform, 48))
  parallel.barrier('read')
"""


def test_what_two_processes_agree_on_and_share_and_how_one_ends_the_other(photos, tmp_path):
  """Decisions are process 0's, refusals come to all; each reads its part; an image that one cannot read ends both, by
  name."""
  from ft_jax.data import open_set
  from ft_jax.data.pipeline import train_batches, Transform

  for name in ('good', 'damaged'):
    shutil.copytree(photos, tmp_path / name)
  broken = tmp_path / 'damaged' / 'train' / 'wall' / '11.jpg'  # the last one, of the second process
  broken.write_bytes(broken.read_bytes()[:200])
  port = str(free_port())
  both = [start([sys.executable, '-c', TOGETHER, str(i), port, str(tmp_path)], 2) for i in range(2)]
  (code, printed), (other_code, other_printed) = ended(both, 120)
  assert other_code == 1, other_printed
  assert 'process 1: error: train/wall/11.jpg cannot be read as an image' in other_printed, other_printed
  assert code in (1, -signal.SIGABRT), printed
  assert 'error: another process ended' in printed or 'another task died' in printed, printed
  assert 'Traceback' not in printed + other_printed
  first, second = (json.loads((tmp_path / f'{i}.json').read_text()) for i in range(2))
  alike = ('agreed', 'asked', 'everyone', 'refused', 'same', 'differ', 'shared', 'damaged')
  assert {name: first[name] for name in alike} == {name: second[name] for name in alike}
  assert first['agreed'] == [0, 'x' * 300] and first['asked'] == {'process': 0}
  assert first['refused'] == 'only process 0 asks'
  assert [value['process'] for value in first['everyone']] == [0, 1] and len(first['everyone'][1]['padding']) == 510
  assert first['same'] is None and first['differ'].startswith('process 1 has other files than process 0: b')
  assert first['shared'] is None and not list((tmp_path / 'shared').iterdir())
  assert '--workdir must be a folder that all hosts share' in first['apart']
  assert 'process 1 (1 of 2 processes)' in first['apart']
  assert first['damaged'] == ['train/wall/11.jpg']
  # One process alone reads the same examples, cropped alike, at the same places.
  source = open_set(f'folder:{photos}', 'train', '')
  batches = train_batches(source, Transform(16, short_side=16), 8, stream='target', seed=3, start=5)
  for mine, others, batch in zip(first['train'], second['train'], batches):
    assert mine[:4] + others[:4] == batch['row'].tolist()
    assert mine[4:] + others[4:] == batch['input'].sum((1, 2, 3)).tolist()
  seen = [index for part in zip(first['eval'], second['eval']) for rows, mask in part for index, real in zip(rows, mask)
          if real]
  assert seen == list(range(48))


ALONE = """
import sys
from ft_jax import cluster, command, progress
progress.show_log(int(sys.argv[2]))
with command.exit_codes(False):
  cluster.start(sys.argv[1], 2, int(sys.argv[2]), seconds=2)
"""


def test_a_coordinator_that_nobody_reaches_is_named():
  """Both a first process that waits for the second and a second that finds no first end after the time, and say what to
  look at."""
  taken = socket.socket(socket.AF_INET6)
  taken.bind(('::', 0))
  taken.listen()
  port = free_port()
  started = [start([sys.executable, '-c', ALONE, f'localhost:{port + i}', str(i)], 1) for i in range(2)]
  started.append(start([sys.executable, '-c', ALONE, f'localhost:{taken.getsockname()[1]}', '0'], 1))
  results = ended(started, 60)
  taken.close()
  for i, (code, printed) in enumerate(results[:2]):
    assert code == 1, printed
    assert f'error: process {i} of 2 has not met the others at localhost:{port + i} within 2 s. ' in printed, printed
  assert results[2][0] == 1 and 'process 0 of 2 cannot listen on port' in results[2][1], results[2][1]
  assert 'in use' in results[2][1], results[2][1]
