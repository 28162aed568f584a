"""Exact metrics over a whole split: every example counts once, whatever the batch and the number of devices."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ft_jax import parallel
from ft_jax.models.network import Network

PredictFn = Callable[[Any, Mapping[str, np.ndarray]], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Predictions over a split and what follows from them.

  Attributes:
    loss: mean cross-entropy.
    confusion: int `[K, K]`, examples by (true class, predicted class).
    predictions: int32 `[n]`, the predicted class of each example, in the order of the split.
  """
  loss: float
  confusion: np.ndarray
  predictions: np.ndarray

  @property
  def top1(self) -> float:
    """The fraction of all examples that is right."""
    return float(np.trace(self.confusion) / self.confusion.sum())

  @property
  def per_class(self) -> np.ndarray:
    """The fraction of each class that is right, `[K]`; NaN for a class without examples."""
    totals = self.confusion.sum(1)
    return np.divide(np.diag(self.confusion), totals, out=np.full(len(totals), np.nan), where=totals > 0)

  @property
  def mean_per_class(self) -> float:
    """The mean over the classes that have examples."""
    return float(np.nanmean(self.per_class))

  def summary(self) -> dict[str, float]:
    """The three numbers by name."""
    return {'top1': self.top1, 'mean_per_class': self.mean_per_class, 'loss': self.loss}


def make_predict(model: Network, head: str) -> PredictFn:
  """The pmapped forward pass in evaluation mode; every host gets the predictions of all."""

  def predict(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    logits = model.predict(variables, batch['input']).logits[head]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    results = {'prediction': jnp.argmax(logits, -1), 'loss': losses,
               **{name: batch[name] for name in ('label', 'row', 'mask')}}
    return jax.lax.all_gather(results, parallel.AXIS, tiled=True)

  return parallel.pmap(predict)


def make_rank(model: Network, head: str, most: int) -> PredictFn:
  """The pmapped forward pass to the likeliest classes of each image, on every host for all.

  Returns:
    A function of replicated variables and a sharded batch, whose results (replicated) are `classes` int32 `[b, most]`,
    the likeliest first, their `probabilities` float32 `[b, most]`, and the batch's `row` and `mask`.
  """

  def rank(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    logits = model.predict(variables, batch['input']).logits[head]
    # By logits: two probabilities may round to the same number. Of equals, the first one wins, as in `argmax`.
    _, classes = jax.lax.top_k(logits, most)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits), classes, axis=-1)
    ranked = {'classes': classes, 'probabilities': probabilities, 'row': batch['row'], 'mask': batch['mask']}
    return jax.lax.all_gather(ranked, parallel.AXIS, tiled=True)

  return parallel.pmap(rank)


def evaluate(predict: PredictFn, variables: Any, batches: Iterable[Mapping[str, np.ndarray]],
             num_classes: int) -> Evaluation:
  """Evaluates replicated variables on the batches of a split.

  Args:
    predict: of `make_predict`.
    variables: `{'params', 'batch_stats'}`, replicated.
    batches: padded and masked, as `data.pipeline.EvalBatches` makes them.
    num_classes: K.
  """
  total, confusion = 0.0, np.zeros((num_classes, num_classes), np.int64)
  rows, predictions = [], []
  for result in parallel.read_late(predict(variables, parallel.shard(batch)) for batch in batches):
    mask = result['mask']
    np.add.at(confusion, (result['label'][mask], result['prediction'][mask]), 1)
    total += float(result['loss'][mask].astype(np.float64).sum())
    rows.append(result['row'][mask])
    predictions.append(result['prediction'][mask])
  order = np.argsort(np.concatenate(rows))
  return Evaluation(total / len(order), confusion, np.concatenate(predictions)[order])
