"""Co-Tuning: the pre-trained classifier is trained on, with its own predictions for each target class as labels (You et
al., NeurIPS 2020).
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import logistic
from ft_jax.methods.base import check_above_zero, check_known, LossTerm, Method, Needs, SetupContext, State, StepContext
from ft_jax.models.network import Network
from ft_jax.progress import bar, log


@dataclasses.dataclass(frozen=True)
class CoTuning(Method):
  """weight * mean over target images of sum_s -p(s | y) log softmax(pre-trained head)_s, s the classes of the
  pre-training.

  The head is trained on, with the learning rate of all pre-trained parameters. p(s | y) is estimated once: see
  `direct`, as in the Transfer-Learning-Library, and `calibrated`, as in the authors' code.
  """
  published: ClassVar = {'weight': 2.3}
  weight: float = 0.0  # published 2.3
  relation: str = 'calibrated'  # calibrated (from p(y | s), with val) or direct (the mean prediction, by class)
  scale: float = 1.0  # factor of the logits that p is estimated from; published 0.884 for torchvision's ResNet-50

  def check(self, context: SetupContext) -> None:
    check_known('co_tuning', RELATIONS, relation=self.relation)
    check_above_zero('co_tuning', scale=self.scale)

  def needs(self, model: Network) -> Needs:
    return Needs(classifier=True, trained_classifier=True)

  def setup(self, context: SetupContext) -> State:
    train = _softmax(context.teacher_outputs('train')['logits'] * self.scale)
    if self.relation == 'direct':
      return {'relation': direct(train, context.labels, context.classes)}
    val = context.teacher_outputs('val')
    val_probabilities = _softmax(val['logits'] * self.scale)
    return {'relation': calibrated(train, context.labels, val_probabilities, val['label'], context.classes)}

  def loss(self, context: StepContext, state: State) -> LossTerm:
    labels = state['relation'][context.labels] if context.labels.ndim == 1 else context.labels @ state['relation']
    losses = -jnp.sum(labels * jax.nn.log_softmax(context.outputs['target'].logits['pretrained']), -1)
    return LossTerm(self.weight * losses.mean(), state)


def direct(probabilities: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
  """p(s | y): the mean prediction of the pre-trained network over the images of class y.

  Args:
    probabilities: `[n, S]` of training images (evaluation view).
    labels: int `[n]`.
    classes: K.

  Returns:
    float32 `[K, S]`, rows of sum one; for a class without images the mean over all.
  """
  probabilities = np.asarray(probabilities, np.float64)
  counts = np.bincount(labels, minlength=classes)[:, None]
  sums = np.zeros((classes, probabilities.shape[1]))
  np.add.at(sums, labels, probabilities)
  rows = np.where(counts > 0, sums / np.maximum(counts, 1), probabilities.mean(0))
  return (rows / rows.sum(1, keepdims=True)).astype(np.float32)


def calibrated(train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray,
               classes: int) -> np.ndarray:
  """p(s | y) by Bayes' rule from p(y | s), as in the paper's code (relationship_learning).

  A linear classifier W without bias is fitted to predict y from the probabilities [n, S] (logistic regression; of 17
  strengths the one with the highest top-1 on val, the weakest penalty among equals), then its scale a on val
  (cross-entropy). p(y | s) = softmax(a W_s), its prediction for an image that is certainly of class s; p(s) is the mean
  over train and val; p(s | y) is p(y | s) p(s), rows normalised to sum one.

  Args:
    train, val: `[n, S]`, predictions of the pre-trained network for the images (evaluation view).
    train_labels, val_labels: int `[n]`.
    classes: K.

  Returns:
    float32 `[K, S]`, rows of sum one; for a class without training images p(s).

  Raises:
    ValueError: no val image is of a class that has training images.
  """
  present, answers = np.unique(train_labels, return_inverse=True)
  marginal = np.concatenate([train, val]).mean(0, dtype=np.float64)
  usable = np.isin(val_labels, present)
  if not usable.any():
    raise ValueError("methods.co_tuning.relation is 'calibrated', which is chosen on val images, and none is of a "
                     'class with training images; use --config.methods.co_tuning.relation=direct')
  val, val_answers = val[usable], np.searchsorted(present, val_labels[usable])
  best: logistic.Classifier | None = None
  fitted, best_right, best_c = None, -1, 0.0
  for c in bar(STRENGTHS, 'relation of classes', len(STRENGTHS), 'fit'):
    fitted = logistic.fit(train, answers, len(present), strength=1 / (c * len(train)), bias=False, start=fitted,
                          max_iterations=200)
    right = int(np.sum(np.argmax(val @ fitted.weights, 1) == val_answers))
    if right >= best_right:
      best, best_right, best_c = fitted, right, c
  assert best is not None
  scale = _calibrate(val @ best.weights, val_answers)
  log.info('relation of classes: the predictions of the pre-trained classifier tell the class of %.1f %% of val (C %g, '
           'scale %.3g)',
           100 * best_right / len(val_answers), best_c, scale)
  rows = np.tile(marginal, (classes, 1))
  # In logarithms: p(y | s) may be nearly zero for every s.
  prior = np.log(np.maximum(marginal, np.finfo(np.float64).tiny))
  joint = _log_softmax(scale * best.weights.astype(np.float64)) + prior[:, None]
  rows[present] = _softmax(joint.T)
  return (rows / rows.sum(1, keepdims=True)).astype(np.float32)


def _calibrate(logits: np.ndarray, labels: np.ndarray) -> float:
  """The factor of logits `[n, K]` with the lowest cross-entropy, from 1e-3 to 1e3: without bounds there may be none."""
  from scipy import optimize

  logits = logits.astype(np.float64)

  def loss(log_scale: float) -> float:
    return -_log_softmax(np.exp(log_scale) * logits)[np.arange(len(labels)), labels].mean()

  bounds = -math.log(1e3), math.log(1e3)
  found = optimize.minimize_scalar(loss, bounds=bounds, method='bounded', options={'xatol': 1e-6})
  return float(np.exp(found.x))


def _log_softmax(x: np.ndarray) -> np.ndarray:
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _softmax(x: np.ndarray) -> np.ndarray:
  return np.exp(_log_softmax(x))


RELATIONS = ('calibrated', 'direct')
# scikit-learn's C, as in the paper's code; the strongest penalty first, so that each fit starts near its end.
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 1e1, 3e1, 1e2, 3e2, 1e3, 3e3, 1e4)
