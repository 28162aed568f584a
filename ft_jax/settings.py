"""The fields of a config by their path, such as `train.batch_size`: what each may be, their defaults, nested and flat.

What is checked here needs nothing but the field itself. Names of a registry (methods, networks, ...) are checked where
the registry is, and fields that do not fit each other where they are used together.
"""

from collections.abc import Callable, Mapping
import json
import numbers
from typing import Any, NamedTuple

from ml_collections import ConfigDict


def flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """The fields of nested mappings by path: `{'train.batch_size': 256, ...}`."""
  fields: dict[str, Any] = {}
  for name, value in config.items():
    fields |= flat(value, f'{prefix}{name}.') if isinstance(value, Mapping) else {f'{prefix}{name}': value}
  return fields


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
  """The reverse of `flat`; where a path is both a group and a value, the later one counts."""
  config: dict[str, Any] = {}
  for path, value in fields.items():
    *groups, name = path.split('.')
    inner = config
    for group in groups:
      if not isinstance(inner.get(group), dict):
        inner[group] = {}
      inner = inner[group]
    inner[name] = value
  return config


def defaults() -> dict[str, Any]:
  """Every field of ft_jax/config.py and its value, by path, as JSON has it: tuples are lists."""
  from ft_jax import config  # it imports ft_jax.methods

  return json.loads(json.dumps(flat(config.get_config().to_dict())))


class Kind(NamedTuple):
  """What a field may be: as text after "expected", and as a test of a value."""
  expected: str
  fits: Callable[[Any], bool]


def check_fields(config: ConfigDict) -> None:
  """Raises ValueError for the first field of a config, or of a part of it, that is not what `FIELDS` says."""
  for path, value in flat(config.to_dict()).items():
    if path in FIELDS:
      check_field(f'config.{path}', value, FIELDS[path])


def check_field(name: str, value: Any, kind: Kind) -> None:
  """Raises ValueError, with the field's name and what was expected, for a value that does not fit."""
  if not kind.fits(value):
    shown = ' '.join(repr(value).split())  # of an array, several lines
    raise ValueError(f'{name} is {shown if len(shown) < 100 else shown[:97] + "..."}; expected {kind.expected}')


def whole(least: int = 0, most: int = 2**31 - 1, meaning: str = '') -> Kind:
  """A whole number from `least` to `most`, by default what int32 holds."""
  is_whole = lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool)
  fits = lambda value: is_whole(value) and least <= value <= most
  return Kind(f'a whole number from {least} to {most}{meaning}', fits)


def number(least: float | None = None, most: float | None = None, *, above: float | None = None,
           below: float | None = None, meaning: str = '') -> Kind:
  """A number, whole or not, between bounds that are included (`least`, `most`) or not (`above`, `below`).

  By default any number of float32.
  """
  unbounded = all(bound is None for bound in (least, most, above, below))
  if least is None and above is None:
    least = -_FLOAT32
  if most is None and below is None:
    most = _FLOAT32
  lower = f'from {least:.2g} to' if above is None else f'above {above:g}'
  if most is None:
    upper = f'below {below:g}' if above is None else f' and below {below:g}'
  else:
    upper = f'{most:.2g}' if most == _FLOAT32 else f'{most:g}'
    upper = upper if above is None else f', up to {upper}'
  expected = f'a number {lower}{" " if above is None else ""}{upper}{meaning}'

  def fits(value: Any) -> bool:  # every comparison with NaN is False
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
      return False
    checked: Any = value  # mypy does not compare a Real with a float
    high_enough = checked >= least if above is None else checked > above
    return high_enough and (checked < below if most is None else checked <= most)

  return Kind(f'a finite number{meaning}' if unbounded else expected, fits)


def switch() -> Kind:
  """True or False."""
  return Kind('true or false', lambda value: isinstance(value, bool))


def text() -> Kind:
  """Text, which may be empty; no file has a name with a NUL in it, or a longer one."""
  return Kind(f'text of at most {_LONGEST} characters',
              lambda value: isinstance(value, str) and len(value) <= _LONGEST and '\0' not in value)


def word(what: str) -> Kind:
  """Text that may not be empty; `what` says of what."""
  return Kind(what, lambda value: text().fits(value) and bool(value.strip()))


def class_name(what: str) -> Kind:
  """The name of a class; the command line reads a name of digits alone as a number."""
  return Kind(what, lambda value: word(what).fits(value) or whole().fits(value))


def several(kind: Kind, example: str) -> Kind:
  """Any number of values of one kind, also none."""
  return Kind(f'values such as {example}, each {kind.expected}',
              lambda value: isinstance(value, (tuple, list)) and all(map(kind.fits, value)))


def pairs(first: Kind, second: Kind, example: str) -> Kind:
  """Any number of pairs, also none."""
  is_pair = lambda value: _has_two(value) and first.fits(value[0]) and second.fits(value[1])
  return Kind(f'pairs such as {example}: {first.expected} and {second.expected}',
              lambda value: isinstance(value, (tuple, list)) and all(map(is_pair, value)))


def interval(bound: Kind, example: str) -> Kind:
  """Two numbers, the least and the greatest."""
  return Kind(f'two numbers such as {example}, the least and the greatest, each {bound.expected}',
              lambda value: _has_two(value) and all(map(bound.fits, value)) and value[0] <= value[1])


def _has_two(value: Any) -> bool:
  return isinstance(value, (tuple, list)) and len(value) == 2


def like(default: Any) -> Kind:
  """Whatever has the type of a default; a whole number may stand for any number.

  A tuple's values are of the type of the first one, and text where there is none.
  """
  if isinstance(default, bool):
    return switch()
  if isinstance(default, int):
    return whole(-2**31)
  if isinstance(default, float):
    return number()
  if isinstance(default, str):
    return text()
  if default and not isinstance(default[0], str):
    return several(like(default[0]), str(tuple(default)))
  return several(word('text that is not empty'), "('one', 'two')")


_LONGEST = 4096  # of paths on Linux
_FLOAT32 = 3.4028234663852886e38  # the largest one; what is beyond it is infinite on the device
_SEED = whole(0, 2**32 - 1)  # jax takes the lowest 32 bits of a seed, so a larger one would be another one's twin
_SIDE = 65_535  # the largest that a JPEG has
_SPLIT = word('the name of a split, such as train or train[:90%]')
_LEFT_OUT = '; 0 leaves that out'


def _is_variant(value: Any) -> bool:
  """Whether a value is an entry of `config.compare.variants`; its fields are checked one by one by job compare."""
  name = word('a name')
  if not isinstance(value, (tuple, list)):
    return name.fits(value)
  return _has_two(value) and name.fits(value[0]) and isinstance(value[1], Mapping) and all(map(name.fits, value[1]))


def _is_choice(value: Any) -> bool:
  """Whether a value is a field and at least one value for it."""
  return (_has_two(value) and word('a field').fits(value[0]) and isinstance(value[1], (tuple, list))
          and len(value[1]) > 0)


# Of `config.compare.tune`; values are checked by the field that they are for.
TUNE = Kind("pairs such as (('train.learning_rate', (0.01, 0.03)),), each a field and the values to try",
            lambda value: isinstance(value, (tuple, list)) and all(map(_is_choice, value)))


# The fields of `configs.default.train_config`.
TRAIN: Mapping[str, Kind] = {
    'batch_size': whole(1),
    'epochs': number(0),
    'steps': whole(0, meaning='; 0 takes the epochs'),
    'learning_rate': number(0),
    'learning_rate_groups': pairs(word('a pattern of paths'), number(0), "(('heads/.*', 10.0), ('.*', 1.0))"),
    'layer_decay': number(above=0, most=1),
    'schedule': text(),
    'milestones': several(number(above=0, below=1), '(0.6, 0.8)'),
    'decay': number(0),
    'warmup': number(0, below=1),
    'optimizer': text(),
    'momentum': number(0, below=1),
    'nesterov': switch(),
    'clip_norm': number(0, meaning='; 0 is any norm'),
    'weight_decay': number(0),
    'weight_decay_groups': pairs(word('a pattern of paths'), number(0), "(('.*/bias', 0.0), ('.*', 1.0))"),
    'freeze': text(),
    'ema_decay': number(0, below=1, meaning=', such as 0.999; 0 is no average'),
    'accumulate_steps': whole(1),
    'eval_every': whole(),
    'keep_epochs': several(number(above=0), '(1, 2, 3, 5, 8)'),
    'skip_diverged': whole(),
    'log_every': whole(),
}

# Every field of configs/default.py; those of methods are in `ft_jax.methods`.
FIELDS: Mapping[str, Kind] = {
    'job': word('the name of a job, such as finetune'),
    'compile_cache': text(),
    'seed': _SEED,
    'data_dir': text(),
    'image_size': whole(8, _SIDE),
    'workdir': text(),
    'target.name': text(),
    'target.train': _SPLIT,
    'target.val': text(),
    'target.test': text(),
    'target.val_fraction': number(0, 1),
    'target.train_per_class': whole(meaning='; 0 is all images'),
    'target.train_fraction': number(above=0, most=1),
    'target.balanced': switch(),
    'target.without': several(class_name('the name of a class'), "('cat', 'dog')"),
    'target.metric': text(),
    'noise.kind': text(),
    'noise.rate': number(0, 1),
    'noise.map': pairs(class_name('the name of a class'), class_name('the name of another'), "(('wolf', 'husky'),)"),
    'noise.labels': text(),
    'source.name': text(),
    'source.duplicates': text(),
    'source.train': _SPLIT,
    'source.val': text(),
    'source.test': text(),
    'source.val_fraction': number(0, 1),
    'source.shuffle_labels': switch(),
    'model.name': text(),
    'model.width': whole(1),
    'model.stem': text(),
    'model.stages': whole(meaning='; 0 is all'),
    'model.weights': text(),
    'model.source_head': text(),
    'model.batch_norm': text(),
    'model.sync_batch_norm': switch(),
    'model.dtype': text(),
    'model.precision': text(),
    'selection.method': text(),
    'selection.size': number(above=0),
    'selection.by': text(),
    'selection.clusters': whole(1),
    'selection.features': text(),
    'selection.file': text(),
    'selection.cost': text(),
    'selection.epsilon': number(above=0),
    'selection.rho_source': number(above=0),
    'selection.rho_target': number(above=0),
    'source_weight': number(0),
    'source_ratio': number(above=0),
    'source_weight_schedule': text(),
    'source_first': number(0, below=1),
    'target_last': number(0, below=1),
    'refit_head': switch(),
    'embeddings_dir': text(),
    'data.on_error': text(),
    'data.timeout': number(0, meaning=' (seconds); 0 waits for ever'),
    'data.cache': switch(),
    'augment.scale': interval(number(above=0, most=1), '(0.08, 1.0)'),
    'augment.ratio': interval(number(1e-4, 1e4), '(0.75, 1.33)'),
    'augment.flip': switch(),
    'augment.randaugment': whole(meaning='; 0 is none'),
    'augment.magnitude': whole(2, 10),
    'augment.cutout': number(0, 1, meaning=', a fraction of the side of the crop'),
    'augment.jitter': several(number(0), '(0.4, 0.4, 0.4, 0.1)'),
    'augment.jitter_probability': number(0, 1),
    'augment.grey': number(0, 1),
    'augment.blur': number(0, 1),
    'augment.blur_sigma': interval(number(above=0), '(0.1, 2.0)'),
    'augment.solarize': number(0, 1),
    'augment.antialias': switch(),
    'augment.short_side': whole(0, _SIDE),
    **{f'{group}.{name}': kind for group in ('train', 'pretrain') for name, kind in TRAIN.items()},
    'predict.images': text(),
    'predict.top': whole(meaning='; 0 is three, or all classes if there are fewer'),
    'stability.sigma': number(above=0),
    'stability.draws': whole(meaning=_LEFT_OUT),
    'stability.images': whole(meaning='; 0 is all'),
    'stability.probes': whole(meaning=_LEFT_OUT),
    'stability.tolerance': number(0),
    'checkpoints': text(),
    'study.targets': several(word('the name of an image set'), "('folder:/data/birds',)"),
    'study.seeds': several(_SEED, '(0, 1, 2)'),
    'study.epochs': several(number(0), '(1, 2, 3)'),
    'study.fine_tune': switch(),
    'study.threshold': number(above=0, below=1),
    'study.centred': switch(),
    'compare.variants': Kind("variants such as 'uot', 'none+l2_sp' or ('uot 20', {'selection.size': 20})",
                             lambda value: isinstance(value, (tuple, list)) and all(map(_is_variant, value))),
    'compare.seeds': several(_SEED, '(0, 1, 2)'),
    'compare.tune': TUNE,
    'compare.trials': whole(meaning='; 0 is all combinations'),
    'compare.tune_seeds': whole(1),
    'compare.equal_compute': switch(),
    'compare.axis': text(),
    'compare.keep_checkpoints': switch(),
}

# Fields that were renamed, by path: {the name in older versions: the name now}. Workdirs of older versions resume under
# the new names.
_RENAMED_IN_TRAINING = {'average': 'ema_decay', 'clip': 'clip_norm', 'accumulate': 'accumulate_steps'}
RENAMED: dict[str, str] = {f'{group}.{old}': f'{group}.{new}' for group in ('train', 'pretrain')
                           for old, new in _RENAMED_IN_TRAINING.items()}
RENAMED['compare.methods'] = 'compare.variants'

# Fields that were removed, by path, each with the value that had no effect: a run that had it resumes, one that had
# another is refused.
REMOVED: dict[str, Any] = {}

# Fields that may differ between two starts of one run. Where they change its images, its checkpoints refuse to resume.
MAY_CHANGE = (
    'compile_cache', 'data.cache', 'data.on_error', 'data.timeout', 'train.skip_diverged', 'pretrain.skip_diverged',
    'predict.top',  # only job predict uses it
    # Removed from the config: runs of older versions still have them.
    'train.nonfinite_steps', 'pretrain.nonfinite_steps')

# Fields that a job adds to the config of a run within its own: classes of the source that a pre-training leaves out.
ADDED = ('source.without',)
