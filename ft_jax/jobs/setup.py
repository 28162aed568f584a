"""What the jobs share at their start: a config's fields turned into data sets, a model and its weights."""

from collections.abc import Mapping, Sequence
import hashlib
from typing import Any, NamedTuple

from etils import epath
import flax
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from ft_jax import parallel
from ft_jax.checkpoints import load_variables
from ft_jax.data.cache import cached
from ft_jax.data.damage import without_damaged
from ft_jax.data.folders import log_unused, UNLABELLED
from ft_jax.data.pipeline import Transform
from ft_jax.data.sources import carve, class_difference, draw, open_source, Source
from ft_jax.models import hub, pretrained, resnet, torch_files
from ft_jax.progress import log
from ft_jax.workdir import read_json
import selection
from selection import files

ON_ERROR = ('raise', 'skip')
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


class Splits(NamedTuple):
  """The splits of a data set that is trained on; `test` is None where there is none."""
  train: Source
  val: Source
  test: Source | None


def open_splits(config: ConfigDict, data_dir: str, seed: int) -> Splits:
  """Opens train, val (carved out of train where it has no name) and test of `config.target` or `config.source`.

  Raises:
    ValueError: a set, split or folder that is not there or has no classes, or splits of different classes or with images in common.
  """
  # The pre-training data has neither field.
  per_class, fraction, left_out = config.get('train_per_class', 0), config.get('train_fraction', 1.0), config.get('without', ())
  opened = lambda split: _labelled(open_source(config.name, split, data_dir, quiet=True)).without(left_out)
  train, rest = opened(config.train), None
  if per_class or fraction < 1:
    train, rest = draw(train, per_class, seed, fraction)
  if config.val:
    val = opened(config.val)
  else:
    train, val = carve(train, config.val_fraction, seed)
  test = rest if config.test == 'rest' and rest is not None else opened(config.test) if config.test else None
  log_unused(config.name, [source.unused for source in (train, val, test) if source is not None])
  if test is not None and not len(test):
    drawn = f'train_per_class {per_class}' if per_class else f'train_fraction {fraction}'
    raise ValueError(f'{train.name}: {drawn} leaves no image for test')
  for other in (val, test):
    if other is not None and other.class_names != train.class_names:
      raise ValueError(f'{train.name} and {other.name} have different classes: '
                       + class_difference(train.name, train.class_names, other.name, other.class_names))
  for one, other in ((train, val), (train, test), (val, test)):
    if other is not None and (shared := set(one.ids.tolist()) & set(other.ids.tolist())):
      raise ValueError(f'{one.name} and {other.name} share {len(shared):,d} images, such as {min(shared)}; what is measured on images '
                       'that were trained on means nothing. Give slices that do not overlap, such as train[:80%] and train[80%:]')
  return Splits(train, val, test)


def _labelled(source: Source) -> Source:
  if source.class_names == (UNLABELLED,):
    raise ValueError(f'{source.name} holds no class folders but {len(source):,d} images, so their classes are not known; expected '
                     '<class>/<image> in it: classes are read from the names of folders, not from a table (docs/data.md turns a .csv into '
                     'folders). Images without classes can be a pool: config.source.name with methods.fixmatch')
  return source


def check_classes(splits: Splits, without: str = '') -> None:
  """Raises ValueError for splits that no classifier can be learnt from.

  Args:
    splits: what is trained on, after slices, draws and unreadable images.
    without: the field that leaves classes out, where a class without training images is refused: its test images are
      never right. '' warns instead, as for a pre-training, whose classifier is rarely used.

  Raises:
    ValueError: there is one class only, whose classifier is always right; or a class without training images, by name.
  """
  train = splits.train
  if len(train.class_names) < 2:
    raise ValueError(f'{train.name} has one class, {train.class_names[0]!r}, so a classifier is always right and learns '
                     'nothing; expected at least two classes (to tell one class from everything else, add a class of other '
                     'images)')
  if not (missing := _classes_without_images(train)):
    return
  named = f'{train.name}: no training image of {_class_list(missing)}'
  if not without:
    log.warning('warning: %s, so nothing is learnt of it', named)
    return
  first = train.class_names.index(missing[0])
  counts = [f'{split} {np.sum(source.labels == first)}' for split, source in splits._asdict().items()
            if source is not None]
  leave_out = f"--config.{without}=\"({', '.join(map(repr, missing[:5]))},)\""
  raise ValueError(f'{named} (images of {missing[0]!r}: {", ".join(counts)}); add images, use a larger slice for train, or '
                   f'leave such classes out: {leave_out}')


def log_classes_not_evaluated(splits: Splits) -> None:
  """Warns of classes that val or test has no image of: nothing is measured on them."""
  for split, source in (('val', splits.val), ('test', splits.test)):
    if source is not None and (missing := _classes_without_images(source)):
      log.warning('warning: %s: no %s image of %s: mean_per_class is the mean over the other %d classes', source.name,
                  split, _class_list(missing), len(source.class_names) - len(missing))


def _classes_without_images(source: Source) -> list[str]:
  counts = np.bincount(source.labels, minlength=len(source.class_names))
  return [source.class_names[k] for k in np.flatnonzero(counts == 0).tolist()]


def _class_list(names: Sequence[str]) -> str:
  return f'class {names[0]!r}' if len(names) == 1 else f'{len(names)} classes: {pretrained.listed(map(repr, names))}'


def check_data(config: ConfigDict) -> None:
  """Raises ValueError where `config.data` says what is not known."""
  if config.on_error not in ON_ERROR:
    raise ValueError(f'config.data.on_error is {config.on_error!r}; known: {", ".join(ON_ERROR)}')


def readable(splits: Splits, what: str, on_error: str, pool: Source | None = None) -> tuple[Splits, Source | None, dict[str, list[str]]]:
  """The images that can be read, and the ids of those that cannot.

  With `on_error` 'raise' nothing is tried: the first image that cannot be read ends the run when its turn comes. Links to
  files that are not there are known already, and end it here.

  Args:
    splits: of `target` or `source`, which `what` says.
    what: see `splits`.
    on_error: `config.data.on_error`.
    pool: the pre-training data that is chosen from, where it is.

  Returns:
    The splits, the pool, and the ids of such images by the name of the split: `target train`, ... `source pool`.

  Raises:
    ValueError: with 'raise' an image that is a link to a file that is not there; with 'skip' a class without an image left.
  """
  named = {**{f'{what} {split}': source for split, source in splits._asdict().items()}, 'source pool': pool}
  if on_error == 'raise':
    for source in named.values():
      _check_links(source)
    return splits, pool, {}
  tried = {name: without_damaged(source, name, name.endswith(('train', 'pool'))) if source is not None else (None, [])
           for name, source in named.items()}
  *kept, pool = (source for source, _ in tried.values())
  return Splits(*kept), pool, {name: ids for name, (_, ids) in tried.items() if ids}


def _check_links(source: Source | None) -> None:
  broken = sorted(source.broken.intersection(source.ids.tolist())) if source is not None and source.broken else []
  if broken:
    raise ValueError(f'{source.name}: {len(broken):,d} of {len(source):,d} images are links to files that are not there, such '
                     f'as {broken[0]}; restore the files, remove the links, or skip them with --config.data.on_error=skip')


def split_fingerprints(splits: Splits) -> dict[str, str | None]:
  """What results.json says of the images, their order and their labels, by split."""
  return {name: None if source is None else source.fingerprint for name, source in splits._asdict().items()}


def check_same_images(splits: Splits, pool: Source | None = None) -> None:
  """Raises ValueError, on every process, where one reads other images than process 0."""
  named = {**splits._asdict(), 'pool': pool}
  parallel.check_same({name: source.fingerprint for name, source in named.items() if source is not None}, 'images')


def skipped_summary(skipped: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
  """What results.json says of images that cannot be read: how many of each split, and the ids of a hundred."""
  return {name: {'images': len(ids), 'first': ids[:100]} for name, ids in skipped.items()}


def in_memory(splits: Splits, what: str, wanted: bool) -> Splits:
  """Where that is wanted, the splits with their decoded images kept in memory; test is read once and is not kept."""
  if not wanted:
    return splits
  kept = cached({f'{what} train': splits.train, f'{what} val': splits.val})
  return Splits(*kept.values(), splits.test)


def make_transform(config: ConfigDict) -> Transform:
  """What images go through."""
  augment = config.augment
  if short_side(config) < config.image_size:
    raise ValueError(f'augment.short_side is {short_side(config)}, less than image_size {config.image_size}')
  return Transform(config.image_size, tuple(augment.scale), tuple(augment.ratio), augment.flip, augment.antialias, short_side(config),
                   augment.randaugment, augment.magnitude, augment.cutout)


def short_side(config: ConfigDict) -> int:
  """Pixels of an image's short side before the middle is cut out for evaluation."""
  return config.augment.short_side or round(config.image_size * 256 / 224)


def build_model(config: ConfigDict, heads: Mapping[str, int], freeze: str = '') -> resnet.ResNet:
  """The network of `config.model` with the given heads, and what `train.freeze` says of it."""
  if config.dtype not in DTYPES:
    raise ValueError(f'model.dtype is {config.dtype!r}; known: {", ".join(DTYPES)}')
  return resnet.build(config.name, heads, width=config.width, stem=config.stem, dtype=DTYPES[config.dtype], precision=config.precision,
                      axis_name=parallel.AXIS if config.sync_batch_norm else None, batch_norm=config.batch_norm, frozen=freeze)


def init_variables(model: resnet.ResNet, image_size: int, seed: int, weights: Mapping[str, Any] | None) -> dict[str, Any]:
  """Fresh variables of a model, with the backbone of `weights`, and the heads that they have too, where there are any."""
  images = jnp.zeros((1, image_size, image_size, 3), jnp.uint8)
  if weights is not None and not model.heads:  # nothing is fresh, so shapes are enough; compiling init takes many seconds
    return pretrained.merge(jax.eval_shape(model.init, jax.random.key(seed), images), weights)
  variables = parallel.same_arrays(jax.device_get(jax.jit(model.init)(jax.random.key(seed), images)))
  return variables if weights is None else pretrained.merge(variables, weights)


class Weights(NamedTuple):
  """Pre-trained variables, with the heads and the projection that were asked for; what results.json says of them."""
  variables: dict[str, Any]
  about: dict[str, str | None]


def check_weights(config: ConfigDict) -> None:
  """Raises ValueError for fields of `config.model` that cannot be right, before anything is loaded or downloaded."""
  if config.source_head not in SOURCE_HEADS:
    raise ValueError(f'model.source_head is {config.source_head!r}; known: {", ".join(SOURCE_HEADS)}')
  for field in ('source_head', 'batch_norm'):
    if config[field] in ('pretrained', 'frozen') and not config.weights:
      raise ValueError(f'model.{field} is {config[field]!r} and model.weights is empty; give the weights that it is to come from')
  if not config.weights or config.weights == 'pretrain':
    return
  if (repo := hub.parse(config.weights)) is None:
    _check_path(config.weights)
  elif repo.name.startswith('timm/'):
    _check_timm(*repo.name.removeprefix('timm/').split('.', 1), config=config)


def _check_path(name: str) -> None:
  path = files.located(name)
  if not path.exists():
    raise ValueError(f'model.weights: there is no file or folder {name}; expected one, or timm:<name>, or hf:<owner>/<name>')
  if not _is_run(path) and not files.is_url(file := _weights_file(path)):
    torch_files.check(file)


def _is_run(path: epath.Path) -> bool:
  """Whether a path is the workdir of a run, or a checkpoint in one."""
  return path.is_dir() and ((path / 'checkpoints').is_dir() or path.parent.name == 'checkpoints')


def _weights_file(path: epath.Path) -> epath.Path:
  """The file itself; of a folder laid out as a repository of the Hugging Face Hub its weights.

  Raises:
    ValueError: the folder holds none, or several.
  """
  if not path.is_dir():
    return path
  inside = sorted(entry.name for entry in path.iterdir())
  if (chosen := hub.weights_in(inside)) is not None:
    return path / chosen
  near = [name for name in inside if name.lower().endswith(torch_files.ENDINGS)]
  raise ValueError(f'model.weights: {path} is no workdir of a run, which has a folder checkpoints/, and has no '
                   f'{" or ".join(hub.WEIGHTS)}; ' + (f'give one of its files: {pretrained.listed(near)}' if near else
                                                      'give such a folder, or a file'))


def _check_timm(network: str, tag: str = '', *, config: ConfigDict) -> None:
  """Many networks of timm differ from torchvision's in stem, pooling or blocks, which their names say."""
  if network not in resnet.NETWORKS:
    raise ValueError(f'model.weights is {config.weights!r}, a {network}, which is another network than {", ".join(resnet.NETWORKS)}')
  if tag.startswith('ra4_'):  # as timm 1.0 has it; all others of these networks have ImageNet's mean
    raise ValueError(f'model.weights is {config.weights!r}, which was trained on images with a mean of 0.5; the networks here take out the '
                     'mean of ImageNet')
  if (network, 64, '7x7') != (config.name, config.width, config.stem):
    raise ValueError(f'model.weights is {config.weights!r}; set --config.model.name={network} --config.model.width=64 '
                     '--config.model.stem=7x7')


def load_weights(name: str, *, classes: int | None = None, class_names: Sequence[str] | None = None,
                 classifier: bool = False, projection: bool = False) -> Weights:
  """Reads pre-trained variables; says what was used and what was dropped.

  Args:
    name: as `config.model.weights`: a name of the Hugging Face Hub, a file, a workdir or a checkpoint in one.
    classes: how many the classifier must have, which then is head 'source'; None drops every head.
    class_names: their names, in order; compared with those of the run that the weights come from.
    classifier: whether the classifier is wanted as head 'pretrained', whatever its classes.
    projection: whether MoCo-v2's projection head is wanted too.

  Raises:
    ValueError: no such weights, weights that cannot be read, or without what is asked for.
  """
  repo = hub.parse(name)
  if repo is None:
    _check_path(name)
  path, commit = hub.fetch(repo) if repo else (files.located(name), None)
  own = _is_run(path)
  variables, dropped, notes = _read_run(path) if own else read_file(_weights_file(path))
  heads = variables['params'].pop('heads', {})
  kept = {}
  if classifier:
    if 'source' not in heads:
      instead = f', but head {", ".join(sorted(heads))}' if heads else ''
      raise ValueError(f'methods.co_tuning and methods.lwf need the classifier of the pre-training, and {name} has none{instead}; give '
                       'weights with the classifier that they were trained with, or leave these methods out')
    kept['pretrained'] = heads['source']
  if classes is not None:
    if 'source' not in heads:
      raise ValueError(f"model.source_head is 'pretrained', but {name} has no classifier; use --config.model.source_head=fresh")
    if (found := len(heads['source']['bias'])) != classes:
      raise ValueError(f"model.source_head is 'pretrained', but the classifier of {name} has {found} classes and the source data "
                       f'{classes}; use --config.model.source_head=fresh')
    if class_names is not None:
      _check_same_classes(name, _source_classes(path) if own else None, class_names)
    kept['source'] = heads['source']
  if projection and 'projection' not in variables:
    raise ValueError(f"selection.features is 'projection', but {name} has no projection head (MoCo-v2's file has one); "
                     'use --config.selection.features=pooled')
  if kept:
    variables['params']['heads'] = kept
    heads = {head: value for head, value in heads.items() if head != 'source'}
  if heads:
    dropped['old classifier'] = [f'heads/{head}' for head in sorted(heads)] if own else ['fc.weight', 'fc.bias']
  if not projection and variables.pop('projection', None):
    dropped['projection head'] = ['fc.0', 'fc.2']
  pretrained.check_numbers(variables, name)
  says = '; '.join(f'{pretrained.listed(names)} ({why})' for why, names in dropped.items())
  says = (f'; dropped: {says}' if says else '') + ''.join(f'; {note}' for note in notes)
  log.info('weights: %s%s: %d tensors used%s', name, f' at {commit}' if commit else '', len(jax.tree.leaves(variables)),
           says)
  return Weights(variables, {'name': name, 'revision': commit, 'fingerprint': weights_fingerprint(
      {key: variables[key] for key in ('params', 'batch_stats')})})


def read_file(path: epath.PathLike) -> pretrained.Loaded:
  """Weights in a file, or in an object on object storage; raises ValueError as of `pretrained.read`."""
  with files.on_disk(path) as file:
    return pretrained.read(file)


def _read_run(folder: epath.Path) -> pretrained.Loaded:
  """A workdir, or one of its checkpoints."""
  is_run = (folder / 'checkpoints').is_dir()  # whatever it and the folder above it are called
  step = int(folder.name) if not is_run and folder.parent.name == 'checkpoints' and folder.name.isdigit() else None
  return pretrained.Loaded(load_variables(folder if step is None else folder.parent.parent, step), {'of that training': ['optimizer']})


def _check_same_classes(name: str, known: Sequence[str] | None, wanted: Sequence[str]) -> None:
  """Raises ValueError for a classifier of other classes than the source data, or in another order; warns if unknown."""
  if known is None:
    log.warning("warning: model.source_head is 'pretrained' and the names of the classes of %s are not known; they must be "
                'those of the source data, in the same order', name)
  elif tuple(known) != tuple(wanted):
    first = next(k for k, pair in enumerate(zip(known, wanted)) if pair[0] != pair[1])
    raise ValueError(f"model.source_head is 'pretrained', but the classifier of {name} has other classes than the source "
                     f'data, or another order: class {first} is {known[first]!r} there and {wanted[first]!r} in the source '
                     'data; use --config.model.source_head=fresh, or the source data that it was trained on')


def _source_classes(path: epath.Path) -> tuple[str, ...] | None:
  """The classes of head 'source' of a run, by its workdir or one of its checkpoints; None where it does not say.

  A pre-training has them in results.json; a fine-tuning in selection.json, where it chose whole classes.
  """
  folder = path if (path / 'checkpoints').is_dir() else path.parent.parent
  results, chosen = folder / 'results.json', folder / 'selection.json'
  try:
    if results.exists() and (told := read_json(results))['job'] == 'pretrain':
      return tuple(str(row['name']) for row in told['val']['per_class'])
    if chosen.exists() and (loaded := selection.Selection.load(chosen)).by == 'class':
      return tuple(loaded.names)
  except (KeyError, TypeError, ValueError) as error:  # of another program, or changed by hand
    log.debug('%s: %s', folder, error)
  return None


def weights_fingerprint(variables: Mapping[str, Any]) -> str:
  """Sixteen hexadecimal digits that depend on every number of the backbone."""
  state = hashlib.sha256()
  for path, value in sorted(flax.traverse_util.flatten_dict(dict(variables), sep='/').items()):
    if not path.startswith('params/heads/'):
      state.update(path.encode() + np.ascontiguousarray(value).tobytes())
  return state.hexdigest()[:16]


def drawn(seed: int) -> str:
  """Says which random weights a network of some config starts with: their last bits depend on the processor and the compiler."""
  return f'drawn with seed {seed}'


SOURCE_HEADS = ('fresh', 'pretrained')
