"""The selection of a run: its settings, how it is made or read, and selection.json, which a resumed run keeps."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import io
import types
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from ft_jax import parallel
from ft_jax.data.image_set import digest, ImageSet
from ft_jax.embedding import Encoder
from ft_jax.progress import log
from ft_jax.workdir import Workdir
import selection
from selection import storage, strategies
from selection.result import NOUNS

FEATURES = ('pooled', 'projection')
# Besides the strategies, which rank units by their features: every class of the pool.
ALL = 'all'

# Ids of images that the pool does not have any more, by the reason.
Lost = Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class SelectionSettings:
  """The fields of `config.selection`, which `ft_jax/config.py` documents.

  Attributes:
    parameters: those of the method: cost, epsilon, ...

  Raises:
    ValueError: fields that cannot be right, alone or together.
  """
  method: str
  size: float
  by: str
  clusters: int
  features: str
  file: str
  parameters: Mapping[str, Any]

  def __post_init__(self) -> None:
    if self.method not in (known := (*selection.STRATEGIES, ALL)):
      raise ValueError(f'config.selection.method is {self.method!r}; known: {", ".join(known)}')
    if self.file and not self.used:
      raise ValueError("config.selection.file is set, but config.selection.method is 'none', which uses no selection; "
                       'set either')
    if self.file and not storage.located(self.file).is_file():
      raise ValueError(f'config.selection.file: there is no file {self.file}; expected a selection.json, or ids '
                       'as text, one a line')
    if self.by not in selection.UNITS:
      raise ValueError(f'config.selection.by is {self.by!r}; known: {", ".join(selection.UNITS)}')
    if self.features not in FEATURES:
      raise ValueError(f'config.selection.features is {self.features!r}; known: {", ".join(FEATURES)}')
    cost = self.parameters.get('cost')
    if cost is not None and cost not in strategies.COSTS:
      raise ValueError(f'config.selection.cost is {cost!r}; known: {", ".join(strategies.COSTS)}')
    if self.by == 'example' and cost == 'bures':
      raise ValueError("config.selection.cost is 'bures', which compares classes or clusters, but "
                       "config.selection.by is 'example'")
    if self.size < 1 and self.used and self.method not in (*strategies.BY_SHARE, ALL):
      raise ValueError(f'config.selection.size is {self.size:g}, a share of transported mass, which {self.method} '
                       'does not use; give a number of units')

  @classmethod
  def from_config(cls, config: ConfigDict) -> 'SelectionSettings':
    """Of the fields of `config.selection`, which `settings.check_fields` has checked one by one."""
    fields = config.to_dict()
    known = strategies.defaults(config.method) if config.method in selection.STRATEGIES else ()
    parameters = {name: fields[name] for name in known if name in fields}
    own = {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name != 'parameters'}
    return cls(**own, parameters=parameters)

  @property
  def used(self) -> bool:
    """Whether any pre-training data are selected."""
    return self.method != 'none'

  @property
  def embeds(self) -> bool:
    """Whether features of images are compared."""
    return self.used and not self.file and self.method != ALL

  @property
  def projects(self) -> bool:
    """Whether the features are the output of MoCo-v2's projection head (Liu et al., NeurIPS 2022)."""
    return self.embeds and self.features == 'projection'

  @property
  def class_means(self) -> bool:
    """Whether the mean features of the classes are enough."""
    return self.by == 'class' and self.parameters.get('cost') != 'bures'

  def check_pool(self, pool: ImageSet) -> None:
    """Raises ValueError where a pool does not have what is to be selected from it."""
    if not self.embeds:
      return
    if len(pool.class_names) < 2 and self.by == 'class':
      raise ValueError(f"config.selection.by is 'class', but {pool.name} has one class, {pool.class_names[0]}; "
                       "select by "
                       'cluster (--config.selection.by=cluster --config.selection.clusters=...) or by example')
    if self.by == 'cluster' and not 0 < self.clusters <= len(pool):
      raise ValueError(f'config.selection.clusters is {self.clusters}; expected 1 to {len(pool)}, the images of '
                       f'{pool.name}')
    most = {'class': len(pool.class_names), 'cluster': self.clusters, 'example': len(pool)}[self.by]
    if not 0 < self.size <= most or self.size >= 1 and self.size != round(self.size):
      raise ValueError(f'config.selection.size is {self.size:g}; expected 1 to {most}, the number of '
                       f'{NOUNS[self.by]} of {pool.name}, or a share below 1')


def select(settings: SelectionSettings, work: Workdir, pool: ImageSet, target: ImageSet,
           make_encoder: Callable[[], Encoder], seed: int, lost: Lost) -> selection.Selection:
  """The selection of a run; one that resumes from a checkpoint keeps the one that it started with.

  Args:
    settings: of the selection.
    work: keeps it as selection.json.
    pool: the pre-training data.
    target: the training images of the target.
    make_encoder: of the features that are compared, where any are.
    seed: of the run.
    lost: ids of images that the pool does not have any more.

  Raises:
    ValueError: a selection that was made for another pool.
  """
  if parallel.agreed(lambda: work.has_checkpoint() and work.selection_json.exists()):
    return load(work, pool)
  if settings.file:
    return _save(read(settings.file, pool, lost), work, pool)
  if settings.method == ALL:
    return _save(whole(pool), work, pool)
  encoder = make_encoder()
  source, wanted = (encoder.embed(images, what, settings.class_means)
                    for images, what in ((pool, 'source'), (target, 'target')))
  size = settings.size if settings.size < 1 else int(settings.size)
  clusters = settings.clusters if settings.by == 'cluster' else None
  chosen = selection.select(source, wanted, size, by=settings.by, method=settings.method, seed=seed, clusters=clusters,
                            **settings.parameters)
  return _save(chosen, work, pool)


def load(work: Workdir, pool: ImageSet) -> selection.Selection:
  """The selection that a run started with; raises ValueError where it was made for other images than the pool's."""
  chosen = selection.Selection.load(work.selection_json)
  if not pool.is_known_as(made_for := chosen.source.get('fingerprint', pool.fingerprint)):
    raise ValueError(f'{work.selection_json} was made for {chosen.source.get("name")} (fingerprint {made_for}), whose '
                     'images, labels or duplicates (config.source.duplicates) have changed since then (fingerprint '
                     f'{pool.fingerprint}); restore them, or give another --workdir')
  return chosen


def whole(pool: ImageSet) -> selection.Selection:
  """All classes of a pool, in their order."""
  classes = len(pool.class_names)
  return selection.Selection(
      method=ALL, by='class', size=classes, seed=0, parameters={}, units=np.arange(classes), scores=np.ones(classes),
      measure='given', ascending=False, names=pool.class_names, target_names=(),
      counts=np.bincount(pool.labels, minlength=classes))


def read(path: str, pool: ImageSet, lost: Lost = types.MappingProxyType({})) -> selection.Selection:
  """A selection from a file: of classes of the same names, or of images whose ids are in the pool.

  Args:
    path: selection.json, or a text file of ids, one a line.
    pool: what it is used with.
    lost: ids of images that the pool does not have any more; they are left out.

  Raises:
    ValueError: it was made of other classes, or with ids that are not in the pool.
  """
  if not path.endswith('.json'):
    return _of_ids(path, _read_ids(path, str(pool.ids[0])), pool, lost)
  chosen = selection.Selection.load(path)
  if pool.is_known_as(chosen.source.get('fingerprint') or ''):
    _check_fits(path, chosen, pool)
    return chosen
  if chosen.by == 'class' and tuple(chosen.names) == pool.class_names:
    counts = np.bincount(pool.labels, minlength=len(chosen.scores))
    return dataclasses.replace(chosen, rows=None, ids=None, row_units=None, counts=counts)
  if chosen.ids is None:
    raise ValueError(f'{path} does not fit: {_difference(chosen, pool, lost)}, and it has no ids of images; select '
                     'again, with ids=... in selection.Embeddings')
  return _of_ids(path, chosen.ids.tolist(), pool, lost)


def _save(chosen: selection.Selection, work: Workdir, pool: ImageSet) -> selection.Selection:
  """The selection with the name of its source, written to the workdir."""
  chosen = dataclasses.replace(chosen, source={'name': pool.name, 'fingerprint': pool.fingerprint})
  if parallel.is_main():
    chosen.save(work.selection_json)
  parallel.check_same({'selection': digest(chosen.units.tobytes().hex())}, 'units')
  log.info('%s', chosen.table(12))
  return chosen


def _difference(chosen: selection.Selection, pool: ImageSet, lost: Lost) -> str:
  """Why a selection without ids cannot be used with a pool."""
  if chosen.by != 'class':
    return f'it is of {NOUNS[chosen.by]}'
  if not any(lost.values()):
    return f'its classes are not those of {pool.name}'
  return (f'its classes are not those of {pool.name} (images that cannot be read or are in the target too were '
          'left out, perhaps all of a class: see the warnings above, and config.source.duplicates)')


def _check_fits(path: str, chosen: selection.Selection, pool: ImageSet) -> None:
  """Raises ValueError where a file has the fingerprint of the pool but was not made for it, as one changed by hand."""
  fits = chosen.by == 'class' or chosen.rows is not None
  fits &= chosen.by != 'class' or tuple(chosen.names) == pool.class_names
  fits &= chosen.rows is None or not len(chosen.rows) or chosen.rows.max() < len(pool)
  if not fits:
    raise ValueError(f'{path} says that it was made for {pool.name}, but its {NOUNS[chosen.by]} are not those of it; '
                     'select again')


def _read_ids(path: str, example: str) -> list[str]:
  expected = f'expected ids of images, one a line, such as {example!r}'
  try:
    text = storage.located(path).read_bytes().decode('utf-8-sig')  # with or without a byte order mark
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is not text in UTF-8; {expected}') from error
  lines = io.StringIO(text, newline=None).read().split('\n')
  ids = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
  if not ids:
    raise ValueError(f'{path} is empty; {expected}')
  return ids


def _of_ids(path: str, ids: Sequence[str], pool: ImageSet, lost: Lost) -> selection.Selection:
  left = [str(i) for i in ids]
  for reason, lost_ids in lost.items():
    if out := set(lost_ids).intersection(left):
      log.warning('warning: %s of %s images of %s %s and are left out', f'{len(out):,d}', f'{len(ids):,d}', path,
                  reason)
      left = [i for i in left if i not in out]
  return selection.Selection.of_rows(pool.at_ids(left), pool.ids)
