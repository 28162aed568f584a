"""select() gives the published selections, and raises ValueError for invalid arguments."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

import selection
from selection import Embeddings, select

CASES = [(encoder, name) for encoder in ('resnet18', 'mocov2')
         for name in ('cub', 'pets', 'aircraft', 'dogs', 'caltech101')]


@pytest.mark.parametrize('encoder,name', CASES)
def test_published_selection(shared, encoder, name):
  """The authors' class means through our solver: same top 100 in the same order, shares within 2e-6."""
  means = shared / 'reference' / 'class_means' / encoder
  with np.load(means / 'imagenet.npz') as source, np.load(means / f'{name}.npz') as target, \
      np.load(shared / 'reference' / 'uot' / encoder / f'{name}.npz') as published:
    chosen = select(*(Embeddings(f['features'], np.arange(len(f['features'])), weights=f['counts'])
                      for f in (source, target)), 100)
    assert list(chosen.classes) == published['top100'].tolist()
    np.testing.assert_allclose(chosen.shares, published['importance'] / published['importance'].sum(), rtol=2e-6)
    assert chosen.converged
    assert chosen.shares.sum() == pytest.approx(1)


@pytest.fixture
def sets() -> tuple[Embeddings, Embeddings]:
  """Ten source classes along ten axes, eight images each; the target lies along axes 2 and 7."""
  rng = np.random.default_rng(0)
  axes = 5 * np.eye(10, 12)
  source = Embeddings(np.repeat(axes, 8, 0) + rng.normal(size=(80, 12)), np.repeat(np.arange(10), 8),
                      [f'class {i}' for i in range(10)])
  target = Embeddings(np.repeat(axes[[7, 2]], 5, 0) + rng.normal(size=(10, 12)), np.repeat([0, 1], 5), ['seven', 'two'])
  return source, target


def test_uot_finds_the_classes_that_the_target_needs(sets):
  chosen = select(*sets, 2)
  assert set(chosen.classes) == {2, 7} and set(chosen.class_names) == {'class 2', 'class 7'}
  published = {'cost': 'cosine', 'epsilon': 0.1, 'rho_source': 0.1, 'rho_target': 10.0}
  assert published.items() <= chosen.parameters.items()
  drawn = dict(zip(chosen.classes, chosen.explain(1)))
  assert drawn[7][0][0] == 'seven' and drawn[7][0][1] > 0.9 and drawn[2][0][0] == 'two'


def test_random_is_random_by_seed(sets):
  first, again, other = (select(*sets, 4, method='random', seed=s) for s in (0, 0, 1))
  assert first.classes == again.classes != other.classes
  assert len(set(first.classes)) == 4
  counts = np.bincount(np.concatenate([select(*sets, 3, method='random', seed=s).classes for s in range(200)]),
                       minlength=10)
  assert counts.min() > 35 and counts.max() < 90  # 60 expected


def test_none_selects_nothing(sets):
  chosen = select(*sets, 4, method='none')
  assert chosen.classes == () and not len(chosen.units)


def test_class_means_as_embeddings(sets):
  """Means with weights give the same selection as their images."""
  means = selection.class_means(sets[0])
  assert means.weights.tolist() == [8.0] * 10
  np.testing.assert_allclose(select(means, sets[1], 3).shares, select(*sets, 3).shares, rtol=1e-5)


@pytest.mark.parametrize('change,words', [
    (dict(size=0), 'size is 0; expected a whole number of units from 1'), (dict(size=-3), 'size is -3'),
    (dict(size=11), 'from 1 to 10'),
    (dict(size=2.5), 'size is 2.5; expected a whole number'),
    (dict(clusters=5), "clusters is 5, but the units are classes"), (dict(size=1.0), 'size is 1.0'),
    (dict(size=True), 'size is True'),
    (dict(size=float('nan')), 'size is nan'), (dict(size=float('inf')), 'size is inf'),
    (dict(size='ten'), "size is 'ten'"),
    (dict(size=0.5, method='nearest'),
     'size is 0.5, a share of transported mass, but nearest chooses by number; give a whole number'),
    (dict(method='best'), "selection method 'best'; known: uot, ot, softmax, nearest"),
    (dict(by='colour'), "by 'colour'; known: class, cluster, example"),
    (dict(temperature=1.0), "uot has no parameter 'temperature'; known: cost, epsilon, rho_source, rho_target"),
    (dict(method='random', epsilon=1.0), "random has no parameter 'epsilon'; known: none"),
    (dict(cost='manhattan'), "cost is 'manhattan'; known: cosine, euclidean, bures"),
    (dict(source=np.ones((3, 12))), 'source has no labels, and class means need labels'),
    (dict(source=['a', 'b']), 'source is a list that cannot be read as an array'),
    (dict(source='no/such.npy'), "source 'no/such.npy' cannot be read"),
    (dict(source=(np.ones((3, 12)), [0, 1])), r'labels have shape \(2,\); expected \[3\]'),
    (dict(source=iter([np.ones((3, 12))]), by='example'), 'source is an iterator, which can be read only once'),
    (dict(source=[np.ones((3, 12)), np.ones((3, 5))], by='example'),
     r'chunk 1 of source has shape \(3, 5\); expected \[c, 12\]'),
    (dict(source=lambda: iter(()), by='example'), 'the iterator of source chunks yielded no rows'),
    (dict(source=lambda: iter([np.ones((3, 12)), np.zeros((2, 12))]), by='example'),
     '2 rows of source features are zero'),
    (dict(source=[np.ones((3, 12))]), "the source has no labels, and class means need labels"),
    (dict(target=[np.ones((3, 12))]), 'the target is given in chunks'),
    (dict(source=Embeddings(np.ones((3, 5)), [0, 1, 2])), 'source features have 5 dimensions and target features 12'),
    (dict(source=Embeddings(np.ones((3, 12)), [0, 1, 3])), '1 of 4 classes have no image: 2'),
    (dict(source=Embeddings(np.ones((3, 12)), [0, 1, 2]), cost='bures', target=np.ones((2, 12)), size=1),
     "the target needs its images with labels"),
    (dict(target=Embeddings(np.eye(3, 12) * [[1], [0], [1]], [0, 1, 2])),
     '1 rows of target features are zero.*the first is row 1'),
    (dict(target=np.full((3, 12), 1e30, np.float32)), 'row 0 of target features is longer than 2e'),
    (dict(by='cluster', clusters=81), 'clusters is 81; expected 1 to 80'),
    (dict(by='cluster', clusters=4, size=5), 'expected a whole number from 1 to'),
    (dict(by='example', sample=0), 'sample is 0; expected a whole number'),
    (dict(by='example', size=81), 'from 1 to 80, the number of source examples'),
    (dict(max_iterations=1),
     'uot did not converge: error .* after 1 iterations, expected less than 1e-06 .*use a larger epsilon'),
    (dict(epsilon=0.001), 'epsilon 0.001 is too small for costs up to 2'),
    (dict(rho_source=np.inf), 'all source units would give the same'),
    *[(dict(method='softmax', epsilon=epsilon), f'epsilon is {epsilon}; expected a finite number')
      for epsilon in (0, -0.1, float('nan'))],
    (dict(seed=-1), 'seed is -1; expected a whole number'), (dict(epsilon='0.1'), "epsilon is '0.1'; expected"),
    (dict(by='example', sample=3.0), 'sample is 3.0; expected a whole number'),
    (dict(by='cluster', clusters=2.5), 'clusters is 2.5; expected a whole number'),
    (dict(by='example', target=(np.ones((3, 12)), [0, 2, 4])), '2 of 5 classes have no image: 1, 3'),
    (dict(target=(np.ones((3, 12)), [0, 1, 80_000_000])), '79999998 of 80000001 classes have no image: 2, 3'),
    (dict(target=(np.float32([[1, 2], [-1, -2]]).repeat(6, 1), [0, 0])), '1 rows of target features are zero'),
    (dict(target=np.ones((3, 12)) * 1e25), 'row 0 of target features is longer than 2e'),
    (dict(target=np.ones((2, 3, 12))), 'the target: features have shape'),
    (dict(source=lambda: iter([np.ones((0, 12))]), by='example'), 'yielded no rows'),
    (dict(source=(lambda same: lambda: same)(iter([np.ones((3, 12))])), by='example'),
     'returned the same iterator twice'),
    (dict(by='cluster', clusters=20, size=50), 'size is 50; expected a whole number from 1 to 20'),
])
def test_errors(sets, change, words):
  arguments = {'source': sets[0], 'target': sets[1], 'size': 3, **change}
  with pytest.raises(ValueError, match=words):
    select(**arguments)


def test_different_encoders_raise(sets):
  import dataclasses
  source, target = (dataclasses.replace(s, fingerprint=f) for s, f in zip(sets, ('abc', 'def')))
  with pytest.raises(ValueError, match='fingerprints abc and def'):
    select(source, target, 3)


def test_importing_selection_stays_light():
  """No TFDS, flax, absl, TensorFlow, ott or matplotlib until they are needed."""
  code = ("import selection, sys; print([m for m in ('tensorflow', 'tensorflow_datasets', 'flax', 'absl', 'ott', "
          "'matplotlib', 'grain', 'ft_jax', 'ml_collections') if m in sys.modules])")
  run = subprocess.run([sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True, check=True,
                       cwd=pathlib.Path(__file__).parents[2])
  assert run.stdout.strip() == '[]'
