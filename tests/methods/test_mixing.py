"""Mixup, CutMix and label smoothing: images and labels are mixed by the same share, the same way on any number of
devices.
"""

from collections.abc import Callable
import functools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import method_case
import numpy as np
import pytest

from ft_jax import methods
from ft_jax.methods.cutmix import CutMix
from ft_jax.methods.label_smoothing import LabelSmoothing
from ft_jax.methods.mixup import Mixup
from ft_jax.parallel import AXIS
from ft_jax.training.step import mix_target

CLASSES = 5


def mixed(method: methods.Method, images: np.ndarray, labels: np.ndarray, seed: int,
          devices: int = 1) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels (distributions) of the whole batch after mixing."""
  split = lambda x: jnp.asarray(x).reshape(devices, -1, *x.shape[1:])
  one_hot = np.eye(CLASSES, dtype=np.float32)[labels]
  made = mapped(method, devices)(split(images), split(one_hot), jax.random.key(seed))
  return tuple(np.asarray(x).reshape(-1, *x.shape[2:]) for x in made)


@functools.cache
def mapped(method: methods.Method, devices: int) -> Callable[..., Any]:
  return jax.jit(jax.vmap(method.mix, in_axes=(0, 0, None), axis_name=AXIS, axis_size=devices),
                 compiler_options=method_case.QUICK)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.sampled_from([Mixup, CutMix]))
def test_images_and_labels_are_mixed_by_the_same_share(seed, kind):
  rng = np.random.default_rng(seed)
  images, labels = rng.normal(size=(8, 11, 9, 3)).astype(np.float32), np.array([0, 1, 2, 3, 4, 4, 3, 1])
  got, soft = mixed(kind(0.7), images, labels, seed)
  share = float(soft[0, 0])  # the first image's partner is the last one
  one_hot = np.eye(CLASSES)[labels]
  np.testing.assert_allclose(soft, share * one_hot + (1 - share) * one_hot[::-1], atol=1e-6)
  if kind is Mixup:
    np.testing.assert_allclose(got, share * images + (1 - share) * images[::-1], atol=1e-5)
  else:
    box = np.all(got == images[::-1], axis=(0, 3))
    np.testing.assert_array_equal(got, np.where(box[..., None], images[::-1], images))
    rows, columns = box.any(1), box.any(0)
    np.testing.assert_array_equal(box, rows[:, None] & columns)
    # one box
    assert np.sum(np.abs(np.diff(rows.astype(int)))) <= 2 and np.sum(np.abs(np.diff(columns.astype(int)))) <= 2
    np.testing.assert_allclose(1 - share, box.mean(), atol=1e-6)
  for a, b in zip(mixed(kind(0.7), images, labels, seed, devices=4), (got, soft)):
    np.testing.assert_array_equal(a, b)


def test_shares_are_drawn_from_the_distribution():
  """Beta(a, a) has variance 1 / (8 a + 4); a box is centred anywhere, has the asked part of both sides, and comes as
  often as asked.
  """
  keys = jax.random.split(jax.random.key(0), 4000)
  ends = jnp.array([1.0, 0.0])
  mix = jax.vmap(lambda key: Mixup(0.2).mix(ends, ends, key)[1][0], axis_name=AXIS, axis_size=1, in_axes=None)
  shares = np.asarray(jax.jit(jax.vmap(mix))(keys))
  np.testing.assert_allclose((shares.mean(), shares.var()), (0.5, 1 / 5.6), atol=0.02)
  boxes = np.asarray(jax.jit(jax.vmap(lambda key: CutMix(1.0, 0.5).box(key, 20, 30)))(keys))
  assert 0.42 < boxes.any((1, 2)).mean() < 0.5  # half of the steps, but for boxes of no pixel
  rng = np.random.default_rng(0)
  part, y, x = np.sqrt(1 - rng.uniform(size=200000)), rng.integers(0, 20, 200000), rng.integers(0, 30, 200000)
  length = lambda middle, half, size: np.minimum(middle + half, size) - np.maximum(middle - half, 0)
  area = length(y, (20 * part).astype(int) // 2, 20) * length(x, (30 * part).astype(int) // 2, 30) / 600
  np.testing.assert_allclose(boxes.mean(), 0.5 * area.mean(), atol=0.01)


def test_one_of_two_mixes_each_step():
  """What a step makes of both is what it makes of either alone, both come, and four devices make of a batch what one
  does.
  """
  both = {'cutmix': CutMix(1.0), 'mixup': Mixup(1.0)}
  batch = method_case.images(8, CLASSES)

  def run(active: dict[str, methods.Method], map_over: Callable[..., Any], devices: int) -> np.ndarray:

    def mix(images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
      return mix_target(active, key, {'target': images}, {'target': labels}, method_case.network({'target': CLASSES}))

    step = map_over(mix, in_axes=(0, 0, None), axis_name=AXIS)
    split = [batch[name].reshape(devices, -1, *batch[name].shape[1:]) for name in ('input', 'label')]
    images, labels = zip(*(step(*split, key) for key in jax.random.split(jax.random.key(1), 8)))
    assert np.asarray(labels[0]['target']).shape == (devices, 8 // devices, CLASSES)
    return np.stack([np.asarray(each['target']).reshape(batch['input'].shape) for each in images])

  of_one = lambda function, **kwargs: jax.jit(jax.vmap(function, **kwargs), compiler_options=method_case.QUICK)
  of_both = run(both, of_one, 1)
  same = [np.all(np.isclose(of_both, run({name: method}, of_one, 1), atol=1e-5), axis=(1, 2, 3, 4))
          for name, method in both.items()]
  np.testing.assert_array_equal(same[0], ~same[1])
  assert same[0].any() and same[1].any()
  np.testing.assert_allclose(run(both, jax.pmap, 4), of_both, atol=1e-6)


def test_same_whatever_the_split():
  """Through the whole step: partners are those of the whole batch, mixed before it is divided into microbatches."""
  method_case.assert_same_whatever_the_split({'label_smoothing': LabelSmoothing(0.1), 'mixup': Mixup(0.4),
                                              'cutmix': CutMix(1.0)})


def test_smoothed_labels():
  smooth = LabelSmoothing(0.3).soften(np.array([[0, 1, 0, 0], [0.25, 0.75, 0, 0]], np.float32))
  np.testing.assert_allclose(smooth, [[0.075, 0.775, 0.075, 0.075], [0.25, 0.6, 0.075, 0.075]], rtol=1e-6)


def test_bad_settings():
  context = method_case.context(method_case.network(), pretrained=False)
  for settings_, message in (({'label_smoothing': {'amount': 1.0}},
                              'label_smoothing.amount is 1.0; expected a number below 1'),
                             ({'cutmix': {'alpha': 1.0, 'probability': 0.0}},
                              'cutmix.probability is 0.0; expected a number above 0'),
                             ({'mixup': {'alpha': -1.0}}, 'mixup.alpha is -1.0; expected a number above 0')):
    with pytest.raises(ValueError, match=message):
      methods.check(methods.active(settings_), context)
  with pytest.raises(ValueError,
                     match='methods.bi_tuning and methods.mixup cannot be combined: .* no class of its own'):
    methods.active({'bi_tuning': {'weight': 1.0}, 'mixup': {'alpha': 1.0}})
