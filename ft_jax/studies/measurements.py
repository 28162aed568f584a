"""What job study measures of features of a network on a target; every part is computed once and kept in a file."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from ft_jax.embedding import Encoder, PRECISION, remove_partial
from ft_jax.studies import history, probe, spectrum, transferability
from ft_jax.studies.study_data import describe_spectra, FrozenFeatures, measure_change, Parts, Target


@dataclasses.dataclass(frozen=True)
class Measurements:
  """Measures checkpoints on targets.

  Attributes:
    checkpoints: of the pre-training, in order.
    fingerprints: of each checkpoint.
    load: reads a checkpoint.
    encoder: a network without heads that embeds images; its variables are those of each checkpoint in turn.
    parts: the measurements that are finished.
    seeds: of the splits; spectra and scores are of the first one.
    threshold: see `config.study.threshold`.
    centred: see `config.study.centred`.
    metric: 'top1' or 'mean_per_class'.
  """
  checkpoints: Sequence[history.SavedCheckpoint]
  fingerprints: Sequence[str]
  load: Callable[[history.SavedCheckpoint], history.LoadedNetwork]
  encoder: Encoder
  parts: Parts
  seeds: Sequence[int]
  threshold: float
  centred: bool
  metric: str

  @property
  def parts_of(self) -> str:
    """Which spectrum cuts features into parts."""
    return 'centred' if self.centred else 'plain'

  def key(self, target: Target, seed: int, legacy: bool = False) -> tuple[Any, ...]:
    """What features, and numbers of their parts, depend on besides the network; `legacy` as in earlier versions."""
    stamp = (target.legacy_stamp if legacy else target.stamp)[seed]
    transform = self.encoder.transform
    return (PRECISION, jnp.dtype(self.encoder.network.dtype).name, transform.size, transform.short_side, stamp,
            self.threshold, self.centred)

  def frozen(self, target: Target, checkpoint: int) -> FrozenFeatures:
    """The features of a target by a checkpoint."""
    entry = self.checkpoints[checkpoint]
    return FrozenFeatures(lambda: self.embed(target, self.load(entry).variables, entry.name))

  def embed(self, target: Target, variables: Mapping[str, Any], network: str, cached: bool = True) -> np.ndarray:
    """Features float32 `[n, d]` of all images of a target.

    Args:
      target: see there.
      variables: of the network without heads.
      network: a name for messages.
      cached: whether they are kept in a file.
    """
    encoder = dataclasses.replace(self.encoder, variables=variables, folder=self.encoder.folder if cached else None)
    try:
      features = [encoder.embed(images, f'{images.name} by {network}').features for images in target.sources]
    except ValueError as error:
      raise ValueError(f'{target.name} by {network}: {error}') from error
    if encoder.unfinished:
      remove_partial(encoder.unfinished)
    return np.concatenate(features)

  def about(self, target: Target, checkpoint: int, frozen: FrozenFeatures) -> dict[str, Any]:
    """Spectra and scores of the features of train and val."""
    seed = self.seeds[0]
    key = ('features', self.fingerprints[checkpoint], *self.key(target, seed))
    if part := self.parts.get(*key):
      return part
    entry, rows = self.checkpoints[checkpoint], target.rows[seed].learnt
    classifier = self.load(entry).classifier
    probabilities = None if classifier is None else _softmax(frozen.features[rows], classifier)
    try:
      scores = transferability.scores(frozen.features[rows], target.labels[rows], probabilities)
      spectra = frozen.spectra(rows)
    except ValueError as error:
      raise ValueError(f'{target.name} by {entry.name}: {error}') from error
    return self.parts.put(*key, found={'spectrum': describe_spectra(spectra, self.threshold), 'scores': scores,
                                       'note': spectra['plain'].note})

  def accuracies(self, target: Target, checkpoint: int, frozen: FrozenFeatures, seed: int) -> dict[str, Any]:
    """Each classifier on the features, and the linear one on each part of them."""
    key = ('frozen', self.fingerprints[checkpoint], *self.key(target, seed), self.metric)
    if part := self.parts.get(*key):
      return part
    rows, labels = target.rows[seed], target.labels
    which = frozen.spectra(rows.learnt)[self.parts_of]
    main, residual = spectrum.parts(frozen.features, which, spectrum.main_size(which.values, self.threshold))
    linear = functools.partial(probe.linear, score=self._score)
    neighbours = functools.partial(probe.neighbours, score=self._score)
    classifiers: tuple[tuple[str, np.ndarray, Callable[..., Any]], ...] = (
        ('linear', frozen.features, linear), ('nearest_mean', frozen.features, probe.nearest_mean),
        ('neighbours', frozen.features, neighbours), ('main', main, linear), ('residual', residual, linear))
    found = {}
    for name, features, classify in classifiers:
      train, val = (probe.Labelled(features[of], labels[of]) for of in (rows.train, rows.val))
      probed = classify(train, val, features[rows.test], len(target.class_names))
      found[name] = {**self.score(target, seed, probed.val, probed.test), 'chosen': probed.chosen,
                     'at_edge': probed.at_edge}
    return self.parts.put(*key, found=found)

  def change(self, target: Target, checkpoint: int, before: FrozenFeatures, after: FrozenFeatures) -> dict[str, Any]:
    """How much features changed since the previous checkpoint."""
    seed = self.seeds[0]
    key = ('change', *self.fingerprints[checkpoint - 1:checkpoint + 1], *self.key(target, seed))
    return self.parts.get(*key) or self.parts.put(*key, found=self.difference(target, seed, before, after))

  def difference(self, target: Target, seed: int, before: FrozenFeatures, after: FrozenFeatures) -> dict[str, Any]:
    """How much the features of train and val differ between two networks."""
    return measure_change(before, after, target.rows[seed].learnt, self.parts_of, self.threshold)

  def score(self, target: Target, seed: int, val_classes: np.ndarray, test_classes: np.ndarray) -> dict[str, Any]:
    """The metric of predictions for a seed's val and test, and the rows of test that are wrong."""
    _, val, test = target.rows[seed]
    truth, classes = target.labels, len(target.class_names)
    return {'val': self._score(truth[val], val_classes, classes),
            'test': self._score(truth[test], test_classes, classes),
            'wrong': test[test_classes != truth[test]].tolist()}

  @property
  def _score(self) -> probe.Score:
    return probe.mean_per_class if self.metric == 'mean_per_class' else probe.top1


def _softmax(features: np.ndarray, classifier: Mapping[str, np.ndarray]) -> np.ndarray:
  """The probabilities that a classifier gives features, float64 `[n, K]`."""
  logits = features.astype(np.float64) @ classifier['kernel'] + classifier['bias']
  powers = np.exp(logits - logits.max(1, keepdims=True))
  return powers / powers.sum(1, keepdims=True)
