"""Whole jobs on real images, in processes of their own: what a user runs, and what stays when it is interrupted."""

import html
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from orbax import checkpoint as ocp
import pytest

from ft_jax.data import open_set
import selection
from selection.ranking import NOUNS

ROOT = pathlib.Path(__file__).parents[2]

TINY = ['--config=configs/digits.py:finetune', '--config.model.width=4', '--config.image_size=16',
        '--config.augment.short_side=16',
        '--config.selection.size=5']
PRETRAIN = ['--config.job=pretrain', '--config.model.weights=', "--config.train.learning_rate_groups=(('.*',1.0),)",
            '--config.train.steps=20', '--config.train.eval_every=10']
FINETUNE = ['--config.train.steps=24', '--config.train.eval_every=8', '--config.train.log_every=4',
            '--config.train.batch_size=16',
            '--config.train.keep_epochs=(1.2,)']  # step 6


def environment(devices: int, optimize: bool = False) -> dict[str, str]:
  # The exception is ml_collections' own, when it reads a config on Python 3.11.
  return {**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': str(int(not optimize)), 'JAX_PLATFORMS': 'cpu',
          'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
          'PYTHONWARNINGS': 'error,ignore:the load_module() method is deprecated:DeprecationWarning'}


def command(workdir, *flags: str) -> list[str]:
  return [sys.executable, 'main.py', *flags, f'--workdir={workdir}']


def main(workdir, *flags: str, devices: int = 2, optimize: bool = False) -> subprocess.CompletedProcess:
  return subprocess.run(command(workdir, *flags), cwd=ROOT, env=environment(devices, optimize), capture_output=True,
                        text=True, check=False)


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> str:
  """The workdir of a short pre-training."""
  workdir = tmp_path_factory.mktemp('runs') / 'pretrain'
  run = main(workdir, *TINY, *PRETRAIN)
  assert run.returncode == 0, run.stderr
  return str(workdir)


@pytest.fixture(scope='module')
def finished(weights, tmp_path_factory) -> tuple[pathlib.Path, str]:
  """A whole fine-tuning with a selection, and what it printed."""
  workdir = tmp_path_factory.mktemp('runs') / 'finetune'
  run = main(workdir, *TINY, *FINETUNE, f'--config.model.weights={weights}')
  assert run.returncode == 0, run.stderr
  return workdir, run.stderr


def test_workdir_holds_what_the_readme_says(finished):
  workdir, printed = finished
  assert {p.name for p in workdir.iterdir()} == {
      'config.json', 'duplicates.json', 'selection.json', 'embeddings', 'metrics.jsonl', 'tensorboard', 'checkpoints',
      'predictions.json', 'results.json', 'report.html'}
  results, predicted = (json.loads((workdir / name).read_text()) for name in ('results.json', 'predictions.json'))
  pairs, counts = np.unique((predicted['labels'], predicted['predictions']), axis=1, return_counts=True)
  assert [*pairs.T.tolist()] == [pair[:2] for pair in results['test']['confusion']]
  assert counts.tolist() == [pair[2] for pair in results['test']['confusion']]
  assert predicted['split'] == 'test' and len(set(predicted['ids'])) == 252
  assert predicted['classes'] == [row['name'] for row in results['test']['per_class']]
  # 16 target images and 16 of the source in each of the 24 steps.
  assert results['cost'].pop('seconds') > 0 and results['cost'] == {'steps': 24, 'images': 24 * 32}
  for split, images in (('val', 130), ('test', 252)):
    assert results[split]['images'] == images == sum(row['images'] for row in results[split]['per_class'])
    assert results[split]['top1'] == sum(row['right'] for row in results[split]['per_class']) / images
    assert {'top1', 'mean_per_class', 'loss'} <= set(results[split])
  assert results['best_step'] in (6, 8, 16, 24) and results['seed'] == 0
  assert results['versions']['jax'] == jax.__version__
  assert results['batch_norm'] == 'statistics of each of 2 devices'
  commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True,
                          check=False).stdout.strip() or None
  assert results['commit'] in (commit, f'{commit}+')
  assert results['weights']['revision'] is None and len(results['weights']['fingerprint']) == 16
  assert 'tensors used; dropped: optimizer (of that training); heads/source (old classifier)' in printed
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [4, 6, 8, 12, 16, 20, 24]
  assert [line['step'] for line in lines if 'val/top1' in line] == [6, 8, 16, 24]
  assert {int(p.name) for p in (workdir / 'checkpoints').iterdir()} == {6, results['best_step'], 24}
  best = max((line for line in lines if 'val/top1' in line), key=lambda line: (line['val/top1'], -line['val/loss']))
  assert best['step'] == results['best_step'] and best['val/top1'] == results['val']['top1']
  assert 'converged in' in printed and 'drawn by' in printed and 'report.html' in printed
  # Not on a terminal: no bars, no carriage returns.
  assert '\r' not in printed and '\x1b' not in printed


def test_report_opens_offline_and_shows_everything(finished):
  workdir, _ = finished
  page = (workdir / 'report.html').read_text()
  assert not re.search(r'(?:src|href)\s*=\s*"(?:https?:)?//|@import|url\(\s*"?http', page)
  chosen = json.loads((workdir / 'selection.json').read_text())
  for name in (chosen['names'][i] for i in chosen['units']):
    assert f'<td>{name}</td>' in page
  assert page.count('<svg') == 4 and page.count('data:image/jpeg') == 5 * 4 + 10 * 2


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(finished):
  """The same command says so and changes nothing; a lost report is made again; another config is refused."""
  workdir, _ = finished
  flags = [*TINY, *FINETUNE,
           '--config.model.weights=' + json.loads((workdir / 'config.json').read_text())['model']['weights']]
  before = (workdir / 'results.json').read_bytes()
  (workdir / 'report.html').unlink()
  run = main(workdir, *flags)
  assert run.returncode == 0 and 'training' not in run.stderr and (workdir / 'report.html').exists()
  assert (workdir / 'results.json').read_bytes() == before
  other = main(workdir, *flags, '--config.seed=7')
  assert other.returncode == 1 and 'config.seed is 0 there and 7 here' in other.stderr
  assert 'Traceback' not in other.stderr


def comparable(workdir: pathlib.Path) -> tuple[dict, list[dict], dict, dict]:
  """The last state with everything in it, metrics without the clock, results without the command, predictions."""
  with ocp.CheckpointManager(workdir / 'checkpoints', item_names=('state', 'about')) as manager:
    assert manager.latest_step() == 24
    last = manager.restore(24, args=ocp.args.Composite(state=ocp.args.StandardRestore()))['state']
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  results = json.loads((workdir / 'results.json').read_text())
  return (last, [{k: v for k, v in line.items() if k not in ('images_per_second', 'waiting_share')} for line in lines],
          {k: v for k, v in results.items() if k not in ('command', 'cost')},
          json.loads((workdir / 'predictions.json').read_text()))


@pytest.mark.slow
def test_interrupted_equals_uninterrupted(finished, weights, tmp_path):
  """Asked to stop in the middle and started again: the same parameters bit for bit, each step once.

  It also finds its newest checkpoint damaged, and goes on from the one before. Of runs that are killed,
  tests/test_kills.py says the same.
  """
  whole, _ = finished
  workdir = tmp_path / 'run'
  flags = [*TINY, *FINETUNE, f'--config.model.weights={weights}']
  process = subprocess.Popen(command(workdir, *flags), cwd=ROOT, env=environment(2), stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 300
  while not (workdir / 'checkpoints' / '8').exists():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  _, printed = process.communicate(timeout=120)
  assert not (workdir / 'results.json').exists()
  assert process.returncode == 128 + signal.SIGTERM and 'the same command resumes from there' in printed
  newest = max((path for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()),
               key=lambda path: int(path.name))
  largest = max((newest / 'state' / 'd').iterdir(), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-100])
  again = main(workdir, *flags)
  assert again.returncode == 0 and re.search(r'resuming from step \d+ of 24', again.stderr), again.stderr
  assert f'It is set aside in {workdir / "damaged" / newest.name}' in again.stderr
  state, lines, results, predictions = comparable(workdir)
  whole_state, whole_lines, whole_results, whole_predictions = comparable(whole)
  assert {'params', 'batch_stats', 'opt_state', 'step'} <= set(state)
  jax.tree.map(np.testing.assert_array_equal, state, whole_state)
  assert results == whole_results and predictions == whole_predictions
  assert {p.name for p in (workdir / 'checkpoints').iterdir()} == {p.name for p in (whole / 'checkpoints').iterdir()}
  # A stop on request ends a window early, so the means of the training batches may be over other windows; nothing else
  # may differ.
  evaluated = lambda lines: [{k: v for k, v in line.items() if not k.startswith('train/')} for line in lines
                             if 'val/top1' in line]
  assert evaluated(lines) == evaluated(whole_lines)
  assert [line['step'] for line in lines] == sorted({line['step'] for line in lines})


@pytest.mark.slow
def test_a_mistake_behind_the_pre_training_does_not_cost_it(tmp_path):
  """What is pre-trained within a run is there again when another setting had to be mended; its head and statistics go
  on."""
  flags = [*TINY, *FINETUNE, '--config.pretrain.epochs=0', '--config.pretrain.steps=8',
           '--config.pretrain.eval_every=8',
           '--config.model.source_head=pretrained', '--config.model.batch_norm=frozen']
  first = main(tmp_path / 'run', *flags, '--config.selection.epsilon=0.0001')
  assert first.returncode == 1 and 'epsilon 0.0001 is too small' in first.stderr and 'training 8 steps' in first.stderr
  again = main(tmp_path / 'run', *flags)
  assert again.returncode == 0 and 'training 8 steps' not in again.stderr, again.stderr
  assert 'training 24 steps' in again.stderr, again.stderr
  assert 'Pre-training on digits:pool' in (tmp_path / 'run' / 'pretrain' / 'report.html').read_text()
  assert '102 tensors used; dropped: optimizer (of that training)\n' in again.stderr
  norms = [json.loads((path / 'results.json').read_text())['batch_norm']
           for path in (tmp_path / 'run' / 'pretrain', tmp_path / 'run')]
  assert norms == ['statistics of each of 2 devices', 'frozen: statistics, scales and biases of the weights']


@pytest.mark.slow
def test_going_on_with_other_images_is_refused(photos, pool, tmp_path):
  """Images that went away between two starts of one run."""
  shutil.copytree(photos, tmp_path / 'photos')
  flags = ['--config=configs/miniature.py:finetune', '--config.selection.method=none', '--config.source.name=',
           f'--config.target.name=folder:{tmp_path / "photos"}', '--config.model.weights=', '--config.model.width=4',
           '--config.image_size=32', '--config.augment.short_side=36', '--config.train.steps=4',
           '--config.train.batch_size=8']
  broken = sorted((tmp_path / 'photos' / 'test' / 'sky').iterdir())[0]
  good = broken.read_bytes()
  broken.write_bytes(b'no image')
  first = main(tmp_path / 'run', *flags)
  assert first.returncode == 1 and f'test/sky/{broken.name} cannot be read as an image' in first.stderr
  broken.write_bytes(good)
  gone = sorted((tmp_path / 'photos' / 'train' / 'roof').iterdir())[:4]
  kept = [path.read_bytes() for path in gone]
  for path in gone:
    path.unlink()
  second = main(tmp_path / 'run', *flags)
  assert second.returncode == 1 and 'changed since then: target images' in second.stderr, second.stderr
  for path, data in zip(gone, kept):
    path.write_bytes(data)
  third = main(tmp_path / 'run', *flags)
  assert third.returncode == 0 and 'resuming from step 4 of 4' in third.stderr, third.stderr


@pytest.mark.slow
def test_finetune_and_compare_on_folders(photos, pool, tmp_path):
  """Everything from folders, from random weights: each method and seed once, embeddings shared, a table in the end."""
  run = main(tmp_path / 'compare', '--config=configs/miniature.py', f'--config.source.name=folder:{pool}',
             f'--config.target.name=folder:{photos}', '--config.model.weights=', '--config.model.width=4',
             '--config.image_size=32',
             '--config.augment.short_side=36', '--config.compare.seeds=(3,)',
             "--config.compare.variants=('none','uot')", '--config.selection.size=2', '--config.train.steps=4', '--config.train.batch_size=8',
             '--config.source_ratio=0.5')
  assert run.returncode == 0, run.stderr
  results = json.loads((tmp_path / 'compare' / 'results.json').read_text())
  assert [row['method'] for row in results['rows']] == ['plain', 'plain, equal compute', 'uot']
  assert results['images'] == 20
  for row in results['rows']:
    slug = {'plain, equal compute': 'plain-equal-compute-x1.5'}.get(row['method'], row['method'])
    runs = [tmp_path / 'compare' / 'cells' / f'{slug}-seed-{seed}' / 'results.json' for seed in (3,)]
    assert row['top1'] == [json.loads(path.read_text())['test']['top1'] for path in runs]
  assert re.search(r'\| uot +\|', run.stderr) and (tmp_path / 'compare' / 'report.html').exists()
  assert len(list((tmp_path / 'compare' / 'embeddings').iterdir())) == 2  # in one place for all runs
  chosen = json.loads((tmp_path / 'compare' / 'cells' / 'uot-seed-3' / 'results.json').read_text())['selection']
  assert len(chosen['classes']) == 2 and chosen['images'] == 20


@pytest.mark.slow
def test_two_processes_find_what_one_finds(photos, pool, tmp_path):
  """Trials and cells; test is read for cells alone; a second start runs nothing."""
  flags = ['--config=configs/miniature.py', f'--config.source.name=folder:{pool}', '--config.model.weights=',
           f'--config.target.name=folder:{photos}', '--config.model.width=4', '--config.image_size=32',
           '--config.augment.short_side=36', "--config.compare.variants=('uot',)", '--config.compare.seeds=(3,)',
           '--config.selection.size=2', '--config.train.steps=3', '--config.train.batch_size=8',
           "--config.compare.tune=(('train.learning_rate',(0.01,0.02)),)"]
  found = {}
  for workers in (1, 2):
    folder = tmp_path / str(workers)
    run = main(folder, *flags, f'--workers={workers}', devices=1)
    assert run.returncode == 0, run.stderr + ''.join(log.read_text() for log in folder.glob('workers/*.log'))
    assert '[3/3] uot, seed 3: test top-1' in run.stderr
    assert [json.loads(path.read_text())['test'] for path in folder.glob('trials/*/results.json')] == [None, None]
    assert (folder / 'report.html').exists() and not list(folder.glob('trials/*/report.html'))
    whole = json.loads((folder / 'compare.json').read_text())['variants'][0]
    found[workers] = [(trial['fields'], trial['val']) for trial in whole['trials']], whole['tuned'], [
        (cell['val'], cell['top1']) for cell in whole['cells']]
    assert 'val (' in (folder / 'cells' / 'uot-seed-3' / 'log.txt').read_text()
  assert found[1] == found[2]
  again = main(tmp_path / '2', *flags, '--workers=2', devices=1)
  assert '3 of 3 runs are finished' in again.stderr and 'processes work on it' not in again.stderr


def fine_tune_by(photos, pool, workdir, by: str, *flags: str) -> tuple[dict, str]:
  """Two steps with what is selected by image or cluster: the results, and what was printed."""
  run = main(workdir, '--config=configs/miniature.py:finetune', f'--config.source.name=folder:{pool}',
             f'--config.target.name=folder:{photos}', '--config.model.weights=', '--config.model.width=4',
             '--config.image_size=32',
             '--config.augment.short_side=36', f'--config.selection.by={by}', '--config.train.steps=2',
             '--config.train.batch_size=4',
             *flags)
  assert run.returncode == 0, run.stderr
  results = json.loads((workdir / 'results.json').read_text())
  chosen, used = json.loads((workdir / 'selection.json').read_text()), results['selection']
  assert used['by'] == by and used['units'] == len(chosen['units']) and used['images'] == len(chosen['rows']) < 60
  page = (workdir / 'report.html').read_text()
  assert f'Selected {NOUNS[by]}, best first' in page and page.count('data:image/jpeg') >= used['units'] + 8
  return results, run.stderr


@pytest.mark.slow
def test_clusters(photos, pool, tmp_path):
  """The network is fine-tuned with their images alone, and the report shows them."""
  fine_tune_by(photos, pool, tmp_path / 'run', 'cluster', '--config.selection.size=3', '--config.selection.clusters=6',
               '--config.selection.cost=bures')


@pytest.mark.slow
def test_single_images_of_sets_with_damaged_files(photos, pool, tmp_path):
  """Selected one by one; the files that cannot be read are counted, and the others used and kept in memory as if these
  were not there."""
  shutil.copytree(photos, tmp_path / 'photos')
  shutil.copytree(pool, tmp_path / 'pool')
  for name in ('photos/train/sky/2.jpg', 'photos/train/sky/7.jpg', 'photos/test/wall/1.jpg', 'pool/c/4.jpg'):
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:300])
  results, printed = fine_tune_by(tmp_path / 'photos', tmp_path / 'pool', tmp_path / 'run', 'example',
                                  '--config.selection.size=0.25',
                                  '--config.data.on_error=skip', '--config.data.cache=true')
  chosen = json.loads((tmp_path / 'run' / 'selection.json').read_text())
  assert set(chosen['ids']) < {path.relative_to(tmp_path / 'pool').as_posix()
                               for path in (tmp_path / 'pool').glob('*/*.jpg')}
  assert '1 image of target test could not be read and was left out (test/wall/1.jpg)' in (
      tmp_path / 'run' / 'report.html').read_text()
  skipped = results['skipped']
  # Which of train's were set aside for val is not known here.
  assert sorted(skipped.pop('target train', {'first': []})['first'] +
                skipped.pop('target val', {'first': []})['first']) == [
      'train/sky/2.jpg', 'train/sky/7.jpg']
  assert skipped == {'source pool': {'images': 1, 'first': ['c/4.jpg']},
                     'target test': {'images': 1, 'first': ['test/wall/1.jpg']}}
  assert (results['test']['images'], results['target']['train'] + results['target']['val'],
          results['source']['images']) == (19, 46, 59)
  assert results['precision'] == {'training': 'default', 'embeddings': 'highest'}
  assert 'source pool: 1 of 60 images cannot be read and are skipped: c/4.jpg' in printed
  assert 'caching 46 decoded images in memory (target train, target val): ' in printed
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  # the first step is compiled, and a window of its own
  assert 'waiting_share' not in lines[0] and 'images_per_second' not in lines[0]
  assert all(0 <= line['waiting_share'] <= 1 and line['images_per_second'] > 0 for line in lines[1:])


def test_same_images_on_both_sides_are_refused(photos, tmp_path):
  run = main(tmp_path / 'run', '--config=configs/miniature.py:finetune', f'--config.source.name=folder:{photos}',
             f'--config.target.name=folder:{photos}', '--config.model.weights=', '--config.selection.size=2')
  assert run.returncode == 1 and 'every image of it is in the target too; give other pre-training data' in run.stderr
  assert 'Traceback' not in run.stderr


@pytest.mark.skipif('FT_JAX_STRESS' not in os.environ,
                    reason='FT_JAX_STRESS is not set: the whole demo is a part of make stress')
def test_the_demo(tmp_path):
  """The README's first command, whole: optimal transport puts the ten digits above the sixteen patches, all runs share
  one pre-training, and the last line but one is advice."""
  run = main(tmp_path / 'demo', '--config=configs/digits.py', devices=1, optimize=True)
  assert run.returncode == 0, run.stderr
  assert run.stderr.count('pre-training resnet18') == 1
  result = json.loads((tmp_path / 'demo' / 'compare.json').read_text())
  assert [variant['name'] for variant in result['variants']] == ['plain', 'plain, equal compute', 'random', 'uot']
  assert all(len(variant['cells']) == 3 for variant in result['variants']) and result['images'] == 252
  for cell in result['variants'][-1]['cells']:
    selection = json.loads((tmp_path / 'demo' / cell['folder'] / 'selection.json').read_text())
    assert sorted(selection['names'][i] for i in selection['units']) == [f'digit {i}' for i in range(10)]
    assert selection['solver']['error'] < 1e-6
    assert cell['top1'] > 0.4
  printed, page = run.stderr, html.unescape((tmp_path / 'demo' / 'report.html').read_text())
  assert all(result['advice'] in ' '.join(text.split()) for text in (printed, page))


def test_results_say_where_they_come_from(finished, weights):
  """Versions, commit, devices, and fingerprints of all images, weights and what was chosen, of the fine-tuning and of
  its pre-training."""
  results, before = (json.loads((pathlib.Path(folder) / 'results.json').read_text())
                     for folder in (finished[0], weights))
  fingerprint = re.compile('[0-9a-f]{16}')
  for told, data in ((results, 'target'), (before, 'source')):
    assert {'python', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'pillow',
            'simplejpeg'} <= told['versions'].keys()
    assert told['versions']['jax'] == jax.__version__ and told['devices'].startswith('2 x ') and told['command']
    assert told['seed'] == 0
    in_git = (ROOT / '.git').exists()
    assert bool(told['commit']) == in_git and (not in_git or re.fullmatch(r'[0-9a-f]{40,64}\+?', told['commit']))
    splits = told[data]['fingerprints']
    # a split that is not there has none
    assert set(splits) == {'train', 'val', 'test'} and len({*splits.values()}) == 3
    assert all(value is None or fingerprint.fullmatch(value) for value in splits.values())
  named = [results['source']['fingerprint'], results['selection']['fingerprint'], results['weights']['fingerprint']]
  assert len({*named}) == 3 and all(map(fingerprint.fullmatch, named))
  # What was chosen, from the file of the selection and the pool alone.
  pool, chosen = open_set('digits:pool', 'train'), selection.Selection.load(finished[0] / 'selection.json')
  assert results['selection']['fingerprint'] == pool.of_classes(chosen.classes).fingerprint
  assert results['selection']['fingerprint'] != pool.of_classes(chosen.classes[1:]).fingerprint
