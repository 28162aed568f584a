"""Job predict: what a trained network sees in images that a user has; a table and a picture."""

import dataclasses
from typing import Any, NamedTuple

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np

from ft_jax import parallel, progress, trained
from ft_jax.data import imagenet
from ft_jax.data.decode import decode
from ft_jax.data.image_set import Example, ImageSet
from ft_jax.data.path_list import open_paths
from ft_jax.data.pipeline import EvalBatches, TIMEOUT, Transform
from ft_jax.data.splits import Reading
from ft_jax.names import cell, csv_line
from ft_jax.pages import contact_sheet
from ft_jax.progress import log
from ft_jax.settings import check_fields
from ft_jax.training.evaluate import make_rank
from ft_jax.workdir import write_bytes

# A picture of more has tiles that nobody looks at.
SHOWN = 100


class Predictions(NamedTuple):
  """Of the images that could be read: their ids `[n]`, the likeliest classes int `[n, top]` and their probabilities
  `[n, top]`.
  """
  ids: list[str]
  classes: np.ndarray
  probabilities: np.ndarray


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
  """Writes predictions.csv and contact_sheet.png; returns the numbers of images and, where folders name classes, the
  accuracy.
  """
  check_fields(config)
  Reading.from_config(config.data)
  if jax.process_count() > 1:
    raise ValueError('job predict runs in one process; start it on one host alone, with --num_processes=1')
  names, source, problems, listed = open_paths(config.predict.images)
  skip = config.data.on_error == 'skip'
  if problems and not skip:
    raise ValueError(f'config.predict.images: {next(iter(problems.values()))}' +
                     (f', and {len(problems) - 1} more cannot be read' if len(problems) > 1 else '') +
                     ('; fix the list (relative paths start at its folder)' if listed else '; fix or remove it') +
                     ', or leave such images out with --config.data.on_error=skip')
  run = trained.load(config.workdir)
  top = config.predict.top or min(3, len(run.class_names))
  if top > len(run.class_names):
    raise ValueError(f'config.predict.top is {top}; expected 1 to {len(run.class_names)}, the classes of {run.path}')
  folder = trained.output_folder(workdir)
  log.info('predicting %s of %s with %s -> %s', _counted(len(source)), config.predict.images, run.summary(), folder)
  found, unreadable = predict(run, source, top, skip, config.data.timeout)
  problems |= unreadable
  truth = _true_classes(found.ids, run.class_names)
  text = table(names, found, problems if skip else None, run.class_names, truth)
  # File names as the file system has them.
  write_bytes(folder / 'predictions.csv', text.encode(errors='surrogateescape'))
  (folder / 'contact_sheet.png').unlink(missing_ok=True)  # of the last time: it would not belong to the table
  if found.ids:
    write_bytes(folder / 'contact_sheet.png', _sheet(run, source, found, truth, len(problems)))
  return _summary(names, found, truth, problems, folder)


def predict(run: trained.Trained, source: ImageSet, top: int, skip: bool,
            timeout: float = TIMEOUT) -> tuple[Predictions, dict[str, str]]:
  """The likeliest classes of each image, and {id: what is wrong} of those that cannot be read, where `skip` leaves them
  out.

  Raises:
    ValueError: an image that cannot be read, by name.
    Stalled: no images came for `timeout` seconds.
  """
  if not len(source):
    return Predictions([], np.zeros((0, top), np.int32), np.zeros((0, top), np.float32)), {}
  unreadable: dict[str, str] = {}
  transform = _Tolerant(**{field.name: getattr(run.transform, field.name) for field in dataclasses.fields(Transform)},
                        unreadable=unreadable) if skip else run.transform
  devices = jax.device_count()
  # Batches as in the run's own evaluation, unless there are fewer images.
  size = -(-min(run.config.train.batch_size, len(source)) // devices) * devices
  rank, variables = make_rank(run.model, run.head, top), parallel.replicate(run.variables)
  classes, probabilities = np.zeros((len(source), top), np.int32), np.zeros((len(source), top), np.float32)
  batches = EvalBatches(source, transform, size, timeout)
  shown = progress.bar(batches, 'predicting', len(batches))
  for result in parallel.read_late(rank(variables, parallel.shard(batch)) for batch in shown):
    rows = result['row'][result['mask']]
    classes[rows], probabilities[rows] = result['classes'][result['mask']], result['probabilities'][result['mask']]
  ids = source.ids.tolist()
  kept = [row for row, name in enumerate(ids) if name not in unreadable]
  return Predictions([ids[row] for row in kept], classes[kept], probabilities[kept]), unreadable


@dataclasses.dataclass(frozen=True)
class _Tolerant(Transform):
  """Notes an image that cannot be read, and continues with a black one in its place."""
  unreadable: dict[str, str] = dataclasses.field(default_factory=dict)

  def evaluate(self, example: Example) -> np.ndarray:
    """As of `Transform`."""
    try:
      return super().evaluate(example)
    except ValueError as error:
      self.unreadable[example.id] = str(error)
      return np.zeros((self.size, self.size, 3), np.uint8)


def table(names: list[str], found: Predictions, problems: dict[str, str] | None, class_names: tuple[str, ...],
          truth: list[int] | None) -> str:
  """CSV text, one row a name: file, class_1, probability_1, ..., true_class (where known), problem (where images may be
  left out).

  What a spreadsheet would take for a formula begins with an apostrophe (`names.cell`).
  """
  top = found.classes.shape[1]
  rows = {name: (classes, probabilities)
          for name, classes, probabilities in zip(found.ids, found.classes, found.probabilities)}
  true = dict(zip(found.ids, truth)) if truth else {}
  lines = [csv_line(['file', *(f'{what}_{k + 1}' for k in range(top) for what in ('class', 'probability')),
                     *(['true_class'] if truth else []), *(['problem'] if problems is not None else [])])]
  for name in names:
    ranked = [''] * (2 * top)
    if name in rows:
      ranked = [value for k, p in zip(*rows[name]) for value in (cell(class_names[k]), f'{p:.6f}')]
    row = [cell(name), *ranked]
    if truth:
      row.append(cell(class_names[true[name]]) if name in true else '')
    if problems is not None:
      row.append(cell(problems.get(name, '')))
    lines.append(csv_line(row))
  return ''.join(lines)


def _true_classes(ids: list[str], class_names: tuple[str, ...]) -> list[int] | None:
  """The classes that the folders of all images name, those of ImageNet also by WordNet ids; None where any is in
  another folder.
  """
  numbers = {name: k for k, name in enumerate(class_names)}
  numbers = {wnid: numbers[name] for wnid, name in imagenet.names().items() if name in numbers} | numbers
  parents = [name.rpartition('/')[0].rpartition('/')[2] for name in ids]
  return [numbers[parent] for parent in parents] if ids and all(parent in numbers for parent in parents) else None


def _sheet(run: trained.Trained, source: ImageSet, found: Predictions, truth: list[int] | None,
           unreadable: int) -> bytes:
  """The least sure ones first: those are what a person can judge better."""
  rows = {name: row for row, name in enumerate(source.ids.tolist())}
  order = np.argsort(found.probabilities[:, 0], kind='stable')[:SHOWN].tolist()
  tiles = []
  for k in progress.bar(order, 'drawing', len(order), 'input'):
    example = source[rows[found.ids[k]]]
    true_class = ''  # where the prediction is wrong
    if truth is not None and truth[k] != found.classes[k, 0]:
      true_class = run.class_names[truth[k]]
    tiles.append(contact_sheet.Tile(
        decode(example.image, example.id), run.class_names[found.classes[k, 0]], float(found.probabilities[k, 0]),
        found.ids[k].rpartition('/')[2], true_class))
  total = len(found.ids)
  count = f'{_counted(total)}, the least sure first' if total <= SHOWN else \
      f'the {SHOWN} least sure of {total:,d} images; predictions.csv has all'
  right = f' · {_accuracy(found, truth):.1%} right, red where the folder names another class' if truth else ''
  lost = f' · {unreadable:,d} could not be read' if unreadable else ''
  return contact_sheet.draw(tiles, source.name, f'{count}{right}{lost}\n{run.summary()}')


def _accuracy(found: Predictions, truth: list[int]) -> float:
  return float(np.mean(found.classes[:, 0] == np.asarray(truth)))


def _counted(images: int) -> str:
  return f'{images:,d} image{"s" if images != 1 else ""}'


def _summary(names: list[str], found: Predictions, truth: list[int] | None, problems: dict[str, str],
             folder: epath.Path) -> dict[str, Any]:
  log.info('  %s  %s', folder / 'predictions.csv', _counted(len(names)))
  if found.ids:
    log.info('  %s  %s, least sure first', folder / 'contact_sheet.png', f'{min(SHOWN, len(found.ids)):,d} of them')
  if problems:
    log.warning('warning: %s could not be read, such as %s', _counted(len(problems)), next(iter(problems.values())))
  if truth:
    log.info('top-1 %.1f%% of the %s, whose folders name their classes', 100 * _accuracy(found, truth),
             _counted(len(found.ids)))
  return {'images': len(found.ids), 'unreadable': len(problems), 'top1': _accuracy(found, truth) if truth else None}
