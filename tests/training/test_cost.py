"""What a training cost: every image that went through the network, and seconds that do not count compiling."""

import pytest

from ft_jax.methods import Needs, View
from ft_jax.training.cost import training_cost
from ft_jax.training.loop import Stream, TrainingData

DATA = TrainingData({'target': Stream(None, 8, 1.0), 'source': Stream(None, 4, 0.5)}, None, None, 0)


@pytest.mark.parametrize('streams,images', [((), 120), (('target',), 200), (('target', 'source'), 240)])
def test_views_that_go_through_the_network_count_as_images(streams, images):
  needs = Needs(views=(View('target', 'only read'),),
                forwarded_views=tuple(View(name, f'view {k}') for k, name in enumerate(streams)))
  assert training_cost(DATA, needs, 10, []) == {'steps': 10, 'images': images, 'seconds': None}


def test_seconds_are_those_of_the_steps():
  """Steps 3 to 6 took 12 images / (24 images/s) each, step 9 two seconds; of the others, the first of the run and the
  one after it was resumed among them, nothing is known.
  """
  lines = [{'step': 2}, {'step': 6, 'images_per_second': 24.0}, {'step': 8, 'val/top1': 0.5},
           {'step': 9, 'images_per_second': 6.0}]
  cost = training_cost(DATA, Needs(), 10, lines)
  assert cost['seconds'] == pytest.approx((4 * 0.5 + 2.0) / 5 * 10)
