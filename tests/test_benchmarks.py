"""Benchmarks that reach into the library still run."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_benchmark_of_selection():
  """At small sizes, where its numbers say nothing; beside POT, whose shares it must give."""
  run = subprocess.run([sys.executable, '-W', 'error', 'benchmarks/selection.py', '--small', '--rounds', '1',
                        '--only', 'class,stream,scoring,gpu'],
                       cwd=ROOT, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  difference = next(line.split()[-1] for line in run.stdout.splitlines() if 'relative difference of the shares' in line)
  assert float(difference) < 1e-4 and 'not stored' in run.stdout


def test_benchmark_of_the_pipeline():
  """One short round, whose numbers say nothing."""
  run = subprocess.run([sys.executable, '-W', 'error', 'benchmarks/pipeline.py', '--rounds=1', '--files=512', '--only-ours'],
                       cwd=ROOT, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  assert 'ours ' in run.stdout and 'with config.data.cache: ' in run.stdout


def test_benchmark_of_studies():
  """At small sizes; the objectives of logistic regression must be as low as scikit-learn's."""
  run = subprocess.run([sys.executable, '-W', 'error', 'benchmarks/studies.py', '--small', '--rounds', '1'],
                       cwd=ROOT, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  rows = [line.split('|') for line in run.stdout.splitlines() if line.startswith('|  ')]  # neither titles nor the line below them
  assert len(rows) == 3 and all(abs(float(row[3])) < 1e-4 and abs(float(row[6])) < 1e-4 for row in rows)
  assert 'not at equal loss' not in run.stdout
  assert 'below 2,000 MB: met' in run.stdout and 'logme' in run.stdout
