"""Copies of evaluation images are found under any name, format and size, and are not trained on."""

import dataclasses
import json
import os
import shutil

from conftest import write_images
from ml_collections import ConfigDict
import numpy as np
import PIL.Image
import pytest

from configs import miniature
from ft_jax import selecting
from ft_jax.data import contents, decode, duplicates, open_set, overlap
from ft_jax.data.splits import open_splits, Splits, SplitSettings, unsampled_sets
from ft_jax.jobs import finetune, pretrain
from ft_jax.workdir import Workdir

# What is done to an image of the target before it lies in the pool, and the kind that it is found as.
PLANTED = {
    'bytes.jpg': 'exact', 'pixels.png': 'pixel', 'recompressed.jpg': 'near', 'resized.jpg': 'near',
    'mirrored.jpg': 'near',
    'border.jpg': 'near'}


def plant(path, folder, name) -> None:
  """A copy of the image at `path` in `folder` as `name` says; wrong for a name that is not in PLANTED."""
  image = PIL.Image.fromarray(decode.decode(path.read_bytes(), name))
  if name == 'bytes.jpg':
    shutil.copy(path, folder / name)
  elif name == 'pixels.png':
    image.save(folder / name)
  elif name == 'recompressed.jpg':
    image.save(folder / name, quality=60)
  elif name == 'resized.jpg':
    image.resize((round(1.7 * image.width), round(1.7 * image.height)),
                 PIL.Image.Resampling.BICUBIC).save(folder / name, quality=80)
  elif name == 'mirrored.jpg':
    image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT).save(folder / name, quality=75)
  else:
    assert name == 'border.jpg'
    image.crop((1, 1, image.width - 1, image.height - 1)).save(folder / name, quality=85)


def photographs(folder, classes, count, first=0) -> None:
  """`<class>/<i>.jpg` of separate regions of the sample photographs: no two are alike."""
  from sklearn import datasets

  photos = datasets.load_sample_images().images
  places = [(photo, y, x) for photo in photos for y in range(0, 341, 85) for x in range(0, 551, 85)]
  for k, name in enumerate(classes):
    (folder / name).mkdir(parents=True)
    for i in range(count):
      photo, y, x = places[first + k * count + i]
      PIL.Image.fromarray(photo[y:y + 85, x:x + 85]).save(folder / name / f'{i}.jpg', quality=92)


@pytest.fixture
def sets(tmp_path):
  """A target of two classes with a test split, and a pool of three whose first class holds copies of one test image."""
  photographs(tmp_path / 'target' / 'train', ('one', 'two'), 6)
  photographs(tmp_path / 'target' / 'test', ('one', 'two'), 3, first=12)
  photographs(tmp_path / 'pool', ('a', 'b', 'c'), 7, first=18)
  for name in PLANTED:
    plant(tmp_path / 'target' / 'test' / 'two' / '1.jpg', tmp_path / 'pool' / 'a', name)
  return tmp_path


def config(sets, **fields):
  made = miniature.get_config('finetune')
  with made.unlocked():
    made.update_from_flattened_dict({
        'source.name': f'folder:{sets}/pool', 'target.name': f'folder:{sets}/target', 'target.val_fraction': 0.3,
        'model.weights': '',
        'model.width': 4, 'image_size': 32, 'augment.short_side': 36, 'selection.size': 2, 'train.steps': 2,
        'train.batch_size': 4,
        'train.eval_every': 1, **fields})
  return made


def opened(sets):
  fields = config(sets)
  return open_splits(SplitSettings.from_config(fields.target), '', 0), open_set(fields.source.name, 'train')


def test_copies_are_found_after_any_change(sets):
  """Renamed, in another format, recompressed, resized, mirrored, without a border; and nothing else is found."""
  found = overlap.find(*opened(sets))
  assert set(found) == {overlap.POOL}
  assert {copy.id.removeprefix('a/'): copy.kind for copy in found[overlap.POOL]} == PLANTED
  assert {(copy.split, copy.other) for copy in found[overlap.POOL]} == {('target test', 'test/two/1.jpg')}


@pytest.mark.slow
def test_a_whole_run_drops_and_reports_copies(sets, caplog):
  """They are in no class mean, batch or count, and are reported; 'keep' keeps them, 'refuse' stops the run."""
  with caplog.at_level('INFO', 'ft_jax'):
    results = finetune.run(config(sets), sets / 'run')
  told = results['duplicates']
  assert told['rule'] == 'drop' and set(told['found']) == {overlap.POOL}
  pool = told['found'][overlap.POOL]
  assert (pool['images'], pool['kinds'], pool['of']) == (6, {'exact': 1, 'near': 4, 'pixel': 1}, {'target test': 6})
  assert {pair['id'] for pair in pool['first']} == {f'a/{name}' for name in PLANTED}
  assert results['source']['images'] == 21 and results['selection']['images'] == 14
  assert 'source pool: 6 images are copies of images of the target (6 of target test; ' in caplog.text
  chosen = json.loads((sets / 'run' / 'selection.json').read_text())
  assert chosen['counts'] == [7, 7, 7]
  page = (sets / 'run' / 'report.html').read_text()
  assert 'Images shared by training and evaluation' in page and 'the same pixels' in page
  assert all(f'a/{name}' in page for name in PLANTED)
  splits, whole = opened(sets)
  kept = overlap.resolve(splits, whole, 'keep', overlap.find(splits, whole))
  assert kept.pool is whole and not kept.dropped and kept.summary() == {**told, 'rule': 'keep'}
  with pytest.raises(ValueError, match='source pool: 6 images are copies .*such as a/.*source.duplicates=drop'):
    finetune.run(config(sets, **{'source.duplicates': 'refuse'}), sets / 'refused')
  with pytest.raises(ValueError, match="config.source.duplicates is 'some'; known: drop, keep, refuse"):
    finetune.run(config(sets, **{'source.duplicates': 'some'}), sets / 'unknown')


def test_no_copy_changes_nothing(photos, pool):
  """Sets that share no image come out as the same objects: a run without copies is unchanged."""
  splits = open_splits(SplitSettings.from_config(config(photos, **{'target.name': f'folder:{photos}'}).target), '', 0)
  pool = open_set(f'folder:{pool}', 'train')
  common = overlap.resolve(splits, pool, 'drop', overlap.find(splits, pool))
  assert common.splits is splits and common.pool is pool and not common.found and not common.dropped


def test_digits_are_too_small_to_look_alike():
  """At 8 x 8 pixels different images look the same: only equal pixels count, and the demo has none."""
  splits = Splits(*(open_set('digits:target', split) for split in ('train', 'val', 'test')))
  assert overlap.find(splits, open_set('digits:pool', 'train')) == {}


def test_train_loses_what_val_and_test_have(sets, caplog):
  """By the contents of the files, not by their names; test loses nothing."""
  target = sets / 'target'
  shutil.copy(target / 'test' / 'one' / '0.jpg', target / 'train' / 'one' / 'other.jpg')
  PIL.Image.fromarray(decode.decode((target / 'test' / 'two' / '0.jpg').read_bytes(),
                                    '')).save(target / 'train' / 'two' / 'other.png')
  for i in range(4):  # copies within train, some of which are split off as val
    shutil.copy(target / 'train' / 'one' / '1.jpg', target / 'train' / 'one' / f'again{i}.jpg')
  splits, _ = opened(sets)
  found = overlap.find(splits)
  common = overlap.resolve(splits, None, 'drop', found)
  train, val, test = (split.contents.tolist() for split in common.splits)
  assert not set(train) & set(val) and not set(train + val) & set(test) and len(test) == 6
  kinds = {copy.kind for copies in found.values() for copy in copies if copy.split == 'target test'}
  assert kinds == {'exact', 'pixel'}
  assert 'target train: ' in caplog.text and 'left out' in caplog.text
  with pytest.raises(ValueError, match='images are copies of images of the target'):
    overlap.resolve(splits, None, 'refuse', found)
  assert overlap.resolve(splits, None, 'keep', found).splits is splits


def test_a_set_with_nothing_left_is_refused(sets):
  """A target whose training images are all in test, and a pool that is the target."""
  shutil.rmtree(sets / 'target' / 'train' / 'one')
  shutil.copytree(sets / 'target' / 'test' / 'one', sets / 'target' / 'train' / 'one')
  splits, pool = opened(sets)
  with pytest.raises(ValueError, match='target train: every image of class one is in val or test too'):
    overlap.resolve(splits, pool, 'drop', overlap.find(splits, pool))
  part = splits._replace(train=splits.test, val=splits.test, test=None)
  with pytest.raises(ValueError, match='every image of it is in the target too'):
    overlap.resolve(part, splits.test, 'drop', {overlap.POOL: overlap.find(part, splits.test)[overlap.POOL]})


def test_a_class_of_the_pool_that_was_the_targets_is_gone(sets, caplog):
  shutil.copytree(sets / 'target' / 'train' / 'one', sets / 'pool' / 'aa')
  splits, pool = opened(sets)
  common = overlap.resolve(splits, pool, 'drop', overlap.find(splits, pool))
  assert common.classes == ('aa',) and common.pool.class_names == ('a', 'b', 'c')
  assert np.bincount(common.pool.labels).tolist() == [7, 7, 7] and 'no image is left of 1 classes' in caplog.text


@pytest.mark.slow
def test_the_pre_training_of_a_run_loses_them_too(sets):
  """It must not see test images; and a pre-training on another pool is not mistaken for this one."""
  fields = {'model.weights': 'pretrain', 'pretrain.steps': 2, 'pretrain.eval_every': 1, 'pretrain.batch_size': 8,
            'train.batch_size': 8, 'selection.method': 'none'}
  results = finetune.run(config(sets, **fields), sets / 'run')
  before = json.loads((sets / 'run' / 'pretrain' / 'results.json').read_text())
  assert results['duplicates']['found'][overlap.POOL]['images'] == before['source']['left_out']['images'] == 6
  own = ConfigDict(json.loads((sets / 'run' / 'pretrain' / 'config.json').read_text()))
  with pytest.raises(ValueError, match='left out other copies of target images'):
    pretrain.run(own, sets / 'run' / 'pretrain')


def test_a_selection_file_may_name_copies(sets, caplog):
  splits, pool = opened(sets)
  common = overlap.resolve(splits, pool, 'drop', overlap.find(splits, pool))
  listed = sets / 'ids.txt'
  listed.write_text('a/bytes.jpg\na/0.jpg\nb/0.jpg\n')
  given = selecting.read(str(listed), common.pool, {'cannot be read': (), 'are in the target too': common.dropped})
  assert given.ids.tolist() == ['a/0.jpg', 'b/0.jpg']
  assert '1 of 3 images of' in caplog.text and 'are in the target too' in caplog.text


def test_what_cannot_be_read_breaks_nothing(sets):
  """A broken file of the pool is not a copy of a broken file of the target."""
  for path in (sets / 'pool' / 'a' / 'broken.jpg', sets / 'target' / 'test' / 'one' / 'broken.jpg'):
    path.write_bytes(b'no image')
  found = overlap.find(*opened(sets))
  assert {copy.id.removeprefix('a/') for copy in found[overlap.POOL]} == set(PLANTED)


def test_blank_pictures_are_never_alike():
  """Blank pages, with a speck, gradients, noise of one level, half black and half white; and tiny images."""
  rng = np.random.default_rng(0)
  white = np.full((64, 64, 3), 255, np.uint8)
  ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None], (64, 64, 3))
  halves = white.copy()
  halves[32:] = 0
  noisy = [np.clip(200 + rng.normal(0, 1, (64, 64, 3)), 0, 255).astype(np.uint8) for _ in range(4)]
  specks = []
  for at in (0, 11, 30, 52):
    specks.append(white.copy())
    specks[-1][at:at + 3, at // 2:at // 2 + 3] = 0
  images = [white, white - 1, ramp, ramp + 3, halves, 255 - halves, *noisy, *specks,
            *rng.integers(0, 256, (4, 31, 40, 3), np.uint8)]
  pictures, distinctive = zip(*map(duplicates.picture_hash, map(np.ascontiguousarray, images)))
  assert not any(distinctive[:10] + distinctive[-4:])
  apart = np.array([f'{k}' for k in range(len(images))], contents.HASH)
  every = duplicates.Hashes(apart, apart, np.stack(pictures), np.array(distinctive))
  for k in range(len(images)):
    assert not duplicates.matches(every.subset(slice(k, k + 1)), every.subset(np.arange(len(images)) != k))


def test_a_search_in_blocks_is_that_of_all_pairs():
  rng = np.random.default_rng(0)
  bits = rng.random((700, 2, 128)) < 0.5
  others = rng.random((40, 2, 128)) < 0.5
  for row, flips in ((3, 0), (300, 5), (699, 20), (50, 21)):
    bits[row, 0] = others[row % 40, 0] ^ (np.arange(128) < flips)
  packed = lambda of: np.packbits(of, axis=-1).view(np.uint64)
  found = list(duplicates._nearest(packed(bits), packed(others), 20))
  assert found == [(3, 3, 0), (300, 20, 5), (699, 19, 20)]


# What images are known by.


def test_other_pixels_under_the_same_names_and_sizes_are_other_images(tmp_path):
  """Uncompressed images have one size; and modification times can be set back."""
  folder = tmp_path / 'set' / 'one'
  folder.mkdir(parents=True)
  for k, ending in enumerate(('bmp', 'ppm')):
    PIL.Image.fromarray(np.full((40, 40, 3), 80 + k, np.uint8)).save(folder / f'{k}.{ending}')
  before = open_set(f'folder:{tmp_path}/set', 'train')
  stat = (folder / '0.bmp').stat()
  PIL.Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(folder / '0.bmp')
  os.utime(folder / '0.bmp', ns=(stat.st_atime_ns, stat.st_mtime_ns))
  after = open_set(f'folder:{tmp_path}/set', 'train')
  assert before.ids.tolist() == after.ids.tolist() and (folder / '0.bmp').stat().st_size == stat.st_size
  assert before.fingerprint != after.fingerprint and before.legacy_fingerprint == after.legacy_fingerprint
  assert (before.contents == after.contents).tolist() == [False, True]


def test_a_copy_elsewhere_is_the_same_set(tmp_path):
  write_images(tmp_path / 'set', {'one': 3})
  before = open_set(f'folder:{tmp_path}/set', 'train')
  shutil.copytree(tmp_path / 'set', tmp_path / 'other', copy_function=shutil.copyfile)
  assert open_set('folder:other', 'train', str(tmp_path)).fingerprint == before.fingerprint


def test_files_are_hashed_once(tmp_path, monkeypatch):
  """Opened again, a set reads none of its files, or only the new ones."""
  monkeypatch.setattr(contents, '_FRESH_NS', -1 << 62)  # these have just been written
  write_images(tmp_path / 'set', {'one': 3})
  names = lambda: open_set(f'folder:{tmp_path}/set', 'train')
  read, real = [], contents._hash_files
  counted = lambda paths, sizes, what: read.append(len(sizes)) or real(paths, sizes, what)
  monkeypatch.setattr(contents, '_hash_files', counted)
  first = names()
  assert read == [3] and (names().contents == first.contents).all() and read == [3]
  shutil.copy(tmp_path / 'set' / 'one' / '0.jpg', tmp_path / 'set' / 'one' / '9.jpg')
  again = names()
  assert read == [3, 1] and again.contents[0] == again.contents[3] and (again.contents[:3] == first.contents).all()


def test_a_file_that_was_just_written_is_hashed_again(tmp_path, monkeypatch):
  """It may change again within the resolution of its times."""
  write_images(tmp_path / 'set', {'one': 2})
  read, real = [], contents._hash_files
  counted = lambda paths, sizes, what: read.append(len(sizes)) or real(paths, sizes, what)
  monkeypatch.setattr(contents, '_hash_files', counted)
  written = max(file.stat().st_ctime_ns for file in (tmp_path / 'set' / 'one').iterdir())
  for seconds, reads in ((1, [2]), (1, [2, 2]), (60, [2, 2, 2]), (60, [2, 2, 2])):
    monkeypatch.setattr(contents.time, 'time_ns', lambda seconds=seconds: written + seconds * 1_000_000_000)
    open_set(f'folder:{tmp_path}/set', 'train')
    assert read == reads


def test_files_that_could_not_be_read_have_nothing_in_common(tmp_path):
  """Files on a disk that did not answer are not copies of each other."""
  write_images(tmp_path / 'set', {'one': 3})
  source = open_set(f'folder:{tmp_path}/set', 'train')
  unknown = dataclasses.replace(source, contents=np.array([b'', b'', source.contents[2]], contents.HASH))
  some, = duplicates.hashes([unknown], 'set')
  assert some.pixels[:2].tolist() == [b'', b''] and some.pixels[2] and not some.distinctive[:2].any()
  assert [match.row for match in duplicates.matches(some, some)] == [2]


@pytest.mark.slow
def test_a_run_is_resumed_with_a_copy_of_its_images(sets):
  """On another disk, with other times; new pixels under the same names are noticed."""
  fields = {'train.steps': 4, 'target.name': 'folder:target', 'source.name': 'folder:pool', 'data_dir': str(sets)}
  done = finetune.run(config(sets, **fields), sets / 'run')
  (sets / 'run' / 'results.json').unlink()
  moved = sets / 'moved'
  for name in ('target', 'pool'):
    shutil.copytree(sets / name, moved / name, copy_function=shutil.copyfile)
    (sets / name).rename(sets / f'{name} of before')
    (sets / name).symlink_to(moved / name)
  again = finetune.run(config(sets, **fields), sets / 'run')
  assert all(again[part] == done[part] for part in ('test', 'source', 'duplicates'))


@pytest.mark.slow
def test_checkpoints_and_selections_of_earlier_versions_are_used(sets):
  """They identify their images by names and sizes, and their runs kept copies."""
  fields = {'train.steps': 4, 'source.duplicates': 'keep'}
  finetune.run(config(sets, **fields), sets / 'run')
  splits, pool = opened(sets)
  of_before = {splits.train.fingerprint: splits.train.legacy_fingerprint,
               splits.val.fingerprint: splits.val.legacy_fingerprint,
               pool.fingerprint: pool.legacy_fingerprint}
  chosen = finetune.selection.Selection.load(sets / 'run' / 'selection.json')
  helping = pool.of_classes(chosen.classes)
  of_before[helping.fingerprint] = helping.legacy_fingerprint
  replaced = 0
  for path in [sets / 'run' / 'selection.json', *(sets / 'run' / 'checkpoints').glob('*/about/*')]:
    text = path.read_text()
    for now, before in of_before.items():
      replaced += text.count(now)
      text = text.replace(now, before)
    path.write_text(text)
  assert replaced >= 1 + 3
  for name in ('results.json', 'duplicates.json', 'config.json'):
    (sets / 'run' / name).unlink()
  stored = config(sets, **{'train.steps': 4})  # the default rule is 'drop'
  (sets / 'run' / 'config.json').write_text(json.dumps(stored.to_dict()))
  results = finetune.run(stored, sets / 'run')
  assert results['source']['images'] == 27 and results['duplicates']['rule'] == 'keep'


def test_hosts_look_through_a_share_each(sets, monkeypatch):
  """Together they find what one host finds, in the same order."""
  splits, pool = opened(sets)
  target, = duplicates.hashes([splits.test], 'target')
  alone = overlap._in_pool(pool, target, target)
  told: list[list] = []
  monkeypatch.setattr(overlap.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(overlap.parallel, 'everyone', lambda value: told.append(value) or [*told])
  for host in (0, 1):
    monkeypatch.setattr(overlap.jax, 'process_index', lambda host=host: host)
    together = overlap._in_pool(pool, target, target)
  assert together == alone and len(alone) == len(PLANTED) and all(len(pool) // 2 > match.row for match in alone)
  reverse = pool.subset(np.arange(len(pool))[::-1])
  assert overlap._in_pool(reverse, target, target)[-1].row == len(pool) - 1 - alone[0].row


def test_other_samples_of_the_target_cost_no_other_search(sets, monkeypatch):
  """The copies of each seed do not depend on the other seeds; nothing is decoded or searched a second time."""
  # copies of images that only some seeds sample
  for i, name in enumerate(('recompressed.jpg', 'pixels.png', 'resized.jpg')):
    plant(sets / 'target' / 'train' / 'one' / f'{2 * i}.jpg', sets / 'pool' / 'b', name)
  fields = config(sets, **{'target.train_per_class': 3, 'target.val_fraction': 0.4})
  settings = SplitSettings.from_config(fields.target)
  pool, unsampled = open_set(fields.source.name, 'train'), unsampled_sets(settings, '')
  seeds = [open_splits(settings, '', seed) for seed in range(4)]
  alone = [overlap.find(splits, pool) for splits in seeds]
  assert len({len(found[overlap.POOL]) for found in alone}) > 1
  assert overlap.find(seeds[0], pool, unsampled) == alone[0]
  monkeypatch.setattr(duplicates, '_hash_all', None)
  searched, nearest = [], duplicates._nearest
  monkeypatch.setattr(duplicates, '_nearest', lambda some, *rest: searched.append(len(some)) or nearest(some, *rest))
  assert [overlap.find(splits, pool, unsampled) for splits in seeds] == alone
  assert max(searched) < 12 < len(pool)


@pytest.mark.parametrize('rule', ['keep', 'drop'])
def test_nothing_is_searched_that_is_kept_anyway(sets, rule, monkeypatch):
  """And a run that kept copies before it had a checkpoint searches them when it is to drop them."""
  splits, pool = opened(sets)
  work = Workdir(sets / 'run', config(sets).to_dict())
  with monkeypatch.context() as patch:
    patch.setattr(overlap, 'find', None)
    kept = overlap.settle(work, splits, pool, 'keep')
  assert kept.pool is pool and kept.summary() == {'rule': 'keep', 'found': {}}
  assert len(overlap.settle(work, splits, pool, rule).dropped) == (6 if rule == 'drop' else 0)
