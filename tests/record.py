"""A few short runs by the command line, and what they give: the record that a rebuilt program is held against.

    python tests/record.py    writes tests/fixtures/record.json anew (only where a result is meant to change, with the
    reason in the commit)
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any
import zlib

import flax
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
FILE = ROOT / 'tests' / 'fixtures' / 'record.json'
SMALL = ('--config=configs/digits.py:finetune', '--config.model.width=4', '--config.image_size=16',
         '--config.augment.short_side=16',
         '--config.train.steps=20', '--config.train.batch_size=16', '--config.train.eval_every=10',
         '--config.train.log_every=1',
         '--config.train.learning_rate=0.00001', '--config.model.stem=3x3')
METHODS = ('--config.methods.l2_sp.weight=0.01', '--config.methods.bss.weight=0.001',
           '--config.methods.layerwise.distance=frobenius',
           '--config.methods.self_label.enabled=true', '--config.methods.self_label.correct_epoch=1',
           '--config.methods.self_label.threshold=0.2', '--config.methods.stoch_norm.enabled=true',
           '--config.methods.lwf.weight=4')
# By name: the flags, of which {pretrain} is the workdir of the run of that name.
RUNS: dict[str, tuple[str, ...]] = {
    'pretrain': ('--config.job=pretrain', '--config.source.test=', '--config.model.weights=',
                 '--config.train.warmup=0.2'),
    'plain': ('--config.selection.method=none', '--config.model.weights={pretrain}'),
    'joint': ('--config.model.weights={pretrain}', '--config.source_weight=0.5', *METHODS),
    'example': ('--config.model.weights={pretrain}', '--config.selection.by=example', '--config.selection.size=64'),
}


def record(folder: pathlib.Path) -> dict[str, Any]:
  """Runs all of them below a folder; what each gave, by name."""
  return {name: _run(name, flags, folder) for name, flags in RUNS.items()}


def _run(name: str, flags: tuple[str, ...], folder: pathlib.Path) -> dict[str, Any]:
  from ft_jax.training.finished_runs import load_variables

  workdir = folder / name
  command = [sys.executable, 'main.py', *SMALL, *(flag.format(pretrain=folder / 'pretrain') for flag in flags),
             f'--workdir={workdir}']
  # The compiler as users have it, and not as the tests do.
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
  run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
  if run.returncode:
    raise RuntimeError(f'{name}: {run.stderr}')
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  found = {'losses': [line['train/loss'] for line in lines], 'variables': summary(load_variables(workdir, 20))}
  if (workdir / 'selection.json').exists():
    chosen = json.loads((workdir / 'selection.json').read_text())
    found['units'], found['scores'] = chosen['units'], chosen['scores']
  return found


def summary(variables: Any) -> dict[str, tuple[float, float]]:
  """Of each array its norm, and its product with a vector of random signs, by path."""
  def numbers(path: str, value: np.ndarray) -> tuple[float, float]:
    value = np.asarray(value, np.float64).ravel()
    signs = np.random.default_rng(zlib.crc32(path.encode())).choice((-1.0, 1.0), value.size)
    return float(np.linalg.norm(value)), float(signs @ value)

  return {path: numbers(path, value) for path, value in flax.traverse_util.flatten_dict(variables, sep='/').items()}


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT))
  with tempfile.TemporaryDirectory() as temporary:
    FILE.write_text(json.dumps(record(pathlib.Path(temporary)), indent=1) + '\n')
