"""Wrong labels for studies of label noise. What becomes of an example depends on its id and the seed, not on the order of files."""

from collections.abc import Sequence
import csv
import dataclasses
import io
from typing import NamedTuple

from etils import epath
import numpy as np

from ft_jax.data.image_set import digest, ImageSet
from ft_jax.names import from_cell

KINDS = ('symmetric', 'asymmetric', 'nonuniform', 'model')


class Noisy(NamedTuple):
  """A source whose labels are those to train on, the true ones int32 `[n]`, and how many labels were drawn anew."""
  source: ImageSet
  true_labels: np.ndarray
  drawn: int

  @property
  def wrong(self) -> int:
    """How many labels are wrong: of those that were drawn anew, some are what they had been."""
    return int(np.sum(self.source.labels != self.true_labels))


def with_noise(source: ImageSet, kind: str, rate: float, seed: int, *, class_map: Sequence[tuple[str, str]] = (),
               predicted: np.ndarray | None = None) -> Noisy:
  """Draws the labels of exactly int(rate * n) of the n examples anew, as the published code of RegSL does (Li and Zhang, NeurIPS 2021).

  symmetric: any class with the same probability, the true one too, so that a part of about rate * (1 - 1/K) of K classes is wrong.
  nonuniform: any class, with probabilities softmax(u) that are the same for all examples, u uniform in [0, 1] for each class.
  model: the class that another network sees in it (there the labels of all examples, so a rate of 1).
  asymmetric (Patrini et al., CVPR 2017, and not in that code): in each class of the map exactly int(rate * n) of its n examples become
  the class that the map says.

  An example is drawn or not whichever split it is stored in, where its name is not in both.

  Args:
    source: the training images.
    kind: see above.
    rate: above 0, up to 1.
    seed: of the run.
    class_map: asymmetric: (from, to) by name.
    predicted: model: int `[n]`, the class of each example.

  Raises:
    ValueError: classes that the source lacks or that the map names twice, or a rate that is less than one example.
  """
  names = _names(source)
  priorities = np.asarray([digest('noise', str(seed), name) for name in names])
  order = np.argsort(priorities, kind='stable')
  if kind == 'asymmetric':
    goes_to = _numbers(source, class_map)
    drawn = [order[source.labels[order] == k] for k in goes_to]
    rows = np.concatenate([members[:int(rate * len(members))] for members in drawn])
    fresh = np.array([goes_to[k] for k in source.labels[rows].tolist()], np.int32)
  else:
    rows = order[:int(rate * len(source))]
    if kind == 'model':
      fresh = predicted[rows]
    else:
      edges = np.cumsum(probabilities(kind, len(source.class_names), seed))[:-1]
      fresh = np.searchsorted(edges, [_uniform('label', str(seed), names[row]) for row in rows.tolist()], side='right')
  if not len(rows):
    raise ValueError(f'config.noise.rate is {rate}, which is no image at all of {source.name}; take more of them, or none')
  labels = source.labels.copy()
  labels[rows] = fresh
  noisy = dataclasses.replace(source, labels=labels, fingerprint=digest(source.fingerprint, labels.tobytes()),
                              legacy_fingerprint=digest(source.legacy_fingerprint, labels.tobytes()))
  return Noisy(noisy, source.labels, len(rows))


def probabilities(kind: str, classes: int, seed: int) -> np.ndarray:
  """Of each class to be drawn, float64 `[classes]`: equal ones (symmetric), or softmax(u) of uniform u (nonuniform)."""
  weights = np.exp([_uniform('class', str(seed), str(k)) for k in range(classes)]) if kind == 'nonuniform' else np.ones(classes)
  return weights / weights.sum()


def read_predictions(path: str, source: ImageSet) -> np.ndarray:
  """The class of each example of a source, int32 `[n]`, in a CSV file as job predict writes it: columns `file` and `class_1`.

  A file is an example's id, or what follows the split in it: a table of the folder `pets/train` fits `folder:pets`.

  Raises:
    ValueError: no such table, an example that is not in it, or a class that the source lacks.
  """
  try:
    with io.StringIO(epath.Path(path).expanduser().read_bytes().decode('utf-8', 'surrogateescape'), newline='') as stream:
      reader = csv.DictReader(stream)
      if not {'file', 'class_1'} <= set(reader.fieldnames or ()):
        raise ValueError(f'config.noise.labels: {path} has the columns {", ".join(reader.fieldnames or ()) or "of an empty file"}; '
                         'expected file and class_1, as job predict writes them')
      found = {from_cell(row['file'] or ''): from_cell(row['class_1'] or '') for row in reader}
  except csv.Error as error:
    raise ValueError(f'config.noise.labels: {path} cannot be read as a table ({error}); give what job predict wrote') from error
  said = [found.get(name, found.get(name.partition('/')[2])) for name in source.ids.tolist()]
  missing = [name for name, class_name in zip(source.ids.tolist(), said) if not class_name]
  if missing:
    raise ValueError(f'config.noise.labels: {path} says nothing of {len(missing):,d} of the {len(source):,d} images of {source.name}, '
                     f'such as {missing[0]}; predict all of them')
  numbers = {name: k for k, name in enumerate(source.class_names)}
  unknown = [class_name for class_name in said if class_name not in numbers]
  if unknown:
    raise ValueError(f'config.noise.labels: {path} has the class {unknown[0]!r}, which {source.name} lacks; give predictions of a network '
                     'of the same classes')
  return np.array([numbers[class_name] for class_name in said], np.int32)


def _names(source: ImageSet) -> list[str]:
  """A name for each example, without the split that it is stored in where that is not needed to tell them apart."""
  classes = [source.class_names[k] for k in source.labels.tolist()]
  names = [f'{class_name}/{name.partition("/")[2]}' for class_name, name in zip(classes, source.ids.tolist())]
  return names if len(set(names)) == len(names) else source.ids.tolist()


def _uniform(*parts: str) -> float:
  """A number in [0, 1) that depends on all parts."""
  return (int(digest(*parts), 16) >> 11) / 2**53


def _numbers(source: ImageSet, class_map: Sequence[tuple[str, str]]) -> dict[int, int]:
  """The map by the numbers of the classes."""
  numbers = {name: k for k, name in enumerate(source.class_names)}
  for name in (name for pair in class_map for name in pair):
    if name not in numbers:
      raise ValueError(f'config.noise.map names the class {name!r}, which {source.name} lacks; it has {len(numbers)}: '
                       f'{", ".join(source.class_names[:8])}{", ..." if len(numbers) > 8 else ""}')
  return {numbers[one]: numbers[other] for one, other in class_map}
