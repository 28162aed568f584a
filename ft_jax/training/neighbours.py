"""How good features are while a network is pre-trained without labels: k-nearest-neighbours on labelled images."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from ft_jax import neighbours, parallel
from ft_jax.data.image_set import ImageSet
from ft_jax.models.network import Network
from ft_jax.training.evaluate import Evaluation, PredictFn

# Training images whose features vote, and the most of them that vote for one image.
BANK, MOST = 10_000, 200


def sample_bank(images: ImageSet, seed: int) -> ImageSet:
  """The training images that vote: all of them, or `BANK` that are drawn with `seed`."""
  rows = np.random.default_rng((seed, 3)).permutation(len(images))[:BANK]
  return images.subset(np.sort(rows))


def make_features(model: Network) -> PredictFn:
  """The pmapped forward pass to features in evaluation mode; every host gets those of all."""

  def predict(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    features = model.predict(variables, batch['input']).features
    return parallel.gather({'features': features, 'label': batch['label'], 'row': batch['row'], 'mask': batch['mask']})

  return parallel.pmap(predict)


def evaluate(features: PredictFn, variables: Any, bank: Iterable[Mapping[str, np.ndarray]],
             batches: Iterable[Mapping[str, np.ndarray]], num_classes: int) -> Evaluation:
  """Evaluates the features of replicated variables on a split.

  k is the number of images in the bank divided by the classes, 200 at most. The loss is the mean of -log p, where p is
  the fraction of the votes for the true class, of those of the neighbours (scaled to k) and of one more that all
  classes share.

  Args:
    features: of `make_features`.
    variables: `{'params', 'batch_stats'}`, replicated.
    bank: the images that vote, padded and masked, as `data.pipeline.EvalBatches` makes them.
    batches: the split, likewise.
    num_classes: K.
  """
  known, labels = _features(features, variables, bank)
  asked, truth = _features(features, variables, batches)
  k = min(MOST, -(-len(labels) // num_classes))
  predictions, losses = [], []
  start = 0
  for classes_of, weights in neighbours.voters(neighbours.directions(known), labels, asked, k):
    counted = neighbours.votes(classes_of, weights, num_classes)
    true = truth[start:start + len(classes_of)]
    predictions.append(neighbours.elected(classes_of, counted))
    shares = counted[np.arange(len(true)), true] / counted.sum(1)
    losses.append(-np.log((k * shares + 1 / num_classes) / (k + 1)))
    start += len(true)
  confusion = np.zeros((num_classes, num_classes), np.int64)
  predicted = np.concatenate(predictions).astype(np.int32)
  np.add.at(confusion, (truth, predicted), 1)
  return Evaluation(float(np.concatenate(losses).mean()), confusion, predicted)


def _features(features: PredictFn, variables: Any,
              batches: Iterable[Mapping[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
  """Features `[n, d]` and labels `[n]` of a split, in its order."""
  results = [{name: value[result['mask']] for name, value in result.items()}
             for result in parallel.read_late(features(variables, parallel.shard(batch)) for batch in batches)]
  whole = {name: np.concatenate([result[name] for result in results]) for name in ('features', 'label', 'row')}
  order = np.argsort(whole['row'])
  return whole['features'][order], whole['label'][order]
