"""How good the features of a frozen network are: three classifiers on them, each of which chooses on val and predicts
test.

"FE" of Deng et al. (ICCV 2023, arXiv 2203.04668): the network stays as it is. The paper's own classifier is not known;
these are the usual ones. Arrays in, predictions out; nothing here is random.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ft_jax import logistic
from ft_jax import neighbours as neighbours_of

# Of the penalty of `linear`. Of a small ResNet-18, one to six epochs trained, and 4 to 30 images a class, 1e-3 to 1e-5
# were best.
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
NUMBERS = (1, 5, 20, 50, 200)

# Of labels, predictions (int [n]) and the number of classes; 1 is the most that there is.
Score = Callable[[np.ndarray, np.ndarray, int], float]


class Labelled(NamedTuple):
  """Features of a split, `[n, d]`, and their labels, int `[n]`."""
  features: np.ndarray
  labels: np.ndarray


class Probed(NamedTuple):
  """What a classifier predicts.

  Attributes:
    chosen: on val: the strength of the penalty, or the number of neighbours; None where nothing is chosen.
    val: int `[n_val]`, the class of each image.
    test: int `[n_test]`.
    at_edge: the choice is the first or the last of those tried, so that a better one may lie beyond.
  """
  chosen: float | None
  val: np.ndarray
  test: np.ndarray
  at_edge: bool = False


def top1(labels: np.ndarray, predictions: np.ndarray, classes: int) -> float:
  """The fraction of all images that is classified correctly."""
  return float(np.mean(labels == predictions))


def mean_per_class(labels: np.ndarray, predictions: np.ndarray, classes: int) -> float:
  """The part of each class that is right, on average over the classes that have an image."""
  images = np.bincount(labels, minlength=classes)
  right = np.bincount(labels[labels == predictions], minlength=classes)
  return float(np.mean(right[images > 0] / images[images > 0]))


def linear(train: Labelled, val: Labelled, test: np.ndarray, classes: int, *, strengths: Sequence[float] = STRENGTHS,
           score: Score = top1) -> Probed:
  """Multinomial logistic regression (`ft_jax.logistic`), its penalty chosen on val.

  It minimises mean cross-entropy + strength / 2 * |weights|^2. The features are first divided by one number, the root
  mean square distance of the training features from their mean: a strength then means the same for every network,
  whatever the scale of its features. (Their mean is taken away too, which changes nothing but rounding: there is a
  bias.) Strengths are tried from strong to weak, each from where the one before ended. Ties go to the stronger; where
  all of val is right, no weaker one can be better and none is tried.

  Args:
    train: the classifier's; classes without an image are hardly ever predicted.
    val: decides the strength; need not have all classes.
    test: features `[n_test, d]`.
    classes: K; labels are 0 to K - 1.
    strengths: above 0.
    score: what is best on val; at most 1.

  Raises:
    ValueError: arrays that do not fit each other, empty ones, values that are not finite, labels out of range, a
      strength that is none.
  """
  train, val, test = _checked(train, val, test, classes)
  grid = sorted(set(strengths), reverse=True)
  if not grid or not all(0 < strength < np.inf for strength in grid):
    raise ValueError(f'strengths are {list(strengths)}; expected numbers above 0, such as {list(STRENGTHS)}')
  mean = train.features.mean(0, dtype=np.float64)
  scale = np.sqrt(np.mean(np.sum((train.features - mean) ** 2, 1))) or 1.0  # all images the same: nothing to divide by

  def standard(features: np.ndarray) -> np.ndarray:
    return ((features - mean) / scale).astype(features.dtype)

  inputs, held_out = standard(train.features), standard(val.features)
  best, highest, classifier = None, -np.inf, None
  for strength in grid:
    classifier = logistic.fit(inputs, train.labels, classes, strength=strength, start=classifier)
    predictions = _classes(classifier, held_out)
    reached = score(val.labels, predictions, classes)
    if reached > highest:
      best, highest = (strength, classifier, predictions), reached
    if highest >= 1:
      break
  assert best is not None  # there is a strength, and every score is above -inf
  strength, classifier, predictions = best
  at_edge = highest < 1 and strength in (grid[0], grid[-1])
  return Probed(strength, predictions, _classes(classifier, standard(test)), at_edge)


def _classes(classifier: logistic.Classifier, features: np.ndarray) -> np.ndarray:
  return np.argmax(features @ classifier.weights + classifier.bias, 1)


def nearest_mean(train: Labelled, val: Labelled, test: np.ndarray, classes: int) -> Probed:
  """The class whose mean training feature is nearest, by Euclidean distance; the first of equals.

  Nothing is chosen on val. Classes without a training image are never predicted. Arguments and errors are those of
  `linear`.
  """
  train, val, test = _checked(train, val, test, classes)
  images = np.bincount(train.labels, minlength=classes)
  # Features far from 0 would make distances differences of large numbers.
  centre = train.features.mean(0, dtype=np.float64)
  means = np.zeros((classes, train.features.shape[1]))
  np.add.at(means, train.labels, train.features - centre)
  means /= np.maximum(images, 1)[:, None]
  lengths = np.where(images, np.sum(means ** 2, 1), np.inf)

  def nearest(features: np.ndarray) -> np.ndarray:
    return np.argmin(lengths - 2 * (features - centre) @ means.T, 1)  # without |x|^2, which is the same for all classes

  return Probed(None, nearest(val.features), nearest(test))


def neighbours(train: Labelled, val: Labelled, test: np.ndarray, classes: int, *, numbers: Sequence[int] = NUMBERS,
               score: Score = top1) -> Probed:
  """Weighted k-nearest-neighbours, k chosen on val.

  As Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018): the k training
  images of the largest cosine similarity vote for their classes, each with the weight exp(similarity / 0.07). Of
  classes with as many votes, the one of the nearest image wins; of numbers with the same score on val, the largest. A
  feature of zeros is similar to nothing (0). Similarities are computed for some images at a time.

  Args:
    train, val, test, classes, score: as of `linear`.
    numbers: k; those above the number of training images are left out.

  Raises:
    ValueError: as of `linear`; or no number from 1 to the number of training images.
  """
  train, val, test = _checked(train, val, test, classes)
  grid = sorted({k for k in numbers if k <= len(train.labels)})
  if not grid or grid[0] < 1:
    raise ValueError(f'numbers of neighbours are {list(numbers)}, with {len(train.labels)} training images; expected '
                     'numbers from 1, at '
                     f'least one of them not above that')
  directions = neighbours_of.directions(train.features)
  predicted = _voted(directions, train.labels, val.features, grid, classes)
  reached = [score(val.labels, predictions, classes) for predictions in predicted]
  at = len(grid) - 1 - int(np.argmax(reached[::-1]))
  edges = {grid[0]} - {1} | {grid[-1]} - {len(train.labels)}  # beyond 1 and all of them there is nothing
  (tested,) = _voted(directions, train.labels, test, [grid[at]], classes)
  return Probed(grid[at], predicted[at], tested, reached[at] < 1 and grid[at] in edges)


def _voted(directions: np.ndarray, labels: np.ndarray, features: np.ndarray, numbers: Sequence[int],
           classes: int) -> list[np.ndarray]:
  """The predictions for each number of neighbours."""
  predicted: list[list[np.ndarray]] = [[] for _ in numbers]
  for classes_of, weights in neighbours_of.voters(directions, labels, features, max(numbers)):
    for k, found in zip(numbers, predicted):
      counted = neighbours_of.votes(classes_of[:, :k], weights[:, :k], classes)
      found.append(neighbours_of.elected(classes_of[:, :k], counted))
  return [np.concatenate(found) for found in predicted]


def _checked(train: Labelled, val: Labelled, test: np.ndarray, classes: int) -> tuple[Labelled, Labelled, np.ndarray]:
  """The arrays, features in float32 where they are not float64."""
  if classes < 1:
    raise ValueError(f'classes is {classes}; expected the number of classes, from 1')
  given = {'train': train.features, 'val': val.features, 'test': test}
  features = {name: _features(name, array) for name, array in given.items()}
  dimensions = {name: array.shape[1] for name, array in features.items()}
  if len(set(dimensions.values())) > 1:
    raise ValueError('features of one network have one dimension; these have '
                     + ', '.join(f'{d} ({name})' for name, d in dimensions.items()))
  train_labels, val_labels = (_labels(name, split.labels, len(features[name]), classes)
                              for name, split in (('train', train), ('val', val)))
  return Labelled(features['train'], train_labels), Labelled(features['val'], val_labels), features['test']


def _features(name: str, array: np.ndarray) -> np.ndarray:
  array = np.asarray(array)
  if array.ndim != 2 or 0 in array.shape:
    raise ValueError(f'{name} has features of shape {array.shape}; expected [images, dimensions], at least one of each'
                     + (': the choice is made on val, take some images of train for it' if name == 'val' else ''))
  array = array.astype(np.result_type(array.dtype, np.float32), copy=False)
  wrong = ~np.isfinite(array).all(1)
  if wrong.any():
    raise ValueError(f'{name} has features that are not finite: {wrong.sum()} of {len(array)} images, the first in row '
                     f'{np.argmax(wrong)}; the weights that made them are damaged or of a training that diverged')
  return array


def _labels(name: str, labels: np.ndarray, images: int, classes: int) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.shape != (images,) or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f'{name} has {images} images and labels of shape {labels.shape}, {labels.dtype}; expected one '
                     'integer an image')
  if labels.min() < 0 or labels.max() >= classes:
    raise ValueError(f'{name} has labels {labels.min()} to {labels.max()}; expected 0 to {classes - 1}, as there are '
                     f'{classes} classes')
  return labels
