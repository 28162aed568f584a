"""Embeddings: features of images with what is known of them; how to make them, and means of classes."""

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


@dataclasses.dataclass(frozen=True, repr=False)
class Embeddings:
  """Features of n images (or n classes) by one encoder.

  Attributes:
    features: float `[n, d]`. A `numpy.memmap` stays one: its values are checked while they are read, those of other arrays at once.
    labels: int `[n]`, the class of each row, or None.
    class_names: a name for each class, or None.
    ids: `[n]`, what each row is called elsewhere (a row number or a file), or None.
    weights: `[n]`, how many images each row stands for; None means one.
    fingerprint: of the encoder and its preprocessing; '' where it is not known.
  """
  features: np.ndarray
  labels: np.ndarray | None = None
  class_names: Sequence[str] | None = None
  ids: np.ndarray | None = None
  weights: np.ndarray | None = None
  fingerprint: str = ''

  def __post_init__(self):
    """Raises ValueError where the parts do not fit together."""
    set_field = lambda name, value: object.__setattr__(self, name, value)
    # A memory-mapped file is not read here: it may be larger than the memory.
    mapped = isinstance(self.features, np.memmap)
    set_field('features', self.features if mapped else np.asarray(self.features))
    if self.features.ndim != 2 or not self.features.size:
      raise ValueError(f'features have shape {self.features.shape}; expected [n, d] with at least one row')
    for name in ('labels', 'ids', 'weights'):
      value = getattr(self, name)
      if value is not None:
        value = np.asarray(value)
        if value.dtype.kind == 'S':
          value = np.char.decode(value)
        set_field(name, value.astype(str) if value.dtype == object else value)
        if getattr(self, name).shape != (len(self.features),):
          raise ValueError(f'{name} have shape {getattr(self, name).shape}; expected [{len(self.features)}], one a row of features')
    if not np.issubdtype(self.features.dtype, np.floating):
      set_field('features', self.features.astype(np.float32))
    if not mapped:
      _check_finite(self.features)
    if self.ids is not None:
      ids, counts = np.unique(self.ids, return_counts=True)
      if len(ids) < len(self.ids):
        twice = ids[np.argmax(counts > 1)]
        raise ValueError(f'{(counts > 1).sum():,d} ids occur more than once, such as {twice!s} ({counts.max()} times at most); '
                         'an id must say which image it is')
    if self.weights is not None and not (np.isfinite(self.weights).all() and (self.weights > 0).all()):
      raise ValueError(f'weights go from {self.weights.min()} to {self.weights.max()}; expected finite numbers above 0, the images '
                       'of each row')
    if self.labels is not None:
      if not np.issubdtype(self.labels.dtype, np.integer) or self.labels.min() < 0:
        raise ValueError(f'labels are {self.labels.dtype} from {self.labels.min()}; expected integers from 0')
      if self.class_names is not None and self.labels.max() >= len(self.class_names):
        raise ValueError(f'label {self.labels.max()} is beyond the {len(self.class_names)} class names')
    if self.class_names is not None:
      set_field('class_names', tuple(str(name) for name in self.class_names))

  def __len__(self) -> int:
    return len(self.features)

  def __repr__(self) -> str:
    labels = '' if self.labels is None else f' of {self.num_classes:,d} classes'
    kind = 'images' if self.weights is None else 'means'
    return f'<Embeddings of {len(self):,d} {kind}{labels}, {self.features.shape[1]} dimensions>'

  def check_classes(self) -> None:
    """Raises ValueError for classes without a row."""
    present, size = np.unique(self.labels), self.num_classes
    if len(present) < size:
      missing = np.setdiff1d(np.arange(min(size, len(present) + 5)), present)[:5]
      names = [self.class_names[k] if self.class_names is not None else str(k) for k in missing]
      raise ValueError(f'{size - len(present)} of {size} classes have no image: {", ".join(names)}; leave them out (labels from 0 '
                       'without gaps)')

  def of_classes(self, classes: Sequence[int]) -> 'Embeddings':
    """The rows of some classes; their labels become 0, 1, ... in the order of `classes`.

    Raises:
      ValueError: no labels, or a class that is not there.
    """
    if self.labels is None:
      raise ValueError('these embeddings have no labels, so they have no classes')
    numbers = np.full(self.num_classes, -1)
    wrong = [k for k in classes if not 0 <= k < len(numbers)]
    if wrong:
      raise ValueError(f'class {wrong[0]} is not among the {self.num_classes} classes')
    numbers[list(classes)] = np.arange(len(classes))
    rows = np.flatnonzero(numbers[self.labels] >= 0)
    part = lambda values: None if values is None else values[rows]
    names = None if self.class_names is None else [self.class_names[k] for k in classes]
    return Embeddings(self.features[rows], numbers[self.labels[rows]], names, part(self.ids), part(self.weights), self.fingerprint)

  @property
  def num_classes(self) -> int:
    """Number of classes: that of the names, or one more than the largest label; raises ValueError without labels."""
    if self.class_names is not None:
      return len(self.class_names)
    if self.labels is None:
      raise ValueError('these embeddings have neither labels nor class names')
    return int(self.labels.max()) + 1

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes one .npz file, whole or not at all, on a disk or on object storage (`gs://`)."""
    path = storage.located(path)
    arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is not None}
    storage.make_folder(path.parent)
    with storage.whole_file(path) as stream:
      np.savez(stream, **arrays)

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> 'Embeddings':
    """Reads what `save` wrote; raises ValueError for anything else."""
    try:
      with storage.located(path).open('rb') as stream, np.load(_checked(stream), allow_pickle=False) as saved:
        fields = {name: saved[name] for name in saved.files}
      return cls(**{**fields, 'fingerprint': str(fields.get('fingerprint', ''))})
    except Exception as error:  # a damaged zip file makes the libraries raise almost anything: zlib.error, MemoryError, ...
      raise ValueError(f'{path} holds no embeddings ({error or type(error).__name__}); move it aside to have it made again') from error


def _checked(stream: BinaryIO) -> BinaryIO:
  """The stream of an .npz file; ValueError where a small one would fill the memory: parts that are compressed, or lie on each other."""
  parts = zipfile.ZipFile(stream).infolist()
  size = stream.seek(0, os.SEEK_END)
  stream.seek(0)
  if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > size:
    raise ValueError('it is compressed, or says that it is larger than it is')
  return stream


def check_same_encoder(dimensions: tuple[int, int], fingerprints: tuple[str, str]) -> None:
  """Raises ValueError where source and target (in this order) cannot come from the same encoder; '' is a fingerprint not known."""
  if dimensions[0] != dimensions[1]:
    raise ValueError(f'source features have {dimensions[0]} dimensions and target features {dimensions[1]}; '
                     'embed both with the same encoder')
  if all(fingerprints) and fingerprints[0] != fingerprints[1]:
    raise ValueError(f'source and target come from different encoders (fingerprints {fingerprints[0]} and {fingerprints[1]}); '
                     'embed both with the same one')


def class_means(embeddings: Embeddings) -> Embeddings:
  """The mean feature of each class: one row a class, `weights` the images of each (FACTS: plain mean, not normalised).

  Raises:
    ValueError: without labels, or a class without a row.
  """
  labels = embeddings.labels
  if labels is None:
    raise ValueError('class means need labels; give Embeddings(features, labels), or select by another unit')
  embeddings.check_classes()
  weights = np.ones(len(labels)) if embeddings.weights is None else embeddings.weights.astype(np.float64)
  size = embeddings.num_classes
  sums = np.zeros((size, embeddings.features.shape[1]))
  if len(labels) == size == len(np.unique(labels)):  # means already
    sums[labels] = embeddings.features * weights[:, None]
    return _from_sums(sums, np.bincount(labels, weights, minlength=size), embeddings.class_names, embeddings.fingerprint)
  for first in range(0, len(labels), 4096):  # no second copy of all features
    rows = slice(first, first + 4096)
    np.add.at(sums, labels[rows], embeddings.features[rows].astype(np.float64) * weights[rows, None])
  return _from_sums(sums, np.bincount(labels, weights, minlength=size), embeddings.class_names, embeddings.fingerprint)


def _check_finite(features: np.ndarray) -> None:
  finite = np.concatenate([np.isfinite(features[k:k + 16384]).all(1) for k in range(0, len(features), 16384)])
  if not finite.all():
    bad = np.flatnonzero(~finite)
    raise ValueError(f'{len(bad):,d} of {len(features):,d} rows of features are not finite, the first is row {bad[0]:,d}')


def embed(encode: Callable[[Any, jax.Array], jax.Array], variables: Any, batches: Batches, *,
          class_names: Sequence[str] | None = None, ids: Sequence[str] | None = None, fingerprint: str = '',
          workdir: str | os.PathLike[str] | None = None) -> Embeddings:
  """Runs an encoder over all images, on all devices.

  Args:
    encode: a pure function of (variables, images [b, h, w, 3]) to features [b, d]. Its products are in full float32 on
      every device (precision 'highest'), where it does not state another precision itself.
    variables: what it needs, as a pytree.
    batches: mappings with `image`, and `label`, `index` (kept as ids) and `mask` (False for padding) where there are any. With a
      `workdir`, a function that gives them without the first k: `lambda k: dataset.skip(k)`; always the same ones, in the same order.
    class_names: of the labels.
    ids: what each image is called, such as its file, by its `index`; None keeps the index.
    fingerprint: of the encoder and its preprocessing.
    workdir: a folder for this one set of images, to which what is embedded is added each minute: called again, a killed call goes on
      from there, with the same bits where the devices are the same. On several hosts all must see it. Remove it when the embeddings
      are saved.

  Returns:
    The embeddings in the order of `index`, or of the batches without it.

  Raises:
    ValueError: no image, features that are not finite, or a workdir of other images or of another encoder.
  """
  journal, kept, new, done, last = _journal(workdir, 'features', fingerprint, class_names), [], [], 0, None
  while before := journal.load(f'features-{done:09d}'):
    done, last = done + int(before.pop('batches')), before.pop('last')
    kept.append(before)
  for part in _rest(encode, variables, batches, workdir, done, last):
    new.append(part)
    if journal.due():
      kept.append(_joined(new))
      journal.save(f'features-{done:09d}', batches=len(new), last=part['features'], **kept[-1])
      done, new = done + len(new), []
  joined = _joined(kept + new)
  if 'row' in joined:
    order = np.argsort(joined['row'], kind='stable')
    joined = {key: value[order] for key, value in joined.items()}
  index = joined.get('row')
  if ids is not None:
    index = np.asarray(ids)[np.arange(len(joined['features'])) if index is None else index]
  return Embeddings(joined['features'], joined.get('label'), class_names, index, fingerprint=fingerprint)


def embed_class_means(encode: Callable[[Any, jax.Array], jax.Array], variables: Any, batches: Batches, *,
                      class_names: Sequence[str], fingerprint: str = '', workdir: str | os.PathLike[str] | None = None) -> Embeddings:
  """`class_means(embed(...))` in the memory of one batch, for pools whose features do not fit. Batches need labels."""
  journal = _journal(workdir, 'class means', fingerprint, class_names)
  before = journal.load('class_sums')
  sums, counts, first = before.get('sums'), before.get('counts', np.zeros(len(class_names))), int(before.get('batches', 0))
  for done, part in enumerate(_rest(encode, variables, batches, workdir, first, before.get('last')), first + 1):
    if sums is None:
      sums = np.zeros((len(class_names), part['features'].shape[1]))
    np.add.at(sums, part['label'], part['features'].astype(np.float64))
    counts += np.bincount(part['label'], minlength=len(class_names))
    if journal.due():
      journal.save('class_sums', sums=sums, counts=counts, batches=done, last=part['features'])
  if sums is None:
    raise ValueError('there is no image to embed')
  return _from_sums(sums, counts, class_names, fingerprint)


def _journal(workdir: str | os.PathLike[str] | None, what: str, fingerprint: str, class_names: Sequence[str] | None) -> Journal:
  names = None if class_names is None else list(map(str, class_names))
  return Journal(workdir, {'embeddings': what, 'encoder': fingerprint, 'classes': names} if workdir is not None else None)


def _rest(encode: Callable[[Any, jax.Array], jax.Array], variables: Any, batches: Batches, workdir: str | os.PathLike[str] | None,
          done: int, last: np.ndarray | None) -> Iterator[dict[str, np.ndarray]]:
  """What `_encoded` gives, without the first `done` batches; the features of the last one of those must come out again as `last`."""
  if workdir is None:
    return _encoded(encode, variables, batches(0) if callable(batches) else batches)
  if not callable(batches):
    raise ValueError(f'batches are a {type(batches).__name__}; with a workdir, give a function that gives them without the first k: '
                     'lambda k: dataset.skip(k)')
  if jax.process_count() > 1 and len(set(multihost_utils.process_allgather(np.int32(done)).tolist())) > 1:
    raise ValueError(f'the processes find different batches in {os.fspath(workdir)}; it must be a folder that all of them see')
  parts = _encoded(encode, variables, batches(max(0, done - 1)))
  if done:
    again = next(parts, {'features': np.zeros(0)})['features']
    # On other devices it is rounded in another way; what is not finite is told in the end.
    again, last = np.nan_to_num(again), np.nan_to_num(last)
    if again.shape != last.shape or not np.allclose(again, last, rtol=0, atol=0.01 * np.abs(last).max()):
      raise ValueError(f'{os.fspath(workdir)} holds features of other images, of batches of another size or by another encoder: its last '
                       'batch is not the same any more; use another workdir')
  return parts


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  if not parts:
    raise ValueError('there is no image to embed')
  fields = sorted({tuple(sorted(part)) for part in parts})
  if len(fields) > 1:
    raise ValueError(f'some batches give {", ".join(fields[0])} and others {", ".join(fields[1])}; all must have the same fields')
  return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _from_sums(sums: np.ndarray, counts: np.ndarray, class_names: Sequence[str] | None, fingerprint: str) -> Embeddings:
  empty = np.flatnonzero(counts == 0)
  if len(empty):
    names = [class_names[i] if class_names else str(i) for i in empty[:5]]
    raise ValueError(f'{len(empty)} of {len(counts)} classes have no image: {", ".join(names)}; '
                     'leave them out (labels from 0 without gaps)')
  means = (sums / counts[:, None]).astype(np.float32)
  _check_finite(means)  # the features of a memory-mapped file are seen here for the first time
  return Embeddings(means, np.arange(len(counts)), class_names, weights=counts, fingerprint=fingerprint)


def _encoded(encode: Callable[[Any, jax.Array], jax.Array], variables: Any,
             batches: Iterable[Batch]) -> Iterator[dict[str, np.ndarray]]:
  """Batches with `features` in place of images and without padding; on several hosts every host gets those of all."""
  devices = jax.sharding.Mesh(np.asarray(jax.devices()), ('batch',))
  rows = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec('batch'))
  everywhere = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())
  variables = jax.device_put(jax.device_get(variables), everywhere)

  def run(variables: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    # A GPU or TPU would round them to ten bits or less, which is enough to change what is chosen by them.
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
    # The result of the batch before is read while the devices work on this one.
    if pending is not None:
      yield _unpadded(pending)
    pending = result
  if pending is not None:
    yield _unpadded(pending)


def _unpadded(result: dict[str, jax.Array]) -> dict[str, np.ndarray]:
  host = {key: np.asarray(value) for key, value in result.items()}
  mask = host.pop('mask')
  if not np.issubdtype(host['features'].dtype, np.floating):  # bfloat16, which files of numpy do not know
    host['features'] = host['features'].astype(np.float32)
  return {key: value[mask] for key, value in host.items()}
