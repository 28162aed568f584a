"""Label noise of a run: its settings, the labels that another network predicts, and what results.json says of it."""

from collections import Counter
import dataclasses
import json
from typing import Any, NamedTuple

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np

from ft_jax import trained
from ft_jax.data.class_names import class_difference
from ft_jax.data.disk_cache import cached_arrays
from ft_jax.data.image_set import digest, ImageSet
from ft_jax.data.label_noise import KINDS, read_predictions, with_noise
from ft_jax.data.splits import Splits
from ft_jax.jobs import predict
from ft_jax.progress import log
from ft_jax.training import initial_weights
from ft_jax.workdir import read_json, write_text
from selection import storage


class Noise(NamedTuple):
  """Splits with noise in train.

  Attributes:
    splits: see there.
    true_labels: int32 `[n]`, of train; None where there is no noise.
    about: what results.json says; None where there is no noise.
  """
  splits: Splits
  true_labels: np.ndarray | None
  about: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class NoiseSettings:
  """The fields of `config.noise`; `map` as pairs of class names.

  Raises:
    ValueError: fields that cannot be right, alone or together.
  """
  kind: str
  rate: float
  map: tuple[tuple[str, str], ...]
  labels: str

  def __post_init__(self) -> None:
    if self.kind not in ('', *KINDS):
      raise ValueError(f"config.noise.kind is {self.kind!r}; known: {', '.join(KINDS)}, or '' for none")
    if self.rate and not self.kind:
      raise ValueError(f'config.noise.rate is {self.rate}, but config.noise.kind is empty; known: {", ".join(KINDS)}')
    if self.kind and not self.rate:
      hint = ' (published: 1, all of them)' if self.kind == 'model' else ''
      raise ValueError(f'config.noise.kind is {self.kind!r}, but config.noise.rate is 0; give the fraction of the '
                       f'training labels that are redrawn{hint}')
    for field, value, kind in (('map', self.map, 'asymmetric'), ('labels', self.labels, 'model')):
      if bool(value) != (self.kind == kind):
        raise ValueError(f'config.noise.{field} is {value!r} and config.noise.kind {self.kind!r}; the kind '
                         f'{kind!r} needs it, and no other takes it')
    if same := [one for one, other in self.map if one == other]:
      raise ValueError(f'config.noise.map takes {same[0]!r} to itself; leave it out')
    counts = Counter(one for one, _ in self.map)
    if twice := [one for one, count in counts.items() if count > 1]:
      raise ValueError(f'config.noise.map takes {twice[0]!r} to {counts[twice[0]]} classes; expected one')
    if self.labels and not storage.located(self.labels).is_file():
      trained.load(self.labels, 'config.noise.labels')

  @classmethod
  def from_config(cls, config: ConfigDict) -> 'NoiseSettings':
    """Of the fields of `config.noise`; the command line reads a class name of digits alone as a number."""
    return cls(config.kind, config.rate, tuple((str(one), str(other)) for one, other in config.map), config.labels)


def add(settings: NoiseSettings, seed: int, splits: Splits, predicted_json: epath.Path | None = None) -> Noise:
  """Puts noise into the labels of train, and logs how much there is; val and test stay clean.

  Args:
    settings: of the noise.
    seed: of the run.
    splits: the images that can be read, with val split off.
    predicted_json: of a run, keeps the predictions of another network: where the run resumes, perhaps on another device
      which rounds differently, it must have the labels that it started with.

  Raises:
    ValueError: classes or images that do not fit.
  """
  if not settings.kind:
    return Noise(splits, None, None)
  train = splits.train
  predicted = _predicted(settings.labels, train, predicted_json) if settings.kind == 'model' else None
  noisy = with_noise(train, settings.kind, settings.rate, seed, class_map=settings.map, predicted=predicted)
  wrong_rate = noisy.wrong / len(train)
  about = {'kind': settings.kind, 'rate': settings.rate, 'images': len(train), 'drawn': noisy.drawn,
           'wrong': noisy.wrong, 'wrong_rate': wrong_rate}
  log.info('noise: %s: %s of %s training labels redrawn, %s of all are wrong (%.1f %%); val and test stay clean',
           settings.kind, f'{noisy.drawn:,d}', f'{len(train):,d}', f'{noisy.wrong:,d}', 100 * wrong_rate)
  return Noise(splits._replace(train=noisy.images), noisy.true_labels, about)


def _predicted(labels: str, source: ImageSet, predicted_json: epath.Path | None) -> np.ndarray:
  """The class that another network predicts for each image, int32 `[n]`: from a table, or by its run."""
  if storage.located(labels).is_file():
    return read_predictions(labels, source)
  run = trained.load(labels, 'config.noise.labels')
  if set(run.class_names) != set(source.class_names):
    raise ValueError(f'config.noise.labels: the run in {labels} is of other classes: '
                     + class_difference('the run', run.class_names, source.name, source.class_names))
  if jax.process_count() > 1:  # what one host has cached, another may not have
    raise ValueError('config.noise.labels is a run, which predicts in one process alone; give the CSV file of its job '
                     'predict')
  head = run.variables['params']['heads'][run.head]
  key = digest(initial_weights.weights_fingerprint(run.variables), head['kernel'].tobytes(), head['bias'].tobytes(),
               str(run.transform), source.fingerprint)
  before = read_json(predicted_json) if predicted_json is not None and predicted_json.exists() else {}
  if before.get('key') == key:
    found = before['classes']
  else:  # cached for other runs on this machine too
    predictions = lambda: {'classes': predict.predict(run, source, 1, False)[0].classes[:, 0]}
    found = cached_arrays('predicted', key, predictions)['classes'].tolist()
    if predicted_json is not None:
      write_text(predicted_json, json.dumps({'key': key, 'classes': found}) + '\n')
  numbers = {name: k for k, name in enumerate(source.class_names)}
  return np.array([numbers[run.class_names[k]] for k in found], np.int32)
