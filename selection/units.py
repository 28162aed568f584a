"""Units: what a selection chooses from, and the target units that it serves: classes, clusters or single images."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from selection.blocks import Settings
from selection.embeddings import class_means, Embeddings
from selection.kmeans import kmeans
from selection.pools import ArrayRows, Rows

# The default number of clusters, as the paper's file names suggest; small pools get a tenth of their rows.
CLUSTERS = 2000


class Units(NamedTuple):
  """Units of one side.

  rows: one row of features `[n, d]` per unit.
  names: of the units; () where they are rows without names.
  counts: images of each unit, `[n]`, or None where each unit is one image.
  images: all images with their unit as label; None where only means or chunks were given.
  members: the unit of each row of the source; None where only means were given, or the rows are the units.
  """
  rows: Rows
  names: Sequence[str] | np.ndarray = ()
  counts: np.ndarray | None = None
  images: Embeddings | None = None
  members: np.ndarray | None = None


def class_units(side: Embeddings | Rows, settings: Settings, clusters: int | None, rng: np.random.Generator,
                what: str) -> Units:
  """One unit per class: the mean of its features."""
  del settings, clusters, rng
  if not isinstance(side, Embeddings) or side.labels is None:
    raise ValueError(f"the {what} has no labels, and class means need labels; give selection.Embeddings(features, "
                     "labels), or select by='cluster' or by='example'")
  means = class_means(side)
  images = side if side.weights is None else None  # rows with weights are means already
  names = means.class_names if means.class_names is not None else tuple(str(i) for i in range(len(means)))
  return Units(ArrayRows(means.features, what), names, means.weights, images, None if images is None else side.labels)


def cluster_units(side: Embeddings | Rows, settings: Settings, clusters: int | None, rng: np.random.Generator,
                  what: str) -> Units:
  """One unit per cluster of k-means: the mean of its features."""
  rows = _rows(side, what)
  if clusters is None:
    clusters = min(CLUSTERS, max(1, len(rows) // 10))
  found = kmeans(rows, clusters, rng, settings)
  names = tuple(f'cluster {i}' for i in range(len(found.centres)))
  images = None
  if isinstance(side, Embeddings):
    images = dataclasses.replace(side, labels=found.labels, class_names=names)
  return Units(ArrayRows(found.centres, what), names, found.counts, images, found.labels)


def example_units(side: Embeddings | Rows, settings: Settings, clusters: int | None, rng: np.random.Generator,
                  what: str) -> Units:
  """One unit per row."""
  del settings, clusters, rng
  if not isinstance(side, Embeddings):
    return Units(side)
  return Units(_rows(side, what), () if side.ids is None else side.ids, images=side)


def target_units(target: Embeddings, by: str) -> Units:
  """The target units: its classes where classes or clusters are selected; its images for examples or without labels."""
  if by != 'example' and target.labels is not None:
    units = class_units(target, Settings(), None, np.random.default_rng(0), 'target')
    return units._replace(members=np.arange(len(units.names)))
  names: Sequence[str] = ()
  if target.labels is not None:
    target.check_classes()
    names = target.class_names or tuple(str(i) for i in range(target.num_classes))
  return Units(ArrayRows(target.features, 'target'), names, target.weights, target, target.labels)


def _rows(side: Embeddings | Rows, what: str) -> Rows:
  return ArrayRows(side.features, what) if isinstance(side, Embeddings) else side


UNITS: dict[str, Callable[[Embeddings | Rows, Settings, int | None, np.random.Generator, str], Units]] = {
    'class': class_units,
    'cluster': cluster_units,
    'example': example_units,
}
