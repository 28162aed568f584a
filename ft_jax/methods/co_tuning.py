"""Co-Tuning: the pre-trained classifier learns on, from what it says of each target class (You et al., NeurIPS 2020)."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import logistic
from ft_jax.methods.base import LossTerm, Method, Needs, Plan, SetupContext, State, StepContext
from ft_jax.models.network import Network
from ft_jax.progress import bar, log


@dataclasses.dataclass(frozen=True)
class CoTuning(Method):
  """weight * mean over target images of sum_s -p(s | y) log softmax(pre-trained head)_s, s the classes of the pre-training.

  The head is trained on, at the rate of all that is pre-trained. p(s | y) is estimated once: see `direct`, which the
  Transfer-Learning-Library has, and `calibrated`, which the authors' code trains with.
  """
  published: ClassVar = {'weight': 2.3}
  weight: float = 0.0  # published 2.3
  relation: str = 'calibrated'  # calibrated (by way of p(y | s), with val) or direct (what the pre-trained network says, by class)
  scale: float = 1.0  # of the logits that p is estimated from, to calibrate them; published 0.884 for torchvision's ResNet-50

  def check(self, plan: Plan) -> None:
    if self.relation not in RELATIONS:
      raise ValueError(f'methods.co_tuning.relation is {self.relation!r}; known: {", ".join(RELATIONS)}')
    if not 0 < self.scale < math.inf:
      raise ValueError(f'methods.co_tuning.scale is {self.scale}; expected a number above 0')

  def needs(self, model: Network) -> Needs:
    return Needs(classifier=True, trained_classifier=True)

  def setup(self, begin: SetupContext) -> State:
    train = _softmax(begin.taught('train')['logits'] * self.scale)
    if self.relation == 'direct':
      return {'relation': direct(train, begin.labels, begin.classes)}
    val = begin.taught('val')
    return {'relation': calibrated(train, begin.labels, _softmax(val['logits'] * self.scale), val['label'], begin.classes)}

  def loss(self, seen: StepContext, state: State) -> LossTerm:
    said = state['relation'][seen.labels] if seen.labels.ndim == 1 else seen.labels @ state['relation']
    losses = -jnp.sum(said * jax.nn.log_softmax(seen.outputs['target'].logits['pretrained']), -1)
    return LossTerm(self.weight * losses.mean(), state)


def direct(probabilities: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
  """p(s | y): the mean over the images of class y of what the pre-trained network says.

  Args:
    probabilities: `[n, S]` of training images (evaluation view).
    labels: int `[n]`.
    classes: K.

  Returns:
    float32 `[K, S]`, rows of sum one; of a class without images the mean over all.
  """
  probabilities = np.asarray(probabilities, np.float64)
  counts = np.bincount(labels, minlength=classes)[:, None]
  sums = np.zeros((classes, probabilities.shape[1]))
  np.add.at(sums, labels, probabilities)
  rows = np.where(counts > 0, sums / np.maximum(counts, 1), probabilities.mean(0))
  return (rows / rows.sum(1, keepdims=True)).astype(np.float32)


def calibrated(train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray, classes: int) -> np.ndarray:
  """p(s | y) by Bayes' rule from p(y | s), as in the paper's code (relationship_learning).

  A linear classifier W without bias is fitted to tell y from the probabilities [n, S] (logistic regression; of 17 strengths the one with
  the highest top-1 on val, the weakest penalty among equals), then its scale a on val (cross-entropy). p(y | s) = softmax(a W_s), what it
  says of an image that is surely of class s; p(s) is the mean over train and val; p(s | y) is p(y | s) p(s), rows brought to sum one.

  Args:
    train, val: `[n, S]`, what the pre-trained network says of the images (evaluation view).
    train_labels, val_labels: int `[n]`.
    classes: K.

  Returns:
    float32 `[K, S]`, rows of sum one; of a class without training images it is p(s).

  Raises:
    ValueError: no val image is of a class that has training images.
  """
  present, answers = np.unique(train_labels, return_inverse=True)
  marginal = np.concatenate([train, val]).mean(0, dtype=np.float64)
  usable = np.isin(val_labels, present)
  if not usable.any():
    raise ValueError("methods.co_tuning.relation is 'calibrated', which is chosen on val images, and none is of a class with training "
                     'images; use --config.methods.co_tuning.relation=direct')
  val, val_answers = val[usable], np.searchsorted(present, val_labels[usable])
  best, best_right = None, -1
  fitted = None
  for c in bar(STRENGTHS, 'relation of classes', len(STRENGTHS), 'fit'):
    fitted = logistic.fit(train, answers, len(present), strength=1 / (c * len(train)), bias=False, start=fitted,
                          max_iterations=200)
    right = int(np.sum(np.argmax(val @ fitted.weights, 1) == val_answers))
    if right >= best_right:
      best, best_right, best_c = fitted, right, c
  scale = _calibrate(val @ best.weights, val_answers)
  log.info('relation of classes: %.1f %% of val told by what the pre-trained classifier says (C %g, scale %.3g)',
           100 * best_right / len(val_answers), best_c, scale)
  rows = np.tile(marginal, (classes, 1))
  # In logarithms: p(y | s) may be next to nothing for every s.
  joint = _log_softmax(scale * best.weights.astype(np.float64)) + np.log(np.maximum(marginal, np.finfo(np.float64).tiny))[:, None]
  rows[present] = _softmax(joint.T)
  return (rows / rows.sum(1, keepdims=True)).astype(np.float32)


def _calibrate(logits: np.ndarray, labels: np.ndarray) -> float:
  """The factor of logits `[n, K]` with the lowest cross-entropy; within a thousand either way, as there may be none."""
  from scipy import optimize

  logits = logits.astype(np.float64)

  def loss(log_scale: float) -> float:
    return -_log_softmax(np.exp(log_scale) * logits)[np.arange(len(labels)), labels].mean()

  return float(np.exp(optimize.minimize_scalar(loss, bounds=(-math.log(1e3), math.log(1e3)), method='bounded', options={'xatol': 1e-6}).x))


def _log_softmax(x: np.ndarray) -> np.ndarray:
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _softmax(x: np.ndarray) -> np.ndarray:
  return np.exp(_log_softmax(x))


RELATIONS = ('calibrated', 'direct')
# scikit-learn's C, as in the paper's code; the strongest penalty first, so that each fit starts near its end.
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 1e1, 3e1, 1e2, 3e2, 1e3, 3e3, 1e4)
