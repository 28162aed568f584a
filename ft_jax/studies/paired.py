"""Differences between ways to train, paired by seed and by test image, with intervals and p-values.

The result of a comparison is a table of right and wrong, seeds by test images, for each way to train. Another set of
seeds would give another result, and so would another set of test images, so both are resampled (a crossed, or
"pigeonhole", bootstrap; Owen, "The pigeonhole bootstrap", 2007). With few seeds it needs two corrections:

- Deviations of the mean over S resampled seeds are too small by sqrt((S - 1) / S), and how far seeds differ is hardly
  known. The deviations are scaled up, and in each resample divided by the root of a chi-square with S - 1 degrees of
  freedom over S - 1, as in Student's t. Where the means of the seeds agree by chance, better than what images are
  right in one seed and wrong in another allows, the variance of these images is taken instead.
- The mean of each image over few seeds varies with the seeds, which resampled seeds count already. Deviations over
  resampled images are scaled to the variance that images alone explain: the covariance of two seeds.

Where all N images are alike, as where no prediction differs, resampling says nothing; half of the interval's width is
then 3 / N (the rule of three: of an event with a probability above that, N images would have shown one).

`benchmarks/coverage.py` measures how often the intervals contain the truth.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

import numpy as np
from scipy import stats

# With 9,999 resamples, p-values are multiples of 0.0001.
RESAMPLES = 9_999
CONFIDENCE = 0.95
_UPPER = (1 + CONFIDENCE) / 2
# More seeds than this are not worth thinking about.
MOST_SEEDS = 1000
# Numbers of a resampling matrix that are in memory at a time.
_BLOCK = 1 << 23


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over seeds and test images, and how sure it is.

  Attributes:
    mean: over the seeds of the metric over the images.
    interval: 95 % interval; over other images alone where there is one seed.
    p: two-sided p-value of the hypothesis that the mean is 0.
    scores: the metric of each seed, or its difference.
    seed_variance: of the metric between seeds on the same images; NaN of one seed.
    image_variance: of the mean of infinitely many seeds between sets of as many test images; of one seed, of its mean.
  """
  mean: float
  interval: tuple[float, float]
  p: float
  scores: tuple[float, ...]
  seed_variance: float
  image_variance: float

  @property
  def half_width(self) -> float:
    """Half of the interval's width."""
    return (self.interval[1] - self.interval[0]) / 2


def estimates(tables: Sequence[np.ndarray], classes: np.ndarray | None = None, resamples: int = RESAMPLES,
              seed: int = 0) -> list[Estimate]:
  """Estimates from tables of the same test images.

  Args:
    tables: for each a float array `[S, N]`, seeds by images, such as right (1) and wrong (0) of one way to train, or
      the difference of two; NaN where a seed has not the image (in splits that depend on the seed).
    classes: int `[N]`, for the mean over classes of the mean over their images: images are then resampled within
      classes; None for the mean over all images.
    resamples: number of resamples.
    seed: of the resampling; the same arguments always give the same numbers.

  Raises:
    ValueError: a table without seeds, or a seed without images.
  """
  if not tables:
    return []
  images = tables[0].shape[1]
  blocks = np.zeros(images, int)
  if classes is None:
    classes = blocks
  else:
    blocks = _blocks(classes, np.mean([(~np.isnan(table)).mean(0) for table in tables], 0))
  parts = [_Parts.of(np.asarray(table, np.float64), classes, blocks) for table in tables]
  rng = np.random.default_rng(seed)
  of_images = _image_deviations(np.stack([part.image_effects for part in parts], 1), blocks, resamples, rng)
  numbers = {len(part.scores) for part in parts}
  # The draws for a table do not depend on how many seeds other tables have.
  spread, uniform = rng.random(resamples), rng.random((max(numbers), resamples)).T
  # What a standard deviation of so many seeds may be too small by.
  factors = {seeds: np.sqrt((seeds - 1) / stats.chi2.ppf(spread, seeds - 1)) for seeds in numbers - {1}}
  return [_estimate(part, of_images[:, k] + _seed_deviations(part, uniform, factors))
          for k, part in enumerate(parts)]


def holm(p_values: Sequence[float]) -> list[float]:
  """Holm's adjusted p-values: below 0.05 where it rejects, with at most 5 % wrong rejections in all of them together.

  Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
  """
  order = np.argsort(p_values, kind='stable')
  adjusted, largest = [0.0] * len(p_values), 0.0
  for rank, k in enumerate(order.tolist()):
    largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[k]))
    adjusted[k] = largest
  return adjusted


def seeds_needed(estimate: Estimate, half_width: float = 0.01) -> int | None:
  """The number of seeds with which the interval would be so narrow on the same test images; None if up to MOST_SEEDS
  would not do.
  """
  if not math.isfinite(estimate.seed_variance):
    return None
  z = float(stats.norm.ppf(_UPPER))
  seeds = np.arange(2, MOST_SEEDS + 1)
  t = stats.t.ppf(_UPPER, seeds - 1)
  enough = t**2 * estimate.seed_variance / seeds + z**2 * estimate.image_variance <= half_width**2
  return int(seeds[enough.argmax()]) if enough.any() else None


def images_needed(estimate: Estimate, images: int, half_width: float = 0.01) -> int:
  """The number of test images from which on seeds could make the interval so narrow."""
  z = float(stats.norm.ppf(_UPPER))
  return math.ceil(images * z**2 * estimate.image_variance / half_width**2)


@dataclasses.dataclass(frozen=True)
class _Parts:
  """A table, taken apart.

  Attributes:
    scores: `[S]`, the metric of each seed.
    noise_variance: of the metric of a seed, from images that have another value in another seed; 0 of one seed.
    image_variance: see `Estimate`.
    image_effects: `[N]`, what each image adds to the mean over seeds, above its block; scaled so that the sum over
      resampled images has the variance `image_variance`.
  """
  scores: np.ndarray
  noise_variance: float
  image_variance: float
  image_effects: np.ndarray

  @classmethod
  def of(cls, table: np.ndarray, classes: np.ndarray, blocks: np.ndarray) -> '_Parts':
    """Of a table; `blocks` are int `[N]`, within which images are resampled; others as of `estimates`."""
    present = ~np.isnan(table)
    if not len(table) or not present.any(1).all():
      raise ValueError(f'a table of {table.shape[0]} seeds by {table.shape[1]} images has a seed without images, or '
                       'none; expected at least one image of each seed')
    filled = np.where(present, table, 0.0)
    weights = _weights(present, classes)
    # What each image adds to a seed's score, above the other images of its block.
    added = weights * (filled - _block_means(filled, present, blocks))
    sizes = np.bincount(blocks, present.mean(0))
    # For deviations from the mean of the same images; of one image alone nothing is known.
    small = np.where(sizes > 1, sizes / np.maximum(sizes - 1, 0.5), 0.0)[blocks]
    seeds, scores, effects = len(table), (weights * filled).sum(1), added.mean(0)
    noise_variance, image_variance = 0.0, float(small @ effects**2)
    if seeds > 1:
      noise_variance = float(small @ added.var(0, ddof=1))
      shared = (added.sum(0) ** 2 - (added**2).sum(0)) / (seeds * (seeds - 1))
      image_variance = max(float(small @ shared), 0.0)
    if np.ptp(table[present]) == 0:  # no image tells how others might differ
      image_variance = (3 / float(stats.norm.ppf(_UPPER)) / present.sum(1).mean()) ** 2
      effects = np.resize([1.0, -1.0], len(effects))
      effects = effects - np.bincount(blocks, effects)[blocks] / np.bincount(blocks)[blocks]
    return cls(scores, noise_variance, image_variance, _with_norm(effects, math.sqrt(image_variance)))


def _with_norm(values: np.ndarray, norm: float) -> np.ndarray:
  """Centred values, scaled to a Euclidean norm; zeros stay."""
  before = float(np.linalg.norm(values))
  return values * (norm / before) if before > 0 else values


def _weights(present: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """The weight of each image in each seed's score, `[S, N]`: all classes that a seed has weigh the same."""
  counts = np.stack([np.bincount(classes, row, classes.max() + 1) for row in present])
  return present / np.maximum(counts, 1)[:, classes] / (counts > 0).sum(1, keepdims=True)


def _blocks(classes: np.ndarray, present: np.ndarray) -> np.ndarray:
  """The classes, where those with less than two images are one block: alone, nothing is known of their variance.

  Args:
    classes: int `[N]`.
    present: `[N]`, the fraction of seeds that have the image.
  """
  single = np.bincount(classes, present)[classes] < 2
  return np.unique(np.where(single, -1, classes), return_inverse=True)[1]


def _block_means(filled: np.ndarray, present: np.ndarray, blocks: np.ndarray) -> np.ndarray:
  """For each seed and image the mean over the seed's images in the image's block, `[S, N]`."""
  sums = np.stack([np.bincount(blocks, row) for row in filled])
  counts = np.stack([np.bincount(blocks, row) for row in present])
  return (sums / np.maximum(counts, 1))[:, blocks]


def _image_deviations(effects: np.ndarray, blocks: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
  """The sums of effects `[N, P]` over images that are drawn anew within their blocks, `[resamples, P]`."""
  order = np.argsort(blocks, kind='stable')
  starts = np.searchsorted(blocks[order], blocks[order], 'left')
  sizes = np.searchsorted(blocks[order], blocks[order], 'right') - starts
  images, found = len(blocks), []
  step = max(1, _BLOCK // images)
  for first in range(0, resamples, step):
    rows = min(step, resamples - first)
    drawn = order[starts + (rng.random((rows, images), np.float32) * sizes).astype(np.int64)]
    flat = (drawn + images * np.arange(rows)[:, None]).ravel()
    counts = np.bincount(flat, minlength=rows * images).reshape(rows, images)
    found.append(counts.astype(np.float32) @ effects.astype(np.float32))
  return np.concatenate(found).astype(np.float64)


def _seed_deviations(parts: _Parts, uniform: np.ndarray, factors: Mapping[int, np.ndarray]) -> np.ndarray:
  """Deviations of the mean over seeds that are drawn anew, `[resamples]`; 0 of one seed.

  Args:
    parts: of S seeds.
    uniform: `[resamples, at least S]`, which seeds are drawn: numbers from 0 to 1.
    factors: for each number of seeds `[resamples]`, by which the deviations are multiplied.
  """
  seeds = len(parts.scores)
  if seeds < 2:
    return np.zeros(len(uniform))
  ratio = float(stats.t.ppf(_UPPER, seeds - 1) / stats.norm.ppf(_UPPER))
  if ratio**2 * parts.scores.var(ddof=1) < parts.noise_variance:
    return stats.norm.ppf(uniform[:, 0]) * math.sqrt(parts.noise_variance / seeds)
  drawn = (parts.scores - parts.scores.mean())[(uniform[:, :seeds] * seeds).astype(int)].mean(1)
  return drawn * math.sqrt(seeds / (seeds - 1)) * factors[seeds]


def _estimate(parts: _Parts, deviations: np.ndarray) -> Estimate:
  mean, several = float(parts.scores.mean()), len(parts.scores) > 1
  seed_variance = max(float(parts.scores.var(ddof=1)), parts.noise_variance) if several else math.nan
  sizes = np.sort(np.abs(deviations))
  width = float(sizes[min(len(sizes), math.ceil(CONFIDENCE * (len(sizes) + 1))) - 1])
  # Resampled sums are rounded, so those of no difference at all are not exactly 0.
  larger = int((sizes >= abs(mean) - 1e-9).sum())
  return Estimate(mean, (mean - width, mean + width), (1 + larger) / (1 + len(sizes)),
                  tuple(parts.scores.tolist()), seed_variance, parts.image_variance)
