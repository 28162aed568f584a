"""Nearest neighbours classify val while a network without a head is trained: against the votes written out."""

import numpy as np
import pytest

from ft_jax import parallel
from ft_jax.data.image_set import ImageSet
from ft_jax.training import neighbours

CLASSES = 4
# The inputs of a batch are the features.
FEATURES = parallel.pmap(lambda _, batch: parallel.gather(
    {'features': batch['input'], **{name: batch[name] for name in ('label', 'row', 'mask')}}))


def batches(features, labels, size=8):
  """In batches of eight, the last one padded and masked, in another order than that of the rows."""
  found = []
  for begin in reversed(range(0, len(labels), size)):
    rows = np.arange(begin, min(begin + size, len(labels)))
    padded = np.resize(rows, size)
    found.append({'input': features[padded], 'label': labels[padded].astype(np.int32), 'row': padded.astype(np.int32),
                  'mask': np.arange(size) < len(rows)})
  return found


@pytest.mark.parametrize('classes', [CLASSES, 1])
def test_votes_written_out(classes):
  """Predictions in the order of the rows, and the loss; 30 images of four classes give eight voters each."""
  rng = np.random.default_rng(0)
  draw = lambda n: (rng.normal(size=(n, 5)).astype(np.float32), rng.integers(0, classes, n))
  (known, labels), (asked, truth) = draw(30), draw(21)
  found = neighbours.evaluate(FEATURES, parallel.replicate({}), batches(known, labels), batches(asked, truth), classes)
  k, losses, predictions = -(-30 // classes), [], []
  for x, y in zip(asked.astype(np.float64), truth):
    similar = known @ x / np.linalg.norm(known, axis=1) / np.linalg.norm(x)
    votes = np.zeros(classes)
    for row in np.argsort(-similar)[:k]:
      votes[labels[row]] += np.exp(similar[row] / 0.07)
    predictions.append(np.argmax(votes))
    losses.append(-np.log((k * votes[y] / votes.sum() + 1 / classes) / (k + 1)))
  assert found.predictions.tolist() == predictions
  assert found.loss == pytest.approx(np.mean(losses), rel=1e-4)
  assert found.top1 == np.mean(np.array(predictions) == truth)


def test_the_bank_is_a_sample(monkeypatch):
  """Of a large set; a small one is taken whole, in order."""
  images = ImageSet.from_arrays(np.zeros((50, 5, 5), np.uint8), np.arange(50) % 3)
  assert neighbours.sample_bank(images, 0).ids.tolist() == images.ids.tolist()
  monkeypatch.setattr(neighbours, 'BANK', 20)
  one, again, other = (neighbours.sample_bank(images, seed).ids.tolist() for seed in (0, 0, 1))
  assert one == again != other and len(set(one)) == 20
