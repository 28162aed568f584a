"""Which of several checkpoints is best, and how sure that is: chosen on val, measured on test."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A margin of fewer standard errors counts as no visible difference: about 95 % of a normal distribution.
ERRORS = 2.0


class Margin(NamedTuple):
  """By how much one score is above another, with its standard error; None of a single image and seed."""
  mean: float
  standard_error: float | None

  @property
  def seen(self) -> bool:
    """Whether it is further from zero than chance makes likely: more than two standard errors."""
    return self.standard_error is not None and abs(self.mean) > ERRORS * self.standard_error


class Choice(NamedTuple):
  """The checkpoint that is best on val, and how it does on test against the others.

  Attributes:
    row: the one that is chosen.
    margins: of it over each checkpoint, on test; over itself it is 0.
    best_other: which of the others is best on val; None where there is one checkpoint.
    similar: the others that cannot be distinguished from it on test.
  """
  row: int
  margins: tuple[Margin, ...]
  best_other: int | None
  similar: tuple[int, ...]


def contributions(right: np.ndarray, labels: np.ndarray, per_class: bool) -> np.ndarray:
  """What each image adds to the score of its split, float64 `[n]`; their sum is the score.

  Args:
    right: bool `[n]`, whether it was predicted rightly.
    labels: int `[n]`.
    per_class: of the mean of the classes' accuracies; else of the accuracy (top-1).
  """
  if not per_class:
    return right / len(right)
  counts = np.bincount(labels)
  return right / (counts[labels] * np.count_nonzero(counts))


def margin(first: np.ndarray, second: np.ndarray, labels: np.ndarray | None = None) -> Margin:
  """The difference of two mean scores on the same test images.

  Its variance is that over seeds, var(d_s) / S of the differences d_s of each seed, plus that of the test images as a
  sample, n / (n - 1) * sum_i (g_i - mean g)^2 of the differences g_i that image i makes to the mean (the paired
  standard error of a mean). What seed and image do together is in both, so the sum is a little too large rather than
  too small. With one seed it is that of the images alone.

  Args:
    first, second: `[S, n]`, `contributions` of each seed; 0 where an image is not in that seed's test split.
    labels: int `[n]`, where scores are means of the classes' accuracies: the images are then a sample of each class by
      itself, and the sum above is over the classes. A class of one image counts with g_i^2, as if its mean were 0.
  """
  differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
  seeds, images = differences.shape
  by_seed, by_image = differences.sum(1), differences.mean(0)
  if images < 2:
    return Margin(float(by_seed.mean()), None)
  groups = [by_image] if labels is None else [by_image[labels == k] for k in np.unique(labels)]
  variance = sum(len(group) * group.var(ddof=1) if len(group) > 1 else float(group[0] ** 2) for group in groups)
  if seeds > 1:
    variance += by_seed.var(ddof=1) / seeds
  return Margin(float(by_seed.mean()), float(np.sqrt(variance)))


def choose(val: Sequence[float], test: Sequence[np.ndarray], labels: np.ndarray | None = None) -> Choice:
  """The checkpoint with the highest score on val (of equals the later one), and its margins on test.

  Choosing on val leaves the margins on test without the optimism of the best of many.

  Args:
    val: the mean score of each checkpoint on val, in the order of the training.
    test: `[S, n]` of each checkpoint; see `margin`.
    labels: likewise.

  Raises:
    ValueError: nothing to choose from.
  """
  if not len(val) or len(val) != len(test):
    raise ValueError(f'there are {len(val)} scores on val and {len(test)} on test; expected one of each for at least '
                     'one checkpoint')
  order = sorted(range(len(val)), key=lambda row: (val[row], row), reverse=True)
  best = order[0]
  margins = tuple(margin(test[best], other, labels) for other in test)
  similar = tuple(row for row, to in enumerate(margins) if row != best and not to.seen)
  return Choice(best, margins, order[1] if len(order) > 1 else None, similar)


def sentence(choice: Choice, names: Sequence[str]) -> str:
  """The answer in words; the last checkpoint is what one would take without a study.

  `Start from epoch 8: 1.9 ± 0.6 points above the last one (epoch 20).` or `No difference to be seen: ...`.
  """
  best, last = choice.row, len(names) - 1
  if choice.best_other is None:
    return f'There is one checkpoint, {names[best]}, and nothing to compare it with.'
  other = last if best != last else choice.best_other
  margin = choice.margins[other]
  role = 'the last one' if other == last else 'the best of the others'
  of_other = f'{role} ({names[other]})'
  points = f'{abs(100 * margin.mean):.1f}'
  if margin.standard_error is not None:
    points += f' ± {100 * margin.standard_error:.1f}'
  side = 'above' if margin.mean >= 0 else 'below'
  if not margin.seen:
    if best == last:
      return (f'No difference to be seen: {names[best]}, the last one, is best on val, and on test it is {points} '
              f'points {side} {of_other}.')
    return (f'No difference to be seen: {names[best]} is best on val, and on test it is {points} points {side} '
            f'{of_other}, which is as good a choice.')
  if margin.mean > 0:
    remark = ', the last one' if best == last else ''
    return f'Start from {names[best]}{remark}: on test it is {points} points above {of_other}.'
  return (f'Val and test do not agree: {names[best]} is best on val, and on test it is {points} points below '
          f'{of_other}; val is too small to choose by.')
