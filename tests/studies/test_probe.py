"""Classifiers on frozen features give what their formulas and scikit-learn's give, choose on val as they say, and
refuse what cannot be."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from sklearn import linear_model, metrics, neighbors

from ft_jax import logistic, neighbours
from ft_jax.studies import probe
from ft_jax.studies.probe import Labelled

D, K = 12, 5


def splits(seed: int = 0, sizes: tuple[int, ...] = (120, 60, 80), present: tuple[int, ...] = (0, 1, 2, 4),
           spread: float = 1.0):
  """Overlapping classes in float32, a scale for each dimension and a mean far from 0; class 3 has no image."""
  rng = np.random.default_rng(seed)
  means = rng.normal(size=(K, D))
  labels = [rng.choice(present, n) for n in sizes]
  features = [((means[y] + spread * rng.normal(size=(len(y), D))) * np.geomspace(0.1, 2, D) + 3).astype(np.float32)
              for y in labels]
  return Labelled(features[0], labels[0]), Labelled(features[1], labels[1]), Labelled(features[2], labels[2])


def same(first: probe.Probed, second: probe.Probed) -> bool:
  return first._replace(val=0, test=0) == second._replace(val=0, test=0) and all(
      (getattr(first, name) == getattr(second, name)).all() for name in ('val', 'test'))


def test_linear_is_scikit_learn_with_the_strength_of_the_best_val():
  """Strengths are of features of total variance 1; predictions agree where the float64 minimum is not undecided."""
  train, val, test = splits()
  mean = train.features.mean(0, dtype=np.float64)
  scale = np.mean(np.sum((train.features - mean) ** 2, 1)) ** 0.5
  strengths = (1e-1, 1e-2, 1e-3, 1e-4)
  accuracies, models = [], []
  for strength in strengths:
    model = linear_model.LogisticRegression(C=1 / (strength * len(train.labels)), solver='newton-cg', tol=1e-10,
                                            max_iter=1000)
    models.append(model.fit((train.features - mean) / scale, train.labels))
    accuracies.append(float(np.mean(model.predict((val.features - mean) / scale) == val.labels)))
  assert len(set(accuracies)) > 1
  best = int(np.argmax(accuracies))  # the first of equals, so the strongest
  found = probe.linear(train, val, test.features, K, strengths=strengths[::-1])
  assert (found.chosen, found.at_edge) == (strengths[best], best in (0, 3))
  for rows, predictions in ((val.features, found.val), (test.features, found.test)):
    logits = np.sort(models[best].decision_function((rows - mean) / scale), 1)
    decided = logits[:, -1] - logits[:, -2] > 0.02
    assert decided.mean() > 0.9
    np.testing.assert_array_equal(predictions[decided], models[best].predict((rows - mean) / scale)[decided])


def test_linear_does_not_depend_on_the_scale_of_the_features():
  """A strength chosen for one network means the same for another, whose features are larger or far from 0."""
  train, val, test = splits(1)
  found = probe.linear(train, val, test.features, K)
  for factor, shift in ((512.0, 0.0), (1.0, 64.0)):  # powers of two: rounding is the same, or nearly
    moved = [factor * part.features.astype(np.float64) + shift for part in (train, val, test)]
    again = probe.linear(Labelled(moved[0], train.labels), Labelled(moved[1], val.labels), moved[2], K)
    assert again.chosen == found.chosen and np.mean(again.test != found.test) < 0.03
  constant = probe.linear(Labelled(np.ones((9, 2)), np.array([0, 1, 1, 1, 2, 1, 1, 1, 0])),
                          Labelled(np.ones((2, 2)), np.array([0, 2])),
                          np.ones((3, 2)), 4)
  assert (constant.test == 1).all()  # the most frequent one


def test_linear_chooses_by_the_score_and_says_where_the_grid_ends(monkeypatch):
  """From strong to weak, warm; ties to the stronger; where val is all right no other is tried; the score is the one
  that is given."""
  train, val, test = splits()
  tried, original = [], logistic.fit

  def fit(*args, **kwargs):
    tried.append((kwargs['strength'], kwargs['start']))
    return original(*args, **kwargs)

  monkeypatch.setattr(probe.logistic, 'fit', fit)
  grid = (1e-3, 1e-1, 1e-2, 1e-2)
  scored = {1e-1: 0.2, 1e-2: 0.5, 1e-3: 0.5}
  by_turn = lambda labels, predictions, classes: scored[tried[-1][0]]
  found = probe.linear(train, val, test.features, K, strengths=grid, score=by_turn)
  assert (found.chosen, found.at_edge) == (1e-2, False) and [strength for strength, _ in tried] == [1e-1, 1e-2, 1e-3]
  assert tried[0][1] is None and tried[1][1].weights.shape == tried[2][1].weights.shape == (D, K)
  assert (tried[2][1].weights ** 2).sum() > (tried[1][1].weights ** 2).sum() > 0  # each from the one before
  for at, expected in ((1e-1, True), (1e-3, True)):
    scored = {strength: float(strength == at) / 2 for strength in scored}
    found = probe.linear(train, val, test.features, K, strengths=grid, score=by_turn)
    assert (found.chosen, found.at_edge) == (at, expected)
  scored, tried[:] = {1e-1: 0.1, 1e-2: 1.0}, []
  found = probe.linear(train, val, test.features, K, strengths=grid, score=by_turn)
  assert (found.chosen, found.at_edge, len(tried)) == (1e-2, False, 2)
  seen = []
  probe.linear(train, val, test.features, K, strengths=[0.1], score=lambda *given: seen.append(given) or 0.0)
  (labels, predictions, classes), = seen
  np.testing.assert_array_equal(labels, val.labels)
  assert predictions.shape == val.labels.shape and classes == K


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_nearest_mean_is_scikit_learn(dtype):
  """Also far from 0, where squared distances are differences of large numbers; a class without training images is never
  told."""
  train, val, test = splits(2, spread=2.0)
  val = val._replace(labels=np.where(val.labels == 4, 3, val.labels))
  far = [part._replace(features=part.features.astype(dtype) + dtype(1000)) for part in (train, val, test)]
  peer = neighbors.NearestCentroid().fit(far[0].features.astype(np.float64), train.labels)
  found = probe.nearest_mean(far[0], far[1], far[2].features, K)
  assert found.chosen is None and not found.at_edge
  np.testing.assert_array_equal(found.val, peer.predict(far[1].features.astype(np.float64)))
  np.testing.assert_array_equal(found.test, peer.predict(far[2].features.astype(np.float64)))
  assert 3 not in found.test and 0.3 < probe.top1(test.labels, found.test, K) < 1


def votes(train: Labelled, features: np.ndarray, k: int) -> np.ndarray:
  """The formula in float64, `[b, K]`."""
  unit = lambda x: x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
  similarities = unit(features) @ unit(train.features).T
  total = np.zeros((len(features), K))
  for row, similarity in enumerate(similarities):
    for near in np.argsort(-similarity)[:k]:
      total[row, train.labels[near]] += np.exp(similarity[near] / 0.07)
  return total


def test_neighbours_vote_as_published(monkeypatch):
  """Against the formula and scikit-learn, for each k alone; in blocks the same; the k of the best val, of equals the
  largest."""
  train, val, test = splits(3, spread=1.5)
  train, val, test = [part._replace(features=part.features - 3) for part in (train, val, test)]
  right = {}
  for k in (1, 4, 15, len(train.labels)):
    expected = votes(train, val.features, k)
    peer = neighbors.KNeighborsClassifier(k, metric='cosine', algorithm='brute',
                                          weights=lambda d: np.exp((1 - d) / 0.07))
    np.testing.assert_array_equal(peer.fit(train.features, train.labels).predict(val.features), expected.argmax(1))
    found = probe.neighbours(train, val, test.features, K, numbers=[k])
    np.testing.assert_array_equal(found.val, expected.argmax(1))
    np.testing.assert_array_equal(found.test, votes(train, test.features, k).argmax(1))
    right[k] = int(np.sum(found.val == val.labels))
  assert len(set(right.values())) > 1
  best = max(right, key=lambda k: (right[k], k))
  whole = probe.neighbours(train, val, test.features, K, numbers=(15, 1, 4, len(train.labels), 10_000))
  assert whole.chosen == best and not whole.at_edge
  np.testing.assert_array_equal(whole.test, votes(train, test.features, best).argmax(1))
  monkeypatch.setattr(neighbours, 'BLOCK', 7 * len(train.labels))  # 60 and 80 images by sevens
  assert same(probe.neighbours(train, val, test.features, K, numbers=(1, 4, 15, len(train.labels))), whole)


def test_neighbours_edges():
  """Equal votes go to the class of the nearest image, equal images to the first; the grid's ends are told, 1 and all
  are none."""
  square = Labelled(np.array([[1, 0], [0, 2], [0, 1], [3, 0]], np.float32), np.array([2, 0, 1, 2]))
  at = np.array([[0, 5], [1, 1], [4, 0.5]], np.float32)
  val = Labelled(at, np.array([0, 2, 2]))
  for k, expected in ((1, [0, 2, 2]), (2, [0, 2, 2]), (3, [0, 2, 2]), (4, [0, 2, 2])):
    found = probe.neighbours(square, val, at, 3, numbers=[k])
    assert found.test.tolist() == expected and not found.at_edge, k  # all of val is right
  wrong = Labelled(at, np.array([1, 1, 1]))
  edges = {grid: probe.neighbours(square, wrong, at, 3, numbers=grid).at_edge for grid in ((1,), (1, 3), (1, 4), (4,))}
  # more than 1; more than 3; nothing; fewer than 4
  assert edges == {(1,): True, (1, 3): True, (1, 4): False, (4,): True}
  # 0.2 + 0.1 is more than 0.3 by rounding alone.
  voters = np.array([[1, 0, 0], [1, 0, 0]])
  counted = neighbours.votes(voters, np.array([[0.3, 0.2, 0.1], [0.3, 0.2, 0.11]]), 3)
  assert neighbours.elected(voters, counted).tolist() == [1, 0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_scores_are_those_of_scikit_learn(pairs):
  labels, predictions = np.array(pairs).T
  assert probe.top1(labels, predictions, 6) == pytest.approx(metrics.accuracy_score(labels, predictions))
  recalls = metrics.recall_score(labels, predictions, labels=np.unique(labels), average='macro', zero_division=0)
  assert probe.mean_per_class(labels, predictions, 6) == pytest.approx(recalls)


def test_small_sets_and_bad_input():
  """One image in all is a training set; what cannot be used is named with its split, its first row and what to do."""
  train, val, test = splits(4)
  everyone = (probe.linear, probe.nearest_mean, probe.neighbours)
  single = Labelled(np.array([[1.0, 2.0]]), np.array([3]))
  for function in everyone:
    assert function(single, single, np.array([[5.0, -5.0]]), K).test.tolist() == [3]
  hole = val.features.copy()
  hole[[7, 9], 2] = np.nan, np.inf
  for (a, b, c, classes), message in (
      ((train, Labelled(hole, val.labels), test.features, K),
       r'val has features that are not finite: 2 of 60 images, the first in row 7'),
      ((train, val, hole, K), r'test has features that are not finite: 2 of 60'),
      ((train, Labelled(val.features[:0], val.labels[:0]), test.features, K),
       r'val has features of shape \(0, 12\);.*take some images'),
      ((train, val, test.features[:0], K), r'test has features of shape \(0, 12\); expected \[images, dimensions\]'),
      ((train, val, test.features[0], K), r'test has features of shape \(12,\)'),
      ((train, val, test.features[:, 1:], K), r'12 \(train\), 12 \(val\), 11 \(test\)'),
      ((Labelled(train.features, train.labels[1:]), val, test.features, K),
       r'train has 120 images and labels of shape \(119,\)'),
      ((train, Labelled(val.features, val.labels + 0.5), test.features, K),
       r'val has 60 images and labels of shape \(60,\), float64'),
      ((train, val, test.features, 4), r'train has labels 0 to 4; expected 0 to 3, as there are 4 classes'),
      ((train, val, test.features, 0), r'classes is 0')):
    for function in everyone:
      with pytest.raises(ValueError, match=message):
        function(a, b, c, classes)
  for strengths in ((), (0.1, 0.0), (np.nan,), (np.inf,)):
    with pytest.raises(ValueError, match=r'strengths are .*; expected numbers above 0'):
      probe.linear(train, val, test.features, K, strengths=strengths)
  for numbers in ((), (0, 1), (500,)):
    with pytest.raises(ValueError, match=r'numbers of neighbours are .*, with 120 training images'):
      probe.neighbours(train, val, test.features, K, numbers=numbers)
