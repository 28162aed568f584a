"""A comparison as job compare writes it, with made-up predictions, for tests of its statistics and its page."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

import numpy as np

from configs import default
from ft_jax.studies.comparison import summarize
from ft_jax.workdir import Workdir
import selection

PLAIN, UOT, RANDOM = ({'selection.method': method} for method in ('none', 'uot', 'random'))


def predictions(correct: np.ndarray, classes: int = 4) -> dict[str, Any]:
  """Of images of all classes in turn; those that are wrong are taken for the next class."""
  labels = np.arange(len(correct)) % classes
  return {'split': 'test', 'classes': [f'class {k}' for k in range(classes)],
          'ids': [f'test/{k}.jpg' for k in range(len(correct))], 'labels': labels.tolist(),
          'predictions': np.where(correct, labels, (labels + 1) % classes).tolist()}


def make(variants: Mapping[str, tuple[Mapping[str, Any], Mapping[int, np.ndarray]]],
         images: Mapping[str, int] | None = None, val: Mapping[str, float] | None = None,
         **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """compare.json without summaries, and predictions by folder.

  Args:
    variants: by name the fields, and by seed which test images are right.
    images: through the network, by variant; 1000 for the others.
    val: accuracy on val, by variant; 0.5 for the others.
    **fields: of compare.json.
  """
  found, tables = {}, []
  for name, (own, of_seeds) in variants.items():
    cells = []
    for seed, correct in of_seeds.items():
      folder = f'cells/{name.replace(" ", "-")}-seed-{seed}'
      found[folder] = predictions(np.asarray(correct))
      cells.append({'seed': seed, 'folder': folder, 'error': None, 'val': (val or {}).get(name, 0.5),
                    'top1': float(np.mean(correct)), 'mean_per_class': float(np.mean(correct)),
                    'cost': {'steps': 10, 'images': (images or {}).get(name, 1000), 'seconds': 12.5}})
    tables.append({'name': name, 'fields': dict(own), 'tuned': {}, 'trials': [], 'cells': cells})
  seeds = sorted({cell['seed'] for table in tables for cell in table['cells']})
  count = len(next(iter(found.values()))['ids']) if found else 0
  return {'format': 1, 'job': 'compare', 'target': 'folder:birds', 'split': 'test', 'metric': 'top1', 'images': count,
          'seeds': seeds, 'baseline': next(iter(variants)), 'variants': tables, **fields}, found


def drawn(rate: float, seeds: int, images: int, number: int = 0) -> dict[int, np.ndarray]:
  """Right or wrong at a rate; images are as hard for every seed, and alike for neighbouring rates."""
  hard = np.random.default_rng(99).random(images)
  noise = np.random.default_rng(number).normal(0, 0.05, (seeds, images))
  return dict(enumerate(hard + noise < rate))


def write(folder: pathlib.Path, comparison: Mapping[str, Any], found: Mapping[str, Any]) -> Workdir:
  """The workdir of a comparison, with what its page reads of the fine-tunings."""
  config = default.get_config()
  config.job, config.target.name = 'compare', comparison['target']
  work = Workdir(folder, config.to_dict())
  (work.path / 'compare.json').write_text(json.dumps(summarize(comparison, found)))
  for k, (name, table) in enumerate(found.items()):
    cell = work.path / name
    cell.mkdir(parents=True)
    labels, right = np.array(table['labels']), np.equal(table['labels'], table['predictions'])
    per_class = [{'name': class_name, 'images': int((labels == label).sum()),
                  'right': int(right[labels == label].sum())} for label, class_name in enumerate(table['classes'])]
    (cell / 'predictions.json').write_text(json.dumps(table))
    (cell / 'results.json').write_text(json.dumps({'test': {'per_class': per_class}, 'val': {}}))
    lines = [{'step': 10 * (i + 1), 'train/top1_target': 1 - 0.9 / (1 + i + k / 9), 'val/top1': 0.5 - 0.3 / (1 + i)}
             for i in range(10)]
    (cell / 'metrics.jsonl').write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
    if '-none-' not in name and 'plain' not in name:
      n = len(table['classes'])
      chosen = selection.Selection(
          method='uot', by='class', size=float(n), seed=0, parameters={}, units=np.arange(n), scores=np.full(n, 1 / n),
          measure='share', ascending=False, names=[f'source {label}' for label in range(n)],
          target_names=table['classes'], plan=(np.eye(n) + 0.3) / (n + 0.3 * n * n), target_mass=np.full(n, 1 / n))
      chosen.save(cell / 'selection.json')
  return work
