"""The checkpoints of one pre-training: a run of job pretrain, or a folder of files of another program."""

from collections.abc import Mapping, Sequence
import json
import re
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from ft_jax import checkpoints
from ft_jax.jobs import setup, trained
from ft_jax.methods.base import flat
from ft_jax.models import pretrained
from ft_jax.progress import log
from ft_jax.workdir import read_config

ENDINGS = ('.safetensors', '.pth', '.pth.tar', '.pt')
# What stands before the number that counts: epoch_12, checkpoint-0012, ckpt12.
_COUNTER = re.compile(r'(?:epoch|ep|checkpoint|ckpt|step)[^a-z0-9]*$', re.IGNORECASE)


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
  """The network of a checkpoint without heads, its fingerprint, and `{'kernel': [d, K], 'bias': [K]}` of its classifier, or None."""
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
  folder = epath.Path(path).expanduser()
  if not folder.is_dir():
    raise ValueError(f'config.checkpoints: there is no folder {path}')
  stored = read_config(folder)
  found = _of_files(folder, network) if stored is None else _of_run(folder, stored)
  if not epochs:
    return found
  if missing := [epoch for epoch in epochs if not any(_same(kept.epoch, epoch) for kept in found.kept)]:
    raise ValueError(f'config.study.epochs has {missing[0]}, and {path} holds no checkpoint of it; there are '
                     f'{", ".join(kept.name for kept in found.kept)}')
  return found._replace(kept=tuple(kept for kept in found.kept if any(_same(kept.epoch, epoch) for epoch in epochs)))


def load(kept: Kept, network: ConfigDict, image_size: int) -> Loaded:
  """Reads a checkpoint.

  Raises:
    ValueError: one that cannot be read, or is of another network; names it.
  """
  try:
    path = epath.Path(kept.weights)
    variables = (checkpoints.load_variables(path.parent.parent, int(path.name)) if path.is_dir() else pretrained.read(path).variables)
    heads = variables['params'].pop('heads', {})
    merged = setup.init_variables(setup.build_model(network, {}), image_size, 0, variables)
  except (ValueError, OSError) as error:
    raise ValueError(f'{kept.name} ({kept.weights}): {error}') from error
  for name, value in flat(merged).items():
    if not np.isfinite(value).all():
      raise ValueError(f'{kept.name} ({kept.weights}) has numbers that are not finite in {name}: its training diverged, or it is damaged; '
                       'leave it out by config.study.epochs')
  return Loaded(merged, setup.weights_fingerprint(merged), heads.get('source'))


def _same(epoch: float | None, wanted: float) -> bool:
  return epoch is not None and abs(epoch - wanted) < 0.05


def _of_run(folder: epath.Path, stored: Mapping[str, Any]) -> History:
  if stored['job'] not in trained.HEADS:
    raise ValueError(f'config.checkpoints: {folder} is of job {stored["job"]}; give the workdir of a pre-training '
                     '(configs/pretrain.py keeps checkpoints)')
  every = [kept for kept in checkpoints.history(folder) if kept.metrics]
  if not every:
    raise ValueError(f'config.checkpoints: {folder} holds no checkpoint that was evaluated; let the run go on to its first one')
  made_from = every[-1].made_from
  for kept in every:
    if differing := sorted(name for name in {*made_from, *kept.made_from} if made_from.get(name) != kept.made_from.get(name)):
      raise ValueError(f'config.checkpoints: {folder} holds checkpoints of two runs: those of step {kept.step} and step {every[-1].step} '
                       f'differ in {", ".join(differing)}; put each run into a folder of its own')
  results = json.loads((folder / 'results.json').read_text()) if (folder / 'results.json').exists() else {}
  a_epoch = results.get('steps_per_epoch')
  wanted = stored['train'].get('keep_epochs')
  if a_epoch and wanted:  # not the best one, which lies somewhere between them
    steps = {max(1, round(epoch * a_epoch)) for epoch in wanted} | {results['steps']}
    every = [kept for kept in every if kept.step in steps]
  config = ConfigDict(stored)
  split = config['target' if config.job == 'finetune' else 'source']
  found = []
  for step, metrics, _ in every:
    epoch = round(step / a_epoch, 2) if a_epoch else None  # an epoch of 445.3 steps ends at step 445
    found.append(Kept(f'step {step}' if epoch is None else f'epoch {epoch:g}', epoch, step,
                      {'top1': metrics['score'], 'loss': metrics['loss']}, str(folder / 'checkpoints' / str(step))))
  return History(str(folder), config.model, split.name, config.image_size, tuple(found))


def _of_files(folder: epath.Path, network: ConfigDict) -> History:
  paths = sorted((path for path in folder.iterdir() if path.name.endswith(ENDINGS)), key=lambda path: path.name)
  if not paths:
    raise ValueError(f'config.checkpoints: {folder} holds no checkpoints: it is no workdir of a run, and no file ends in '
                     f'{", ".join(ENDINGS)}')
  numbers = {path: _number(path.name) for path in paths}
  if without := [path.name for path, number in numbers.items() if number is None]:
    log.info('left out, as their names have no epoch: %s', ', '.join(without))
  counted = sorted((path for path in paths if numbers[path] is not None), key=lambda path: numbers[path][1])
  if not counted:
    raise ValueError(f'config.checkpoints: no file of {folder} has its epoch in its name ({paths[0].name}); name them epoch_1.pth, ...')
  for first, second in zip(counted, counted[1:]):
    if numbers[first] == numbers[second]:
      raise ValueError(f'config.checkpoints: {folder} holds checkpoints of two runs: {first.name} and {second.name} are both of '
                       f'{" ".join(map(str, numbers[first]))}; put each run into a folder of its own')
  if len(patterns := {re.sub(r'\d+([.]\d+)?', '#', path.name): path.name for path in counted}) > 1:
    raise ValueError(f'config.checkpoints: {folder} holds checkpoints of two runs, by their names: {", ".join(patterns.values())}; put '
                     'each run into a folder of its own')
  found = []
  for path in counted:
    unit, number = numbers[path]
    found.append(Kept(f'{unit} {number}', float(number) if unit == 'epoch' else None, number if unit == 'step' else None, None,
                      str(path)))
  return History(str(folder), network, None, 0, tuple(found))


def _number(name: str) -> tuple[str, int] | None:
  """What a file's name counts and how far, as ('epoch', 3) or ('step', 400); None where it does not say.

  It is the number behind 'epoch', 'step' or the like, else the only one; digits beside other letters are part of a word, as in resnet18.
  """
  stem = name
  for ending in sorted(ENDINGS, key=len, reverse=True):
    stem = stem.removesuffix(ending)
  groups = list(re.finditer(r'\d+', stem))
  for group in reversed(groups):
    if counter := _COUNTER.search(stem[:group.start()]):
      return 'step' if counter[0].lower().startswith('step') else 'epoch', int(group[0])
  alone = re.findall(r'(?<![a-z\d])\d+(?![a-z\d])', stem, re.IGNORECASE)
  return ('epoch', int(alone[0])) if len(alone) == 1 else None
