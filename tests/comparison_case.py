"""A comparison as job compare writes it, with made-up predictions, for tests of its statistics and its page."""

from collections.abc import Mapping
from typing import Any

import numpy as np

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
