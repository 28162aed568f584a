"""k-means finds separate groups, and its centres are the means of their rows."""

import numpy as np
import pytest

from selection.blocks import Settings
from selection.kmeans import kmeans
from selection.pools import ArrayRows, IteratedRows


@pytest.fixture(scope='module')
def groups() -> tuple[np.ndarray, np.ndarray]:
  """2,000 rows in 20 well separated groups."""
  rng = np.random.default_rng(0)
  labels = np.sort(rng.integers(0, 20, 2000))
  return (10 * rng.normal(size=(20, 8))[labels] + rng.normal(size=(2000, 8))).astype(np.float32), labels


def test_it_finds_separate_groups(groups):
  rows, labels = groups
  found = kmeans(ArrayRows(rows), 20, np.random.default_rng(0))
  assert len({(a, b) for a, b in zip(labels, found.labels)}) <= 22  # nearly one to one, from one start
  assert found.counts.sum() == 2000 and (np.bincount(found.labels) == found.counts).all()


def test_a_fixed_point_of_lloyds_iteration(groups):
  """Each row has its nearest centre, each centre is nearly the mean of its rows, and the inertia is right."""
  rows, _ = groups
  found = kmeans(ArrayRows(rows), 50, np.random.default_rng(1), tolerance=1e-7, max_iterations=200)
  squares = ((rows[:, None].astype(np.float64) - found.centres) ** 2).sum(2)
  assert np.mean(squares.argmin(1) == found.labels) > 0.999
  means = np.stack([rows[found.labels == k].mean(0) for k in range(50)])
  np.testing.assert_allclose(found.centres, means, atol=2e-2)
  assert found.inertia == pytest.approx(squares.min(1).mean(), rel=1e-3)


def test_as_good_as_scikit_learn(groups):
  from sklearn.cluster import KMeans
  rows, _ = groups
  ours = [kmeans(ArrayRows(rows), 60, np.random.default_rng(seed)).inertia for seed in range(5)]
  theirs = [KMeans(60, n_init=1, random_state=seed, init='k-means++', algorithm='lloyd').fit(rows).inertia_ / 2000
            for seed in range(5)]
  assert np.mean(ours) < 1.05 * np.mean(theirs)


def test_chunks_make_no_difference(groups):
  rows, _ = groups
  whole = kmeans(ArrayRows(rows), 30, np.random.default_rng(0))
  chunks = kmeans(IteratedRows(lambda: iter([rows[:3], rows[3:]])), 30, np.random.default_rng(0), Settings(chunk=300))
  assert (whole.labels == chunks.labels).all()
  np.testing.assert_allclose(whole.centres, chunks.centres, rtol=1e-4, atol=1e-4)


def test_fewer_different_rows_than_clusters():
  """Three distinct rows, repeated: empty clusters are left out, and every row has a cluster."""
  rows = np.repeat(np.eye(3, dtype=np.float32), 4, 0)
  found = kmeans(ArrayRows(rows), 7, np.random.default_rng(0))
  assert found.counts.min() > 0 and found.counts.sum() == 12 and found.inertia == pytest.approx(0, abs=1e-6)
  assert len(found.centres) == len(found.counts) == found.labels.max() + 1
