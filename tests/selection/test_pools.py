"""The same selection from memory, a file or chunks, on any number of devices and processes, and after a kill."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from selection import Embeddings, select
from selection.blocks import Blocks, cosine, Settings
from selection.journal import Journal
from selection.pools import ArrayRows, check_rows, IteratedRows

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def sets() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """3,001 source rows in 40 groups, 90 target rows in three of the groups and their labels."""
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(40, 24))
  labels = rng.integers(0, 3, 90)
  rows = lambda groups: (centres[groups] + 0.5 * rng.normal(size=(len(groups), 24)) + 0.5).astype(np.float32)
  return rows(rng.integers(0, 40, 3001)), rows(10 + labels), labels


@pytest.fixture(scope='module')
def exact(sets):
  """The selection from memory, with a stored kernel."""
  source, target, labels = sets
  return select(source, (target, labels), 150, by='example')


def same(chosen, expected) -> None:
  assert chosen.units.tolist() == expected.units.tolist()
  np.testing.assert_allclose(chosen.shares, expected.shares, rtol=2e-5)
  np.testing.assert_allclose(chosen.plan, expected.plan, rtol=1e-4, atol=1e-9)


def test_examples_are_those_of_the_targets_groups(sets, exact):
  """The chosen images lie in the groups that the target comes from, and each is drawn by the class of its group."""
  source, target, labels = sets
  centres = np.stack([target[labels == k].mean(0) for k in range(3)])
  cosines = (source @ centres.T) / np.linalg.norm(source, axis=1)[:, None] / np.linalg.norm(centres, axis=1)
  assert np.mean(cosines[exact.units].max(1) > np.quantile(cosines.max(1), 0.9)) > 0.95
  drawn = [int(reasons[0][0]) for reasons in exact.explain(1)]
  assert np.mean(drawn == cosines[exact.units].argmax(1)) > 0.95
  assert exact.shares.sum() == pytest.approx(1, abs=1e-5) and exact.target_mass.sum() == pytest.approx(1, abs=1e-5)


def test_from_a_file_from_chunks_and_without_a_stored_kernel(sets, exact, tmp_path):
  source, target, labels = sets
  same(select(source, (target, labels), 150, by='example', memory=0), exact)
  np.save(tmp_path / 'pool.npy', source)
  for pool in (tmp_path / 'pool.npy', np.load(tmp_path / 'pool.npy', mmap_mode='r'),
               [source[:7], source[7:2000], source[2000:]],
               lambda: (source[k:k + 100] for k in range(0, 3001, 100))):
    same(select(pool, (target, labels), 150, by='example', memory=0), exact)


def test_half_precision_files(sets, exact, tmp_path):
  """float16 features, as large pools are often stored: nearly the same selection."""
  source, target, labels = sets
  np.save(tmp_path / 'pool.npy', source.astype(np.float16))
  chosen = select(tmp_path / 'pool.npy', (target, labels), 150, by='example')
  assert chosen.compare(exact).overlap > 0.98


def test_fitted_to_all_rows_is_exact_and_to_a_sample_near(sets, exact):
  source, target, labels = sets
  same(select(source, (target, labels), 150, by='example', sample=3001), exact)
  fitted = select(source, (target, labels), 150, by='example', sample=1500)
  assert fitted.compare(exact).overlap > 0.75 and np.median(np.abs(fitted.shares / exact.shares - 1)) < 0.1
  again = select(source, (target, labels), 150, by='example', sample=1500)
  assert again.units.tolist() == fitted.units.tolist()


@pytest.mark.parametrize('parameters',
                         [{}, {'sample': 1000}, {'method': 'softmax'}, {'by': 'cluster', 'clusters': 60, 'size': 10}],
                         ids=['exact', 'fitted', 'softmax', 'cluster'])
def test_a_killed_pass_resumes_after_its_last_finished_chunk(sets, tmp_path, monkeypatch, parameters):
  """Killed again and again while reading any chunk: the same result bit for bit.

  Only chunks that were being processed at a kill are read twice.
  """
  source, target, labels = sets
  monkeypatch.setattr(Blocks, '_chunk_rows', lambda self: 512)
  arguments = {'by': 'example', 'size': 150, 'memory': 0, **parameters}
  expected = select(source, (target, labels), **arguments)
  reads = []

  def dying_after(chunks: int):
    def read(self, size, first=0, whole=ArrayRows.read):
      for start, chunk in whole(self, size, first):
        if len(self) == len(source):
          reads.append(start)
          if sum(r is not None for r in reads) > chunks:
            raise KeyboardInterrupt
        yield start, chunk
    return read

  unbroken = ArrayRows.read
  read_in_all, killed = 0, 0
  for _ in range(60):
    reads.clear()
    monkeypatch.setattr(ArrayRows, 'read', dying_after(5))
    try:
      chosen = select(source, (target, labels), workdir=tmp_path, **arguments)
      read_in_all += len(reads)
      break
    except KeyboardInterrupt:
      killed += 1
      read_in_all += len(reads)
    finally:
      monkeypatch.setattr(ArrayRows, 'read', unbroken)
  assert killed > 1 or parameters.get('sample') and killed
  np.testing.assert_array_equal(chosen.scores, expected.scores)
  assert chosen.units.tolist() == expected.units.tolist()
  # Six chunks make a pass. At each kill one chunk was being read and at most two had not been written yet.
  reads.clear()
  monkeypatch.setattr(ArrayRows, 'read', dying_after(10**9))
  select(source, (target, labels), **arguments)
  assert read_in_all <= len(reads) + 3 * killed
  reads.clear()
  select(source, (target, labels), workdir=tmp_path, **arguments)  # all passes are complete: nothing is computed again
  assert not reads


def test_a_workdir_belongs_to_one_selection(sets, tmp_path):
  source, target, labels = sets
  select(source, (target, labels), 150, by='example', memory=0, workdir=tmp_path)
  select(source, (target, labels), 20, by='example', memory=0, workdir=tmp_path)  # another cut of the same scores
  for changed in (dict(epsilon=0.2), dict(method='softmax')):
    with pytest.raises(ValueError, match='passes of another selection or embedding .*use another workdir'):
      select(source, (target, labels), 150, by='example', memory=0, workdir=tmp_path, **changed)
  with pytest.raises(ValueError, match=r'another selection or embedding .source differ'):
    select(source[:-1], (target, labels), 150, by='example', memory=0, workdir=tmp_path)
  (tmp_path / 'selection_passes.json').write_text('{"sour')
  with pytest.raises(ValueError, match='cannot be read'):
    select(source, (target, labels), 150, by='example', memory=0, workdir=tmp_path)


def test_saved_passes_of_another_source_raise(sets, tmp_path):
  """Other rows in memory, a rewritten file, fewer chunks or surplus scores raise ValueError."""
  source, target, labels = sets
  arguments = dict(size=150, by='example', memory=0, method='nearest')
  run = lambda pool, folder: select(pool, (target, labels), workdir=tmp_path / folder, **arguments)
  changed = source.copy()
  changed[1234] += 1
  run(source, 'memory')
  with pytest.raises(ValueError, match='source differ'):
    run(changed, 'memory')
  np.save(tmp_path / 'pool.npy', source)
  run(tmp_path / 'pool.npy', 'file')
  np.save(tmp_path / 'pool.npy', changed)
  os.utime(tmp_path / 'pool.npy', (1, 1))
  with pytest.raises(ValueError, match='source differ'):
    run(tmp_path / 'pool.npy', 'file')
  run([source[:1000], source[1000:]], 'chunks')
  with pytest.raises(ValueError, match='source differ'):
    run([source[:1000], source[1000:2000]], 'chunks')
  run(lambda: iter([source[:1000], source[1000:]]), 'function')
  with pytest.raises(ValueError, match='the saved pass holds 3,001 scores and the source has 2,000 rows'):
    run(lambda: iter([source[:1000], source[1000:2000]]), 'function')
  with open(tmp_path / 'memory' / 'scores.f32', 'ab') as stream:
    stream.write(bytes(40))
  with pytest.raises(ValueError, match='holds 3,011 scores and the source has 3,001 rows; use another workdir'):
    run(source, 'memory')


def test_an_iterator_may_reuse_its_buffer(sets, exact):
  source, target, labels = sets

  def chunks():
    buffer = np.empty((100, 24), np.float32)
    for k in range(0, 3001, 100):
      part = source[k:k + 100]
      buffer[:len(part)] = part
      yield buffer[:len(part)]

  same(select(chunks, (target, labels), 150, by='example', memory=0), exact)


def test_a_pass_with_a_damaged_journal_starts_over(sets, exact, tmp_path):
  source, target, labels = sets
  select(source, (target, labels), 150, by='example', memory=0, workdir=tmp_path)
  for name in ('solver.npz', 'iteration.npz'):
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
  with open(tmp_path / 'scores.f32', 'ab') as stream:
    stream.truncate(4 * 1000 + 3)  # cut within a number
  same(select(source, (target, labels), 150, by='example', memory=0, workdir=tmp_path), exact)


SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter('error')
import jax
devices, process, port = map(int, sys.argv[1:4])
jax.config.update('jax_num_cpu_devices', devices)
if port:
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'127.0.0.1:{port}', 2, process)
import numpy as np
from selection import select
with np.load(sys.argv[4]) as f:
  source, target, labels, classes = f['source'], f['target'], f['labels'], f['classes']
results = {}
for name, side, arguments in (
    ('class', (source, classes), dict(size=5)), ('example', source, dict(size=150, by='example')),
    ('stream', source, dict(size=150, by='example', memory=0)),
    ('nearest', source, dict(size=150, by='example', method='nearest')),
    ('cluster', source, dict(size=8, by='cluster', clusters=30))):
  chosen = select(side, (target, labels), **arguments)
  results[name] = {'units': chosen.units.tolist(), 'scores': chosen.scores.tolist(), 'plan': chosen.plan.tolist()}
if process == 0:
  with open(sys.argv[5], 'w') as stream:
    json.dump(results, stream)
"""


@pytest.mark.slow
def test_one_device_eight_devices_and_two_processes_select_the_same(sets, tmp_path):
  """Classes, clusters, and examples with and without a stored kernel, sharded over all devices: the same selection."""
  source, target, labels = sets
  np.savez(tmp_path / 'sets.npz', source=source, target=target, labels=labels, classes=np.arange(3001) % 17)
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}

  def start(devices: int, process: int, port: int, out: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, '-c', SCRIPT, str(devices), str(process), str(port),
                             str(tmp_path / 'sets.npz'),
                             str(tmp_path / out)], env=environment, stderr=subprocess.PIPE, text=True)

  for group in ([start(1, 0, 0, 'one')], [start(8, 0, 0, 'eight')],
                [start(2, 0, port, 'two'), start(2, 1, port, 'none')]):
    for process in group:
      _, printed = process.communicate(timeout=300)
      assert process.returncode == 0, printed[-2000:]
  one, eight, two = (json.loads((tmp_path / name).read_text()) for name in ('one', 'eight', 'two'))
  for other in (eight, two):
    for name, expected in one.items():
      assert other[name]['units'] == expected['units'], name
      for part in ('scores', 'plan'):
        np.testing.assert_allclose(other[name][part], expected[part], rtol=1e-4, atol=1e-9, err_msg=name)


def test_chunks_of_any_size_are_read_as_one_array():
  rows = np.arange(46, dtype=np.float32).reshape(23, 2) + 1
  pool = IteratedRows(lambda: iter([rows[:1], rows[1:1], rows[1:15], rows[15:]]))
  assert pool.known_length is None
  for first in (0, 3, 22):
    read = list(pool.read(5, first))
    assert [start for start, _ in read] == list(range(first, 23, 5))
    np.testing.assert_array_equal(np.concatenate([chunk for _, chunk in read]), rows[first:])
  assert len(pool) == 23
  wanted = np.array([22, 0, 14, 15])
  np.testing.assert_array_equal(pool.take(wanted), rows[wanted])
  np.testing.assert_array_equal(ArrayRows(rows).take(wanted), rows[wanted])


def test_an_iterator_that_changes_raises():
  lengths = iter([5, 5, 5, 5, 6])
  pool = IteratedRows(lambda: iter([np.ones((next(lengths), 2))]))
  list(pool.read(2))
  with pytest.raises(ValueError, match='had 6 rows in this pass and 5 before'):
    list(pool.read(2))


def test_bad_rows_are_counted_and_located():
  rows = np.ones((40000, 3), np.float32)
  rows[[5, 30000, 39999]] = np.nan
  with pytest.raises(ValueError, match='3 rows of source features are not finite, the first is row 5;'):
    check_rows(rows)
  with pytest.raises(ValueError, match='2 rows of the 10,001 from row 29,999 of source features are not finite, the '
                                       'first is row 30,000'):
    check_rows(rows[29999:], 29999)
  with pytest.raises(ValueError, match='row 1 of target features is shorter than'):
    check_rows(np.float32([[1, 1], [1e-30, 0]]), what='target')


def test_a_mapped_file_is_checked_while_it_is_read(tmp_path):
  """Opening reads nothing; bad rows are found in the first pass."""
  rows = np.ones((50, 4), np.float32)
  rows[33] = np.inf
  np.save(tmp_path / 'pool.npy', rows)
  source = Embeddings(np.load(tmp_path / 'pool.npy', mmap_mode='r'))
  assert isinstance(source.features, np.memmap)
  with pytest.raises(ValueError, match='1 rows of source features are not finite, the first is row 33'):
    select(source, np.ones((3, 4)) * [[1], [2], [3]], 5, by='example')


def test_blocks_hold_the_costs(sets):
  """Entries against numpy, for any chunk size; padding does not count."""
  source, target, _ = sets
  unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)
  expected = 1 - unit(source.astype(np.float64)) @ unit(target.astype(np.float64)).T
  for chunk in (None, 100):
    costs = Blocks(ArrayRows(source), target, cosine, settings=Settings(chunk=chunk))
    np.testing.assert_allclose(costs.map(lambda entries, valid: entries), expected, atol=1e-6)
    counted = costs.sum(lambda entries, valid: valid @ (0 * entries + 1), name='counted')
    assert counted.tolist() == [3001] * 90
  kernel = Blocks(ArrayRows(source), target, cosine, 0.1).store()
  np.testing.assert_allclose(kernel.map(lambda entries, valid: entries), np.exp(-expected / 0.1), rtol=1e-4)


def test_a_journal_without_a_folder_saves_nothing():
  journal = Journal()
  journal.save('a', x=1)
  assert journal.load('a') == {} and journal.scores('s').done == 0
