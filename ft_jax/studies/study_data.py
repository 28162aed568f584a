"""What job study works on: a target's images and the rows of each seed's splits, features of frozen networks, and
finished parts.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from ft_jax import parallel
from ft_jax.data import open_set, overlap, unreadable
from ft_jax.data.image_set import digest, ImageSet
from ft_jax.data.splits import check_classes, open_splits, SplitSettings, unsampled_sets
from ft_jax.studies import spectrum
from ft_jax.workdir import write_text
from selection import storage

# Of the parts that are kept: another one where a formula or a grid of the studies changes, so that old numbers are not
# taken for new ones.
VERSION = 1


class Rows(NamedTuple):
  """The rows of a seed's splits in the features of all images of a target, int64."""
  train: np.ndarray
  val: np.ndarray
  test: np.ndarray

  @property
  def learnt(self) -> np.ndarray:
    """Train and val: what spectra and scores are of."""
    return np.sort(np.concatenate([self.train, self.val]))


class Target(NamedTuple):
  """An image set with all that is needed of it.

  Attributes:
    name: as the config has it.
    sources: its splits as they are opened, before any val split is carved out of them.
    labels: int32 `[n]`, of all sources, one after the other.
    rows: of each seed.
    stamp: of each seed, what its numbers depend on, as a fingerprint.
    legacy_stamp: of each seed, the same as earlier versions had it, by names and sizes of files.
  """
  name: str
  sources: tuple[ImageSet, ...]
  labels: np.ndarray
  rows: dict[int, Rows]
  stamp: dict[int, str]
  legacy_stamp: dict[int, str]

  @property
  def class_names(self) -> tuple[str, ...]:
    """One a class."""
    return self.sources[0].class_names


def open_target(config: ConfigDict, name: str) -> Target:
  """Opens an image set by the fields of `config.target`, for each of `config.study.seeds`.

  Raises:
    ValueError: as of `data.splits.open_splits`.
  """
  fields = ConfigDict({**config.target.to_dict(), 'name': name})
  settings = SplitSettings.from_config(fields)
  splits = {seed: open_splits(settings, config.data_dir, seed) for seed in config.study.seeds}
  rule = config.source.duplicates
  if rule != 'keep':
    unsampled = unsampled_sets(settings, config.data_dir)
    splits = {seed: overlap.resolve(of_seed, None, rule, overlap.find(of_seed, unsampled=unsampled)).splits
              for seed, of_seed in splits.items()}
  for of_seed in splits.values():
    check_classes(of_seed, 'target.without')
  expressions = dict.fromkeys(split for split in (fields.train, fields.val, fields.test) if split and split != 'rest')
  sources = tuple(open_set(name, split, config.data_dir).without(fields.without) for split in expressions)
  if config.data.on_error == 'skip':
    sources = tuple(unreadable.drop(source, f'{name} {split}', every_class=split == fields.train)[0]
                    for split, source in zip(expressions, sources))
  places = {name: row for row, name in enumerate(np.concatenate([source.ids for source in sources]).tolist())}

  def rows_of(split: ImageSet | None) -> np.ndarray:
    assert split is not None  # a study without test is refused
    return np.array([places[name] for name in split.ids.tolist() if name in places], np.int64)

  rows = {seed: Rows(*map(rows_of, of_seed)) for seed, of_seed in splits.items()}

  def stamp(fingerprints: Sequence[str]) -> dict[int, str]:
    return {seed: digest(*fingerprints, *(part.tobytes().hex() for part in of_seed)) for seed, of_seed in rows.items()}

  return Target(name, sources, np.concatenate([source.labels for source in sources]), rows,
                stamp([source.fingerprint for source in sources]),
                stamp([source.legacy_fingerprint or source.fingerprint for source in sources]))


class FrozenFeatures:
  """The features of all images of a target by one network; made, or read, when they are asked for."""

  def __init__(self, make: Callable[[], np.ndarray]):
    self._make = make
    self._spectra: dict[bytes, dict[str, spectrum.Spectrum]] = {}

  @functools.cached_property
  def features(self) -> np.ndarray:
    """float32 `[n, d]`."""
    return self._make()

  def spectra(self, rows: np.ndarray) -> dict[str, spectrum.Spectrum]:
    """`plain` and `centred`, of some rows."""
    key = rows.tobytes()
    if key not in self._spectra:
      gram = spectrum.gram(self.features[rows])
      self._spectra[key] = {'plain': spectrum.spectrum(gram, centred=False),
                            'centred': spectrum.spectrum(gram, centred=True)}
    return self._spectra[key]


def describe_spectra(spectra: Mapping[str, spectrum.Spectrum], threshold: float) -> dict[str, dict[str, Any]]:
  """The numbers of each spectrum."""
  numbers = {}
  for which, each in spectra.items():
    k = spectrum.main_size(each.values, threshold)
    share = float(each.values[:k].sum() / each.values.sum()) if each.values.any() else 0.0
    numbers[which] = {
        'images': each.images, 'dimensions': len(each.mean), 'values': each.values.tolist(), 'main': k, 'share': share,
        'energy': spectrum.energy(each.values, k), 'effective_rank': spectrum.effective_rank(each.values),
        'stable_rank': spectrum.stable_rank(each.values)}
  return numbers


def measure_change(before: FrozenFeatures, after: FrozenFeatures, rows: np.ndarray, which: str,
                   threshold: float) -> dict[str, Any]:
  """How far the main part and the residual of the same images' features are from what they were; angles in degrees."""
  first, second = before.spectra(rows)[which], after.spectra(rows)[which]
  sizes = [spectrum.main_size(each.values, threshold) for each in (first, second)]
  cross = spectrum.cross(before.features[rows], after.features[rows])
  change = spectrum.change(first, sizes[0], second, sizes[1], cross)
  # JSON has no infinity: what something is more than nothing is not known.
  return {'angles': spectrum.principal_angles(first, sizes[0], second, sizes[1]).tolist(),
          **{name: value if np.isfinite(value) else None for name, value in change._asdict().items()}}


class Parts:
  """Finished parts of a study: a JSON file each, named by what it was made of."""

  def __init__(self, folder: epath.Path):
    self._folder = folder

  def get(self, kind: str, *made_of: Any) -> dict[str, Any] | None:
    """What was found before, or None; a damaged file is as good as none."""
    return parallel.agreed(lambda: self._read(kind, made_of))

  def _read(self, kind: str, made_of: Sequence[Any]) -> dict[str, Any] | None:
    try:
      return json.loads(self._path(kind, made_of).read_text())
    except (FileNotFoundError, ValueError):
      return None

  def put(self, kind: str, *made_of: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps what was found; returns it as `get` will."""
    storage.make_folder(self._folder)
    write_text(self._path(kind, made_of), json.dumps(found, allow_nan=False) + '\n')
    return json.loads(json.dumps(found))

  def _path(self, kind: str, made_of: Sequence[Any]) -> epath.Path:
    return self._folder / f'{kind}-{digest(str(VERSION), *map(str, made_of))}.json'
