"""Each strategy against a direct float64 implementation of its formula."""

import numpy as np
import pytest
import scipy.linalg

from selection import Embeddings, select


@pytest.fixture(scope='module')
def sets() -> tuple[Embeddings, Embeddings]:
  """Twelve source classes of seven to eighteen images, four target classes of five to eight, in nine dimensions."""
  rng = np.random.default_rng(0)
  make = lambda counts, centres: Embeddings(
      (np.repeat(centres, counts, 0) +
       0.6 * rng.normal(size=(sum(counts), 9)) @ np.diag(rng.uniform(0.3, 1.5, 9))).astype(np.float32),
      np.repeat(np.arange(len(counts)), counts))
  return make(range(7, 19), rng.normal(size=(12, 9))), make(range(5, 9), rng.normal(size=(4, 9)))


def means(side: Embeddings) -> np.ndarray:
  return np.stack([side.features[side.labels == k].astype(np.float64).mean(0) for k in range(side.num_classes)])


def unit(rows: np.ndarray) -> np.ndarray:
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope='module')
def cosines(sets) -> np.ndarray:
  return unit(means(sets[0])) @ unit(means(sets[1])).T


def scaling_iteration(cost, epsilon=0.1, tau_source=1 / 2, tau_target=100 / 101, target_mass=1.0) -> np.ndarray:
  """The published algorithm with masses of one in the source, run to its fixed point."""
  kernel = np.exp(-cost / epsilon)
  v = np.ones(cost.shape[1])
  for _ in range(5000):
    u = (1 / (kernel @ v)) ** tau_source
    v = (target_mass / (kernel.T @ u)) ** tau_target
  return u[:, None] * kernel * v


def check(chosen, values, ascending=False, rtol=1e-5) -> None:
  np.testing.assert_allclose(chosen.scores, values, rtol=rtol)
  assert chosen.units.tolist() == np.argsort(values if ascending else -values)[:len(chosen.units)].tolist()


@pytest.mark.parametrize('cost', ['cosine', 'euclidean'])
def test_uot_and_least(sets, cosines, cost):
  plan = scaling_iteration(1 - cosines if cost == 'cosine' else np.sqrt(2 - 2 * cosines))
  check(select(*sets, 5, cost=cost), plan.sum(1) / plan.sum())
  worst = select(*sets, 5, method='least', cost=cost)
  check(worst, plan.sum(1) / plan.sum(), ascending=True)
  np.testing.assert_allclose(worst.plan, plan[worst.units] / plan.sum(), rtol=1e-4)
  np.testing.assert_allclose(worst.target_mass, plan.sum(0) / plan.sum(), rtol=1e-5)


def test_uot_with_the_bures_cost(sets):
  """Half the squared 2-Wasserstein distance of the Gaussians of unit vectors, with matrix square roots."""
  def moments(side):
    groups = [unit(side.features.astype(np.float64))[side.labels == k] for k in range(side.num_classes)]
    return [(group.mean(0), np.cov(group.T, bias=True)) for group in groups]

  def wasserstein(a, b):
    root = scipy.linalg.sqrtm(a[1]).real
    return np.sum((a[0] - b[0])**2) + np.trace(a[1] + b[1] - 2 * scipy.linalg.sqrtm(root @ b[1] @ root).real)

  cost = np.array([[wasserstein(a, b) / 2 for b in moments(sets[1])] for a in moments(sets[0])])
  plan = scaling_iteration(cost)
  check(select(*sets, 5, cost='bures'), plan.sum(1) / plan.sum(), rtol=1e-4)


def test_softmax(sets, cosines):
  """q_i = sum_j exp(-M_ij) / sum_k exp(-M_kj); each target class gives the same mass."""
  kernel = np.exp((cosines - 1) / 0.1)
  plan = kernel / kernel.sum(0)
  chosen = select(*sets, 5, method='softmax')
  check(chosen, plan.sum(1) / plan.sum())
  np.testing.assert_allclose(chosen.target_mass, 0.25, rtol=1e-5)
  np.testing.assert_allclose(chosen.plan, plan[chosen.units] / 4, rtol=1e-5)


def test_ot(sets, cosines):
  """Both marginals hold, so all units give the same mass and differ only in its mean cost."""
  plan = scaling_iteration(1 - cosines, tau_source=1, tau_target=1, target_mass=12 / 4)
  assert np.ptp(plan.sum(1)) < 1e-6 * plan.sum(1).mean()
  check(select(*sets, 5, method='ot'), (plan * (1 - cosines)).sum(1) / plan.sum(1), ascending=True, rtol=1e-4)


def test_nearest(sets, cosines):
  chosen = select(*sets, 5, method='nearest')
  check(chosen, cosines.max(1))
  assert [reasons for reasons in chosen.explain()] == [[(str(j), 1.0)] for j in cosines.argmax(1)[chosen.units]]


def test_greedy_emd(sets):
  """The mean distance without normalization, weighted by the images of each target class."""
  distances = np.linalg.norm(means(sets[0])[:, None] - means(sets[1]), axis=2)
  check(select(*sets, 5, method='greedy_emd'), distances @ (np.arange(5, 9) / 26), ascending=True)


def test_published_closed_form(shared):
  """The column softmax sum gives nearly the published top 100: all of it for the supervised encoder."""
  means_of = lambda encoder, name: np.load(shared / 'reference' / 'class_means' / encoder / f'{name}.npz')
  for encoder, least in (('resnet18', 100), ('mocov2', 81)):
    for name in ('cub', 'pets', 'aircraft', 'dogs', 'caltech101'):
      with means_of(encoder, 'imagenet') as s, means_of(encoder, name) as t:
        source, target = (Embeddings(f['features'], np.arange(len(f['features'])), weights=f['counts']) for f in (s, t))
      uot, softmax = (select(source, target, 100, method=method) for method in ('uot', 'softmax'))
      assert len(uot.compare(softmax).shared) >= least


def test_strategies_choose_among_examples_and_clusters_too(sets):
  """Every strategy with examples and clusters: distinct units, in the order of their scores."""
  source, target = sets
  for method in ('uot', 'ot', 'softmax', 'nearest', 'greedy_emd', 'random', 'least'):
    for by in ('example', 'cluster'):
      chosen = select(source, target, 6, by=by, method=method)
      assert len(chosen.units) == 6 == len(set(chosen.units.tolist()))
      assert chosen.ranking()[:6].tolist() == chosen.units.tolist()
      assert len(chosen.examples) == (sum(chosen.counts[chosen.units]) if by == 'cluster' else 6)


def test_all_units_cover_the_whole_target(sets):
  """If every unit is chosen, the plan has all of the mass, and every target class is covered to 100%."""
  source, target = sets
  for method in ('uot', 'ot', 'softmax', 'least'):
    for by, size in (('class', 12), ('example', 150)):
      chosen = select(source, target, size, by=by, method=method)
      assert chosen.plan.sum() == pytest.approx(1, rel=1e-4) and chosen.target_mass.sum() == pytest.approx(1, rel=1e-5)
      np.testing.assert_allclose(chosen.coverage(), 1, rtol=1e-4)


def test_distances_far_from_the_origin():
  """A large common offset of all features changes nothing and loses no digits."""
  rng = np.random.default_rng(0)
  means_, near = rng.normal(size=(10, 4)), rng.normal(size=(3, 4))
  expected = np.linalg.norm(means_[:, None] - near, axis=2).mean(1)
  chosen = select((means_ + 1000, np.arange(10)), near + 1000, 4, method='greedy_emd')
  check(chosen, expected, ascending=True, rtol=1e-3)


def test_under_x64(sets):
  """The results are the same if jax is set to float64, as in some notebooks."""
  import jax
  for arguments in (dict(size=5), dict(size=5, by='cluster', clusters=9), dict(size=9, by='example', method='ot')):
    expected = select(*sets, **arguments)
    with jax.enable_x64(True):
      chosen = select(*sets, **arguments)
    np.testing.assert_array_equal(chosen.scores, expected.scores)


def test_size_as_a_share_of_the_mass(sets):
  """A fractional size chooses the fewest units whose mass reaches it."""
  for size in (0.05, 0.5, 0.999999):
    chosen = select(*sets, size)
    covered = chosen.shares[chosen.units].sum()
    assert covered >= size - 1e-9 and covered - chosen.shares[chosen.units[-1]] < size
  assert len(select(*sets, 1e-9).units) == 1
