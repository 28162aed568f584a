"""select() gives the published selections, and refuses what cannot be right."""

import subprocess
import sys

import numpy as np
import pytest

import selection
from selection import Embeddings, select

CASES = [(encoder, name) for encoder in ('resnet18', 'mocov2') for name in ('cub', 'pets', 'aircraft', 'dogs', 'caltech101')]


@pytest.mark.parametrize('encoder,name', CASES)
def test_published_selection(shared, encoder, name):
  """The authors' class means through our solver: same top 100 in the same order, shares within 1e-4 (they agree to 2e-6)."""
  means = shared / 'reference' / 'class_means' / encoder
  with np.load(means / 'imagenet.npz') as source, np.load(means / f'{name}.npz') as target, \
      np.load(shared / 'reference' / 'uot' / encoder / f'{name}.npz') as published:
    chosen = select(*(Embeddings(f['features'], np.arange(len(f['features'])), weights=f['counts']) for f in (source, target)), 100)
    assert chosen.converged
    assert list(chosen.classes) == published['top100'].tolist()
    np.testing.assert_allclose(chosen.shares, published['importance'] / published['importance'].sum(), rtol=1e-4)
    assert chosen.shares.sum() == pytest.approx(1)


@pytest.fixture
def sets() -> tuple[Embeddings, Embeddings]:
  """Ten source classes along ten axes, eight images each; the target lies along axes 2 and 7."""
  rng = np.random.default_rng(0)
  axes = 5 * np.eye(10, 12)
  source = Embeddings(np.repeat(axes, 8, 0) + rng.normal(size=(80, 12)), np.repeat(np.arange(10), 8), [f'class {i}' for i in range(10)])
  target = Embeddings(np.repeat(axes[[7, 2]], 5, 0) + rng.normal(size=(10, 12)), np.repeat([0, 1], 5), ['seven', 'two'])
  return source, target


def test_uot_finds_the_classes_that_the_target_needs(sets):
  chosen = select(*sets, 2)
  assert set(chosen.classes) == {2, 7} and set(chosen.class_names) == {'class 2', 'class 7'}
  assert chosen.parameters == {'epsilon': 0.1, 'rho_source': 0.1, 'rho_target': 10.0}
  drawn = dict(zip(chosen.classes, chosen.explain(1)))
  assert drawn[7][0][0] == 'seven' and drawn[7][0][1] > 0.9 and drawn[2][0][0] == 'two'


def test_random_is_random_by_seed(sets):
  first, again, other = (select(*sets, 4, method='random', seed=s) for s in (0, 0, 1))
  assert first.classes == again.classes != other.classes
  assert len(set(first.classes)) == 4
  counts = np.bincount(np.concatenate([select(*sets, 3, method='random', seed=s).classes for s in range(200)]), minlength=10)
  assert counts.min() > 35 and counts.max() < 90  # 60 expected


def test_none_selects_nothing(sets):
  chosen = select(*sets, 4, method='none')
  assert chosen.classes == () and chosen.shares.sum() == pytest.approx(1)


def test_class_means_given_as_embeddings_count_as_they_are(sets):
  """Means with weights select the same as the images that they were made of."""
  means = selection.class_means(sets[0])
  assert means.weights.tolist() == [8.0] * 10
  np.testing.assert_allclose(select(means, sets[1], 3).shares, select(*sets, 3).shares, rtol=1e-5)


@pytest.mark.parametrize('change,words', [
    (dict(size=0), 'size is 0; expected a whole number from 1 to 10'), (dict(size=11), 'from 1 to 10'), (dict(size=2.5), 'from 1 to 10'),
    (dict(method='best'), "selection method 'best'; known: uot, random, none"), (dict(by='colour'), "by 'colour'; known: class"),
    (dict(temperature=1.0), "uot has no parameter 'temperature'; known: epsilon, rho_source, rho_target"),
    (dict(method='random', epsilon=1.0), "random has no parameter 'epsilon'; known: none"),
    (dict(source=np.ones((3, 2))), 'source is a ndarray; expected selection.Embeddings'),
    (dict(source=Embeddings(np.ones((3, 5)), [0, 1, 2])), 'source features have 5 dimensions and target features 12'),
    (dict(source=Embeddings(np.ones((3, 12)))), 'class means need labels'),
    (dict(source=Embeddings(np.ones((3, 12)), [0, 1, 3])), '1 of 4 classes have no image: 2'),
    (dict(target=Embeddings(np.eye(3, 12) * [[1], [0], [1]], [0, 1, 2])), '1 rows of target features are zero, the first is row 1'),
])
def test_errors(sets, change, words):
  arguments = {'source': sets[0], 'target': sets[1], 'size': 3, **change}
  with pytest.raises(ValueError, match=words):
    select(**arguments)


def test_different_encoders_are_refused(sets):
  import dataclasses
  source, target = (dataclasses.replace(s, fingerprint=f) for s, f in zip(sets, ('abc', 'def')))
  with pytest.raises(ValueError, match='fingerprints abc and def'):
    select(source, target, 3)


def test_importing_selection_stays_light():
  """No TFDS, flax, absl, TensorFlow, ott or matplotlib until they are needed."""
  code = ("import selection, sys; print([m for m in ('tensorflow', 'tensorflow_datasets', 'flax', 'absl', 'ott', 'matplotlib', 'grain', "
          "'ft_jax', 'ml_collections') if m in sys.modules])")
  run = subprocess.run([sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True, check=True,
                       cwd=str(__import__('pathlib').Path(__file__).parents[1]))
  assert run.stdout.strip() == '[]'
