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
