"""Embeddings are validated on construction, and embed() gives the same result on any number of devices."""

import jax.numpy as jnp
import numpy as np
import pytest

from selection import class_means, embed, embed_class_means, Embeddings, journal


def encode(variables, images):
  return images.reshape(len(images), -1).astype(jnp.float32) @ variables['w']


@pytest.fixture
def pieces():
  """Eleven images in uneven batches, out of order, with padding in the last one."""
  rng = np.random.default_rng(0)
  images, labels = rng.integers(0, 255, (11, 2, 2, 3)).astype(np.uint8), rng.integers(0, 3, 11).astype(np.int32)
  labels[:3] = 0, 1, 2
  order = rng.permutation(11)
  batches = [{'input': images[rows], 'label': labels[rows], 'row': rows.astype(np.int32),
              'mask': np.ones(len(rows), bool)}
             for rows in (order[:5], order[5:9], order[9:])]
  batches[2] = {key: np.concatenate([value, value[:1]]) for key, value in batches[2].items()}
  batches[2]['mask'][2] = False
  variables = {'w': rng.normal(size=(12, 6)).astype(np.float32)}
  return images, labels, batches, variables


def test_embed_on_four_devices_is_the_plain_product(pieces):
  images, labels, batches, variables = pieces
  embeddings = embed(encode, variables, batches, class_names='abc', fingerprint='f')
  np.testing.assert_allclose(embeddings.features, images.reshape(11, 12) @ variables['w'], rtol=1e-5)
  assert embeddings.labels.tolist() == labels.tolist() and embeddings.ids.tolist() == list(range(11))


def test_streamed_class_means_are_the_means(pieces):
  images, labels, batches, variables = pieces
  streamed = embed_class_means(encode, variables, batches, class_names='abc')
  whole = class_means(embed(encode, variables, batches, class_names='abc'))
  expected = np.stack([(images.reshape(11, 12) @ variables['w'])[labels == k].mean(0) for k in range(3)])
  np.testing.assert_allclose(streamed.features, expected, rtol=1e-5)
  np.testing.assert_allclose(whole.features, expected, rtol=1e-5)
  assert streamed.weights.tolist() == whole.weights.tolist() == np.bincount(labels).tolist()


def test_batches_without_labels(pieces):
  """Batches of images and nothing else, as in a notebook."""
  images, _, _, variables = pieces
  embeddings = embed(encode, variables, ({'input': images[i:i + 3]} for i in range(0, 11, 3)))
  np.testing.assert_allclose(embeddings.features, images.reshape(11, 12) @ variables['w'], rtol=1e-5)
  assert embeddings.labels is None


@pytest.fixture
def save_each_batch(monkeypatch):
  """Progress is saved after each batch instead of every minute."""
  monkeypatch.setattr(journal, 'SECONDS', 0.0)


@pytest.mark.parametrize('function', [embed, embed_class_means])
@pytest.mark.usefixtures('save_each_batch')
def test_resumes_where_it_was_killed(function, tmp_path):
  """The result is the same bit for bit, and only one batch is embedded twice, to compare it.

  Other images, other batches or other weights in the same folder raise ValueError.
  """
  rng = np.random.default_rng(1)
  variables = {'w': rng.normal(size=(12, 6)).astype(np.float32)}
  batches = [{'input': rng.integers(0, 255, (4, 2, 2, 3)).astype(np.uint8), 'label': np.arange(4) % 3}
             for _ in range(6)]
  expected, asked = function(encode, variables, batches, class_names='abc'), []

  def until(stop):
    def rest(done):
      asked.append(done)
      for number, batch in enumerate(batches[done:], done):
        if number == stop:
          raise KeyboardInterrupt
        yield batch
    return rest

  for stop in (3, 5):
    with pytest.raises(KeyboardInterrupt):
      function(encode, variables, until(stop), class_names='abc', workdir=tmp_path)
  again = function(encode, variables, until(None), class_names='abc', workdir=tmp_path)
  # At each kill the last batch was still on the devices; the last saved one is embedded again to compare it.
  assert asked == [0, 1, 3] and again.features.tobytes() == expected.features.tobytes()
  with pytest.raises(ValueError, match=r'passes of another selection or embedding \(encoder differ\)'):
    function(encode, variables, until(None), class_names='abc', fingerprint='other', workdir=tmp_path)
  halves = [{key: value[rows] for key, value in batch.items()} for batch in batches
            for rows in (slice(0, 2), slice(2, 4))]
  for weights, others in ((variables, batches[::-1]), (variables, halves), (variables, []),
                          ({'w': -variables['w']}, batches)):
    with pytest.raises(ValueError,
                       match='holds features of other images, of batches of another size or by another encoder'):
      function(encode, weights, lambda first, others=others: others[first:], class_names='abc', workdir=tmp_path)
  with pytest.raises(ValueError, match='batches are a list; with a workdir, give a function'):
    function(encode, variables, batches, class_names='abc', workdir=tmp_path)


@pytest.mark.usefixtures('save_each_batch')
def test_a_damaged_save_is_embedded_again(tmp_path):
  rng = np.random.default_rng(1)
  variables = {'w': np.eye(12, dtype=np.float32)}
  batches = [{'input': rng.integers(0, 255, (4, 2, 2, 3)).astype(np.uint8)} for _ in range(4)]
  expected = embed(encode, variables, lambda done: batches[done:], workdir=tmp_path)
  second = tmp_path / 'features-000000001.npz'
  second.write_bytes(second.read_bytes()[:-100])
  asked = []
  again = embed(encode, variables, lambda done: asked.append(done) or batches[done:], workdir=tmp_path)
  assert asked == [0] and (again.features == expected.features).all()


@pytest.mark.usefixtures('save_each_batch')
def test_features_that_are_not_finite_raise_each_time(tmp_path):
  """Comparing the last batch does not report them as features of other images."""
  images = np.random.default_rng(1).integers(0, 255, (8, 2, 2, 3)).astype(np.uint8)
  call = lambda: embed(encode, {'w': np.full((12, 6), np.nan)}, lambda first: [{'input': images}] * 2 if not first
                       else [{'input': images}],
                       workdir=tmp_path)
  for _ in range(2):
    with pytest.raises(ValueError, match='16 of 16 rows of features are not finite'):
      call()


@pytest.mark.usefixtures('save_each_batch')
def test_batches_have_the_same_fields(tmp_path):
  """Also across a restart: labels of some batches only are useless."""
  images, variables = np.random.default_rng(1).integers(0, 255, (4, 2, 2, 3)).astype(np.uint8), {'w': np.eye(12)}
  labelled, bare = {'input': images, 'label': np.arange(4)}, {'input': images}
  with pytest.raises(ValueError,
                     match='some batches give features and others features, label; all must have the same fields'):
    embed(encode, variables, [labelled, bare])
  embed(encode, variables, lambda first: [labelled][first:], workdir=tmp_path)
  with pytest.raises(ValueError, match='some batches give features and others features, label'):
    embed(encode, variables, lambda first: [labelled, bare, bare][first:], workdir=tmp_path)


@pytest.mark.usefixtures('save_each_batch')
def test_bfloat16_is_saved_as_float32(tmp_path):
  images = np.random.default_rng(1).integers(0, 255, (8, 2, 2, 3)).astype(np.uint8)
  half = lambda variables, images: encode(variables, images).astype(jnp.bfloat16)
  call = lambda: embed(half, {'w': np.eye(12)}, lambda first: [{'input': images[k:k + 4]} for k in (0, 4)][first:],
                       workdir=tmp_path)
  assert call().features.dtype == call().features.dtype == np.float32


def test_ids_name_the_images(pieces):
  """By the row of each image, whatever the order of the batches."""
  _, _, batches, variables = pieces
  embeddings = embed(encode, variables, batches, ids=[f'{i}.jpg' for i in range(11)])
  assert embeddings.ids.tolist() == [f'{i}.jpg' for i in range(11)]


def test_of_classes():
  """The rows of some classes, relabelled in the order of the argument."""
  all_of_them = Embeddings(np.arange(10.0).reshape(5, 2), [0, 1, 2, 1, 0], ['a', 'b', 'c'], list('vwxyz'),
                           fingerprint='f')
  part = all_of_them.of_classes([2, 0])
  assert part.ids.tolist() == ['v', 'x', 'z'] and part.labels.tolist() == [1, 0, 1] and part.class_names == ('c', 'a')
  assert repr(part) == '<Embeddings of 3 images of 2 classes, 2 dimensions>' and part.fingerprint == 'f'
  with pytest.raises(ValueError, match='class 3 is not among the 3 classes'):
    all_of_them.of_classes([3])


def test_save_and_load(tmp_path):
  before = Embeddings(np.eye(3, dtype=np.float32), [0, 1, 1], ['a', 'b'], weights=[1, 2, 3], fingerprint='abc')
  before.save(tmp_path / 'deep' / 'e.npz')
  after = Embeddings.load(tmp_path / 'deep' / 'e.npz')
  assert (after.features == before.features).all() and after.class_names == ('a', 'b') and after.fingerprint == 'abc'
  assert after.weights.tolist() == [1, 2, 3] and after.ids is None
  assert [p.name for p in (tmp_path / 'deep').iterdir()] == ['e.npz']
  (tmp_path / 'deep' / 'e.npz').write_bytes((tmp_path / 'deep' / 'e.npz').read_bytes()[:100])
  with pytest.raises(ValueError, match='cannot be read as embeddings'):
    Embeddings.load(tmp_path / 'deep' / 'e.npz')


@pytest.mark.parametrize('kwargs,words', [
    (dict(features=np.ones(3)), r'shape \(3,\); expected \[n, d\]'),
    (dict(features=np.ones((0, 3))), 'at least one row'),
    (dict(features=[[1, np.nan], [1, 1], [np.inf, 0]]), '2 of 3 rows of features are not finite, the first is row 0'),
    (dict(features=np.ones((3, 2)), ids=['a', 'b', 'a']), 'ids occur more than once, such as a .2 times at most'),
    (dict(features=np.ones((2, 2)), labels=[0]), r'labels have shape \(1,\); expected \[2\]'),
    (dict(features=np.ones((2, 2)), labels=[0.0, 1.0]), 'expected integers from 0'),
    (dict(features=np.ones((2, 2)), labels=[-1, 1]), 'expected integers from 0'),
    (dict(features=np.ones((2, 2)), labels=[0, 2], class_names=['a', 'b']), 'label 2 is beyond the 2 class names'),
])
def test_errors(kwargs, words):
  with pytest.raises(ValueError, match=words):
    Embeddings(**kwargs)
