"""FixMatch: the loss is the formula over the images that all devices keep, teaches the strong view alone, and is 0
where none is kept.
"""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import method_case
import numpy as np
import pytest

from configs import fixmatch as fixmatch_config
from configs import miniature
from ft_jax import methods
from ft_jax.data import open_set
from ft_jax.data.splits import Splits
from ft_jax.jobs import finetune
from ft_jax.methods.base import StepContext
from ft_jax.methods.fixmatch import FixMatch
from ft_jax.models.resnet import Outputs
from ft_jax.parallel import AXIS


def reference(method: FixMatch, weak: np.ndarray, strong: np.ndarray) -> tuple[float, float]:
  """The loss and the part that is kept, image by image."""
  total, kept = 0.0, 0
  for w, s in zip(weak, strong):
    w = w / method.temperature
    q = np.exp(w - w.max()) / np.exp(w - w.max()).sum()
    if q.max() >= method.threshold:
      kept += 1
      answers = q if method.labels == 'soft' else np.arange(len(q)) == np.argmax(q)
      total -= float(np.sum(answers * (s - s.max() - np.log(np.exp(s - s.max()).sum()))))
  return (method.weight * total / kept if kept else 0.0), kept / len(weak)


def term(method: FixMatch, weak: np.ndarray, strong: np.ndarray,
         devices: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """The loss and the metrics on each device."""

  def of_device(weak, strong):
    outputs = {name: Outputs(None, {'target': logits}, {}) for name, logits in (('source', weak),
                                                                                ('source/strong', strong))}
    made = method.loss(StepContext(*[None] * 5, outputs, *[None] * 6), {})
    return made.loss, made.metrics

  split = lambda x: x.reshape(devices, -1, x.shape[-1])
  return jax.vmap(of_device, axis_name=AXIS)(split(weak), split(strong))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(['soft', 'hard']), st.sampled_from([0.0, 0.6, 0.9]),
       st.sampled_from([0.5, 1.0, 2.0]),
       st.sampled_from([1, 4]))
def test_formula(seed, labels, threshold, temperature, devices):
  """The mean over devices is that over all kept images, and its gradient the strong view's; float64, against finite
  differences.
  """
  method = FixMatch(0.7, threshold, labels, temperature)
  rng = np.random.default_rng(seed)
  weak, strong, direction = rng.normal(size=(3, 8, 5)) * np.array([2.0, 2.0, 1.0])[:, None, None]
  with jax.enable_x64(True):
    loss, metrics = term(method, weak, strong, devices)
    expected, kept = reference(method, weak, strong)
    np.testing.assert_allclose(np.mean(loss), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(metrics['kept'], kept)
    of_weak, of_strong = jax.grad(lambda *logits: term(method, *logits, devices)[0].mean(),
                                  argnums=(0, 1))(weak, strong)
    assert not np.any(of_weak)
    h = 1e-5
    ahead, behind = (reference(method, weak, strong + sign * h * direction)[0] for sign in (1, -1))
    np.testing.assert_allclose(np.sum(of_strong * direction), (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-9)


def test_none_is_kept():
  """No image is sure enough, on all devices or on some: zero and its gradient, and nothing that is no number."""
  weak, strong = np.zeros((8, 4)), np.random.default_rng(0).normal(size=(8, 4))
  method = FixMatch(1.0, threshold=0.5)
  loss, gradient = jax.value_and_grad(lambda strong: term(method, weak, strong, 2)[0].mean())(strong)
  assert loss == 0 and not np.any(gradient)
  weak[5, 0] = 9.0  # one image, of the second device
  loss, metrics = term(method, weak, strong, 2)
  np.testing.assert_allclose(loss.mean(), reference(method, weak, strong)[0], rtol=1e-5)
  assert loss[0] == 0 and np.all(metrics['kept'] == 0.125)


def test_same_whatever_the_split():
  """The whole step: source images have no head, their labels no say, and images kept are unequally many on each device.
  """
  batch = method_case.batch()
  # Unlike labels would change the step where they had a say.
  wrong = {**batch, 'source': {**batch['source'], 'label': np.full(method_case.BATCH, 10**6, np.int32)}}
  on = {'fixmatch': FixMatch(1.0, threshold=0.3, labels='hard')}
  method_case.assert_same_whatever_the_split(on, batches=lambda step: wrong if step else batch)


def test_bad_settings():
  context = method_case.context(method_case.network(), pretrained=False)
  for fields, words in ((dict(labels='firm'), "labels is 'firm'; known: soft, hard"),
                        (dict(threshold=1.0), 'threshold is 1.0; expected'),
                        (dict(threshold=-0.1), 'threshold is -0.1'),
                        (dict(temperature=0.0), 'temperature is 0.0; expected')):
    with pytest.raises(ValueError, match=f'methods.fixmatch.{words}'):
      methods.check(methods.active({'fixmatch': {'weight': 1.0, **fields}}), context)
  on = methods.active({'fixmatch': {'weight': 1.0}})
  methods.check(on, context)
  with pytest.raises(ValueError, match='methods.fixmatch needs source images .* but config.selection.method is none'):
    methods.check(on, dataclasses.replace(context, has_source=False))


def test_pools_that_do_not_fit(photos, pool):
  """Images without classes are chosen by cluster or example and used without labels; a source head has nothing to learn
  there.
  """
  config = miniature.get_config('finetune')
  config.target.name, config.model.weights, config.selection.size = f'folder:{photos}', '', 2
  alone = open_set(f'folder:{pool}/a', 'train')
  splits = Splits(*[open_set(f'folder:{photos}', 'train')] * 3)
  with pytest.raises(ValueError, match='has one class, unlabelled, so its labels teach nothing; .*fixmatch.weight=1'):
    finetune.Settings.from_config(config).check_sets(splits, alone)
  config.methods.fixmatch.weight = 1.0
  with pytest.raises(ValueError, match="by is 'class', but .* has one class, unlabelled; select by cluster"):
    finetune.Settings.from_config(config).check_sets(splits, alone)
  config.selection.by, config.selection.clusters = 'cluster', 5
  finetune.Settings.from_config(config).check_sets(splits, alone)
  config.model.weights, config.model.source_head = 'pretrain', 'pretrained'
  with pytest.raises(ValueError,
                     match="source_head is 'pretrained', but with methods.fixmatch source images have no labels"):
    finetune.Settings.from_config(config)


def test_published_settings():
  config = fixmatch_config.get_config()
  on = methods.active(config.methods.to_dict())
  assert on == {'fixmatch': FixMatch(1.0, 0.0, 'soft', 1.0)}
  settings = config.selection
  assert (settings.by, settings.clusters, settings.size, settings.features, config.model.name) == (
      'cluster', 2000, 500, 'projection', 'resnet50')
  train = config.train
  assert (train.learning_rate, train.weight_decay, train.nesterov, train.batch_size, train.epochs, train.milestones,
          config.source_ratio) == (0.01, 1e-5, True, 256, 100, (0.6, 0.8), 1)
