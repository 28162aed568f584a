"""The table of back-ends: unknown names are refused, the package is light, and a new back-end is one row."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from configs import miniature
from ft_jax import data
from ft_jax.data import open_set
from ft_jax.jobs import finetune

ROOT = pathlib.Path(__file__).parents[2]

# The whole file of a new back-end; its row of the table is `'csv': open_csv`.
CSV = '''
"""Back-end for tables of images, `csv:<file>`: the columns split, path and label, one image per row."""

import csv
import pathlib

from ft_jax.data import ImageSet


def open_csv(path: str, split: str, data_dir: str) -> ImageSet:
  """Opens the rows of a split; paths of images are relative to the table."""
  table = pathlib.Path(data_dir, path)
  with table.open(newline='', encoding='utf-8') as stream:
    rows = list(csv.DictReader(stream))
  chosen = [row for row in rows if row['split'] == split]
  if not chosen:
    raise ValueError(f'csv:{path} has no split {split!r}; known: {", ".join(sorted({row["split"] for row in rows}))}')
  return ImageSet.from_files([table.parent / row['path'] for row in chosen], [row['label'] for row in chosen],
                             class_names=sorted({row['label'] for row in rows}), name=f'csv:{path} {split}')
'''


@pytest.fixture
def table(photos, tmp_path, monkeypatch) -> pathlib.Path:
  """The images of `photos` as a table."""
  space = {'__name__': 'example_csv'}
  exec(compile(CSV, 'csv.py', 'exec'), space)
  monkeypatch.setitem(data.BACKENDS, 'csv', space['open_csv'])
  rows = [f'{path.parts[-3]},{path},{path.parts[-2]}' for path in sorted(photos.rglob('*.jpg'))]
  (tmp_path / 'photos.csv').write_text('\n'.join(['split,path,label', *rows]))
  return tmp_path / 'photos.csv'


@pytest.mark.slow
def test_a_new_back_end_is_one_file_and_one_row(table, photos, pool, tmp_path):
  """It is fine-tuned on, with a selection from a folder; its splits are those of the folder it lists."""
  assert len(CSV.strip().splitlines()) < 30
  config = miniature.get_config('finetune')
  with config.unlocked():
    config.update_from_flattened_dict({
        'target.name': 'csv:photos.csv', 'data_dir': str(tmp_path), 'source.name': f'folder:{pool}',
        'model.weights': '',
        'model.width': 4, 'image_size': 32, 'augment.short_side': 36, 'selection.size': 2.0, 'train.steps': 2,
        'train.batch_size': 8})
  finetune.run(config, tmp_path / 'run')
  results = json.loads((tmp_path / 'run' / 'results.json').read_text())
  assert results['test']['images'] == 20 and len(results['test']['per_class']) == 4
  listed, folder = open_set('csv:photos.csv', 'test', str(tmp_path)), open_set(f'folder:{photos}', 'test')
  assert sorted(listed.contents.tolist()) == sorted(folder.contents.tolist())
  with pytest.raises(ValueError, match="csv:photos.csv has no split 'val'; known: test, train"):
    open_set('csv:photos.csv', 'val', str(tmp_path))


@pytest.mark.parametrize('name', ['pets', 'pets:x', 'folder', 'folder:', ''])
def test_an_unknown_name_is_refused_with_what_is_known(name):
  with pytest.raises(ValueError, match=re.escape(f'data set {name!r}: expected tfds:..., folder:..., digits:...')):
    open_set(name, 'train')


def test_the_package_is_light(photos):
  """Readers are imported when a set of their kind is opened."""
  script = ('import sys; from ft_jax.data import ImageSet, open_set; '
            'heavy = {"tensorflow_datasets", "tensorflow", "grain", "cv2", "sklearn", "jax"}; assert not heavy & '
            'set(sys.modules); '
            'open_set(sys.argv[1], "train"); assert not {"tensorflow_datasets", "tensorflow", "grain"} & '
            'set(sys.modules)')
  subprocess.run([sys.executable, '-c', script, f'folder:{photos}'], check=True, cwd=ROOT)
