"""How often the 95 % intervals of job compare contain the truth, with few seeds and few test images.

    python benchmarks/coverage.py            # about five minutes on one core
    python benchmarks/coverage.py --small    # seconds; too few comparisons to say much

Each simulated comparison has two ways to train. Whether an image is classified correctly depends on how hard it is (for
both ways and all seeds), on the way and the image (for all seeds), on the way and the seed (for all images), and on
chance: right where the sum of normal deviates is positive. The truth is the difference for all seeds and all images.
"""

import argparse
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from scipy import stats

from ft_jax.studies import paired

SEEDS, IMAGES = (3, 5, 10), (185, 1692)
# Standard deviations: of images, of images within a way, of chance; and of seeds within a way: none, some, much.
IMAGE, OWN, CHANCE = 1.5, 0.4, 0.7
SEED = (0.0, 0.03, 0.1)
# Means of the two ways.
MEANS = (-0.3, -0.2)


def simulate(rng: np.random.Generator, seeds: int, images: int, seed_sd: float) -> np.ndarray:
  """The difference of right and wrong between two ways to train, `[seeds, images]`."""
  hard = rng.normal(0, IMAGE, images)
  right = [mean + hard + rng.normal(0, OWN, images) + rng.normal(0, seed_sd, (seeds, 1))
           + rng.normal(0, CHANCE, (seeds, images)) > 0 for mean in MEANS]
  return right[1].astype(float) - right[0]


def truth(seed_sd: float) -> float:
  """The difference in accuracy over all seeds and images."""
  spread = math.sqrt(IMAGE**2 + OWN**2 + CHANCE**2 + seed_sd**2)
  first, second = (stats.norm.cdf(mean / spread) for mean in MEANS)
  return float(second - first)


def over_seeds(table: np.ndarray, rng: np.random.Generator, resamples: int) -> tuple[float, float]:
  """The interval of a bootstrap that resamples seeds alone."""
  scores = table.mean(1)
  low, high = np.quantile(scores[rng.integers(len(scores), size=(resamples, len(scores)))].mean(1), (0.025, 0.975))
  return float(low), float(high)


def over_images(table: np.ndarray) -> tuple[float, float]:
  """The interval over images alone, as if the seeds were all there are."""
  each = table.mean(0)
  width = 1.96 * each.std(ddof=1) / math.sqrt(len(each))
  return float(each.mean() - width), float(each.mean() + width)


def coverage(rng: np.random.Generator, seeds: int, images: int, seed_sd: float, count: int) -> list[float]:
  """The fractions of intervals that contain the truth: ours, over seeds alone, over images alone; and the mean
  half-width of ours.
  """
  expected, inside, width = truth(seed_sd), np.zeros(3), 0.0
  for first in range(0, count, 100):
    tables = [simulate(rng, seeds, images, seed_sd) for _ in range(min(100, count - first))]
    # Each batch has resamples of its own, or their luck would be the same in all comparisons.
    for table, estimate in zip(tables, paired.estimates(tables, resamples=1999, seed=first)):
      intervals = (estimate.interval, over_seeds(table, rng, 500), over_images(table))
      inside += [low <= expected <= high for low, high in intervals]
      width += estimate.half_width
  return [*(inside / count).tolist(), width / count]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--small', action='store_true', help='few comparisons')
  count = 100 if parser.parse_args().small else 2000
  rng = np.random.default_rng(0)
  print(f'{count:,d} simulated comparisons in each row')
  print('| test images | seeds | spread of seeds | seeds and images | seeds alone | images alone | half-width |')
  print('|---|---|---|---|---|---|---|')
  for images in IMAGES:
    for seeds in SEEDS:
      for name, seed_sd in zip(('none', 'some', 'large'), SEED):
        *inside, width = coverage(rng, seeds, images, seed_sd, count)
        cells = ' | '.join(f'{100 * value:.1f} %' for value in inside)
        print(f'| {images:,d} | {seeds} | {name} | {cells} | {100 * width:.1f} points |', flush=True)


if __name__ == '__main__':
  main()
