"""Joint training where it must win: the pool holds the target's own classes, with true labels, and the target is tiny.

If it does not win here, something in the joint step is wrong: the heads' rates, the weight of the losses, BatchNorm's
statistics, the order of the batches, or the evaluation.
"""

import functools

import numpy as np
import pytest
from sklearn import datasets

import ft_jax
from ft_jax.data import digits
from ft_jax.models import NETWORKS
from ft_jax.models.resnet import BasicBlock, ResNet
import selection

STEPS = 100


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
  """Target, source, and the file of a selection.

  Digits of the same writers everywhere: two of each class to train on, 500 to test on, and all others in the pool,
  among patches of photographs. No image is in two of them, so that nothing can be learnt by heart. They are selected by
  their pixels: the network is random.
  """
  data = datasets.load_digits()
  images, labels = np.round(data.images * (255 / 16)).astype(np.uint8), data.target
  pool_images, pool_labels, _, names = digits.load('pool', 'train')
  patches = pool_labels >= 10
  order = np.random.default_rng(0).permutation(len(labels))
  few = np.concatenate([order[labels[order] == k][:2] for k in range(10)])
  val, test, rest = np.split(order[~np.isin(order, few)], (100, 600))
  some = lambda rows: ft_jax.ImageSet.from_arrays(images[rows], labels[rows], [str(k) for k in range(10)])
  source_images = np.concatenate([images[rest], pool_images[patches]])
  source_labels = np.concatenate([labels[rest], pool_labels[patches]])
  pixels = lambda images: images.reshape(len(images), -1).astype(np.float32)
  chosen = selection.select(selection.Embeddings(pixels(source_images), labels=source_labels, class_names=names),
                            selection.Embeddings(pixels(images[few]), labels=labels[few]), 10)
  assert set(chosen.class_names) == {f'digit {k}' for k in range(10)}
  file = tmp_path_factory.mktemp('planted') / 'selection.json'
  chosen.save(file)
  return ({'train': some(few), 'val': some(val), 'test': some(test)},
          ft_jax.ImageSet.from_arrays(source_images, source_labels, names), {'file': str(file)})


def accuracy(target, source, workdir, steps, selection):
  """On the test images, after a fine-tuning from random weights."""
  run = ft_jax.finetune(
      target, source, workdir=workdir, image_size=8, augment={'short_side': 8, 'scale': (0.6, 1.0), 'flip': False},
      model={'name': 'small', 'width': 32, 'stem': '3x3'}, selection=selection,
      train={'steps': steps, 'batch_size': 32, 'learning_rate': 0.1, 'schedule': 'cosine', 'warmup': 0.1,
             'eval_every': steps})
  return run.test.top1


def test_a_planted_pool_helps(planted, tmp_path, monkeypatch):
  """Against plain fine-tuning for as many steps, and with as many images through the network."""
  monkeypatch.setitem(NETWORKS, 'small', functools.partial(ResNet, (1, 1), BasicBlock))
  target, source, chosen = planted
  joint = accuracy(target, source, tmp_path / 'joint', STEPS, chosen)
  plain = accuracy(target, source, tmp_path / 'plain', STEPS, {'method': 'none'})
  twice = accuracy(target, source, tmp_path / 'twice', 2 * STEPS, {'method': 'none'})
  assert joint > max(plain, twice) + 0.05, (joint, plain, twice)
