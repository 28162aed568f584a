"""Nothing is trained on, or selected, that the result is measured on: copies of the target's images leave the pool.

One rule: a copy goes where it is worth least. The pool loses every image that the target has (train, val or test),
train loses those that val or test have, val those that test has; test loses nothing. In the pool nearly the same
picture counts as well; within the target, where neighbouring frames are common and belong to the data, only the same
file or the same pixels.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
import json
from typing import Any, NamedTuple

import jax
import numpy as np

from ft_jax import parallel
from ft_jax.data import duplicates
from ft_jax.data.disk_cache import cached_arrays
from ft_jax.data.image_set import digest, ImageSet
from ft_jax.data.splits import Splits
from ft_jax.progress import log
from ft_jax.workdir import read_json, Workdir, write_text

RULES = ('drop', 'keep', 'refuse')
POOL = 'source pool'
# The others, most telling first: an image of the pool that is in test and in train is named as one of test.
_COPIES_OF = {POOL: ('target test', 'target val', 'target train'), 'target train': ('target test', 'target val'),
              'target val': ('target test',)}
FORMAT_VERSION = 1


class Copy(NamedTuple):
  """An image that is in another split too.

  Attributes:
    id: of the image.
    split: the other split.
    other: its id there.
    kind: one of `duplicates.KINDS`.
    distance: bits in which their perceptual hashes differ.
  """
  id: str
  split: str
  other: str
  kind: str
  distance: int


class Overlap(NamedTuple):
  """What came of looking for copies.

  Attributes:
    splits: of the target, without what was dropped.
    pool: the same of the pre-training data, None where there is none.
    rule: one of RULES.
    found: copies by the name of the split that they are in, dropped or not; no entry where there are none.
    classes: of the pool that have no image left, and are not in it any more.
  """
  splits: Splits
  pool: ImageSet | None
  rule: str
  found: dict[str, list[Copy]]
  classes: tuple[str, ...] = ()

  @property
  def dropped(self) -> list[str]:
    """Ids of the images that the pool has lost."""
    return [copy.id for copy in self.found.get(POOL, ())] if self.rule == 'drop' else []

  def summary(self) -> dict[str, Any]:
    """What results.json says: the rule, and for each split how many copies of each kind, with the first of them."""
    return {'rule': self.rule, 'found': {
        name: {'images': len(copies), 'kinds': dict(Counter(copy.kind for copy in copies)),
               'of': dict(Counter(copy.split for copy in copies)), 'first': [copy._asdict() for copy in copies[:20]]}
        for name, copies in self.found.items()}}


def check(rule: str) -> None:
  """Raises ValueError for a `config.source.duplicates` that is not known."""
  if rule not in RULES:
    raise ValueError(f'config.source.duplicates is {rule!r}; known: {", ".join(RULES)}')


def find(splits: Splits, pool: ImageSet | None = None, unsampled: Sequence[ImageSet] = ()) -> dict[str, list[Copy]]:
  """Copies by the name of the split that they are in, the same on every process; each hashes a share of the pool.

  Args:
    splits: of the target.
    pool: the pre-training data.
    unsampled: all images of the target where the splits are a sample of them: for other seeds nothing is hashed, or
      searched for in the whole pool, again.
  """
  target = {f'target {name}': images for name, images in splits._asdict().items() if images is not None}
  searched = list(unsampled) or list(target.values())
  everything = _concatenated(duplicates.hashes(searched, 'the target'))
  places = {name: row for row, name in enumerate(np.concatenate([images.ids for images in searched]).tolist())}
  hashes = {name: everything.subset(np.array([places[i] for i in images.ids.tolist()], np.int64))
            for name, images in target.items()}
  found = {}
  for name, possible in _COPIES_OF.items():
    others = [other for other in possible if other in target]
    if not others or name == POOL and pool is None:
      continue
    together = _concatenated([hashes[other] for other in others])
    named = [(other, example) for other in others for example in target[other].ids.tolist()]
    if name == POOL and pool is not None:
      images, matches = pool, _in_pool(pool, together, everything)
    else:
      images, matches = target[name], duplicates.matches(hashes[name], together, near=False)
    found[name] = [Copy(str(images.ids[match.row]), *named[match.other], match.kind, match.distance)
                   for match in matches]
  return {name: [Copy(*copy) for copy in copies] for name, copies in parallel.agreed(found).items() if copies}


def settle(work: Workdir, splits: Splits, pool: ImageSet | None, rule: str,
           unsampled: Sequence[ImageSet] = ()) -> Overlap:
  """The overlap of a run; duplicates.json in its workdir records it, so that a resumed run has the same images.

  A run with a checkpoint and without that file was started by an earlier version, which did not look for copies: it
  keeps them.

  Args:
    work: the workdir.
    splits: of the target.
    pool: the pre-training data.
    rule: one of RULES; with 'keep' nothing is searched.
    unsampled: see `find`.

  Raises:
    ValueError: as of `resolve`.
  """
  opened = {**splits._asdict(), 'pool': pool}
  images = {name: each.fingerprint for name, each in opened.items() if each is not None}
  before = parallel.agreed(lambda: read_json(work.duplicates_json) if work.duplicates_json.exists() else None)
  if parallel.agreed(work.has_checkpoint):
    rule = before['rule'] if before else 'keep'
    if not before:
      log.info('this run was started by an earlier version, which did not look for copies of target images; they '
               'are kept')
  found: Mapping[str, list[Copy]] = {}
  if before and before['images'] == images and (rule == 'keep' or before['rule'] != 'keep'):
    found = {name: [Copy(*copy) for copy in copies] for name, copies in before['found'].items()}
  elif rule != 'keep':
    found = find(splits, pool, unsampled)
  overlap = resolve(splits, pool, rule, found)
  record = json.dumps({'format_version': FORMAT_VERSION, 'rule': rule, 'images': images, 'found': found})
  if parallel.is_main() and json.loads(record) != before:
    write_text(work.duplicates_json, record + '\n')
  return overlap


def _concatenated(hashes: Sequence[duplicates.Hashes]) -> duplicates.Hashes:
  return duplicates.Hashes(*map(np.concatenate, zip(*hashes)))


def _in_pool(pool: ImageSet, target: duplicates.Hashes, everything: duplicates.Hashes) -> list[duplicates.Match]:
  """The images of the pool that the target has; each process searches its share.

  Args:
    pool: the pre-training data.
    target: the images of the target, most telling first.
    everything: these, and those that other seeds would sample.
  """
  hosts, host = jax.process_count(), jax.process_index()
  first, end = len(pool) * host // hosts, len(pool) * (host + 1) // hosts
  share, = duplicates.hashes([pool.subset(np.arange(first, end))], pool.name)
  key = digest(str(duplicates.THRESHOLD), *(part.tobytes() for of in (share, everything) for part in of))
  search = lambda: {'row': np.array([match.row for match in duplicates.matches(share, everything)], np.int64)}
  # The long search is the same for every sample of the target.
  rows = cached_arrays('duplicates', key, search)['row'].astype(np.int64)
  matches = duplicates.matches(share.subset(rows), target)
  own = [(int(rows[match.row]) + first, int(match.other), match.kind, int(match.distance)) for match in matches]
  return [duplicates.Match(*match) for found in parallel.everyone(own) for match in found]


def resolve(splits: Splits, pool: ImageSet | None, rule: str, found: Mapping[str, list[Copy]]) -> Overlap:
  """Drops, keeps or refuses copies, as the rule says, and logs them.

  Raises:
    ValueError: the rule is 'refuse' and there are copies, or nothing to learn from would be left.
  """
  for name, copies in found.items():
    kinds = Counter(copy.kind for copy in copies)
    what = ', '.join(f'{duplicates.KINDS[kind]}: {count:,d}' for kind, count in sorted(kinds.items()))
    where = ', '.join(f'{count:,d} of {split}' for split, count in Counter(copy.split for copy in copies).items())
    pairs = ', '.join(f'{copy.id} = {copy.other}' for copy in copies[:3]) + (', ...' if len(copies) > 3 else '')
    summary = f'{name}: {len(copies):,d} images are copies of images of the target ({where}; {what}), such as {pairs}'
    if rule == 'refuse':
      raise ValueError(f'{summary}. Remove them, or leave them out with --config.source.duplicates=drop')
    outcome = 'left out' if rule == 'drop' else 'kept, so what is measured may be too good'
    log.warning('warning: %s; they are %s', summary, outcome)
  if rule != 'drop' or not found:
    return Overlap(splits, pool, rule, dict(found))
  ids = {name: [copy.id for copy in copies] for name, copies in found.items()}
  train = _without(splits.train, ids.get('target train', ()))
  val = _without(splits.val, ids.get('target val', ()))
  if len(lost := np.setdiff1d(splits.train.labels, train.labels)):
    raise ValueError(f'target train: every image of class {splits.train.class_names[lost[0]]} is in val or test too, '
                     'so nothing is left to learn it from; remove the copies there, or keep them with '
                     '--config.source.duplicates=keep')
  if not len(val):
    raise ValueError('target val: every image of it is in test too; give another val split (config.target.val), or '
                     'keep them with --config.source.duplicates=keep')
  classes: tuple[str, ...] = ()
  if pool is not None and POOL in ids:
    part = _without(pool, ids[POOL])
    if not len(part):
      raise ValueError(f'{pool.name}: every image of it is in the target too; give other pre-training data '
                       '(config.source.name), or keep them with --config.source.duplicates=keep')
    classes = tuple(pool.class_names[k] for k in np.setdiff1d(pool.labels, part.labels))
    if classes:
      log.warning('warning: %s: no image is left of %d classes, which are left out: %s%s', POOL, len(classes),
                  ', '.join(classes[:3]), ', ...' if len(classes) > 3 else '')
    pool = part.without(classes)
  return Overlap(splits._replace(train=train, val=val), pool, rule, dict(found), classes)


def _without(source: ImageSet, ids: Sequence[str]) -> ImageSet:
  return source.subset(np.flatnonzero(~np.isin(source.ids, ids))) if len(ids) else source
