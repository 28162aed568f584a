"""The spectrum of features from streamed sums is that of the whole matrix, and so are its parts and how they change."""

import math
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.linalg

from ft_jax.studies import spectrum as study


def made(rng: np.random.Generator, n: int, d: int, *, rank: int | None = None, mean: float = 0.0,
         decay: float = 0.9) -> np.ndarray:
  """Features whose spectrum falls off as those of networks do."""
  rank = rank or min(n, d)
  return mean + rng.normal(size=(n, rank)) @ (decay ** np.arange(rank)[:, None] * rng.normal(size=(rank, d)))


def dense(features: np.ndarray, centred: bool) -> tuple[np.ndarray, np.ndarray]:
  """Singular values and directions by numpy's SVD of the whole matrix in float64."""
  features = features.astype(np.float64)
  features = features - features.mean(0) if centred else features
  _, values, directions = np.linalg.svd(features, full_matrices=False)
  r = min(len(features) - centred, features.shape[1])
  return values[:r], directions[:r].T


def check_values(found: np.ndarray, expected: np.ndarray) -> None:
  """The promise: squares to 1e-14 of the largest one, and what is below a millionth of the largest is 0."""
  assert found.shape == expected.shape and (np.diff(found) <= 0).all()
  largest = expected.max(initial=0.0)
  lost = expected < 0.999e-6 * largest
  assert (found[lost] == 0).all()
  kept = expected > 1.001e-6 * largest
  np.testing.assert_allclose(found[kept] ** 2, expected[kept] ** 2, rtol=0, atol=1e-14 * largest ** 2)


@pytest.mark.parametrize('centred', [False, True])
@pytest.mark.parametrize('n,d', [(300, 40), (25, 40), (41, 40), (40, 40), (2, 5), (7, 1)])
@pytest.mark.parametrize('mean', [0.0, 1000.0])
def test_values_and_directions_are_those_of_the_svd(n, d, centred, mean, monkeypatch):
  monkeypatch.setattr(study, 'SLICE', 16)
  features = made(np.random.default_rng(n), n, d, mean=mean).astype(np.float32)
  found = study.spectrum(study.gram(features), centred)
  values, directions = dense(features, centred)
  check_values(found.values, values)
  assert found.images == n and found.directions.shape == (d, len(values))
  np.testing.assert_allclose(found.directions.T @ found.directions, np.eye(len(values)), atol=1e-12)
  np.testing.assert_allclose(found.mean, features.mean(0, dtype=np.float64) if centred else 0, rtol=1e-12, atol=1e-13)
  # A direction is as exact as its eigenvalue is far from the next; here of those that are well apart.
  for i in np.flatnonzero(values[:5] > 1e-3 * values[0]):
    gap = np.min(np.abs(np.delete(values, i) ** 2 - values[i] ** 2), initial=values[0] ** 2)
    assert abs(found.directions[:, i] @ directions[:, i]) > 1 - 1e-12 * (values[0] ** 2 / gap) ** 2
  assert (found.note is None) == (n >= d)
  if n < d:
    assert f'{n} images have features of {d} dimensions' in found.note and f'at most {n - centred} ' in found.note


def test_a_large_mean_costs_the_centred_spectrum_nothing():
  """Sums of squares around zero would keep about two digits of this spread, those around the first images few more."""
  rng = np.random.default_rng(0)
  spread = made(rng, 5000, 20) * 1e-3
  features = 1000 + np.sort(spread, 0)  # the first images are not like the others
  found = study.spectrum(study.gram(np.array_split(features, 37)), centred=True)
  check_values(found.values, dense(features, True)[0])
  plain = study.spectrum(study.gram(features), centred=False)
  check_values(plain.values, dense(features, False)[0])


def test_precision_of_small_values():
  """Values over twelve orders: what is below a millionth of the largest comes out as 0, the rest to the precision that
  is promised."""
  rng = np.random.default_rng(1)
  n, d = 400, 64
  u, v = (np.linalg.qr(rng.normal(size=(size, d)))[0] for size in (n, d))
  values = 1e3 * np.logspace(0, -12, d)
  found = study.spectrum(study.gram((u * values) @ v.T), centred=False).values
  check_values(found, values)
  assert np.count_nonzero(found) == np.count_nonzero(values >= 1e-3 * (1 - 1e-6))
  thousandth = values >= 1.0
  np.testing.assert_allclose(found[thousandth], values[thousandth], rtol=1e-8)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), d=st.integers(1, 12),
                  mean=st.sampled_from([0.0, -50.0]),
                  dtype=st.sampled_from([np.float16, np.float32, np.float64]), slice_=st.integers(1, 50))
def test_batches_may_be_cut_anywhere(sizes, d, mean, dtype, slice_):
  """Empty batches, batches smaller and larger than a slice: the sums are those of the whole."""
  hypothesis.assume(sum(sizes))
  rng = np.random.default_rng(sum(sizes))
  first = (made(rng, sum(sizes), d) + mean).astype(dtype)
  second = (made(rng, sum(sizes), d + 1) + mean).astype(dtype)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(study, 'SLICE', slice_)
    cuts = np.cumsum(sizes)[:-1]
    found = study.gram(np.split(first, cuts))
    crossed = study.cross(iter(np.split(first, cuts)), second)
  x, y = first.astype(np.float64), second.astype(np.float64)
  assert found.images == crossed.images == len(x)
  for mine, whole in ((found.mean, x), (crossed.first_mean, x), (crossed.second_mean, y)):
    np.testing.assert_allclose(mine, whole.mean(0), rtol=1e-12, atol=1e-12)
  scale = np.abs(x).max() * max(np.abs(y).max(), np.abs(x).max()) * len(x) + 1e-30
  np.testing.assert_allclose(found.scatter, (x - x.mean(0)).T @ (x - x.mean(0)), atol=1e-13 * scale)
  np.testing.assert_allclose(found.products, x.T @ x, atol=1e-13 * scale)
  np.testing.assert_allclose(crossed.scatter, (x - x.mean(0)).T @ (y - y.mean(0)), atol=1e-13 * scale)


def test_memory_is_that_of_a_slice(tmp_path, monkeypatch):
  """No float64 copy of the features, whether they come as one array, mapped from a file, or in batches; nor of the
  parts."""
  monkeypatch.setattr(study, 'SLICE', 256)
  n, d = 20000, 128
  features = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
  np.save(tmp_path / 'features.npy', features)
  mapped = np.load(tmp_path / 'features.npy', mmap_mode='r')
  few = 8 * d * (5 * d + 2 * 256)  # Gram matrices and slices in float64

  def peak(run):
    tracemalloc.start()
    result = run()
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return size, result

  whole = peak(lambda: study.gram(features))
  for batches in (mapped, np.split(features, 200), (features[i:i + 9000] for i in range(0, n, 9000))):
    size, found = peak(lambda batches=batches: study.gram(batches))
    assert size < few < features.nbytes / 8 and whole[0] < few
    np.testing.assert_array_equal(found.scatter, whole[1].scatter)
  assert peak(lambda: study.cross(features, mapped))[0] < few + 8 * d * 256
  found = study.spectrum(whole[1], True)
  assert peak(lambda: study.parts(features, found, 9))[0] < 2 * features.nbytes + few


def test_size_of_the_main_part():
  """Of values, not of squares; the smallest size that reaches the threshold, also where it is reached exactly."""
  # squares: 1 and 1
  assert study.main_size(np.array([3.0, 1.0, 1.0])) == 2 and study.main_size(np.array([3.0, 1.0, 1.0]), 0.81) == 3
  assert study.main_size(np.ones(10)) == 8 and study.main_size(np.full(15, 0.1)) == 12
  assert study.main_size(np.full(5, 0.3)) == 4
  assert study.main_size(np.ones(10), 0.79) == 8 and study.main_size(np.ones(10), 0.81) == 9
  assert study.main_size(np.array([5.0])) == 1 and study.main_size(np.array([2.0, 1.0, 0.0]), 1.0) == 2
  assert study.main_size(np.array([2.0, 1.0]), 1e-9) == 1
  assert study.main_size(np.zeros(4)) == study.main_size(np.zeros(0)) == 0
  rng = np.random.default_rng(0)
  values = np.sort(rng.random(50))[::-1]
  for threshold in (0.1, 0.5, 0.8, 0.95):
    k = study.main_size(values, threshold)
    assert values[:k].sum() / values.sum() >= threshold > values[:k - 1].sum() / values.sum()
    assert study.main_size(values * 1e-200, threshold) == study.main_size(values * 1e200, threshold) == k


def test_energy_and_ranks():
  """Known values, bounds that are reached, and spectra far from 1 in size."""
  assert study.energy(np.array([3.0, 1.0, 1.0]), 1) == pytest.approx(9 / 11)
  assert study.energy(np.array([3.0, 1.0]), 0) == 0 and study.energy(np.array([3.0, 1.0]), 2) == 1
  # entropy of 1/2, 1/4, 1/4: 1.5 bits
  assert study.effective_rank(np.array([2.0, 1.0, 1.0, 0.0])) == pytest.approx(2 ** 1.5)
  assert study.stable_rank(np.array([2.0, 1.0, 1.0, 0.0])) == pytest.approx(1.5)
  for size in (1.0, 1e-200, 1e200):
    for rank in (study.effective_rank, study.stable_rank):
      assert rank(size * np.ones(7)) == pytest.approx(7) and rank(size * np.array([1.0, 0.0, 0.0])) == pytest.approx(1)
    assert study.energy(size * np.ones(8), 2) == pytest.approx(0.25)
  for nothing in (np.zeros(3), np.zeros(0)):
    assert study.energy(nothing, 0) == study.effective_rank(nothing) == study.stable_rank(nothing) == 0


@pytest.mark.parametrize('centred', [False, True])
def test_parts(centred, monkeypatch):
  """Those of the truncated SVD; together the features; of other images the residual holds what the directions do
  not."""
  monkeypatch.setattr(study, 'SLICE', 16)
  rng = np.random.default_rng(2)
  features = made(rng, 70, 12, mean=1000.0)
  found = study.spectrum(study.gram(features), centred)
  k = 3
  main, residual = study.parts(features, found, k)
  rest = features - features.mean(0) if centred else features
  u, values, v = np.linalg.svd(rest, full_matrices=False)
  np.testing.assert_allclose(main, (u[:, :k] * values[:k]) @ v[:k], atol=1e-9)
  np.testing.assert_allclose(main + residual, rest, atol=1e-11)
  np.testing.assert_allclose(np.linalg.svd(residual, compute_uv=False)[:12 - k], found.values[k:], rtol=1e-7)
  single = study.parts(features.astype(np.float32), found, k)
  assert single[0].dtype == single[1].dtype == np.float32
  assert study.parts(features.astype(np.float16), found, k)[0].dtype == np.float32
  np.testing.assert_allclose(single[1], features.astype(np.float32) - (features - rest) - main, atol=1e-3)
  few = study.spectrum(study.gram(features[:5]), centred)
  others = study.parts(features, few, len(few.values))
  np.testing.assert_allclose(others[1] @ few.directions, 0, atol=1e-9)
  assert np.linalg.norm(others[1][5:]) > 1 and np.linalg.norm(others[1][:5]) < 1e-6
  nothing, everything = study.parts(features, found, 0)
  assert not nothing.any() and np.array_equal(everything, features - found.mean)
  assert study.parts(features[:0], found, 2)[0].shape == (0, 12)


@pytest.mark.parametrize('n,d,k1,k2', [(200, 30, 5, 5), (200, 30, 3, 9), (200, 30, 9, 3), (12, 30, 4, 4), (50, 8, 6, 6),
                                       (50, 8, 8, 2)])
def test_principal_angles(n, d, k1, k2):
  rng = np.random.default_rng(3)
  features = made(rng, n, d)
  first, second = (study.spectrum(study.gram(f), True) for f in (features, features + 0.1 * made(rng, n, d)))
  angles = study.principal_angles(first, k1, second, k2)
  assert angles.shape == (min(k1, k2),) and (np.diff(angles) >= -1e-12).all()
  expected = np.degrees(scipy.linalg.subspace_angles(first.directions[:, :k1], second.directions[:, :k2]))[::-1]
  np.testing.assert_allclose(angles, expected, atol=1e-12)


def test_known_principal_angles():
  """Small ones, which cosines alone cannot tell from none, right ones, and those between."""
  degrees = np.array([0.0, 1e-9, 1e-4, 44.9, 45.1, 89.9999, 90.0])
  k, rng = len(degrees), np.random.default_rng(4)
  basis = np.linalg.qr(rng.normal(size=(2 * k, 2 * k)))[0]
  turn = lambda: np.linalg.qr(rng.normal(size=(k, k)))[0]
  radians = np.radians(degrees)
  of = lambda directions: study.Spectrum(np.ones(k), directions, np.zeros(2 * k), 100)
  first = of(basis[:, :k] @ turn())
  second = of((basis[:, :k] * np.cos(radians) + basis[:, k:] * np.sin(radians)) @ turn())
  np.testing.assert_allclose(study.principal_angles(first, k, second, k), degrees, rtol=1e-6, atol=1e-12)
  assert study.principal_angles(first, 0, second, 3).shape == study.principal_angles(first, 3, second, 0).shape == (0,)


def moved(first: np.ndarray, k1: int, second: np.ndarray, k2: int, centred: bool) -> tuple[float, float]:
  """Relative changes by the parts themselves, from SVDs of the whole matrices."""
  parts = []
  for features, k in ((first, k1), (second, k2)):
    features = features.astype(np.float64) - (features.astype(np.float64).mean(0) if centred else 0)
    _, directions = dense(features, False)
    main = features @ directions[:, :k] @ directions[:, :k].T
    parts.append((main, features - main))
  return tuple(np.linalg.norm(after - before) / np.linalg.norm(before) for before, after in zip(*parts))


@pytest.mark.parametrize('centred', [False, True])
@pytest.mark.parametrize('n,d,mean', [(300, 24, 0.0), (300, 24, 1000.0), (15, 24, 0.0), (15, 24, 1000.0)])
@pytest.mark.parametrize('k1,k2', [(4, 4), (2, 6), (7, 1)])
def test_change_is_that_of_the_parts(n, d, mean, k1, k2, centred):
  rng = np.random.default_rng(5)
  features = made(rng, n, d)
  first, second = features + mean, features + 0.2 * made(rng, n, d) + 1.1 * mean
  spectra = [study.spectrum(study.gram(f), centred) for f in (first, second)]
  found = study.change(spectra[0], k1, spectra[1], k2, study.cross(first, second))
  np.testing.assert_allclose(found, moved(first, k1, second, k2, centred), rtol=1e-6)


def test_change_where_there_is_hardly_any():
  """The same features: zero as far as the difference of traces can say; all of them times one number: exactly that."""
  rng = np.random.default_rng(6)
  features = made(rng, 500, 30, mean=10.0).astype(np.float32)
  same = study.spectrum(study.gram(features), True)
  assert max(study.change(same, 5, same, 5, study.cross(features, features))) < 1e-6
  for scale, expected in ((1.25, 0.25), (-1.25, 2.25)):
    other = features * np.float32(scale)
    found = study.change(same, 5, study.spectrum(study.gram(other), True), 5, study.cross(features, other))
    assert found == pytest.approx((expected, expected), rel=1e-6)


@pytest.mark.parametrize('centred', [False, True])
def test_little_or_nothing(centred):
  """Zero features, constant ones, one image, a lower rank than dimensions: an answer that is defined."""
  rng = np.random.default_rng(7)
  zero = study.spectrum(study.gram(np.zeros((9, 4), np.float32)), centred)
  assert zero.values.tolist() == [0.0] * 4 and study.main_size(zero.values) == 0
  features = made(rng, 9, 4)
  some, k = study.spectrum(study.gram(features), centred), 2
  nothing = np.zeros_like(features)
  assert study.change(zero, 0, zero, 0, study.cross(nothing, nothing)) == (0.0, 0.0)
  assert study.change(zero, 0, some, k, study.cross(nothing, features)) == (math.inf, math.inf)
  assert study.change(some, k, zero, 0, study.cross(features, nothing)) == pytest.approx((1.0, 1.0))
  assert study.principal_angles(zero, 0, some, k).shape == (0,)
  constant = np.tile(rng.normal(size=5) * 1000 / 3, (5000, 1))
  found = study.spectrum(study.gram(constant), centred)
  assert np.count_nonzero(found.values) == (0 if centred else 1)
  k = study.main_size(found.values)
  assert study.change(found, k, found, k, study.cross(constant, constant)) == pytest.approx((0, 0), abs=1e-6)
  one = study.spectrum(study.gram(features[:1]), centred)
  assert one.directions.shape == (4, 1 - centred) and study.main_size(one.values) == 1 - centred and one.note
  np.testing.assert_allclose(one.values, [] if centred else [np.linalg.norm(features[0])])
  assert not study.parts(features[:1], one, len(one.values))[1].round(12).any()
  low = made(rng, 60, 20, rank=6, mean=3.0)
  found = study.spectrum(study.gram(low), centred)
  assert np.count_nonzero(found.values) == np.linalg.matrix_rank(low - low.mean(0) if centred
                                                                 else low) == 6 + (not centred)
  assert study.change(found, 6 + (not centred), found, 6 + (not centred), study.cross(low, low)).residual == 0.0


def test_what_is_refused():
  features = made(np.random.default_rng(8), 30, 4)
  found = study.spectrum(study.gram(features), True)
  for value in (np.nan, np.inf):
    broken = features.astype(np.float32)
    broken[21, 2] = value
    for run in (study.gram, lambda x: study.gram(np.split(x, 10)), lambda x: study.cross(
        features, x), lambda x: study.parts(x, found, 2)):
      with pytest.raises(ValueError,
                         match='features of image 21 .counted from 0. have values that are not finite; the weights'):
        run(broken)
  for none in ([], [np.zeros((0, 4))], np.zeros((0, 4))):
    with pytest.raises(ValueError, match='there are no features; expected at least one image'):
      study.gram(none)
    with pytest.raises(ValueError, match='there are no features; expected at least one image'):
      study.cross(none, none)
  for wrong, words in (([features, features[:, :3]], r'a batch of features is \(30, 3\); expected \[images, 4\]'),
                       ([features[0]], r'is \(4,\); expected \[images, dimensions\]'),
                       (features[0], r'is \(\); expected'),
                       (np.zeros((3, 0)), r'is \(3, 0\); expected')):
    with pytest.raises(ValueError, match=words):
      study.gram(wrong)
  for one, other in ((features, features[:29]), (features[:29], features)):
    with pytest.raises(ValueError,
                       match='there are features of .* images of the first network and .* the same images in both'):
      study.cross(one, other)
  with pytest.raises(ValueError, match=r'features are \(30, 3\); expected \[n, 4\] as of the spectrum'):
    study.parts(features[:, :3], found, 2)
  for k in (-1, 5):
    for run, name in ((lambda k=k: study.parts(features, found, k), 'k'),
                      (lambda k=k: study.energy(found.values, k), 'k'),
                      (lambda k=k: study.principal_angles(found, k, found, 2), 'k1'),
                      (lambda k=k: study.change(found, 2, found, k, study.cross(features, features)), 'k2')):
      with pytest.raises(ValueError, match=f'^{name} is {k}; expected 0 to 4'):
        run()
  for threshold in (0.0, 1.1, math.nan):
    with pytest.raises(ValueError, match='threshold is .* expected a number above 0, up to 1'):
      study.main_size(found.values, threshold)
  for values in (np.array([1.0, 2.0]), np.array([1.0, -1.0]), np.array([math.nan]), np.ones((2, 2))):
    for measure in (study.main_size, study.effective_rank, study.stable_rank):
      with pytest.raises(ValueError, match='expected singular values'):
        measure(values)
  wide = study.spectrum(study.gram(made(np.random.default_rng(9), 30, 5)), True)
  with pytest.raises(ValueError, match='features have 4 and 5 dimensions; .* checkpoints of one architecture'):
    study.principal_angles(found, 2, wide, 2)
  with pytest.raises(ValueError, match='the spectra are of 30 and 30 images, their products of 20'):
    study.change(found, 2, found, 2, study.cross(features[:20], features[:20]))
  with pytest.raises(ValueError, match=r'products are \(4, 3\); expected \(4, 4\)'):
    study.change(found, 2, found, 2, study.cross(features, features[:, :3]))
  plain, moved_on = study.spectrum(study.gram(features), False), study.spectrum(study.gram(features + 1), True)
  for one, other in ((found, plain), (plain, found)):
    with pytest.raises(ValueError, match='one spectrum is plain and the other centred'):
      study.change(one, 2, other, 2, study.cross(features, features))
  with pytest.raises(ValueError, match='the spectra have other means than the products; .* in the same order'):
    study.change(found, 2, moved_on, 2, study.cross(features + 1, features))
