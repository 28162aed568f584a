"""Workdirs, selections and embeddings on object storage: no object is renamed or added to, and none is seen before it
is whole.

The clients are the real ones (gcsfs, google-cloud-storage, tensorstore); the storage is that of
tests/object_storage.py.
"""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading

from conftest import ROOT
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
from object_storage import serve
import optax
import pytest
from torch_weights import RESNET

from configs import miniature
from ft_jax import metrics
from ft_jax.jobs import finetune
from ft_jax.metrics import MetricsWriter
from ft_jax.training import initial_weights
from ft_jax.training.checkpoints import Checkpoints, Damaged
from ft_jax.training.finished_runs import history, load_variables
from ft_jax.training.step import create_state
from ft_jax.workdir import saved_steps, Workdir, write_results
from selection import Embeddings, Selection, storage
from selection.journal import Journal

FLAGS = ['--config=configs/digits.py:finetune', '--config.model.width=4', '--config.image_size=16',
         '--config.augment.short_side=16',
         '--config.model.weights=', "--config.train.learning_rate_groups=(('.*',1.0),)", '--config.selection.size=5',
         '--config.selection.method=random', '--config.train.steps=12', '--config.train.eval_every=4',
         '--config.train.log_every=2',
         '--config.train.batch_size=16']
real_sleep = asyncio.sleep
FIELDS = {'job': 'finetune', 'seed': 0, 'train': {'steps': 5}}

# Of gcsfs, after a write that failed; see `checkpoints._quieten`.
pytestmark = pytest.mark.filterwarnings(
    'ignore:Exception ignored in. <_io.BytesIO:pytest.PytestUnraisableExceptionWarning')


@pytest.fixture
def bucket(monkeypatch):
  """An empty bucket that this process's clients reach."""
  with serve() as bucket:
    for name, value in bucket.environment.items():  # before the first import, which one of them is for
      monkeypatch.setenv(name, value)
    pytest.importorskip('gcsfs')
    forget_clients()
    yield bucket
    forget_clients()
  gc.collect()  # what gcsfs leaves of a write that failed is told in the next test otherwise


def forget_clients() -> None:
  """They remember where they went."""
  from etils.epath.backend import fsspec_backend
  import gcsfs
  from orbax.checkpoint._src.path import gcs_utils

  fsspec_backend._get_filesystem.cache_clear()
  gcsfs.GCSFileSystem.clear_instance_cache()
  gcs_utils.get_bucket.cache_clear()


def state_at(step: int):
  variables = {'params': {'a': {'kernel': np.full((2, 3), step, np.float32)}},
               'batch_stats': {'a': {'mean': np.zeros(3, np.float32)}}}
  return jax.device_get(create_state(variables, optax.trace(0.9)).replace(step=jnp.int32(step)))


@pytest.mark.parametrize('name', ['100%', 'a%20b', '[1]', 'back\\slash', 'run*', '{x}', 'caf\u00e9', 'a|b'])
def test_checkpoints_below_any_name(bucket, name):
  checkpoints = Checkpoints(f'gs://bucket/{name}/run')
  checkpoints.save(1, state_at(1), {'score': 0.5, 'loss': 1.0})
  checkpoints.wait()
  jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, state_at(0)), state_at(1))
  checkpoints.close()
  assert all(stored.startswith(f'{name}/run/') for stored in bucket.names())


@pytest.mark.parametrize('name', ['C#', 'a?b', 'logs:'])
def test_names_that_cannot_hold_checkpoints_are_refused_at_once(bucket, name):
  with pytest.raises(ValueError, match=r'orbax reads as part of a URL\. Give another folder$'):
    Workdir(f'gs://bucket/{name}/run', FIELDS)
  assert not bucket.names()


def test_a_selection_and_embeddings_come_back(bucket):
  chosen = Selection.of_rows([3, 1], ['a', 'b', 'c', 'd'])
  chosen.save('gs://bucket/some/selection.json')
  embeddings = Embeddings(np.arange(12, dtype=np.float32).reshape(4, 3), [0, 0, 1, 1], ('x', 'y'),
                          ids=['a', 'b', 'c', 'd'])
  embeddings.save('gs://bucket/some/target.npz')
  assert bucket.names() == ['some/selection.json', 'some/target.npz']
  assert Selection.load('gs://bucket/some/selection.json').ids.tolist() == ['d', 'b']
  again = Embeddings.load('gs://bucket/some/target.npz')
  np.testing.assert_array_equal(again.features, embeddings.features)
  assert again.ids.tolist() == ['a', 'b', 'c', 'd'] and again.class_names == ('x', 'y')
  assert chosen.export('gs://bucket/some/chosen.txt') == 2 and bucket.read('some/chosen.txt') == b'b\nd\n'
  with pytest.raises(ValueError, match='gs://bucket/none.npz cannot be read as embeddings'):
    Embeddings.load('gs://bucket/none.npz')
  assert not bucket.refused


def test_what_fails_half_way_leaves_the_object_that_was_there(bucket):
  storage.write_whole('gs://bucket/a', b'before')
  with pytest.raises(RuntimeError), storage.whole_file('gs://bucket/a') as stream:
    stream.write(b'half')
    raise RuntimeError
  assert bucket.read('a') == b'before'
  bucket.denied = 'a'
  with pytest.raises(storage.Unwritable,
                     match='^gs://bucket/a cannot be written: .*storage.objects.create access.*start again$'):
    storage.write_whole('gs://bucket/a', b'after')
  assert bucket.read('a') == b'before'


def test_long_passes_go_on_from_their_last_chunk(bucket):
  """Scores are an object for each chunk, as nothing can be added to one."""
  journal = Journal('gs://bucket/passes', {'size': 3})
  journal.save('potentials', values=np.arange(3))
  for rows in (4, 2):
    journal.scores('scores').append(np.full(rows, rows, np.float32))
  again = Journal('gs://bucket/passes', {'size': 3})
  np.testing.assert_array_equal(again.load('potentials')['values'], np.arange(3))
  assert again.load('others') == {} and again.scores('scores').done == 6
  np.testing.assert_array_equal(again.scores('scores').all(), [4, 4, 4, 4, 2, 2])
  with pytest.raises(ValueError, match='passes of another selection or embedding'):
    Journal('gs://bucket/passes', {'size': 4})
  assert not bucket.refused


def test_metrics_are_written_as_a_whole_when_asked_and_from_time_to_time(bucket, monkeypatch):
  monkeypatch.setattr(metrics, 'SECONDS', float('inf'))  # however slow the machine is
  work = Workdir('gs://bucket/run', FIELDS)
  writer = MetricsWriter(work, 0)
  writer.write(1, {'train/loss': 3.0})
  assert bucket.read('run/metrics.jsonl') == b''
  writer.flush()
  assert work.metrics() == [{'step': 1, 'train/loss': 3.0}]
  monkeypatch.setattr(metrics, 'SECONDS', 0.0)
  writer.write(2, {'train/loss': 2.0})
  writer.close()
  again = MetricsWriter(work, 1)
  again.write(2, {'train/loss': 1.0})
  again.close()
  assert work.metrics() == [{'step': 1, 'train/loss': 3.0}, {'step': 2, 'train/loss': 1.0}]
  events = [bucket.read(name) for name in bucket.names('run/tensorboard/')]
  assert events and b'train/loss' in events[0] and not bucket.refused


def test_checkpoints_come_back_and_damaged_ones_are_set_aside(bucket):
  """One whose upload was cut off by a kill is none: orbax writes under the last name, and says at the end that all is
  there."""
  checkpoints = Checkpoints('gs://bucket/run')
  for step, score in ((1, 0.9), (2, 0.2)):
    checkpoints.save(step, state_at(step), {'score': score, 'loss': 1.0})
  checkpoints.close()
  with bucket.lock:
    for name in bucket.names('run/checkpoints/2/'):
      if not name.endswith('2/commit_success.txt'):
        bucket.objects[name.replace('/2/', '/3/')] = bucket.objects[name]
    bucket.objects['run/checkpoints/3/state/remains'] = b'x', 1
  assert saved_steps('gs://bucket/run') == [1, 2]
  checkpoints = Checkpoints('gs://bucket/run')
  assert (checkpoints.latest_step, checkpoints.best_step) == (2, 1)
  # waits for orbax's thread, which removes what the killed one left
  checkpoints.save(3, state_at(3), {'score': 0.1, 'loss': 1.0})
  checkpoints.wait()
  assert 'run/checkpoints/3/state/remains' not in bucket.names()
  jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(3, state_at(0)), state_at(3))
  name = max(bucket.names('run/checkpoints/3/state/d/'), key=lambda name: len(bucket.read(name)))
  bucket.objects[name] = bucket.read(name)[:20], bucket.objects[name][1] + 1000
  with pytest.raises(Damaged, match='gs://bucket/run/checkpoints/3 cannot be read') as error:
    checkpoints.restore(3, state_at(0))
  before = len(bucket.names('run/checkpoints/3/'))
  checkpoints.set_aside(3, str(error.value))
  assert not bucket.names('run/checkpoints/3/') and len(bucket.names('run/damaged/3/')) == before
  assert checkpoints.latest_step == 1 and [kept.step for kept in history('gs://bucket/run')] == [1]
  checkpoints.close()
  np.testing.assert_array_equal(load_variables('gs://bucket/run')['params']['a']['kernel'], np.ones((2, 3)))
  assert not bucket.refused


def test_a_run_of_another_config_and_a_folder_of_something_else(bucket):
  work = Workdir('gs://bucket/run', FIELDS)
  write_results(work, {'loss': 1.0})
  with pytest.raises(ValueError, match='gs://bucket/run belongs to a run with another config'):
    Workdir('gs://bucket/run', {**FIELDS, 'seed': 1})
  storage.write_whole('gs://bucket/thesis/chapter.tex', b'x')
  with pytest.raises(ValueError, match='gs://bucket/thesis is not empty and holds no run'):
    Workdir('gs://bucket/thesis', FIELDS)


def test_weights_in_an_object(bucket, tmp_path):
  path = ROOT / 'tests' / 'fixtures' / 'resnet18.pth'
  storage.write_whole('gs://bucket/weights/resnet18.pth', path.read_bytes())
  there, here = (initial_weights.load_weights(str(name), RESNET) for name in ('gs://bucket/weights/resnet18.pth', path))
  assert there.about['fingerprint'] == here.about['fingerprint']


def test_a_bucket_that_cannot_be_reached(bucket, monkeypatch):
  with pytest.raises(OSError, match='gs://other/run/config.json cannot be written: there is no bucket other, or it '
                                    'cannot be accessed from'):
    Workdir('gs://other/run', FIELDS)
  monkeypatch.setenv('STORAGE_EMULATOR_HOST', 'http://127.0.0.1:9')
  monkeypatch.setattr('gcsfs.retry.asyncio.sleep', lambda seconds: real_sleep(0))
  forget_clients()
  with pytest.raises(
      OSError, match=r'gs://bucket/run cannot be reached \(.*is there a bucket bucket, and may this machine use it'):
    Workdir('gs://bucket/run', FIELDS)


@pytest.mark.parametrize('path, says', [('s3://bucket/run', 'of the kind s3:// is not supported; supported: gs://'),
                                        ('gs://bucket/run', 'needs the package gcsfs: pip install gcsfs')])
def test_what_is_missing_is_said_at_the_start(monkeypatch, path, says):
  monkeypatch.setattr(storage.importlib.util, 'find_spec', lambda name: None)
  config = miniature.get_config('finetune')
  config.embeddings_dir = path
  for use in (lambda: Workdir(path,
                              FIELDS), lambda: finetune.Settings.from_config(config), lambda: Embeddings.load(path),
              lambda: Selection.of_rows([0], ['a']).save(path)):
    with pytest.raises(ValueError, match=says):
      use()


@pytest.mark.parametrize('path', ['gs:', 'gs:bucket', 'gs:/bucket/run', 'gs://', 'gs:///run'])
def test_invalid_urls_are_not_taken_for_folders(path):
  with pytest.raises(ValueError, match='is not a valid object storage URL; expected gs://bucket/folder'):
    storage.located(path)


def test_paths_on_a_disk(tmp_path, monkeypatch):
  """They stay what they were: relative to the working directory, `~` is the home."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path))
  assert storage.absolute('a') == storage.absolute('~/a') == epath.Path(tmp_path).resolve() / 'a'
  assert storage.absolute('gs') == epath.Path(tmp_path).resolve() / 'gs'


@pytest.mark.slow
def test_a_whole_run_is_killed_and_goes_on(bucket, tmp_path):
  """Selection, embedding, training, report, all on object storage, with warnings as errors; each step once."""
  # What it compiles is kept elsewhere: a process that is killed may leave half of a program there, for all others to
  # read.
  env = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(tmp_path), 'JAX_PLATFORMS': 'cpu',
         'XLA_FLAGS': '--xla_backend_optimization_level=0',
         'PYTHONWARNINGS': 'error,ignore:the load_module() method is deprecated:DeprecationWarning'}
  command = [sys.executable, 'main.py', *FLAGS, '--workdir=gs://bucket/runs/one']
  process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
  committed = threading.Event()
  bucket.stored = lambda name: committed.set() if name == 'runs/one/checkpoints/4/commit_success.txt' else None
  while not committed.wait(0.05):
    assert process.poll() is None, process.communicate()[1]
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert 'runs/one/results.json' not in bucket.names()
  run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
  assert run.returncode == 0 and 'resuming from step ' in run.stderr and 'embedding' not in run.stderr, run.stderr
  lines = [json.loads(line) for line in bucket.read('runs/one/metrics.jsonl').splitlines()]
  assert [line['step'] for line in lines] == [2, 4, 6, 8, 10, 12]
  results = json.loads(bucket.read('runs/one/results.json'))
  assert results['test']['images'] == 252 and saved_steps('gs://bucket/runs/one')[-1] == 12
  assert b'</html>' in bucket.read('runs/one/report.html') and not bucket.refused
  assert {name.split('/')[2] for name in bucket.names('runs/one/')} == {
      'config.json', 'selection.json', 'embeddings', 'metrics.jsonl', 'tensorboard', 'checkpoints', 'duplicates.json',
      'predictions.json', 'results.json', 'report.html'}
