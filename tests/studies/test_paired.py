"""Intervals and p-values over seeds and test images: exact where they can be worked by hand, and right as often as they
say."""

import numpy as np
import pytest
from scipy import stats

from ft_jax.studies import paired


def tables(rng, count, seeds, images, seed_sd=0.02, image_sd=0.2, noise=0.3):
  """Differences whose true mean is 0: an effect of each seed, one of each image, and noise."""
  draw = lambda sd, *shape: rng.normal(0, sd, (count, *shape))
  return list(draw(seed_sd, seeds, 1) + draw(image_sd, 1, images) + draw(noise, seeds, images))


def test_hand_worked_parts():
  """Of two seeds and three images: the seeds' means are 1 and 0; images are above them by (1, 0, -1) in both seeds."""
  [estimate] = paired.estimates([np.array([[2.0, 1.0, 0.0], [1.0, 0.0, -1.0]])])
  assert estimate.mean == 0.5 and estimate.scores == (1.0, 0.0) and estimate.seed_variance == pytest.approx(0.5)
  # Each image adds (1, 0, -1) / 3 to the score of a seed; the product of both seeds is 1/9 for two images, times 3/2.
  assert estimate.image_variance == pytest.approx(3 / 2 * 2 / 9)


def test_images_that_disagree_between_seeds_are_not_counted_twice():
  """What seeds do not share is noise, which the means of the seeds show already; where they are alike by chance, the
  noise says how far they might have been apart: the mean of four images has the variance of a seed's images over 4.
  """
  table = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
  [estimate] = paired.estimates([table])
  assert estimate.image_variance == 0 and estimate.scores == (0.5, 0.5)
  # (-1/2 and 1/2) / 4 of each image in the two seeds: variance 1/32, times four images, times 4/3.
  assert estimate.seed_variance == pytest.approx(4 * 4 / 3 / 32) and estimate.half_width > 0.5


def test_equals_brute_force():
  """Each resample draws seeds and images with loops; quantiles agree with those of the matrix product."""
  rng = np.random.default_rng(3)
  [table] = tables(rng, 1, 4, 30, image_sd=0.5)
  [estimate] = paired.estimates([table])
  scores, grand = table.mean(1), table.mean()
  effects = table.mean(0) - grand
  shares = [(a - a.mean()) @ (b - b.mean()) / 29 for i, a in enumerate(table) for b in table[i + 1:]]
  assert estimate.image_variance == pytest.approx(np.mean(shares) / 30)
  scale = np.sqrt(np.mean(shares) * 30 / (effects @ effects)) if effects.any() else 0
  deviations = []
  for _ in range(20_000):
    drawn = rng.choice(scores - grand, 4).mean() * np.sqrt(4 / 3) / np.sqrt(rng.chisquare(3) / 3)
    deviations.append(drawn + scale * rng.choice(effects, 30).mean())
  assert estimate.half_width == pytest.approx(np.quantile(np.abs(deviations), 0.95), rel=0.05)
  assert estimate.p == pytest.approx(np.mean(np.abs(deviations) >= abs(grand)), abs=0.02)
  assert (estimate.p < 0.05) == (abs(grand) > estimate.half_width)


def test_many_seeds_without_images_give_students_interval():
  table = np.random.default_rng(0).normal(0.3, 1, (40, 1)) + np.zeros(500)
  [estimate] = paired.estimates([table])
  expected = stats.t.interval(0.95, 39, table[:, 0].mean(), stats.sem(table[:, 0]))
  np.testing.assert_allclose(estimate.interval, expected, atol=0.015)
  assert estimate.p == pytest.approx(stats.ttest_1samp(table[:, 0], 0).pvalue, abs=0.02)


def test_one_seed_has_the_interval_of_its_images():
  """That of McNemar's test: 30 images gained and 10 lost of 400."""
  table = np.repeat([1.0, -1.0, 0.0], [30, 10, 360])[None]
  [estimate] = paired.estimates([table])
  assert np.isnan(estimate.seed_variance) and estimate.mean == pytest.approx(0.05)
  assert estimate.half_width == pytest.approx(1.96 * table.std(ddof=1) / 20, rel=0.03)
  assert paired.seeds_needed(estimate) is None


def test_the_mean_over_classes_resamples_within_classes():
  """A class of two images weighs as much as one of eight; images of a class that are all alike add no variance."""
  classes = np.array([0] * 8 + [1] * 2)
  table = np.array([[1.0] * 8 + [0.0, 1.0]] * 3)
  [estimate] = paired.estimates([table], classes)
  assert estimate.mean == 0.75 and estimate.seed_variance == 0
  assert estimate.image_variance == pytest.approx((1 / 2) ** 2 * 0.5 / 2)  # the variance of 0 and 1, over two images
  # Four classes of one image each: together they tell how images differ.
  [single] = paired.estimates([np.array([[0.0, 1.0, 1.0, 0.0]] * 2)], np.arange(4))
  assert single.image_variance == pytest.approx(1 / 3 / 4)


def test_seeds_with_other_images():
  """Where val depends on the seed: nothing is shared, so the seeds alone say how sure the mean is."""
  rng = np.random.default_rng(1)
  table = np.full((5, 50), np.nan)
  for seed in range(5):
    table[seed, 10 * seed:10 * seed + 10] = rng.random(10)
  [estimate] = paired.estimates([table])
  scores = np.nanmean(table, 1)
  assert estimate.image_variance == 0 and estimate.mean == pytest.approx(scores.mean())
  t = stats.t.interval(0.95, 4, scores.mean(), stats.sem(scores))
  np.testing.assert_allclose(estimate.interval, t, atol=0.2 * (t[1] - t[0]))
  with pytest.raises(ValueError, match='a seed without images'):
    paired.estimates([np.full((2, 3), np.nan)])


def test_classes_with_one_image_a_seed():
  """Of a val split that depends on the seed: no number is divided by nearly nothing."""
  table, classes = np.full((3, 12), np.nan), np.arange(12) % 4
  for seed in range(3):
    table[seed, 4 * seed:4 * seed + 4] = [1, 0, seed % 2, 1]
  [estimate] = paired.estimates([table], classes)
  assert estimate.scores == (0.5, 0.75, 0.5) and estimate.half_width < 1


def test_the_same_input_gives_the_same_numbers():
  """Also beside other tables: no interval changes because a variant is added."""
  found = [*tables(np.random.default_rng(0), 2, 5, 80), *tables(np.random.default_rng(1), 1, 9, 80)]
  alone, together = paired.estimates(found[:1]), paired.estimates(found)
  assert together == paired.estimates(found)
  assert alone[0].interval == pytest.approx(together[0].interval, abs=1e-6) and alone[0].p == together[0].p
  assert paired.estimates([np.zeros((3, 50))])[0].p == 1 and paired.estimates([np.ones((3, 50))])[0].p < 0.001


@pytest.mark.parametrize('seeds', [1, 3])
@pytest.mark.parametrize('images', [4, 30, 185])
def test_no_difference_on_few_images_is_not_certainty(seeds, images):
  """The rule of three: half of the width is 3 / N."""
  [estimate] = paired.estimates([np.zeros((seeds, images))])
  assert estimate.mean == 0 and estimate.p == 1
  assert estimate.half_width == pytest.approx(3 / images, rel=0.2 if images == 4 else 0.1)


@pytest.mark.parametrize('seeds,at_most', [(3, 0.995), (5, 0.985), (10, 0.975)])
def test_intervals_contain_the_truth(seeds, at_most):
  """95 % of them, and with few seeds a few more."""
  found = paired.estimates(tables(np.random.default_rng(seeds), 400, seeds, 185), resamples=999)
  inside = np.mean([low <= 0 <= high for low, high in (each.interval for each in found)])
  assert 0.93 <= inside <= at_most


def test_holm():
  assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert paired.holm([0.9, 0.8]) == [1.0, 1.0] and paired.holm([]) == []


def test_seeds_and_images_that_are_needed():
  """The smallest number of seeds whose interval reaches one point to each side."""
  estimate = paired.Estimate(0.0, (-0.02, 0.02), 0.5, (0.0, 0.0, 0.0), 0.01**2, 0.003**2)
  width = lambda seeds: np.sqrt(stats.t.ppf(0.975, seeds - 1) ** 2 * 0.01**2 / seeds + (1.96 * 0.003) ** 2)
  needed = paired.seeds_needed(estimate)
  assert width(needed) <= 0.01 < width(needed - 1)
  many = paired.Estimate(0.0, (-0.02, 0.02), 0.5, (0.0, 0.0, 0.0), 0.01**2, 0.01**2)
  assert paired.seeds_needed(many) is None and paired.images_needed(many, 100) == 385
