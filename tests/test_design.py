"""The examples of docs/design.md: each has under 30 lines, is added by one row of a table, and works in a whole run."""

import csv
import json
import pathlib
import re
from typing import Any

from conftest import write_images
import numpy as np
import pytest

from configs import default
from ft_jax import data, models
from ft_jax.jobs import finetune
from ft_jax.methods import METHODS
import selection
from selection import strategies

ROOT = pathlib.Path(__file__).parents[1]
WORKDIR_PAGE = (ROOT / 'docs' / 'workdir.md').read_text()


def example(name: str) -> dict[str, Any]:
  """What the code block of that name on the page defines."""
  page = ROOT / 'docs' / 'design.md'
  code = re.search(rf'^```python {name}\n(.*?)^```$', page.read_text(), re.M | re.S)[1]
  assert len(code.splitlines()) < 30
  space: dict[str, Any] = {'__name__': f'example_{name}'}
  exec(compile(code, f'{page.name}: {name}', 'exec'), space)
  return space


def write_table(path: pathlib.Path, classes: dict[str, int], splits: tuple[str, ...], seed: int) -> None:
  """A table of images, and the images; other seeds draw other images."""
  with path.open('w', newline='') as stream:
    table = csv.writer(stream)
    table.writerow(['file', 'label', 'split'])
    for i, split in enumerate(splits):
      write_images(path.parent / path.stem / split, classes, seed + i)
      for file in sorted((path.parent / path.stem / split).rglob('*.jpg')):
        table.writerow([file.relative_to(path.parent), file.parent.name, split])


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A fine-tuning with all of them at once, from a pre-training of its own: its results and its workdir."""
  folder = tmp_path_factory.mktemp('design')
  write_table(folder / 'target.csv', {'a': 6, 'b': 6}, ('train', 'test'), seed=0)
  write_table(folder / 'pool.csv', {'c': 8, 'd': 8, 'e': 8}, ('train',), seed=2)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(METHODS, 'features', example('method')['Features'])
    patch.setitem(models.NETWORKS, 'small', example('network')['Small'])
    patch.setitem(data.BACKENDS, 'csv', example('data')['open_csv'])
    patch.setitem(strategies.STRATEGIES, 'mean_cosine', example('strategy')['mean_cosine'])
    config = default.get_config()
    config.data_dir = str(folder)
    config.target.name, config.source.name = 'csv:target.csv', 'csv:pool.csv'
    config.image_size, config.model.name, config.model.width, config.model.weights = 16, 'small', 8, 'pretrain'
    config.selection.method, config.selection.size = 'mean_cosine', 2
    config.methods.features.weight = 0.5
    for training in (config.train, config.pretrain):
      training.batch_size, training.steps = 8, 2
    yield finetune.run(config, folder / 'run'), folder / 'run'


def test_the_method_adds_its_term(run):
  """Features have moved by the second step, so the term is above zero."""
  _, workdir = run
  terms = [json.loads(line).get('train/loss_features') for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert max(term for term in terms if term is not None) > 0


def test_the_network_is_trained(run):
  results, workdir = run
  assert json.loads((workdir / 'config.json').read_text())['model']['name'] == 'small'
  assert 0 <= results['test']['top1'] <= 1


def test_the_data_source_is_read(run):
  results, _ = run
  assert (results['target']['classes'], results['test']['images'], results['source']['images']) == (2, 12, 24)


def test_the_strategy_selects(run):
  results, workdir = run
  chosen = selection.Selection.load(workdir / 'selection.json')
  assert (chosen.method, len(chosen.classes), results['selection']['units']) == ('mean_cosine', 2, 2)


def test_the_strategy_is_its_formula():
  rng = np.random.default_rng(0)
  source, target = rng.normal(size=(20, 5)).astype(np.float32), rng.normal(size=(7, 5)).astype(np.float32)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(strategies.STRATEGIES, 'mean_cosine', example('strategy')['mean_cosine'])
    chosen = selection.select(source, target, 3, by='example', method='mean_cosine')
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  np.testing.assert_allclose(chosen.scores, (unit(source) @ unit(target).T).mean(1), atol=1e-6)


def test_every_key_of_the_results_is_described(run):
  """In docs/workdir.md; and every metric."""
  results, workdir = run
  table = WORKDIR_PAGE.partition('## results.json')[2].partition('## metrics.jsonl')
  for key, value in results.items():
    assert f'`{key}`' in table[0], key
    for inner in value if isinstance(value, dict) and key != 'versions' else ():
      assert f'`{inner}`' in table[0] or f'`val.{inner}`' in table[0], (key, inner)
  named = set(re.findall(r'`([\w/<>.]+)`', table[2]))
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    unknown = {re.sub('loss_features', 'loss_<method>', key) for key in json.loads(line)} - named
    assert not unknown


def test_every_file_of_the_workdir_is_described(run):
  _, workdir = run
  for path in workdir.iterdir():
    assert f'`{path.name}' in WORKDIR_PAGE, path.name
