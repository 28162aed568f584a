"""Embeddings: features of images with their labels, names and ids; how to compute them, and means of classes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import os
from typing import Any, BinaryIO
import zipfile

import jax
from jax.experimental import multihost_utils
import numpy as np

from selection import storage
from selection.journal import Journal

Batch = Mapping[str, np.ndarray]
Batches = Iterable[Batch] | Callable[[int], Iterable[Batch]]

_NO_LABELS = 'these embeddings have no labels, so they have no classes; give selection.Embeddings(features, labels)'


@dataclasses.dataclass(frozen=True, repr=False)
class Embeddings:
  """Features of n images (or n classes) by one encoder.

  Attributes:
    features: float `[n, d]`. A `numpy.memmap` stays memory-mapped: its values are checked while they are read, those of
      other arrays at once.
    labels: int `[n]`, the class of each row, or None.
    class_names: a name for each class, or None.
    ids: `[n]`, the image of each row by its row number or file in the data set, or None.
    weights: `[n]`, how many images each row stands for; None means one.
    fingerprint: fingerprint of the encoder and its preprocessing; '' if it is not known.
  """
  features: np.ndarray
  labels: np.ndarray | None = None
  class_names: Sequence[str] | None = None
  ids: np.ndarray | None = None
  weights: np.ndarray | None = None
  fingerprint: str = ''

  def __post_init__(self) -> None:
    """Raises ValueError if the fields do not fit together."""
    # A memory-mapped file is not read here: it may be larger than the memory.
    mapped = isinstance(self.features, np.memmap)
    self._set('features', self.features if mapped else np.asarray(self.features))
    if self.features.ndim != 2 or not self.features.size:
      raise ValueError(f'features have shape {self.features.shape}; expected [n, d] with at least one row')
    for name in ('labels', 'ids', 'weights'):
      value = getattr(self, name)
      if value is not None:
        self._set(name, _column(name, value, len(self.features)))
    if not np.issubdtype(self.features.dtype, np.floating):
      self._set('features', self.features.astype(np.float32))
    if not mapped:
      _check_finite(self.features)
    if self.ids is not None:
      _check_ids(self.ids)
    if self.weights is not None and not (np.isfinite(self.weights).all() and (self.weights > 0).all()):
      raise ValueError(f'weights range from {self.weights.min()} to {self.weights.max()}; expected finite numbers '
                       'above 0, the number of images of each row')
    if self.labels is not None:
      if not np.issubdtype(self.labels.dtype, np.integer) or self.labels.min() < 0:
        raise ValueError(f'labels are {self.labels.dtype} from {self.labels.min()}; expected integers from 0')
      if self.class_names is not None and self.labels.max() >= len(self.class_names):
        raise ValueError(f'label {self.labels.max()} is beyond the {len(self.class_names)} class names; expected one '
                         'name for each class')
    if self.class_names is not None:
      self._set('class_names', tuple(str(name) for name in self.class_names))

  def _set(self, name: str, value: Any) -> None:
    """Sets a field while the frozen object is initialised."""
    object.__setattr__(self, name, value)

  def __len__(self) -> int:
    return len(self.features)

  def __repr__(self) -> str:
    labels = '' if self.labels is None else f' of {self.num_classes:,d} classes'
    kind = 'images' if self.weights is None else 'means'
    return f'<Embeddings of {len(self):,d} {kind}{labels}, {self.features.shape[1]} dimensions>'

  def check_classes(self) -> None:
    """Raises ValueError for classes without a row, and without labels."""
    if self.labels is None:
      raise ValueError(_NO_LABELS)
    present, size = np.unique(self.labels), self.num_classes
    if len(present) < size:
      missing = np.setdiff1d(np.arange(min(size, len(present) + 5)), present)[:5].tolist()
      raise ValueError(_empty_classes(size - len(present), size, missing, self.class_names))

  def of_classes(self, classes: Sequence[int]) -> 'Embeddings':
    """The rows of some classes; their labels become 0, 1, ... in the order of `classes`.

    Raises:
      ValueError: no labels, or a class that does not exist.
    """
    if self.labels is None:
      raise ValueError(_NO_LABELS)
    numbers = np.full(self.num_classes, -1)
    wrong = [k for k in classes if not 0 <= k < len(numbers)]
    if wrong:
      raise ValueError(f'class {wrong[0]} is not among the {self.num_classes} classes, which are numbered from 0')
    numbers[list(classes)] = np.arange(len(classes))
    rows = np.flatnonzero(numbers[self.labels] >= 0)
    taken = lambda values: None if values is None else values[rows]
    names = None if self.class_names is None else [self.class_names[k] for k in classes]
    return Embeddings(self.features[rows], numbers[self.labels[rows]], names, taken(self.ids), taken(self.weights),
                      self.fingerprint)

  @property
  def num_classes(self) -> int:
    """Number of class names, or, without names, one more than the largest label; raises ValueError without both."""
    if self.class_names is not None:
      return len(self.class_names)
    if self.labels is None:
      raise ValueError(_NO_LABELS)
    return int(self.labels.max()) + 1

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes one .npz file, whole or not at all, on a disk or on object storage (`gs://`)."""
    located = storage.located(path)
    arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is not None}
    storage.make_folder(located.parent)
    with storage.whole_file(located) as stream:
      np.savez(stream, **arrays)

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> 'Embeddings':
    """Reads what `save` wrote; raises ValueError for anything else."""
    try:
      with storage.located(path).open('rb') as stream:
        _check_size(stream)
        with np.load(stream, allow_pickle=False) as saved:
          fields = {name: saved[name] for name in saved.files}
      return cls(**{**fields, 'fingerprint': str(fields.get('fingerprint', ''))})
    except Exception as error:  # libraries raise many kinds for a damaged zip file: zlib.error, MemoryError, ...
      raise ValueError(f'{path} cannot be read as embeddings ({error or type(error).__name__}); move or delete the '
                       'file, and compute them again') from error


def _empty_classes(missing: int, size: int, some: Sequence[int], class_names: Sequence[str] | None) -> str:
  names = [class_names[k] if class_names is not None else str(k) for k in some]
  return f'{missing} of {size} classes have no image: {", ".join(names)}; leave them out (labels from 0 without gaps)'


def _column(name: str, value: Any, length: int) -> np.ndarray:
  """One value for each row, as an array of numbers or of str; raises ValueError if the length is another."""
  column = np.asarray(value)
  if column.dtype.kind == 'S':
    column = np.char.decode(column)
  if column.dtype == object:
    column = column.astype(str)
  if column.shape != (length,):
    raise ValueError(f'{name} have shape {column.shape}; expected [{length}], one for each row of features')
  return column


def _check_ids(ids: np.ndarray) -> None:
  different, counts = np.unique(ids, return_counts=True)
  if len(different) < len(ids):
    example = different[np.argmax(counts > 1)]
    raise ValueError(f'{(counts > 1).sum():,d} ids occur more than once, such as {example!s} ({counts.max()} times at '
                     'most); each id must identify one image')


def _check_size(stream: BinaryIO) -> None:
  """Raises ValueError for an .npz file whose arrays could fill the memory although the file is small."""
  parts = zipfile.ZipFile(stream).infolist()
  size = stream.seek(0, os.SEEK_END)
  stream.seek(0)
  # Compressed parts, or parts that overlap in the file.
  if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > size:
    raise ValueError('it is compressed, or its parts are larger than the file')


def check_same_encoder(dimensions: tuple[int, int], fingerprints: tuple[str, str]) -> None:
  """Raises ValueError if source and target (in this order) cannot come from the same encoder.

  Args:
    dimensions: of the features of both.
    fingerprints: of the encoders of both; '' if not known.
  """
  if dimensions[0] != dimensions[1]:
    raise ValueError(f'source features have {dimensions[0]} dimensions and target features {dimensions[1]}; '
                     'embed both with the same encoder')
  if all(fingerprints) and fingerprints[0] != fingerprints[1]:
    raise ValueError(f'source and target come from different encoders (fingerprints {fingerprints[0]} and '
                     f'{fingerprints[1]}); embed both with the same encoder')


def class_means(embeddings: Embeddings) -> Embeddings:
  """The mean feature of each class, not normalised: one row for each class, with its number of images as weight.

  Raises:
    ValueError: no labels, or a class without a row.
  """
  labels = embeddings.labels
  if labels is None:
    raise ValueError('class means need labels; give selection.Embeddings(features, labels), or select by another unit')
  embeddings.check_classes()
  weights = np.ones(len(labels)) if embeddings.weights is None else embeddings.weights.astype(np.float64)
  size = embeddings.num_classes
  sums = np.zeros((size, embeddings.features.shape[1]))
  counts = np.bincount(labels, weights, minlength=size)
  if len(labels) == size == len(np.unique(labels)):  # the rows are means already
    sums[labels] = embeddings.features * weights[:, None]
    return _from_sums(sums, counts, embeddings.class_names, embeddings.fingerprint)
  for first in range(0, len(labels), 4096):  # no second copy of all features
    rows = slice(first, first + 4096)
    np.add.at(sums, labels[rows], embeddings.features[rows].astype(np.float64) * weights[rows, None])
  return _from_sums(sums, counts, embeddings.class_names, embeddings.fingerprint)


def _check_finite(features: np.ndarray) -> None:
  finite = np.concatenate([np.isfinite(features[k:k + 16384]).all(1) for k in range(0, len(features), 16384)])
  if not finite.all():
    bad = np.flatnonzero(~finite)
    raise ValueError(f'{len(bad):,d} of {len(features):,d} rows of features are not finite, the first is row '
                     f'{bad[0]:,d}; leave them out, or embed them again')


def embed(encode: Callable[[Any, jax.Array], jax.Array], variables: Any, batches: Batches, *,
          class_names: Sequence[str] | None = None, ids: Sequence[str] | None = None, fingerprint: str = '',
          workdir: str | os.PathLike[str] | None = None) -> Embeddings:
  """Runs an encoder over all images, on all devices.

  Args:
    encode: a pure function of (variables, images [b, h, w, 3]) to features [b, d]. Its matrix products are in full
      float32 on every device (precision 'highest'), unless it states another precision itself.
    variables: the parameters of `encode`, as a pytree.
    batches: mappings with `input`, and optionally `label`, `row` (saved as ids) and `mask` (False for padding). With a
      `workdir`, a function that gives the batches after the first k: `lambda k: dataset.skip(k)`; always the same ones,
      in the same order.
    class_names: names of the classes.
    ids: a name for each image, such as its file, indexed by `row`; None uses the rows as ids.
    fingerprint: fingerprint of the encoder and its preprocessing.
    workdir: a folder for this one set of images, to which new features are written each minute. Called again, a killed
      call resumes from it, with the same bits on the same kind and number of devices. On several hosts all must see it.
      Remove it when the embeddings are saved.

  Returns:
    The embeddings in the order of `row`, or without it in the order of the batches.

  Raises:
    ValueError: no image, features that are not finite, or a workdir of other images or of another encoder.
  """
  journal = _journal(workdir, 'features', fingerprint, class_names)
  saved: list[dict[str, np.ndarray]] = []
  unsaved: list[dict[str, np.ndarray]] = []
  done, last = 0, None  # batches that are saved, and the features of the last of them
  while before := journal.load(f'features-{done:09d}'):
    done, last = done + int(before.pop('batches')), before.pop('last')
    saved.append(before)
  for part in _remaining(encode, variables, batches, workdir, done, last):
    unsaved.append(part)
    if journal.due():
      saved.append(_joined(unsaved))
      journal.save(f'features-{done:09d}', batches=len(unsaved), last=part['features'], **saved[-1])
      done, unsaved = done + len(unsaved), []
  joined = _joined(saved + unsaved)
  if 'row' in joined:
    order = np.argsort(joined['row'], kind='stable')
    joined = {key: value[order] for key, value in joined.items()}
  rows = joined.get('row')
  if ids is not None:
    rows = np.asarray(ids)[np.arange(len(joined['features'])) if rows is None else rows]
  return Embeddings(joined['features'], joined.get('label'), class_names, rows, fingerprint=fingerprint)


def embed_class_means(encode: Callable[[Any, jax.Array], jax.Array], variables: Any, batches: Batches, *,
                      class_names: Sequence[str], fingerprint: str = '',
                      workdir: str | os.PathLike[str] | None = None) -> Embeddings:
  """`class_means(embed(...))` for pools whose features do not fit in memory: it holds one batch at a time.

  The arguments are those of `embed`; every batch needs `label`.
  """
  journal = _journal(workdir, 'class means', fingerprint, class_names)
  before = journal.load('class_sums')
  sums, counts = before.get('sums'), before.get('counts', np.zeros(len(class_names)))
  first = int(before.get('batches', 0))
  for done, part in enumerate(_remaining(encode, variables, batches, workdir, first, before.get('last')), first + 1):
    if sums is None:
      sums = np.zeros((len(class_names), part['features'].shape[1]))
    np.add.at(sums, part['label'], part['features'].astype(np.float64))
    counts += np.bincount(part['label'], minlength=len(class_names))
    if journal.due():
      journal.save('class_sums', sums=sums, counts=counts, batches=done, last=part['features'])
  if sums is None:
    raise ValueError('there is no image to embed')
  return _from_sums(sums, counts, class_names, fingerprint)


def _journal(workdir: str | os.PathLike[str] | None, what: str, fingerprint: str,
             class_names: Sequence[str] | None) -> Journal:
  if workdir is None:
    return Journal()
  names = None if class_names is None else list(map(str, class_names))
  return Journal(workdir, {'embeddings': what, 'encoder': fingerprint, 'classes': names})


def _remaining(encode: Callable[[Any, jax.Array], jax.Array], variables: Any, batches: Batches,
               workdir: str | os.PathLike[str] | None, done: int,
               last: np.ndarray | None) -> Iterator[dict[str, np.ndarray]]:
  """The `_encoded` batches after the first `done`; raises ValueError if batch number `done` no longer gives `last`."""
  if workdir is None:
    return _encoded(encode, variables, batches(0) if callable(batches) else batches)
  if not callable(batches):
    raise ValueError(f'batches are a {type(batches).__name__}; with a workdir, give a function that gives the batches '
                     'after the first k: lambda k: dataset.skip(k)')
  if jax.process_count() > 1 and len(set(multihost_utils.process_allgather(np.int32(done)).tolist())) > 1:
    raise ValueError(f'the processes find different batches in {os.fspath(workdir)}; use a folder that all hosts see')
  parts = _encoded(encode, variables, batches(max(0, done - 1)))
  if last is not None:
    again = np.nan_to_num(next(parts, {'features': np.zeros(0)})['features'])
    # Other devices round differently. Values that are not finite are reported at the end.
    last = np.nan_to_num(last)
    if again.shape != last.shape or not np.allclose(again, last, rtol=0, atol=0.01 * np.abs(last).max()):
      raise ValueError(f'{os.fspath(workdir)} holds features of other images, of batches of another size or by another '
                       'encoder: its last batch now gives other features; use another workdir')
  return parts


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  if not parts:
    raise ValueError('there is no image to embed')
  fields = sorted({tuple(sorted(part)) for part in parts})
  if len(fields) > 1:
    raise ValueError(f'some batches give {", ".join(fields[0])} and others {", ".join(fields[1])}; all must have the '
                     'same fields')
  return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _from_sums(sums: np.ndarray, counts: np.ndarray, class_names: Sequence[str] | None, fingerprint: str) -> Embeddings:
  empty = np.flatnonzero(counts == 0)
  if len(empty):
    raise ValueError(_empty_classes(len(empty), len(counts), empty[:5].tolist(), class_names))
  means = (sums / counts[:, None]).astype(np.float32)
  _check_finite(means)  # a memory-mapped file is read here for the first time
  return Embeddings(means, np.arange(len(counts)), class_names, weights=counts, fingerprint=fingerprint)


def _encoded(encode: Callable[[Any, jax.Array], jax.Array], variables: Any,
             batches: Iterable[Batch]) -> Iterator[dict[str, np.ndarray]]:
  """The batches with `features` instead of images, without padding; each host gets the rows of all hosts."""
  devices = jax.sharding.Mesh(np.asarray(jax.devices()), ('batch',))
  rows = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec('batch'))
  everywhere = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())
  variables = jax.device_put(jax.device_get(variables), everywhere)

  def run(variables: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    # By default a GPU or TPU rounds products to ten bits or less, which is enough to change the selection.
    with jax.default_matmul_precision('highest'):
      features = encode(variables, batch['input'])
    return {'features': features, **{k: v for k, v in batch.items() if k != 'input'}}

  run = jax.jit(run, in_shardings=(everywhere, rows), out_shardings=everywhere)
  pending = None
  for batch in batches:
    batch = {key: np.asarray(batch[key]) for key in ('input', 'label', 'row', 'mask') if key in batch}
    batch.setdefault('mask', np.ones(len(batch['input']), bool))
    extra = -len(batch['input']) % jax.local_device_count()
    padded = {key: np.concatenate([value, np.zeros((extra, *value.shape[1:]), value.dtype)]) if extra else value
              for key, value in batch.items()}
    result = run(variables, {key: jax.make_array_from_process_local_data(rows, value) for key, value in padded.items()})
    # The previous batch's result is read while the devices work on this batch.
    if pending is not None:
      yield _unpadded(pending)
    pending = result
  if pending is not None:
    yield _unpadded(pending)


def _unpadded(result: dict[str, jax.Array]) -> dict[str, np.ndarray]:
  host = {key: np.asarray(value) for key, value in result.items()}
  mask = host.pop('mask')
  if not np.issubdtype(host['features'].dtype, np.floating):  # bfloat16, which .npy files cannot hold
    host['features'] = host['features'].astype(np.float32)
  return {key: value[mask] for key, value in host.items()}
