"""The head fitted once more, when the training is over: logistic regression on the features of the best checkpoint."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ft_jax import logistic, parallel, progress
from ft_jax.data.image_set import ImageSet
from ft_jax.data.pipeline import EvalBatches
from ft_jax.models.network import Network
from ft_jax.progress import log
from ft_jax.training.evaluate import Evaluation, PredictFn
from ft_jax.training.loop import evaluate_split, Run
from ft_jax.training.step import TrainState

# Of the penalty, for features of mean square 1; the one that is best on val is taken.
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def refit_head(run: Run, model: Network, state: TrainState, best: int) -> tuple[TrainState, int, dict[str, Any]]:
  """Fits the head of the first stream to its training images, without augmentation; keeps it if it is better on val.

  A head that is kept is saved with its network as a checkpoint after the last one, which is the best from then on: all
  that use the best checkpoint of a run use it. Where that checkpoint is there already, nothing is fitted.

  Args:
    run: that is trained.
    model: its network.
    state: the state of the best checkpoint, on the host.
    best: its step.

  Returns:
    The state to use; the step of the checkpoint that it was trained for; and what results.json says: `val` and
    `val_refit`, the metric that chooses checkpoints before and after, `strength` of the penalty, and `kept`.
  """
  checkpoints, last = run.checkpoints, run.plan.steps + 1
  if best == last:
    saved = parallel.agreed(lambda: checkpoints.metrics(last))
    return state, int(saved['trained_step']), _about(saved['trained_score'], saved['score'], saved['strength'], True)
  replicated = parallel.replicate(state)
  features = _make_features(model)
  train, val = run.data.splits.train, run.data.splits.val
  known = _features(run, features, replicated, train, 'features of train')
  held_out = _features(run, features, replicated, val, 'features of val')
  head, strength = fit_head(known, train.labels, held_out, val.labels, len(train.class_names), run.metric)
  refitted = _with_head(state, run.data.head, parallel.same_arrays(head))
  evaluation = evaluate_split(run, parallel.replicate(refitted), val, 'val, head fitted again')
  before = parallel.agreed(lambda: checkpoints.metrics(best))
  after = {'score': evaluation.summary()[run.metric], 'loss': evaluation.loss}
  kept = (after['score'], -after['loss']) > (before['score'], -before['loss'])
  log.info('the head fitted again on train: %s on val %.1f%%, %.1f%% before, so it is %s', run.metric,
           100 * after['score'], 100 * before['score'], 'kept' if kept else 'not used')
  if kept:
    trained = {'trained_step': best, 'trained_score': before['score'], 'strength': strength}
    checkpoints.save(last, refitted, {**after, **trained})
    checkpoints.wait()
  return refitted if kept else state, best, _about(before['score'], after['score'], strength, kept)


def fit_head(train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray, classes: int,
             metric: str) -> tuple[dict[str, np.ndarray], float]:
  """Logistic regression with the strength that is best on val, as a head of the network; and that strength.

  It minimises mean cross-entropy + strength / 2 * |weights|^2 on features that are divided by the root mean square of
  their distance from their mean. Of equal strengths by the metric, the one with the lower loss is taken.

  Args:
    train: features `[n, d]`.
    train_labels: int `[n]`.
    val: features `[m, d]`.
    val_labels: int `[m]`.
    classes: K.
    metric: 'top1' or 'mean_per_class'.
  """
  mean = train.mean(0, dtype=np.float64)
  scale = float(np.sqrt(np.mean(np.sum((train - mean) ** 2, 1)))) or 1.0
  standard = lambda features: ((features - mean) / scale).astype(np.float32)
  classifier, best, rank = None, None, (-np.inf, -np.inf)
  for strength in STRENGTHS:
    classifier = logistic.fit(standard(train), train_labels, classes, strength=strength, start=classifier)
    found = _evaluation(standard(val) @ classifier.weights + classifier.bias, val_labels)
    if (reached := (found.summary()[metric], -found.loss)) > rank:
      best, rank = (classifier, strength), reached
  assert best is not None  # every rank is above -inf
  classifier, strength = best
  kernel = classifier.weights / scale
  head = {'kernel': kernel.astype(np.float32), 'bias': (classifier.bias - mean @ kernel).astype(np.float32)}
  return head, strength


def _evaluation(logits: np.ndarray, labels: np.ndarray) -> Evaluation:
  shifted = logits - logits.max(1, keepdims=True)
  losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
  confusion, predictions = np.zeros((logits.shape[1],) * 2, np.int64), logits.argmax(1)
  np.add.at(confusion, (labels, predictions), 1)
  return Evaluation(float(losses.mean()), confusion, predictions)


def _make_features(model: Network) -> PredictFn:
  """The pmapped forward pass to features in evaluation mode; every host gets those of all."""

  def predict(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    features = model.predict(variables, batch['input']).features
    return parallel.gather({'features': features, 'row': batch['row'], 'mask': batch['mask']})

  return parallel.pmap(predict)


def _features(run: Run, features: PredictFn, state: TrainState, images: ImageSet, what: str) -> np.ndarray:
  """Of each image, `[n, d]`, in the order of the set."""
  batches = EvalBatches(images, run.data.transform, run.data.first.batch_size, run.data.timeout)
  shown = progress.bar(batches, what, len(batches))
  results = parallel.read_late(features(state.eval_variables, parallel.shard(batch)) for batch in shown)
  found: np.ndarray = np.zeros(0)
  for result in results:
    if not len(found):
      found = np.zeros((len(images), result['features'].shape[1]), np.float32)
    found[result['row'][result['mask']]] = result['features'][result['mask']]
  return found


def _with_head(state: TrainState, name: str, head: Mapping[str, np.ndarray]) -> TrainState:
  """The state with another head, in its averages too."""
  replaced = lambda params: {**params, 'heads': {**params['heads'], name: head}}
  average = {**state.average, 'params': replaced(state.average['params'])} if state.average else state.average
  return state.replace(params=replaced(state.params), average=average)


def _about(before: float, after: float, strength: float, kept: bool) -> dict[str, Any]:
  return {'val': before, 'val_refit': after, 'strength': strength, 'kept': kept}
