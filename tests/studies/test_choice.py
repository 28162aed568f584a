"""The choice of a checkpoint: its standard error is that of repeated experiments, and nothing is said to be better that
is not."""

import numpy as np
import pytest

from ft_jax.studies import choice


def test_contributions_sum_to_the_score():
  right, labels = np.array([1, 0, 1, 1, 0], bool), np.array([0, 0, 0, 2, 2])
  assert choice.contributions(right, labels, per_class=False).sum() == pytest.approx(3 / 5)
  assert choice.contributions(right, labels, per_class=True).sum() == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_standard_error_is_the_spread_of_repeated_experiments():
  """New test images and new seeds each time, with an effect of the seed: what `margin` says is what the means scatter
  by."""
  rng, seeds, images = np.random.default_rng(0), 4, 300

  def experiment():
    difficulty = rng.normal(size=images)
    scores = lambda skill: (rng.normal(size=(seeds, images)) + skill +
                            0.15 * rng.normal(size=(seeds, 1)) > difficulty) / images
    return choice.margin(scores(0.3), scores(0.2))

  margins = [experiment() for _ in range(400)]
  scatter = np.std([m.mean for m in margins])
  said = np.sqrt(np.mean([m.standard_error ** 2 for m in margins]))
  assert scatter < said < 1.25 * scatter


def test_standard_error_of_class_means_is_the_spread_of_repeated_experiments():
  """Unbalanced classes, in one of which the second network is always wrong: within that class there is nothing to
  scatter."""
  rng, labels = np.random.default_rng(0), np.repeat([0, 1, 2], [180, 15, 40])

  def experiment():
    first, second = (rng.random(len(labels)) < np.array(rates)[labels] for rates in ((0.6, 1.0, 0.5), (0.5, 0.0, 0.4)))
    each = [choice.contributions(right, labels, per_class=True)[None] for right in (first, second)]
    return choice.margin(*each, labels)

  margins = [experiment() for _ in range(400)]
  said = np.sqrt(np.mean([m.standard_error ** 2 for m in margins]))
  assert 0.9 * said < np.std([m.mean for m in margins]) < 1.1 * said


def test_of_one_seed_it_is_the_paired_error_of_the_mean():
  rng = np.random.default_rng(1)
  first, second = rng.integers(0, 2, (2, 1, 50))
  found = choice.margin(first / 50, second / 50)
  difference = (first - second)[0]
  assert found.mean == pytest.approx(difference.mean())
  assert found.standard_error == pytest.approx(difference.std(ddof=1) / 50 ** 0.5)
  assert choice.margin(np.ones((1, 1)), np.zeros((1, 1))) == (1.0, None)


def scores(*rates, images=400):
  """Test contributions of checkpoints that are right on the first part of the images, two seeds each."""
  return [np.tile(np.arange(images) < rate * images, (2, 1)) / images for rate in rates]


NAMES = ['epoch 1', 'epoch 2', 'epoch 3']


def test_an_earlier_checkpoint_that_is_better():
  made = choice.choose([0.4, 0.6, 0.5], scores(0.4, 0.6, 0.5))
  assert (made.row, made.best_other, made.similar) == (1, 2, ())
  assert choice.sentence(made,
                         NAMES) == 'Start from epoch 2: on test it is 10.0 ± 1.5 points above the last one (epoch 3).'


def test_the_last_checkpoint_that_is_better():
  made = choice.choose([0.4, 0.5, 0.6], scores(0.4, 0.5, 0.6))
  said = 'Start from epoch 3, the last one: on test it is 10.0 ± 1.5 points above the best of the others (epoch 2).'
  assert choice.sentence(made, NAMES) == said


@pytest.mark.parametrize('rates', [(0.4, 0.502, 0.5), (0.4, 0.5, 0.502), (0.5, 0.5, 0.5)])
def test_no_difference_to_be_seen(rates):
  made = choice.choose([0.3, 0.5, 0.4], scores(*rates))
  assert 2 in made.similar
  assert choice.sentence(made, NAMES).startswith('No difference to be seen: epoch 2 is best on val')
  last = choice.choose([0.3, 0.4, 0.5], scores(*rates))
  assert choice.sentence(last, NAMES).startswith('No difference to be seen: epoch 3, the last one, is best on val')


def test_equal_on_val_is_the_later_one():
  assert choice.choose([0.5, 0.5, 0.4], scores(0.5, 0.5, 0.4)).row == 1


def test_val_and_test_do_not_agree():
  made = choice.choose([0.4, 0.6, 0.5], scores(0.4, 0.4, 0.6))
  assert choice.sentence(made, NAMES).startswith('Val and test do not agree')


def test_one_checkpoint_and_none():
  assert 'nothing to compare' in choice.sentence(choice.choose([0.5], scores(0.5)), ['epoch 1'])
  with pytest.raises(ValueError, match='0 scores on val'):
    choice.choose([], [])
