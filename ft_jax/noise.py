"""Label noise as a config says it: what is refused, where labels of another network come from, what results.json says of it."""

from collections import Counter
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
  """Splits with noise in train, the true labels of train int32 `[n]`, and what results.json says; both None where there is no noise."""
  splits: Splits
  true_labels: np.ndarray | None
  about: dict[str, Any] | None


def check(config: ConfigDict) -> None:
  """Raises ValueError for fields of `config.noise` that cannot be right."""
  if config.kind not in ('', *KINDS):
    raise ValueError(f"config.noise.kind is {config.kind!r}; known: {', '.join(KINDS)}, or '' for none")
  if config.rate and not config.kind:
    raise ValueError(f'config.noise.rate is {config.rate}, but config.noise.kind is empty; known: {", ".join(KINDS)}')
  if config.kind and not config.rate:
    hint = ' (published: 1, all of them)' if config.kind == 'model' else ''
    raise ValueError(f'config.noise.kind is {config.kind!r}, but config.noise.rate is 0; give the part of the training images whose labels '
                     f'are drawn anew{hint}')
  for field, kind in (('map', 'asymmetric'), ('labels', 'model')):
    if bool(config[field]) != (config.kind == kind):
      raise ValueError(f'config.noise.{field} is {config[field]!r} and config.noise.kind {config.kind!r}; the kind {kind!r} needs it, '
                       'and no other takes it')
  _check_map(_pairs(config))
  if config.labels and not storage.located(config.labels).is_file():
    trained.load(config.labels, 'config.noise.labels')


def _pairs(config: ConfigDict) -> list[tuple[str, str]]:
  """`noise.map` by names: the command line reads one of digits alone as a number."""
  return [(str(one), str(other)) for one, other in config.map]


def _check_map(class_map: Any) -> None:
  if same := [one for one, other in class_map if one == other]:
    raise ValueError(f'config.noise.map takes {same[0]!r} to itself; leave it out')
  if twice := [one for one, count in Counter(one for one, _ in class_map).items() if count > 1]:
    raise ValueError(f'config.noise.map takes {twice[0]!r} to {sum(one == twice[0] for one, _ in class_map)} classes; expected one')


def add(config: ConfigDict, seed: int, splits: Splits, predicted_json: epath.Path | None = None) -> Noise:
  """Puts noise into the labels of train, and says how much came of it; val and test stay clean.

  Args:
    config: `config.noise`, which `check` has seen.
    seed: of the run.
    splits: what can be read of them, with val carved out.
    predicted_json: of a run, keeps what another network sees in the images: where it resumes, perhaps on another device which rounds
      differently, it must have the labels that it began with.

  Raises:
    ValueError: classes or images that do not fit.
  """
  if not config.kind:
    return Noise(splits, None, None)
  train = splits.train
  predicted = _predicted(config.labels, train, predicted_json) if config.kind == 'model' else None
  noisy = with_noise(train, config.kind, config.rate, seed, class_map=_pairs(config), predicted=predicted)
  about = {'kind': config.kind, 'rate': config.rate, 'images': len(train), 'drawn': noisy.drawn, 'wrong': noisy.wrong,
           'wrong_rate': noisy.wrong / len(train)}
  log.info('noise: %s: %s of %s training labels drawn anew, %s of all are wrong (%.1f %%); val and test stay clean', config.kind,
           f'{noisy.drawn:,d}', f'{len(train):,d}', f'{noisy.wrong:,d}', 100 * about['wrong_rate'])
  return Noise(splits._replace(train=noisy.source), noisy.true_labels, about)


def _predicted(labels: str, source: ImageSet, predicted_json: epath.Path | None) -> np.ndarray:
  """What another network sees in each image, int32 `[n]`: by a table, or by its run, in evaluation mode."""
  if storage.located(labels).is_file():
    return read_predictions(labels, source)
  run = trained.load(labels, 'config.noise.labels')
  if set(run.class_names) != set(source.class_names):
    raise ValueError(f'config.noise.labels: the run in {labels} is of other classes: '
                     + class_difference('the run', run.class_names, source.name, source.class_names))
  if jax.process_count() > 1:  # what one host has kept, another may not have
    raise ValueError('config.noise.labels is a run, which predicts in one process alone; give the CSV file of its job predict')
  head = run.variables['params']['heads'][run.head]
  key = digest(initial_weights.weights_fingerprint(run.variables), head['kernel'].tobytes(), head['bias'].tobytes(), str(run.transform),
               source.fingerprint)
  before = read_json(predicted_json) if predicted_json is not None and predicted_json.exists() else {}
  if before.get('key') == key:
    found = before['classes']
  else:  # kept for other runs on this machine too
    found = cached_arrays('predicted', key, lambda: {'classes': predict.predict(run, source, 1, False)[0].classes[:, 0]})
    found = found['classes'].tolist()
    if predicted_json is not None:
      write_text(predicted_json, json.dumps({'key': key, 'classes': found}) + '\n')
  numbers = {name: k for k, name in enumerate(source.class_names)}
  return np.array([numbers[run.class_names[k]] for k in found], np.int32)
