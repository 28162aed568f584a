"""The order is a function of (seed, step); every example comes once per epoch, and once in evaluation."""

import collections
import dataclasses
import itertools
import os
import shutil

import jax
import numpy as np
import psutil
import pytest

from ft_jax.data import crop, decode, memory_cache, open_set, pipeline, unreadable
from ft_jax.data.pipeline import EvalBatches, train_batches, Transform

TRANSFORM = Transform(16, short_side=18)


@pytest.fixture(scope='module')
def source(photos):
  return open_set(f'folder:{photos}', 'train')


def first(source, count, **kwargs):
  defaults = dict(stream='target', seed=0, start=0)
  return list(itertools.islice(train_batches(source, TRANSFORM, kwargs.pop('batch_size', 10), **{**defaults, **kwargs}),
                               count))


def same(a, b):
  return all((a[key] == b[key]).all() for key in ('input', 'label', 'row', 'mask'))


def test_batch_contract(source):
  batch = first(source, 1)[0]
  assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
      'input': ((10, 16, 16, 3), 'uint8'), 'label': ((10,), 'int32'), 'row': ((10,), 'int32'), 'mask': ((10,), 'bool')}
  assert (batch['label'] == source.labels[batch['row']]).all() and batch['mask'].all()


def test_starting_at_a_step_gives_the_same_batches(source):
  """The pixels too: crops depend on the position in the order, not on earlier draws."""
  whole = first(source, 8)
  assert all(same(a, b) for a, b in zip(whole[5:], first(source, 3, start=5)))


def test_seed_and_stream_change_the_order(source):
  base = first(source, 1)[0]['row'].tolist()
  assert base != first(source, 1, seed=1)[0]['row'].tolist()
  assert base != first(source, 1, stream='source')[0]['row'].tolist()


def test_balanced_classes_come_equally_often(source):
  """Classes of 12, 12, 12 and 3 examples take turns, and the examples of each are permuted; from a later step too."""
  uneven = source.subset([i for i in range(48) if source.labels[i] < 3 or i % 4 == 0])
  drawn = np.concatenate([b['row'] for b in first(uneven, 24, balanced=True)])
  turns = uneven.labels[drawn].reshape(60, 4)
  assert all(sorted(turn) == [0, 1, 2, 3] for turn in turns.tolist())
  assert len({tuple(turn) for turn in turns.tolist()}) > 10
  for k, size in enumerate(np.bincount(uneven.labels).tolist()):
    rows = drawn[uneven.labels[drawn] == k]
    passes = rows[:len(rows) // size * size].reshape(-1, size)
    assert all(len(set(p)) == size for p in passes.tolist()) and len({tuple(p) for p in passes.tolist()}) > 1, k
  assert all(same(a, b) for a, b in zip(first(uneven, 8, balanced=True)[5:], first(uneven, 3, start=5, balanced=True)))


def test_further_views_are_other_crops_of_the_same_images(source):
  """The first view is the same as without the others, and each has its own random numbers."""
  views = {'key': TRANSFORM, 'whole': Transform(16, scale=(1.0, 1.0), flip=False)}
  plain, both = first(source, 2)[1], first(source, 2, views=views)[1]
  assert same(plain, both) and both['key'].shape == both['whole'].shape == plain['input'].shape
  assert (both['key'] != both['input']).any(axis=(1, 2, 3)).all()
  again = first(source, 1, start=1, views={'key': TRANSFORM})[0]
  np.testing.assert_array_equal(again['key'], both['key'])


def test_every_example_once_per_epoch(source):
  """48 examples in batches of 10: over five epochs each comes five times, each epoch in another order."""
  drawn = np.concatenate([b['row'] for b in first(source, 24)])
  passes = drawn.reshape(5, 48)
  assert all(sorted(p) == list(range(48)) for p in passes.tolist())
  assert len({tuple(p) for p in passes.tolist()}) == 5


def test_batch_larger_than_the_set(source):
  small = source.subset(range(6))
  batch = first(small, 1, batch_size=16)[0]
  assert sorted(collections.Counter(batch['row'].tolist()).values()) == [2, 2, 3, 3, 3, 3]


def test_two_hosts_share_one_order(source, monkeypatch):
  """Each reads its half of the batch; together they have the images of a single host."""
  alone = first(source, 3)
  halves = []
  for host in range(2):
    monkeypatch.setattr(pipeline.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(pipeline.jax, 'process_index', lambda host=host: host)
    halves.append(first(source, 3))
  for whole, a, b in zip(alone, *halves):
    assert len(a['row']) == 5
    merged = {key: np.concatenate([a[key], b[key]]) for key in whole}
    assert same(whole, merged)


@pytest.mark.parametrize('count', [1, 7, 8, 9])
def test_evaluation_pads_and_masks(source, count):
  batches = EvalBatches(source.subset(range(count)), TRANSFORM, 4)
  made = list(batches)
  assert len(made) == len(batches) == -(-count // 4)
  assert np.concatenate([b['row'][b['mask']] for b in made]).tolist() == list(range(count))
  assert all(b['input'].shape == (4, 16, 16, 3) for b in made)


def test_evaluation_on_two_hosts(source, monkeypatch):
  """Nine examples, batch size four: both hosts make equally many batches, and together have each example once."""
  seen = []
  for host in range(2):
    monkeypatch.setattr(pipeline.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(pipeline.jax, 'process_index', lambda host=host: host)
    made = list(EvalBatches(source.subset(range(9)), TRANSFORM, 4))
    assert [len(b['mask']) for b in made] == [2, 2, 2]
    seen += np.concatenate([b['row'][b['mask']] for b in made]).tolist()
  assert sorted(seen) == list(range(9)) and jax.process_index() == 1


def test_flip_and_no_flip(source):
  """Half of the images are flipped, none with flip off: seen on a ramp that is bright on the right."""
  ramp = source[0]._replace(image=np.tile(np.arange(16, dtype=np.uint8), (16, 1)))

  def mirrored(flip):
    whole = Transform(16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=flip)
    return sum(bool(whole.train(ramp, np.random.default_rng(seed))[0, 0, 0] > 8) for seed in range(200))

  assert 70 < mirrored(True) < 130 and mirrored(False) == 0
  image = decode.decode(source[0].image, '')
  assert (crop.mirror(image.copy()) == image[:, ::-1]).all()


def test_a_damaged_file_is_named(photos, tmp_path):
  """The error of a pipeline thread reaches the caller, with the name of the file."""
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'good.jpg').write_bytes(next((photos / 'train' / 'sky').iterdir()).read_bytes())
  (tmp_path / 'b' / 'bad.jpg').write_bytes(b'not an image')
  source = open_set(f'folder:{tmp_path}', 'train')
  with pytest.raises(ValueError, match='b/bad.jpg cannot be read as an image'):
    list(EvalBatches(source, TRANSFORM, 4))
  with pytest.raises(ValueError, match='b/bad.jpg cannot be read as an image'):
    first(source, 2, batch_size=4)


def test_a_cache_changes_no_bit(source):
  """In training and evaluation; each image is decoded once, in the first epoch, and cropped anew each time."""
  reads = collections.Counter()

  def read(row):
    reads[row] += 1
    return source.read(row)

  kept = memory_cache.cached({'target train': dataclasses.replace(source, read=read)})['target train']
  reads.clear()  # of the sizes
  assert all(same(a, b) for a, b in zip(first(source, 12), first(kept, 12)))
  assert all(same(a, b) for a, b in zip(EvalBatches(source, TRANSFORM, 7), EvalBatches(kept, TRANSFORM, 7)))
  # Threads that meet at one image may both read it.
  assert set(reads) == set(range(48)) and sum(reads.values()) < 60
  before = sum(reads.values())
  first(kept, 10)
  assert sum(reads.values()) == before and kept.fingerprint == source.fingerprint
  with pytest.raises(ValueError, match='read-only'):
    kept[0].image[:] = 0


def test_a_cache_says_its_size_first_and_refuses_what_does_not_fit(source, monkeypatch, caplog):
  """Before any image is decoded."""
  size = sum(decode.decode(example.image, '').nbytes for example in (source[i] for i in range(len(source))))
  monkeypatch.setattr(memory_cache, 'decode', lambda *args: pytest.fail('decoded'))
  monkeypatch.setattr(memory_cache, 'free_memory', lambda: 2 * size)
  with caplog.at_level('INFO', 'ft_jax'):
    memory_cache.cached({'target train': source})
  logged = f'caching 48 decoded images in memory (target train): {size / 1e6:.2f} MB of {2 * size / 1e6:.2f} MB free'
  assert logged in caplog.text
  monkeypatch.setattr(memory_cache, 'free_memory', lambda: size)  # all of it is too much
  with pytest.raises(ValueError, match='config.data.cache=true: 48 images .* of memory are free, .*; use '
                                       '--config.data.cache=false'):
    memory_cache.cached({'target train': source})


def test_free_memory_is_that_of_this_machine():
  assert 1e6 < memory_cache.free_memory() < psutil.virtual_memory().total


@pytest.fixture
def damaged_source(photos, tmp_path):
  """The photographs, three of which cannot be read: two of one class, one of another."""
  shutil.copytree(photos / 'train', tmp_path / 'damaged')
  for name, data in (('roof/3.jpg', b''), ('roof/11.jpg', b'no image'), ('sky/0.jpg', None)):
    path = tmp_path / 'damaged' / name
    path.write_bytes(path.read_bytes()[:500] if data is None else data)
  return open_set(f'folder:{tmp_path / "damaged"}', 'train')


def test_damaged_images_are_found_once_and_left_out(damaged_source, caplog, monkeypatch):
  rest, ids = unreadable.drop(damaged_source, 'target train', True)
  assert ids == ['roof/11.jpg', 'roof/3.jpg', 'sky/0.jpg'] and len(rest) == 45
  assert not set(ids) & set(rest.ids.tolist())
  logged = 'target train: 3 of 48 images cannot be read and are skipped: roof/11.jpg, roof/3.jpg, sky/0.jpg'
  assert logged in caplog.text
  assert len(np.unique(np.concatenate([batch['row'] for batch in first(rest, 9, batch_size=5)]))) == 45
  # The next time nothing is read.
  monkeypatch.setattr(unreadable, 'decode', lambda *args, **kwargs: pytest.fail('decoded'))
  again, ids_again = unreadable.drop(damaged_source, 'target train', True)
  assert ids_again == ids and again.fingerprint == rest.fingerprint != damaged_source.fingerprint


def test_a_file_that_changed_is_tried_again(damaged_source, tmp_path):
  """Same names and sizes, other bytes."""
  opened = lambda: open_set(f'folder:{tmp_path / "damaged"}', 'train')
  damaged = lambda: unreadable.drop(opened(), 'target train', True)[1]
  before = opened().fingerprint
  path = tmp_path / 'damaged' / 'wall' / '2.jpg'
  good = path.read_bytes()
  assert 'wall/2.jpg' not in damaged()
  path.write_bytes(bytes(len(good)))
  assert 'wall/2.jpg' in damaged()
  path.write_bytes(good)
  os.utime(path, ns=(1, 1))
  assert 'wall/2.jpg' not in damaged() and opened().fingerprint == before


def test_a_class_without_a_readable_image_is_named(damaged_source):
  roof = damaged_source.subset([i for i, name in enumerate(damaged_source.ids)
                                if name in ('roof/3.jpg', 'roof/11.jpg', 'sky/1.jpg')])
  with pytest.raises(ValueError, match='target train: no image of class roof can be read, such as roof/11.jpg'):
    unreadable.drop(roof, 'target train', True)
  # To evaluate on, the other classes are enough; on nothing nobody can.
  assert len(unreadable.drop(roof, 'target val', False)[0]) == 1
  with pytest.raises(ValueError, match='target val: no image of class roof'):
    unreadable.drop(roof.of_classes([roof.class_names.index('roof')]), 'target val', False)
