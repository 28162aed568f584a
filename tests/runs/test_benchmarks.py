"""Benchmarks that reach into the library still run."""

import os
import pathlib
import subprocess
import sys

from conftest import write_images
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import scaling

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif('FT_JAX_STRESS' not in os.environ, reason='FT_JAX_STRESS is not set: a part of make stress')
def test_benchmark_of_selection():
  """At small sizes, where its numbers say nothing; beside POT, whose shares it must give."""
  run = subprocess.run([sys.executable, '-W', 'error', 'benchmarks/selection.py', '--small', '--rounds', '1',
                        '--only', 'class,stream,scoring,gpu'],
                       cwd=ROOT, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  difference = next(line.split()[-1] for line in run.stdout.splitlines() if 'relative difference of the shares' in line)
  assert float(difference) < 1e-4 and 'not stored' in run.stdout


@pytest.mark.slow
def test_benchmark_of_the_pipeline():
  """One short round, whose numbers say nothing."""
  run = subprocess.run([sys.executable, '-W', 'error', 'benchmarks/pipeline.py', '--rounds=1', '--files=512',
                        '--only-ours'],
                       cwd=ROOT, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  assert 'ours ' in run.stdout and 'with config.data.cache: ' in run.stdout


@pytest.mark.slow
def test_benchmark_of_duplicates(tmp_path):
  """On a few crops of photographs; most copies that are not cropped must be found (some crops are of a plain sky)."""
  for seed, name in enumerate(('pool', 'target')):
    for split in ('train', 'test'):
      write_images(tmp_path / name / split, {'a': 6, 'b': 6}, seed=2 * seed + (split == 'test'))
  run = subprocess.run([sys.executable, '-W', 'error', 'benchmarks/duplicates.py', str(tmp_path), '--sets=pool,target',
                        '--images=10',
                        '--rows', '300', '50'], cwd=ROOT, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  rows = {row[1].strip(): row[2:-1] for row in (line.split('|') for line in run.stdout.splitlines()) if len(row) > 2}
  assert float(rows['mirrored, quality 75'][-1].split()[0]) >= 60 and 'comparing 300 with 50: ' in run.stdout


@pytest.mark.slow
def test_benchmark_of_studies():
  """At small sizes; the objectives of logistic regression must be as low as scikit-learn's."""
  run = subprocess.run([sys.executable, '-W', 'error', 'benchmarks/studies.py', '--small', '--rounds', '1'],
                       cwd=ROOT, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  # neither titles nor the line below them
  rows = [line.split('|') for line in run.stdout.splitlines() if line.startswith('|  ')]
  assert len(rows) == 3 and all(abs(float(row[3])) < 1e-4 and abs(float(row[6])) < 1e-4 for row in rows)
  assert 'not at equal loss' not in run.stdout
  assert 'below 2,000 MB: met' in run.stdout and 'logme' in run.stdout


@pytest.mark.slow
def test_benchmark_of_coverage():
  """With few comparisons; intervals over seeds and images contain the truth more often than those over seeds alone."""
  run = subprocess.run([sys.executable, '-W', 'error', 'benchmarks/coverage.py', '--small'], cwd=ROOT,
                       capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  rows = [[float(cell.split()[0]) for cell in line.split('|')[4:6]] for line in run.stdout.splitlines()
          if line.startswith(('| 185', '| 1,692'))]
  assert len(rows) == 18 and np.mean([ours for ours, _ in rows]) >= 94 > np.mean([seeds for _, seeds in rows])


def test_what_a_step_sends_is_read_right():
  """Bytes of a compiled function that sums and gathers known arrays over four devices."""
  def function(x):
    total = jax.lax.psum({'a': x['a'], 'b': x['b'].astype(jnp.bfloat16)}, 'batch')
    return total, jax.lax.all_gather(x['c'], 'batch')

  shapes = {'a': (4, 10, 3), 'b': (4, 7), 'c': (4, 5)}
  compiled = jax.pmap(function, axis_name='batch').lower({name: np.zeros(shape, np.float32)
                                                          for name, shape in shapes.items()}).compile()
  found = scaling.sent(compiled.as_text())
  assert found['all-gather'].size == 4 * 5 * 4 and found['all-gather'].operations == 1
  reduced = found['all-reduce']
  assert reduced.arrays == 2 and reduced.size in (30 * 4 + 7 * 2, 30 * 4 + 7 * 4)  # a CPU may sum bfloat16 as float32
  tuple_of = ('%x = (f32[2,3]{1,0}, s32[]) all-reduce-start(%a, %b), channel_id=1\n'
              '%y = (f32[2,3]{1,0}, s32[]) all-reduce-done(%x)')
  assert scaling.sent(tuple_of) == {'all-reduce': scaling.Sent(1, 2, 28)}
