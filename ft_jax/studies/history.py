"""The checkpoints of one pre-training: a run of job pretrain, or a folder of files of another program."""

from collections.abc import Mapping, Sequence
import json
import re
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from ft_jax import models, progress
from ft_jax.data.image_set import digest
from ft_jax.models import torch_pickle
from ft_jax.models.weights import check_numbers
from ft_jax.progress import log
from ft_jax.training import checkpoint_files, finished_runs, initial_weights
from ft_jax.workdir import read_config
from selection import storage

# What comes before the number of the epoch or step: epoch_12, checkpoint-0012, ckpt12.
_COUNTER = re.compile(r'(?:epoch|ep|(?<![a-z])e|checkpoint|ckpt|step)[^a-z0-9]*$', re.IGNORECASE)


class SavedCheckpoint(NamedTuple):
  """A checkpoint of the pre-training.

  Attributes:
    name: `epoch 3`, or `step 400` where the length of an epoch is not known.
    epoch: at which it was saved; None where it is not known.
    step: likewise.
    source: `{'top1', 'loss'}` on the val split of the pre-training; None where they are not known.
    weights: the value of `config.model.weights` that loads it.
  """
  name: str
  epoch: float | None
  step: int | None
  source: dict[str, float] | None
  weights: str


class History(NamedTuple):
  """The checkpoints of one pre-training.

  Attributes:
    path: their folder.
    network: `config.model` of the pre-training.
    source: the name of its data; None where it is not known.
    image_size: pixels a side of its images; 0 where it is not known.
    checkpoints: in the order of the training.
  """
  path: str
  network: ConfigDict
  source: str | None
  image_size: int
  checkpoints: tuple[SavedCheckpoint, ...]


class LoadedNetwork(NamedTuple):
  """The network of a checkpoint.

  Attributes:
    variables: `{'params', 'batch_stats'}` without heads, numpy arrays.
    fingerprint: of the variables and the classifier.
    classifier: `{'kernel': [d, K], 'bias': [K]}`, or None.
  """
  variables: dict[str, Any]
  fingerprint: str
  classifier: Mapping[str, np.ndarray] | None


def read(path: str, network: ConfigDict, epochs: Sequence[float] = ()) -> History:
  """Finds the checkpoints in a folder.

  Args:
    path: `config.checkpoints`.
    network: `config.model`, for files; a run has its own.
    epochs: only the checkpoints of these epochs; () is all.

  Raises:
    ValueError: no folder, no checkpoint in it, those of two runs, or an epoch that is not there.
  """
  if not path:
    raise ValueError('config.checkpoints is empty; give the workdir of a pre-training, or a folder of checkpoint '
                     'files, such as '
                     '--config.checkpoints=runs/pretrain')
  folder = storage.located(path)
  if not folder.is_dir():
    raise ValueError(f'config.checkpoints: there is no folder {path}')
  stored = read_config(folder)
  found = _of_files(folder, network) if stored is None else _of_run(folder, stored)
  if not epochs:
    return found
  known = {checkpoint.epoch for checkpoint in found.checkpoints}
  if missing := [epoch for epoch in epochs if epoch not in known]:
    raise ValueError(f'config.study.epochs has {missing[0]}, and {path} holds no checkpoint of it; there are '
                     f'{", ".join(checkpoint.name for checkpoint in found.checkpoints)}')
  return found._replace(checkpoints=tuple(checkpoint for checkpoint in found.checkpoints if checkpoint.epoch in epochs))


def load(checkpoint: SavedCheckpoint, network: ConfigDict, image_size: int) -> LoadedNetwork:
  """Reads a checkpoint.

  Raises:
    ValueError: one that cannot be read, or is of another network; names it.
  """
  model = models.from_config(network, {}, image_size)
  try:
    path = storage.located(checkpoint.weights)
    if path.is_dir():
      variables = finished_runs.load_variables(path.parent.parent, int(path.name))
    else:
      variables = initial_weights.read_file(path, model).variables
    heads = variables['params'].pop('heads', {})
    merged = initial_weights.init_variables(model, 0, variables)
  except (ValueError, OSError) as error:
    raise ValueError(f'{checkpoint.name} ({checkpoint.weights}): {error}') from error
  try:
    check_numbers(model, merged, f'{checkpoint.name} ({checkpoint.weights})')
  except ValueError as error:
    raise ValueError(f'{error}; or leave it out by config.study.epochs') from error
  classifier = heads.get('source')
  numbers = [] if classifier is None else [classifier[name].tobytes() for name in ('kernel', 'bias')]
  return LoadedNetwork(merged, digest(initial_weights.weights_fingerprint(merged), *numbers), classifier)


def fingerprints(found: History, image_size: int) -> list[str]:
  """Reads each checkpoint and returns its fingerprint.

  Raises:
    ValueError: as of `load`; or classifiers of different classes.
  """
  prints: list[str] = []
  classifiers: dict[int | None, str] = {}
  for entry in progress.bar(found.checkpoints, 'reading checkpoints', len(found.checkpoints), 'checkpoint'):
    loaded = load(entry, found.network, image_size)
    prints.append(loaded.fingerprint)
    classifiers.setdefault(None if loaded.classifier is None else loaded.classifier['kernel'].shape[1], entry.name)
  if len(classifiers) > 1:
    (one, first), (other, second) = list(classifiers.items())[:2]
    describe = lambda classes: 'no classifier' if classes is None else f'a classifier of {classes} classes'
    raise ValueError(f'config.checkpoints: {found.path} holds checkpoints of two runs: {first} has {describe(one)}, '
                     f'{second} {describe(other)}; put each run into a folder of its own')
  return prints


def _of_run(folder: epath.Path, stored: Mapping[str, Any]) -> History:
  if stored['job'] != 'pretrain':
    raise ValueError(f'config.checkpoints: {folder} is of job {stored["job"]}; give the workdir of a pre-training '
                     '(configs/pretrain.py keeps checkpoints)')
  every = [saved for saved in finished_runs.history(folder) if saved.metrics]
  if not every:
    raise ValueError(f'config.checkpoints: {folder} holds no checkpoint that was evaluated; let the run continue to '
                     'its first evaluation')
  made_from = every[-1].made_from
  for saved in every:
    if differing := checkpoint_files.differing(made_from, saved.made_from):
      raise ValueError(f'config.checkpoints: {folder} holds checkpoints of two runs: those of step {saved.step} and '
                       f'step {every[-1].step} differ in {", ".join(differing)}; put each run into a folder of its own')
  config = ConfigDict(stored)
  results = json.loads((folder / 'results.json').read_text()) if (folder / 'results.json').exists() else {}
  epoch_steps = results.get('steps_per_epoch')
  asked = {}
  if epoch_steps:
    asked = {max(1, round(epoch * epoch_steps)): epoch for epoch in config.train.get('keep_epochs', ())}
  if asked:  # without the best one, which lies somewhere between them
    every = [saved for saved in every if saved.step in {*asked, results['steps']}]
  if not epoch_steps:
    log.info('%s: epochs are not known before the run is finished; its checkpoints are named by their steps', folder)
  found = []
  for step, metrics, _ in every:
    assert metrics is not None  # those that were not evaluated are left out above
    # An epoch of 445.3 steps ends at step 445.
    epoch = float(asked.get(step, round(step / epoch_steps, 2))) if epoch_steps else None
    found.append(SavedCheckpoint(f'step {step}' if epoch is None else f'epoch {epoch:g}', epoch, step,
                      {'top1': metrics['score'], 'loss': metrics['loss']}, str(folder / 'checkpoints' / str(step))))
  return History(str(folder), config.model, config.source.name, config.image_size, tuple(found))


def _of_files(folder: epath.Path, network: ConfigDict) -> History:
  paths = sorted((path for path in folder.iterdir() if path.name.lower().endswith(torch_pickle.ENDINGS)),
                 key=lambda path: path.name)
  if not paths:
    raise ValueError(f'config.checkpoints: {folder} holds no checkpoints: it is not the workdir of a run, and no file '
                     f'ends in {", ".join(torch_pickle.ENDINGS)}')
  numbers = {path: unit_number for path in paths if (unit_number := _number(path.name)) is not None}
  if without := [path.name for path in paths if path not in numbers]:
    log.info('left out, as there is no epoch in their names: %s', ', '.join(without))
  counted = sorted(numbers, key=lambda path: numbers[path][1])
  if not counted:
    raise ValueError(f'config.checkpoints: no file of {folder} has its epoch in its name ({paths[0].name}); name them '
                     'epoch_1.pth, ...')
  for first, second in zip(counted, counted[1:]):
    if numbers[first] == numbers[second]:
      raise ValueError(f'config.checkpoints: {folder} holds checkpoints of two runs: {first.name} and {second.name} '
                       'are both of '
                       f'{numbers[first][0]} {numbers[first][1]:g}; put each run into a folder of its own')
  if len(patterns := {re.sub(r'\d+([.]\d+)?', '#', path.name): path.name for path in counted}) > 1:
    raise ValueError(f'config.checkpoints: {folder} holds checkpoints of two runs, by their names: '
                     f'{", ".join(patterns.values())}; put each run into a folder of its own')
  found = []
  for path in counted:
    unit, number = numbers[path]
    epoch = number if unit == 'epoch' else None
    step = int(number) if unit == 'step' else None
    found.append(SavedCheckpoint(f'{unit} {number:g}', epoch, step, None, str(path)))
  return History(str(folder), network, None, 0, tuple(found))


def _number(name: str) -> tuple[str, float] | None:
  """The epoch or step in the name of a file, as ('epoch', 3) or ('step', 400); None where there is none.

  It is the number after 'epoch', 'step' or the like, else the only number; digits beside other letters belong to a
  word, as in resnet18.
  """
  stem = name
  for ending in sorted(torch_pickle.ENDINGS, key=len, reverse=True):
    stem = re.sub(f'{re.escape(ending)}$', '', stem, flags=re.IGNORECASE)
  for group in reversed(list(re.finditer(r'\d+([.]\d+)?', stem))):
    if counter := _COUNTER.search(stem[:group.start()]):
      return 'step' if counter[0].lower().startswith('step') else 'epoch', float(group[0])
  alone = re.findall(r'(?<![a-z\d])\d+(?![a-z\d])', stem, re.IGNORECASE)
  return ('epoch', float(alone[0])) if len(alone) == 1 else None
