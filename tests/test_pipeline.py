"""Order is a function of (seed, step); every example comes once a pass; evaluation misses and doubles nothing."""

import collections
import itertools

import jax
import numpy as np
import pytest

from ft_jax.data import augment, pipeline
from ft_jax.data.pipeline import EvalBatches, train_batches, Transform
from ft_jax.data.sources import open_source

TRANSFORM = Transform(16, short_side=18)


@pytest.fixture(scope='module')
def source(photos):
  return open_source(f'folder:{photos}', 'train')


def first(source, count, **kwargs):
  defaults = dict(stream='target', seed=0, start=0)
  return list(itertools.islice(train_batches(source, TRANSFORM, kwargs.pop('batch_size', 10), **{**defaults, **kwargs}), count))


def same(a, b):
  return all((a[key] == b[key]).all() for key in ('image', 'label', 'index', 'mask'))


def test_batch_contract(source):
  batch = first(source, 1)[0]
  assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
      'image': ((10, 16, 16, 3), 'uint8'), 'label': ((10,), 'int32'), 'index': ((10,), 'int32'), 'mask': ((10,), 'bool')}
  assert (batch['label'] == source.labels[batch['index']]).all() and batch['mask'].all()


def test_starting_at_a_step_gives_the_same_batches(source):
  """Images too: the crops are a function of the place in the order, not of what was drawn before."""
  whole = first(source, 8)
  assert all(same(a, b) for a, b in zip(whole[5:], first(source, 3, start=5)))


def test_seed_and_stream_change_the_order(source):
  base = first(source, 1)[0]['index'].tolist()
  assert base != first(source, 1, seed=1)[0]['index'].tolist()
  assert base != first(source, 1, stream='source')[0]['index'].tolist()


def test_every_example_once_a_pass(source):
  """48 examples in batches of 10: over five passes each comes five times, and each pass has an order of its own."""
  drawn = np.concatenate([b['index'] for b in first(source, 24)])
  passes = drawn.reshape(5, 48)
  assert all(sorted(p) == list(range(48)) for p in passes.tolist())
  assert len({tuple(p) for p in passes.tolist()}) == 5


def test_batch_larger_than_the_set(source):
  small = source.subset(range(6))
  batch = first(small, 1, batch_size=16)[0]
  assert sorted(collections.Counter(batch['index'].tolist()).values()) == [2, 2, 3, 3, 3, 3]


def test_two_hosts_share_one_order(source, monkeypatch):
  """Each reads its half of the batch; together they have the images that one host would have."""
  alone = first(source, 3)
  halves = []
  for host in range(2):
    monkeypatch.setattr(pipeline.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(pipeline.jax, 'process_index', lambda host=host: host)
    halves.append(first(source, 3))
  for whole, a, b in zip(alone, *halves):
    assert len(a['index']) == 5
    merged = {key: np.stack([a[key], b[key]], 1).reshape(whole[key].shape) for key in whole}
    assert same(whole, merged)


@pytest.mark.parametrize('count', [1, 7, 8, 9])
def test_evaluation_pads_and_masks(source, count):
  batches = EvalBatches(source.subset(range(count)), TRANSFORM, 4)
  made = list(batches)
  assert len(made) == len(batches) == -(-count // 4)
  assert np.concatenate([b['index'][b['mask']] for b in made]).tolist() == list(range(count))
  assert all(b['image'].shape == (4, 16, 16, 3) for b in made)


def test_evaluation_on_two_hosts(source, monkeypatch):
  """Nine examples, batch four: both hosts make as many batches, and together have each example once."""
  seen = []
  for host in range(2):
    monkeypatch.setattr(pipeline.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(pipeline.jax, 'process_index', lambda host=host: host)
    made = list(EvalBatches(source.subset(range(9)), TRANSFORM, 4))
    assert [len(b['mask']) for b in made] == [2, 2, 2]
    seen += np.concatenate([b['index'][b['mask']] for b in made]).tolist()
  assert sorted(seen) == list(range(9)) and jax.process_index() == 1


def test_flip_and_no_flip(source):
  """Half of the images are mirrored, none when flip is off: judged by a ramp that is bright on the right."""
  ramp = source[0]._replace(image=np.tile(np.arange(16, dtype=np.uint8), (16, 1)))

  def mirrored(flip):
    whole = Transform(16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=flip)
    return sum(bool(whole.train(ramp, np.random.default_rng(seed))[0, 0, 0] > 8) for seed in range(200))

  assert 70 < mirrored(True) < 130 and mirrored(False) == 0
  assert (augment.mirror(image := augment.decode(source[0].image, '')) == image[:, ::-1]).all()


def test_a_damaged_file_is_named(photos, tmp_path):
  """The error comes out of the threads of the pipeline as it is, with the name of the file."""
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'good.jpg').write_bytes(next((photos / 'train' / 'sky').iterdir()).read_bytes())
  (tmp_path / 'b' / 'bad.jpg').write_bytes(b'not an image')
  source = open_source(f'folder:{tmp_path}', 'train')
  with pytest.raises(ValueError, match='b/bad.jpg is no image that can be read'):
    list(EvalBatches(source, TRANSFORM, 4))
  with pytest.raises(ValueError, match='b/bad.jpg is no image that can be read'):
    first(source, 2, batch_size=4)
