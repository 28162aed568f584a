"""The parts of a fine-tuning's report that show images: what was selected, and copies that several splits have."""

from collections.abc import Mapping

import numpy as np

from ft_jax.data import duplicates
from ft_jax.data.decode import thumbnail
from ft_jax.data.image_set import ImageSet
from ft_jax.data.overlap import Overlap
from ft_jax.pages import report
from selection import plots, Selection
from selection.result import NOUNS


def selection_section(target: ImageSet, pool: ImageSet, chosen: Selection, most: int = 120) -> report.SelectionSection:
  """What the report shows of a selection, with a few images of each unit.

  Args:
    target: the training images of the target.
    pool: the pre-training data.
    chosen: what was selected of them.
    most: how many units and target classes are shown.
  """
  shown = chosen.units[:most].tolist()
  members = [np.flatnonzero(pool.labels == unit) if chosen.by == 'class' else chosen.rows_of(unit) for unit in shown]
  rows = [report.ChosenUnit(pool.ids[unit] if chosen.by == 'example' else chosen.name(unit),
                            chosen.score_text(unit).replace('%', ' %'), len(images), chosen_by,
                            _examples(pool, images, 4))
          for unit, images, chosen_by in zip(shown, members, chosen.explain(3))]
  target_rows = [(name, _examples(target, np.flatnonzero(target.labels == k), 2))
                 for k, name in enumerate(target.class_names[:most])]
  picture = plots.overview(chosen) if chosen.has_scores else None
  measure = chosen.measure if chosen.has_scores else ''
  return report.SelectionSection(_summary(pool, chosen, most), chosen.by, NOUNS[chosen.by], measure, rows, picture,
                                 target_rows)


def duplicate_pairs(copies: Overlap, opened: Mapping[str, ImageSet | None],
                    most: int = 6) -> list[report.DuplicatePair]:
  """Pictures of the first copies of each split and of what they are copies of.

  Args:
    copies: that were found.
    opened: the image sets by the name of the split, with their copies.
    most: how many pairs of each split.
  """

  def picture(split: str, example_id: str) -> bytes:
    images = opened[split]
    assert images is not None  # copies were found in it
    example = images[int(images.at_ids([example_id])[0])]
    return thumbnail(example.image, example.id, 96)

  return [report.DuplicatePair(duplicates.KINDS[copy.kind], (name, copy.id, picture(name, copy.id)),
                               (copy.split, copy.other, picture(copy.split, copy.other)))
          for name, found in copies.found.items() for copy in found[:most]]


def _summary(pool: ImageSet, chosen: Selection, most: int) -> str:
  """How the selection was made, in a few sentences."""
  how = f'{len(chosen.units):,d} of {len(chosen.scores):,d} {NOUNS[chosen.by]} of {pool.name}, '
  how += _HOW.get(chosen.method, f'chosen by {chosen.method}')
  settings = [f'{name} {value}' for name, value in chosen.parameters.items()
              if value is not None and name != 'max_iterations']
  settings += [chosen.solver_summary] if chosen.solver else []
  how += f' ({", ".join(settings)}).' if settings else '.'
  if chosen.measure == 'share':
    how += (f' The share of a {chosen.by} is the fraction of the transported mass that comes from it; the last '
            'column says which target classes that mass goes to.')
  if len(chosen.units) > most:
    how += f' The first {most} are shown; selection.json has all of them.'
  return how


# By the method of a selection that chose nothing itself.
_HOW = {'given': 'taken from a list', 'all': 'the whole pool'}


def _examples(images: ImageSet, rows: np.ndarray, most: int) -> list[bytes]:
  """Thumbnails of some of the rows, at equal distances."""
  rows = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)]
  return [thumbnail(example.image, example.id, 64) for example in (images[int(row)] for row in rows)]
