"""A comparison: its variants and their cells, what is chosen on val, what is run again and what is not."""

from collections.abc import Iterator
import contextlib
import json
import logging

import pytest

from configs import compare as ready
from configs import default
from ft_jax import compiled, methods
from ft_jax.jobs import compare, finetune
from ft_jax.jobs.compare_variants import Cell, cell_config, declared_variants
from ft_jax.pages import comparison
from ft_jax.progress import log
from ft_jax.training.loop import Diverged
from ft_jax.workdir import Workdir, write_results, write_text


@contextlib.contextmanager
def log_captured(caplog) -> Iterator[None]:
  """Within it, the project's log lines are in `caplog`."""
  log.addHandler(caplog.handler)
  log.setLevel(logging.INFO)
  try:
    yield
  finally:
    log.removeHandler(caplog.handler)


def fine_tuning(config, number: int, seed: int = 0):
  """The config of the fine-tuning of a variant."""
  variant = declared_variants(config)[number]
  return cell_config(config, Cell(variant, seed, variant.combinations[0], trial=False))


def test_short_forms_name_a_selection_and_methods():
  config = default.get_config()
  config.methods.l2_sp.head_weight = 0.5
  config.methods.bss.weight = 0.3
  config.compare.variants = ('none', 'uot+l2_sp', 'none+lwf')
  one = fine_tuning(config, 1, 3)
  assert (one.selection.method, one.seed) == ('uot', 3)
  assert (one.methods.l2_sp.weight, one.methods.l2_sp.head_weight) == (0.01, 0.5)
  for number, expected in enumerate((['bss'], ['l2_sp', 'bss'], ['bss', 'lwf'])):
    on = methods.active(fine_tuning(config, number).methods.to_dict())
    assert list(on) == expected, 'what any entry names is off in the others, and all else as the config has it'
  config.methods.l2_sp.weight = 0.2
  config.compare.variants = ('none', 'none+l2_sp')
  assert fine_tuning(config, 1).methods.l2_sp.weight == 0.2
  config.compare.variants = ('none', 'none+l2')
  with pytest.raises(ValueError, match="config.compare.variants names the fine-tuning method 'l2'; known: .*l2_sp"):
    declared_variants(config)


# --- the engine, with a fine-tuning that takes no time ---


class FakeTraining:
  """Stands in for `finetune.fine_tune`: notes what it is asked for, and finishes at once.

  Attributes:
    runs: (folder, learning rate, steps, whether test was read) of each call.
    fails: folders, with the error to raise.
  """

  def __init__(self) -> None:
    self.runs: list[tuple[str, float, int, bool]] = []
    self.fails: dict[str, BaseException] = {}

  def __call__(self, settings, path, embeddings, pretrained, trial) -> None:
    work, training = Workdir(path, settings.fields), settings.training
    self.runs.append((f'{work.path.parent.name}/{work.path.name}', training.learning_rate, training.steps, not trial))
    log.info('training')
    (work.path / 'checkpoints' / '1').mkdir(parents=True, exist_ok=True)
    if error := self.fails.get(work.path.name):
      raise error
    # The best learning rate is 0.02 for uot, and 0.04 without a selection.
    best = 0.02 if settings.selection.used else 0.04
    split = {'top1': 1 - abs(training.learning_rate - best), 'mean_per_class': 0.5, 'loss': 1.0, 'images': 4}
    write_text(work.path / 'predictions.json', json.dumps(
        {'split': 'test', 'classes': ['a', 'b'], 'ids': list('wxyz'), 'labels': [0, 0, 1, 1],
         'predictions': [0, 1, 1, settings.seed % 2]}))
    cost = {'steps': training.steps, 'images': training.steps * settings.images_per_step, 'seconds': 1.0}
    write_results(work, {'val': split, 'test': None if trial else split, 'cost': cost})

  @property
  def folders(self) -> list[str]:
    """Of the calls since it was asked before."""
    found = [folder for folder, *_ in self.runs]
    self.runs.clear()
    return found


@pytest.fixture
def fake(monkeypatch):
  training = FakeTraining()
  monkeypatch.setattr(finetune, 'fine_tune', training)
  monkeypatch.setattr(compare, '_prepare', lambda *_: None)
  monkeypatch.setattr(comparison, 'write', lambda work: None)
  monkeypatch.setattr(compiled, 'clear_compiled', lambda: None)
  return training


def small(**fields):
  """The config of a comparison; `fields` are of its group `compare`."""
  config = default.get_config()
  config.job, config.target.name, config.source.name = 'compare', 'digits:target', 'digits:pool'
  config.model.name, config.model.width, config.image_size = 'resnet18', 1, 16
  config.train.batch_size, config.train.steps = 8, 3
  config.compare.variants, config.compare.seeds = ('none', 'uot'), (0, 1)
  config.compare.equal_compute = False
  config.compare.update(fields)
  return config


def test_each_variant_and_seed_is_run_once(fake, tmp_path, caplog):
  with log_captured(caplog):
    results = compare.run(small(), tmp_path)
  assert '[4/4] uot, seed 1: test top-1 99.0% in 0 s' in caplog.text
  cells = ['cells/plain-seed-0', 'cells/uot-seed-0', 'cells/plain-seed-1', 'cells/uot-seed-1']
  assert fake.folders == cells
  assert [row['method'] for row in results['rows']] == ['plain', 'uot']
  written = json.loads((tmp_path / 'compare.json').read_text())
  assert [[cell['folder'] for cell in variant['cells']] for variant in written['variants']] == [cells[::2], cells[1::2]]
  assert written['advice'] and written['variants'][1]['fields'] == {'selection.method': 'uot'}
  assert not list(tmp_path.rglob('checkpoints')), 'checkpoints of finished runs are removed'
  assert 'training' in (tmp_path / 'cells' / 'uot-seed-1' / 'log.txt').read_text()
  compare.run(small(), tmp_path)
  assert fake.folders == []


def test_a_changed_grid_keeps_what_fits(fake, tmp_path, caplog):
  """Another seed or variant adds runs; another field runs again what it changes, and the old run stays there."""
  compare.run(small(), tmp_path)
  fake.runs.clear()
  slow = ('slow', {'selection.method': 'uot', 'train.learning_rate': 0.001})
  compare.run(small(variants=('none', 'uot', slow), seeds=(0, 1, 2)), tmp_path)
  assert fake.folders == ['cells/slow-seed-0', 'cells/slow-seed-1', 'cells/plain-seed-2', 'cells/uot-seed-2',
                          'cells/slow-seed-2']
  slow[1]['train.learning_rate'] = 0.002
  with log_captured(caplog):
    compare.run(small(variants=('none', slow), seeds=(0, 1)), tmp_path)
  assert fake.folders == ['cells/slow-seed-0', 'cells/slow-seed-1']
  assert 'slow, seed 0 is done again, as its settings have changed (config.train.learning_rate is 0.001 there and ' \
         '0.002 here)' in caplog.text
  assert (tmp_path / 'replaced' / 'slow-seed-0-1' / 'results.json').exists()
  old = small(variants=('none',))
  old.train.momentum = 0.5
  compare.run(old, tmp_path)
  assert fake.folders == ['cells/plain-seed-0', 'cells/plain-seed-1']
  old.compare.seeds = (0,)
  assert compare.run(old, tmp_path)['seeds'] == json.loads((tmp_path / 'results.json').read_text())['seeds'] == [0]
  assert fake.folders == []


def test_runs_of_earlier_versions_are_taken_over(fake, tmp_path):
  """They were in folders beside the comparison's own files, with its fields as they were called then."""
  config = small(variants=('none', 'uot'), seeds=(0,))
  compare.run(config, tmp_path)
  assert len(fake.folders) == 2
  for new, old in (('plain-seed-0', 'none-0'), ('uot-seed-0', 'uot-0')):
    (tmp_path / 'cells' / new).rename(tmp_path / old)
    (tmp_path / old / 'outcome.json').unlink()
    fields = json.loads((tmp_path / old / 'config.json').read_text())
    fields['compare'] = {'methods': [old[:-2]], 'seeds': [0]}
    (tmp_path / old / 'config.json').write_text(json.dumps(fields))
  changed = json.loads((tmp_path / 'uot-0' / 'config.json').read_text())
  changed['train']['momentum'] = 0.3
  (tmp_path / 'uot-0' / 'config.json').write_text(json.dumps(changed))
  finished = (tmp_path / 'none-0' / 'results.json').read_text()
  compare.run(config, tmp_path)
  assert (tmp_path / 'cells' / 'plain-seed-0' / 'results.json').read_text() == finished
  assert not (tmp_path / 'none-0').exists() and (tmp_path / 'uot-0').exists(), 'the second one does not fit'


def test_a_failed_run_does_not_stop_the_others(fake, tmp_path):
  fake.fails['plain-seed-0'] = OSError('the disk is gone')
  with pytest.raises(RuntimeError, match='1 of 4 runs failed: plain, seed 0: the disk is gone .*plain-seed-0/log.txt'):
    compare.run(small(), tmp_path)
  assert len(fake.folders) == 4
  first, second = json.loads((tmp_path / 'compare.json').read_text())['variants'][0]['cells']
  assert first['error'] == 'the disk is gone' and first['log'] == 'cells/plain-seed-0/log.txt'
  assert second['error'] is None and not (tmp_path / 'results.json').exists()
  assert 'error: the disk is gone' in (tmp_path / 'cells' / 'plain-seed-0' / 'log.txt').read_text()
  fake.fails.clear()
  compare.run(small(), tmp_path)
  assert fake.folders == ['cells/plain-seed-0'], 'it is tried again, alone'


def test_a_stopped_comparison_resumes(fake, tmp_path):
  """A signal ends it at once, whatever it was doing."""
  fake.fails['uot-seed-0'] = SystemExit(143)
  with pytest.raises(SystemExit):
    compare.run(small(), tmp_path)
  assert fake.folders == ['cells/plain-seed-0', 'cells/uot-seed-0']
  fake.fails.clear()
  compare.run(small(), tmp_path)
  assert fake.folders == ['cells/uot-seed-0', 'cells/plain-seed-1', 'cells/uot-seed-1']


RATES = (('train.learning_rate', (0.01, 0.02, 0.04)),)


def test_values_are_chosen_on_val_for_each_variant(fake, tmp_path, caplog):
  with log_captured(caplog):
    compare.run(small(tune=RATES), tmp_path)
  trials, cells = fake.runs[:6], fake.runs[6:]
  assert all(folder.startswith('trials/') and folder.endswith('seed-0') and not tests for folder, _, _, tests in trials)
  assert [(folder, rate, tests) for folder, rate, _, tests in cells] == [
      ('cells/plain-seed-0', 0.04, True), ('cells/uot-seed-0', 0.02, True), ('cells/plain-seed-1', 0.04, True),
      ('cells/uot-seed-1', 0.02, True)]
  plain, uot = json.loads((tmp_path / 'compare.json').read_text())['variants']
  assert plain['tuned'] == {'train.learning_rate': 0.04} and uot['tuned'] == {'train.learning_rate': 0.02}
  assert [trial['fields']['train.learning_rate'] for trial in uot['trials']] == [0.01, 0.02, 0.04]
  assert 'plain: the best train.learning_rate is 0.04, the largest that was tried' in caplog.text
  assert 'uot: the best train.learning_rate' not in caplog.text
  # One more value is one more trial for each variant; where it is no better, nothing else is done again.
  fake.runs.clear()
  compare.run(small(tune=(('train.learning_rate', (0.005, 0.01, 0.02, 0.04)),)), tmp_path)
  assert [rate for _, rate, *_ in fake.runs] == [0.005, 0.005]


def test_a_small_val_split_is_warned_of(caplog):
  with log_captured(caplog):
    compare.warn_of_few_val(50, 2)
    assert not caplog.text
    compare.warn_of_few_val(6, 1)
  assert 'values are chosen on 6 val images with 1 seed, where one image is 16.7 points' in caplog.text


def test_what_means_nothing_to_a_variant_is_not_tried(fake):
  tune = (*RATES, ('source_weight', (0.3, 1.0)), ('methods.l2_sp.weight', (0.1, 0.2)))
  own = ('plain 6', {'selection.method': 'none', 'compare.tune': (('train.learning_rate', (1, 2, 3, 4, 5, 6)),)})
  plain, uot, own_values = declared_variants(small(variants=('none', 'uot', own), tune=tune))
  assert [len(variant.combinations) for variant in (plain, uot, own_values)] == [3, 6, 6]
  assert set(uot.combinations[0]) == {'train.learning_rate', 'source_weight'}
  few = declared_variants(small(variants=('none', 'uot'), tune=tune, trials=2))
  assert [len(variant.combinations) for variant in few] == [2, 2]
  assert all(combination in uot.combinations for combination in few[1].combinations)


def test_a_trial_that_diverges_loses_and_one_that_fails_counts_for_nothing(fake, tmp_path):
  config = small(variants=('uot',), seeds=(0,), tune=RATES)
  best, = [trial.folder.removeprefix('trials/') for trial in trials_of(config) if
           trial.tuned == {'train.learning_rate': 0.02}]
  fake.fails[best] = OSError('gone')
  with pytest.raises(RuntimeError, match='uot: a trial failed: gone'):
    compare.run(config, tmp_path)
  assert [folder for folder in fake.folders if folder.startswith('cells')] == []
  fake.fails[best] = Diverged(2, 'the loss is nan')
  compare.run(config, tmp_path)
  assert [(folder, rate) for folder, rate, *_ in fake.runs] == [(f'trials/{best}', 0.02), ('cells/uot-seed-0', 0.01)]


def trials_of(config) -> list[Cell]:
  return [Cell(variant, seed, tuned, trial=True) for variant in declared_variants(config)
          for tuned in variant.combinations for seed in config.compare.seeds]


def test_equal_compute_is_plain_with_as_many_images(fake, tmp_path):
  """One for each distinct number of images per step, tuned like any other variant."""
  wide = ('wide', {'selection.method': 'uot', 'source_ratio': 3.0})
  config = small(variants=('none', 'uot', 'random', wide), seeds=(0,), tune=RATES, equal_compute=True)
  compare.run(config, tmp_path)
  written = json.loads((tmp_path / 'compare.json').read_text())['variants']
  assert [variant['name'] for variant in written] == ['plain', 'plain, equal compute x2', 'plain, equal compute x4',
                                                      'uot', 'random', 'wide']
  images = {variant['name']: variant['cells'][0]['cost']['images'] for variant in written}
  assert images['plain, equal compute x2'] == images['uot'] == 2 * images['plain']
  assert images['plain, equal compute x4'] == images['wide']
  assert len(written[1]['trials']) == 3
  # With one number the name is short, and the folder is the same.
  fake.runs.clear()
  compare.run(small(variants=('none', 'uot'), seeds=(0,), tune=RATES, equal_compute=True), tmp_path)
  assert fake.runs == []
  assert json.loads((tmp_path / 'compare.json').read_text())['variants'][1]['name'] == 'plain, equal compute'
  only_plain = small(variants=('none', ('long', {'selection.method': 'none', 'train.steps': 9})), equal_compute=True)
  assert [variant.name for variant in compare.plan(only_plain)[0]] == ['plain', 'long']


def test_equal_compute_along_an_axis():
  """Each value of a field that means something to plain fine-tuning has its own; a field of the source has one."""
  few, many = {'target.train_per_class': 2}, {'target.train_per_class': 5}
  along = [('plain 2', few | NONE), ('uot 2', few | UOT), ('plain 5', many | NONE), ('uot 5', many | UOT)]
  of_both = small(variants=tuple(along), equal_compute=True, axis='target.train_per_class')
  added = [variant for variant in compare.plan(of_both)[0] if 'equal compute' in variant.name]
  assert [(variant.name, variant.fields['target.train_per_class'], variant.fields['train.steps'])
          for variant in added] == [('plain 2, equal compute', 2, 6), ('plain 5, equal compute', 5, 6)]
  sizes = tuple((f'uot {size}', UOT | {'selection.size': size}) for size in (3, 5))
  of_source = small(variants=('none', *sizes), equal_compute=True, axis='selection.size')
  assert [variant.name for variant in compare.plan(of_source)[0]] == ['plain', 'plain, equal compute', 'uot 3', 'uot 5']
  tuned = small(equal_compute=True, tune=(('source_ratio', (1.0, 3.0)),))
  assert [variant.name for variant in compare.plan(tuned)[0]] == ['plain', 'plain, equal compute x2',
                                                                  'plain, equal compute x4', 'uot']


NONE, UOT = {'selection.method': 'none'}, {'selection.method': 'uot'}


@pytest.mark.parametrize('fields,said', [
    ({'variants': ()}, 'config.compare.variants and config.compare.seeds need at least one entry each'),
    ({'seeds': (1, 1)}, 'config.compare.seeds has 1 twice'),
    ({'axis': 'selection.sise'}, "config.compare.axis: there is no field 'selection.sise' that a variant can set"),
    ({'variants': ('none', 'none')}, "config.compare.variants has 'plain' twice"),
    ({'variants': ('uot', ('a b', {}), ('a-b', {}))}, "'a b' and 'a-b' would share the folder a-b"),
    ({'variants': (('big', {'selection.sise': 3}),)},
     "'big': there is no field 'selection.sise' that a variant can set; known: .*selection.size"),
    ({'variants': (('big', {'seed': 3}),)}, "'big': there is no field 'seed' that a variant can set; known: .*train"),
    ({'variants': (('big', {'selection.size': -3}),)}, "'big': selection.size is -3; expected a number above 0"),
    ({'variants': (('big', {'compare.tune': 3}),)}, "'big': compare.tune is 3; expected pairs such as"),
    ({'variants': ('none', 'best')}, "'best': config.selection.method is 'best'; known: uot"),
    ({'variants': ('none', ('odd', {'source_ratio': 0.3}))}, "'odd': config.source_ratio 0.3 of batch 8 is 2.4"),
    ({'tune': (('train.learning_rate', (0.1, -1)),)}, "tune for 'plain': train.learning_rate is -1; expected a number"),
    ({'tune': (('train.batch_size', (8, 12)), ('source_ratio', (0.3,)))}, "'uot': config.source_ratio 0.3 of batch 8"),
    ({'tune': (('train.rate', (0.1,)),)}, "tune for 'plain': there is no field 'train.rate'")])
def test_what_cannot_work_is_refused_before_anything_is_run(fake, tmp_path, fields, said):
  with pytest.raises(ValueError, match=said):
    compare.run(small(**fields), tmp_path / 'run')
  assert fake.runs == [] and not (tmp_path / 'run').exists()


def test_how_many_processes_can_work():
  for processes, folder, said in ((0, 'runs', '--workers is 0; expected at least 1'),
                                  (2, 'gs://bucket/runs', 'is on object storage, where no process can claim a run')):
    with pytest.raises(ValueError, match=said):
      compare.run(small(), folder, processes)


def test_a_selection_file_belongs_to_a_variant(tmp_path):
  (tmp_path / 'ids').write_text('a\n')
  config = small(variants=('none', ('birds', {'selection.method': 'uot', 'selection.file': str(tmp_path / 'ids')})))
  assert compare.plan(config)[1][1].selection.file
  config.selection.file = str(tmp_path / 'ids')
  with pytest.raises(ValueError, match='config.selection.file is one selection for all variants; set it in the fields'):
    compare.plan(config)


@pytest.mark.parametrize('question', list(ready.QUESTIONS))
def test_the_ready_lists_can_be_asked(question):
  """Every variant can work, and each has as many trials as the others."""
  config = ready.get_config(question)
  config.target.name, config.source.name = 'digits:target', 'digits:pool'
  config.model.width, config.image_size = 4, 32
  variants, _ = compare.plan(config)
  assert len({len(variant.combinations) for variant in variants}) == 1
  assert config.compare.axis in ('', *variants[-1].fields)
  with pytest.raises(ValueError, match='configs/compare.py:other is not known; known: main, controls'):
    ready.get_config('other')
