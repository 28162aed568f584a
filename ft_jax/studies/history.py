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

# What stands before the number that counts: epoch_12, checkpoint-0012, ckpt12.
_COUNTER = re.compile(r'(?:epoch|ep|(?<![a-z])e|checkpoint|ckpt|step)[^a-z0-9]*$', re.IGNORECASE)


class Kept(NamedTuple):
  """One checkpoint.

  Attributes:
    name: `epoch 3`; `step 400` where the length of an epoch is not known; the name of a file without a number's meaning.
    epoch: when it was, or None.
    step: likewise.
    source: `{'top1', 'loss'}` on the val split of its own training, or None.
    weights: what `config.model.weights` is to be for it.
  """
  name: str
  epoch: float | None
  step: int | None
  source: dict[str, float] | None
  weights: str


class History(NamedTuple):
  """The checkpoints in the order of the training, the fields of `config.model` that they have, and what they were trained on.

  `source` is None and `image_size` 0 where that is not known.
  """
  path: str
  network: ConfigDict
  source: str | None
  image_size: int
  kept: tuple[Kept, ...]


class Loaded(NamedTuple):
  """The network of a checkpoint without heads, a fingerprint of all of it, and its classifier `{'kernel': [d, K], 'bias': [K]}` or None."""
  variables: dict[str, Any]
  fingerprint: str
  classifier: Mapping[str, np.ndarray] | None


def read(path: str, network: ConfigDict, epochs: Sequence[float] = ()) -> History:
  """Finds the checkpoints in a folder.

  Args:
    path: `config.checkpoints`.
    network: `config.model`: which network files are of; a run knows its own.
    epochs: only the checkpoints of these; () is all.

  Raises:
    ValueError: no folder, no checkpoint in it, those of two runs, or an epoch that is not there.
  """
  if not path:
    raise ValueError('config.checkpoints is empty; give the workdir of a pre-training, or a folder of checkpoint files, such as '
                     '--config.checkpoints=runs/pretrain')
  folder = storage.located(path)
  if not folder.is_dir():
    raise ValueError(f'config.checkpoints: there is no folder {path}')
  stored = read_config(folder)
  found = _of_files(folder, network) if stored is None else _of_run(folder, stored)
  if not epochs:
    return found
  if missing := [epoch for epoch in epochs if epoch not in {kept.epoch for kept in found.kept}]:
    raise ValueError(f'config.study.epochs has {missing[0]}, and {path} holds no checkpoint of it; there are '
                     f'{", ".join(kept.name for kept in found.kept)}')
  return found._replace(kept=tuple(kept for kept in found.kept if kept.epoch in epochs))


def load(kept: Kept, network: ConfigDict, image_size: int) -> Loaded:
  """Reads a checkpoint.

  Raises:
    ValueError: one that cannot be read, or is of another network; names it.
  """
  model = models.from_config(network, {}, image_size)
  try:
    path = storage.located(kept.weights)
    variables = (finished_runs.load_variables(path.parent.parent, int(path.name)) if path.is_dir() else initial_weights.read_file(path, model).variables)
    heads = variables['params'].pop('heads', {})
    merged = initial_weights.init_variables(model, 0, variables)
  except (ValueError, OSError) as error:
    raise ValueError(f'{kept.name} ({kept.weights}): {error}') from error
  try:
    check_numbers(model, merged, f'{kept.name} ({kept.weights})')
  except ValueError as error:
    raise ValueError(f'{error}; or leave it out by config.study.epochs') from error
  classifier = heads.get('source')
  numbers = [] if classifier is None else [classifier[name].tobytes() for name in ('kernel', 'bias')]
  return Loaded(merged, digest(initial_weights.weights_fingerprint(merged), *numbers), classifier)


def fingerprints(found: History, image_size: int) -> list[str]:
  """Reads each checkpoint; what it holds, as a fingerprint.

  Raises:
    ValueError: as of `load`; or classifiers of different classes.
  """
  prints, classifiers = [], {}
  for entry in progress.bar(found.kept, 'reading checkpoints', len(found.kept), 'checkpoint'):
    loaded = load(entry, found.network, image_size)
    prints.append(loaded.fingerprint)
    classifiers.setdefault(None if loaded.classifier is None else loaded.classifier['kernel'].shape[1], entry.name)
  if len(classifiers) > 1:
    (one, first), (other, second) = list(classifiers.items())[:2]
    spoken = lambda classes: 'no classifier' if classes is None else f'a classifier of {classes} classes'
    raise ValueError(f'config.checkpoints: {found.path} holds checkpoints of two runs: {first} has {spoken(one)}, {second} '
                     f'{spoken(other)}; put each run into a folder of its own')
  return prints


def _of_run(folder: epath.Path, stored: Mapping[str, Any]) -> History:
  if stored['job'] != 'pretrain':
    raise ValueError(f'config.checkpoints: {folder} is of job {stored["job"]}; give the workdir of a pre-training '
                     '(configs/pretrain.py keeps checkpoints)')
  every = [kept for kept in finished_runs.history(folder) if kept.metrics]
  if not every:
    raise ValueError(f'config.checkpoints: {folder} holds no checkpoint that was evaluated; let the run go on to its first one')
  made_from = every[-1].made_from
  for kept in every:
    if differing := checkpoint_files.differing(made_from, kept.made_from):
      raise ValueError(f'config.checkpoints: {folder} holds checkpoints of two runs: those of step {kept.step} and step {every[-1].step} '
                       f'differ in {", ".join(differing)}; put each run into a folder of its own')
  config = ConfigDict(stored)
  results = json.loads((folder / 'results.json').read_text()) if (folder / 'results.json').exists() else {}
  a_epoch = results.get('steps_per_epoch')
  asked = {max(1, round(epoch * a_epoch)): epoch for epoch in config.train.get('keep_epochs', ())} if a_epoch else {}
  if asked:  # not the best one, which lies somewhere between them
    every = [kept for kept in every if kept.step in {*asked, results['steps']}]
  if not a_epoch:
    log.info('%s: epochs are not known before the run is finished; its checkpoints go by their steps', folder)
  found = []
  for step, metrics, _ in every:
    epoch = float(asked.get(step, round(step / a_epoch, 2))) if a_epoch else None  # an epoch of 445.3 steps ends at step 445
    found.append(Kept(f'step {step}' if epoch is None else f'epoch {epoch:g}', epoch, step,
                      {'top1': metrics['score'], 'loss': metrics['loss']}, str(folder / 'checkpoints' / str(step))))
  return History(str(folder), config.model, config.source.name, config.image_size, tuple(found))


def _of_files(folder: epath.Path, network: ConfigDict) -> History:
  paths = sorted((path for path in folder.iterdir() if path.name.lower().endswith(torch_pickle.ENDINGS)),
                 key=lambda path: path.name)
  if not paths:
    raise ValueError(f'config.checkpoints: {folder} holds no checkpoints: it is no workdir of a run, and no file ends in '
                     f'{", ".join(torch_pickle.ENDINGS)}')
  numbers = {path: _number(path.name) for path in paths}
  if without := [path.name for path, number in numbers.items() if number is None]:
    log.info('left out, as their names have no epoch: %s', ', '.join(without))
  counted = sorted((path for path in paths if numbers[path] is not None), key=lambda path: numbers[path][1])
  if not counted:
    raise ValueError(f'config.checkpoints: no file of {folder} has its epoch in its name ({paths[0].name}); name them epoch_1.pth, ...')
  for first, second in zip(counted, counted[1:]):
    if numbers[first] == numbers[second]:
      raise ValueError(f'config.checkpoints: {folder} holds checkpoints of two runs: {first.name} and {second.name} are both of '
                       f'{numbers[first][0]} {numbers[first][1]:g}; put each run into a folder of its own')
  if len(patterns := {re.sub(r'\d+([.]\d+)?', '#', path.name): path.name for path in counted}) > 1:
    raise ValueError(f'config.checkpoints: {folder} holds checkpoints of two runs, by their names: {", ".join(patterns.values())}; put '
                     'each run into a folder of its own')
  found = []
  for path in counted:
    unit, number = numbers[path]
    found.append(Kept(f'{unit} {number:g}', number if unit == 'epoch' else None, int(number) if unit == 'step' else None, None, str(path)))
  return History(str(folder), network, None, 0, tuple(found))


def _number(name: str) -> tuple[str, float] | None:
  """What a file's name counts and how far, as ('epoch', 3) or ('step', 400); None where it does not say.

  It is the number behind 'epoch', 'step' or the like, else the only one; digits beside other letters are part of a word, as in resnet18.
  """
  stem = name
  for ending in sorted(torch_pickle.ENDINGS, key=len, reverse=True):
    stem = re.sub(f'{re.escape(ending)}$', '', stem, flags=re.IGNORECASE)
  for group in reversed(list(re.finditer(r'\d+([.]\d+)?', stem))):
    if counter := _COUNTER.search(stem[:group.start()]):
      return 'step' if counter[0].lower().startswith('step') else 'epoch', float(group[0])
  alone = re.findall(r'(?<![a-z\d])\d+(?![a-z\d])', stem, re.IGNORECASE)
  return ('epoch', float(alone[0])) if len(alone) == 1 else None
