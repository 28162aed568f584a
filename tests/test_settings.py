"""Whatever a field of a config is set to, it is fine, or refused in one line by its name, before anything long
begins."""

import importlib
import math
import pathlib
from typing import Any

from flax import linen as nn
import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import default, noisy, regsl
from ft_jax import methods, settings
from ft_jax.data import crop
from ft_jax.data.randaugment import STRONGEST
from ft_jax.data.splits import open_splits, SplitSettings
from ft_jax.jobs import compare, finetune, predict, stability, study
from ft_jax.studies import history

ROOT = pathlib.Path(__file__).parents[1]
DEFAULTS = settings.flat(default.get_config().to_dict())
# A value of each type, an empty one, and of tuples some lengths and contents; then numbers that are negative, huge or
# not finite.
OF_TYPES = {str: ['5', '', ' ', 'x' * 10_000, 'a\0b', 'true'], bool: [True, False],
            tuple: [(), (1,), ('a',), (0.5,), (1, 2, 3)],
            int: [0, 1, 2, 7], float: [0.5, 1.5], type(None): [None], bytes: [b'x'], set: [{1}]}
PAIRS = [(0.0, 1.0), (0.0, 2.0), (1.0, 0.5), (-1.0, 1.0), (math.nan, 1.0), (0.5, math.inf), ('a', 'b'), (('a', 'b'),),
         (('a', 1.0),),
         (('a',),), (('a', 'b', 'c'),), ((1, 2),), (('[', 1.0),), (None, None), ('a', ''), ('a', 1), (True, False),
         (1, 2.5), (0.7, 0.7)]
NUMBERS = [-1, -0.5, -8, 10**400, 65_535, 2**31 - 1, 2**31, 2**63, -2**63, 1e300, -1e300, 1e-300, math.nan, math.inf,
           -math.inf]


def changed(path: str, value: Any, **fields: Any) -> ConfigDict:
  """A config whose field is of any type, as no flag could set it but a program can."""
  tiny = {'target.name': 'folder:images', 'model.name': 'resnet18', 'model.width': 1, 'image_size': 32,
          'selection.method': 'none',
          'train.batch_size': 8}
  return ConfigDict(settings.nested({**DEFAULTS, **tiny, **fields, path: value}))


def refused(path: str, config: ConfigDict) -> str | None:
  """What is said of a field that is refused, which is one line with its name; None where it is fine."""
  try:
    settings.check_fields(config)
    methods.active(config.methods.to_dict())
  except ValueError as error:
    said = str(error)
    assert '\n' not in said and len(said) < 400 and said.removeprefix('config.').startswith(f'{path} is '), said
    assert '; expected ' in said, said
    return said
  return None


def test_every_field_has_its_kind():
  """A field that is added to configs/default.py is added to FIELDS too; those of methods have the kind of their
  default."""
  assert {path for path in DEFAULTS if not path.startswith('methods.')} == set(settings.FIELDS)


@pytest.mark.parametrize('path', list(DEFAULTS))
def test_every_value_is_fine_or_refused_by_name(path):
  kind = type(DEFAULTS[path])
  assert refused(path, changed(path, DEFAULTS[path])) is None
  for of_type, values in OF_TYPES.items():
    for value in values:
      if of_type is not kind and (of_type, kind) != (int, float):  # a whole number is a number
        assert refused(path, changed(path, value)), (path, value)
  for value in (*PAIRS, *NUMBERS, *OF_TYPES[kind]):
    problem = refused(path, changed(path, value))
    if kind in (bool, str) or kind is tuple and not isinstance(value, tuple) or kind in (int, float) and isinstance(
        value, tuple):
      assert problem or type(value) is kind, (path, value)
    if kind in (int, float) and not isinstance(value, (tuple, str, bool)) and not abs(value) < 1e39:
      assert problem, (path, value)


def door(path: str, config: ConfigDict, folder: pathlib.Path) -> None:
  """What a job does with a config before anything long begins."""
  group = path.partition('.')[0]
  if group == 'predict':
    predict.run(config, folder)
  elif group == 'stability':
    stability.check(config)
  elif group in ('study', 'checkpoints'):
    checkpoints = (history.SavedCheckpoint('epoch 1', 1.0, 1, None, ''),)
    study.check(config, history.History('', config.model, None, 0, checkpoints))
  elif group == 'compare':
    compare.plan(config)
  else:
    finetune.Settings.from_config(config)
  if group in ('target', 'source', 'data_dir'):
    open_splits(SplitSettings.from_config(config[group] if group in config and group != 'data_dir' else config.target),
                config.data_dir, config.seed)


@pytest.fixture(scope='module')
def shapes_once():
  """The shapes of a network are found once for all configs that have the same one: that takes most of the time of a
  check."""
  known, eval_shape = {}, jax.eval_shape

  def remembered(init, *args):
    if not isinstance(getattr(init, '__self__', None), nn.Module):  # another function may get the address of this one
      return eval_shape(init, *args)
    key = repr(init), repr(args[1:])
    if key not in known:
      known[key] = eval_shape(init, *args)
    return known[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'eval_shape', remembered)
    yield


@pytest.mark.slow
@pytest.mark.parametrize('path', list(DEFAULTS))
def test_what_is_fine_by_itself_is_so_for_its_job(path, photos, tmp_path, shapes_once):
  """Nothing that is let through ends in another library: it is refused in one line, or the job could begin."""
  kind, first = type(DEFAULTS[path]), path.split('.')[1] if path.startswith('methods.') else ''
  # A method is switched on, so that it looks at its other fields.
  on = {f'methods.{first}.{name}': value for name, value in methods.METHODS[first].published.items()} if first else {}
  values = (*OF_TYPES[kind], *(OF_TYPES[int] if kind is float else ()), *(PAIRS if kind is tuple else NUMBERS))
  for value in values:
    config = changed(path, value, **{'target.name': f'folder:{photos}', 'source.name': f'folder:{photos}',
                                     'compare.variants': ('none',),
                                     **on})
    if refused(path, config) is None:
      try:
        door(path, config, tmp_path / 'run')
      except (ValueError, OSError) as error:
        assert '\n' not in str(error) and len(str(error)) < 1000, (value, error)


def test_every_crop_that_is_let_through_can_be_cut():
  """Up to the ends of what the fields may be."""
  image, rng = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3), np.random.default_rng(0)
  for scale in ((1e-300, 1e-300), (1e-300, 1.0), (1, 1), (0.5, 0.5)):
    for ratio in ((1e-4, 1e-4), (1e-4, 1e4), (1e4, 1e4), (1, 1)):
      assert refused('augment.scale', changed('augment.scale', scale, **{'augment.ratio': ratio})) is None
      for antialias in (False, True):
        assert crop.random_resized_crop(image, 16, scale, ratio, rng, antialias, None).shape == (16, 16, 3)


def test_magnitudes_are_those_of_randaugment():
  assert settings.FIELDS['augment.magnitude'].fits(STRONGEST)
  assert not settings.FIELDS['augment.magnitude'].fits(STRONGEST + 1)


@pytest.mark.parametrize('path,value,said', [
    ('augment.scale', (0.5,),
     r"config.augment.scale is \(0.5,\); expected two numbers such as \(0.08, 1.0\), the least and the greatest"),
    ('augment.scale', (0.0, 2.0),
     r'config.augment.scale is \(0.0, 2.0\); expected two numbers .* each a number above 0, up to 1$'),
    ('augment.ratio', (0.0, 1.0), r'config.augment.ratio is \(0.0, 1.0\); expected two numbers'),
    ('augment.ratio', (1.0, 0.5), r'config.augment.ratio is \(1.0, 0.5\); expected two numbers'),
    ('train.batch_size', -8, '^config.train.batch_size is -8; expected a whole number from 1 to 2147483647$'),
    ('pretrain.momentum', 1.0, '^config.pretrain.momentum is 1.0; expected a number from 0 to below 1$'),
    ('train.milestones', (0.6, 1.0),
     r'^config.train.milestones is \(0.6, 1.0\); expected values such as \(0.6, 0.8\), each'),
    ('train.layer_decay', 0.0, 'config.train.layer_decay is 0.0; expected a number above 0, up to 1'),
    ('train.layer_decay', 1.5, 'config.train.layer_decay is 1.5; expected'),
    ('train.clip_norm', -1.0, 'config.train.clip_norm is -1.0; expected'),
    ('train.warmup', 1.0, 'config.train.warmup is 1.0; expected a number from 0 to below 1'),
    ('methods.bss.k', 1.0, '^methods.bss.k is 1.0; expected a whole number'),
    ('seed', 2**32, 'config.seed is 4294967296; expected a whole number from 0 to 4294967295')])
def test_what_is_said(path, value, said):
  with pytest.raises(ValueError, match=said):
    raise ValueError(refused(path, changed(path, value)))


def all_configs():
  """Every config of configs/ with every argument that it takes."""
  for file in sorted((ROOT / 'configs').glob('*.py')):
    module = importlib.import_module(f'configs.{file.stem}')
    arguments = {'noisy': noisy.RATES, 'regsl': regsl.SETS,
                 'miniature': ('compare', 'finetune', 'pretrain', 'history', 'study'),
                 **dict.fromkeys(('aircraft', 'caltech101', 'cars', 'cub', 'dogs', 'dtd', 'pets', 'sun397', 'liu2022'),
                                 ('supervised', 'mocov2'))}
    for argument in arguments.get(file.stem, [None]):
      yield pytest.param(module.get_config() if argument is None else module.get_config(argument),
                         id=f'{file.stem}-{argument}')


@pytest.mark.parametrize('config', list(all_configs()))
def test_every_config_is_let_through(config):
  settings.check_fields(config)
  methods.active(config.methods.to_dict())
