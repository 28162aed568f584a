"""Wrong labels for studies of label noise; they depend on the ids of the examples and the seed, not on their order."""

from collections.abc import Sequence
import csv
import dataclasses
import io
from typing import NamedTuple
import zlib

from etils import epath
import numpy as np

from ft_jax.data.image_set import digest, ImageSet
from ft_jax.names import from_cell

KINDS = ('symmetric', 'asymmetric', 'nonuniform', 'model')


class Noisy(NamedTuple):
  """A set with the labels to train on, the true labels int32 `[n]`, and how many labels were redrawn."""
  images: ImageSet
  true_labels: np.ndarray
  drawn: int

  @property
  def wrong(self) -> int:
    """How many labels are wrong: some of the redrawn ones are the same as before."""
    return int(np.sum(self.images.labels != self.true_labels))


def with_noise(images: ImageSet, kind: str, rate: float, seed: int, *, class_map: Sequence[tuple[str, str]] = (),
               predicted: np.ndarray | None = None) -> Noisy:
  """Redraws the labels of exactly int(rate * n) of the n examples, as RegSL's published code does.

  The code is that of Li and Zhang, NeurIPS 2021. The kinds:
  - symmetric: any class with the same probability, the true one included: with K classes, about rate * (1 - 1/K) of the
    labels are wrong.
  - nonuniform: any class, with probabilities softmax(u) that are the same for all examples, u uniform in [0, 1].
  - model: the class that another network predicts (in that code for all examples, which is a rate of 1).
  - asymmetric (Patrini et al., CVPR 2017; not in that code): in each class of the map, exactly int(rate * n) of its n
    examples become the class that it is mapped to.

  Whether an example is redrawn does not depend on the split that it is stored in, unless two splits have an image of
  its name.

  Args:
    images: the training images.
    kind: see above.
    rate: above 0, up to 1.
    seed: of the run.
    class_map: for asymmetric: (from, to) by class name.
    predicted: for model: int `[n]`, the class of each example.

  Raises:
    ValueError: the set lacks a class of the map, or the rate comes to less than one example.
  """
  names = _names(images)
  priorities = np.asarray([digest('noise', str(seed), name) for name in names])
  order = np.argsort(priorities, kind='stable')
  if kind == 'asymmetric':
    target_class = _class_numbers(images, class_map)
    per_class = [order[images.labels[order] == k] for k in target_class]
    rows = np.concatenate([members[:int(rate * len(members))] for members in per_class])
    new_labels = np.array([target_class[k] for k in images.labels[rows].tolist()], np.int32)
  else:
    rows = order[:int(rate * len(images))]
    if predicted is not None:
      new_labels = predicted[rows].astype(np.int32)
    else:
      edges = np.cumsum(probabilities(kind, len(images.class_names), seed))[:-1]
      positions = [_uniform('label', str(seed), names[row]) for row in rows.tolist()]
      new_labels = np.searchsorted(edges, positions, side='right').astype(np.int32)
  if not len(rows):
    raise ValueError(f'config.noise.rate is {rate}, which is less than one image of {images.name}; use a higher rate, '
                     'or 0 for no noise')
  labels = images.labels.copy()
  labels[rows] = new_labels
  noisy = dataclasses.replace(images, labels=labels, fingerprint=digest(images.fingerprint, labels.tobytes()),
                              legacy_fingerprint=digest(images.legacy_fingerprint, labels.tobytes()))
  return Noisy(noisy, images.labels, len(rows))


def probabilities(kind: str, classes: int, seed: int) -> np.ndarray:
  """The probability of each class, float64 `[classes]`: equal (symmetric), or softmax(u) of uniform u (nonuniform)."""
  weights = np.ones(classes)
  if kind == 'nonuniform':
    weights = np.exp([_uniform('class', str(seed), str(k)) for k in range(classes)])
  return weights / weights.sum()


def shuffled(images: ImageSet, seed: int) -> ImageSet:
  """The same images, with their labels permuted at random: each class keeps its number of images."""
  order = np.random.default_rng((zlib.crc32(b'shuffled labels'), seed)).permutation(len(images))
  labels = images.labels[order]
  return dataclasses.replace(images, labels=labels, fingerprint=digest(images.fingerprint, labels.tobytes()),
                             legacy_fingerprint=digest(images.legacy_fingerprint, labels.tobytes()))


def read_predictions(path: str, images: ImageSet) -> np.ndarray:
  """The class of each example of a set, int32 `[n]`, in a CSV file of job predict: columns `file` and `class_1`.

  `file` is the id of an example, or what follows the split in it: a table of the folder `pets/train` fits
  `folder:pets`.

  Raises:
    ValueError: the file is not such a table, lacks an example, or has a class that the set lacks.
  """
  field = 'config.noise.labels'
  try:
    text = epath.Path(path).expanduser().read_bytes().decode('utf-8', 'surrogateescape')
    with io.StringIO(text, newline='') as stream:
      reader = csv.DictReader(stream)
      if not {'file', 'class_1'} <= set(reader.fieldnames or ()):
        columns = ', '.join(reader.fieldnames or ()) or 'of an empty file'
        raise ValueError(f'{field}: {path} has the columns {columns}; expected file and class_1, as job predict '
                         'writes them')
      found = {from_cell(row['file'] or ''): from_cell(row['class_1'] or '') for row in reader}
  except csv.Error as error:
    raise ValueError(f'{field}: {path} cannot be read as a table ({error}); give a file that job predict '
                     'wrote') from error
  ids = images.ids.tolist()
  predicted = [found.get(name, found.get(name.partition('/')[2], '')) for name in ids]
  missing = [name for name, class_name in zip(ids, predicted) if not class_name]
  if missing:
    raise ValueError(f'{field}: {path} has no class for {len(missing):,d} of the {len(images):,d} images of '
                     f'{images.name}, such as {missing[0]}; predict all of them')
  numbers = {name: k for k, name in enumerate(images.class_names)}
  unknown = [class_name for class_name in predicted if class_name not in numbers]
  if unknown:
    raise ValueError(f'{field}: {path} has the class {unknown[0]!r}, which {images.name} lacks; give predictions of '
                     'a network of the same classes')
  return np.array([numbers[class_name] for class_name in predicted], np.int32)


def _names(images: ImageSet) -> list[str]:
  """A name for each example, without the split that it is stored in unless that is needed to tell two of them apart."""
  classes = [images.class_names[k] for k in images.labels.tolist()]
  names = [f'{class_name}/{name.partition("/")[2]}' for class_name, name in zip(classes, images.ids.tolist())]
  return names if len(set(names)) == len(names) else images.ids.tolist()


def _uniform(*parts: str) -> float:
  """A number in [0, 1) that depends on all parts."""
  return (int(digest(*parts), 16) >> 11) / 2**53


def _class_numbers(images: ImageSet, class_map: Sequence[tuple[str, str]]) -> dict[int, int]:
  """The map by the numbers of the classes."""
  numbers = {name: k for k, name in enumerate(images.class_names)}
  for name in (name for pair in class_map for name in pair):
    if name not in numbers:
      some = ', '.join(images.class_names[:8]) + (', ...' if len(numbers) > 8 else '')
      raise ValueError(f'config.noise.map has the class {name!r}, which {images.name} lacks; it has '
                       f'{len(numbers)}: {some}')
  return {numbers[one]: numbers[other] for one, other in class_map}
