"""What a comparison consists of: its variants, what is tuned for each of them, and the config of every fine-tuning."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
import re
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from ft_jax.data.image_set import digest
from ft_jax.jobs import finetune
from ft_jax.methods import METHODS
from ft_jax.settings import check_field, defaults, FIELDS, flat, nested, TUNE

# Groups and fields of a config that a fine-tuning in a comparison does not have, so that it stays as it is when they
# are changed.
_ELSEWHERE = ('checkpoints', 'compare', 'predict', 'stability', 'study', 'workdir')
# Fields of job finetune that are the same for all variants, or for which the comparison has a place of its own.
_SHARED = ('job', 'seed', 'compile_cache', 'data_dir', 'embeddings_dir', 'pretrain')
# Fields that mean nothing where nothing is selected; and those of a network that a shared pre-training was for.
_OF_SOURCE = ('selection', 'source', 'source_weight', 'source_ratio', 'source_weight_schedule', 'source_first',
              'target_last')
_OF_NETWORK = ('model.name', 'model.width', 'model.stem', 'image_size')
# The name of a variant with the selection method 'none', and what is added to it at equal compute.
PLAIN = 'plain'
EQUAL_COMPUTE = 'equal compute'
_TUNE = 'compare.tune'
# Up to this factor, the images through the network count as equally many.
_EQUAL = 1.05


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to fine-tune, compared with the others.

  Attributes:
    name: as tables have it.
    slug: the name as the beginning of the names of its folders.
    fields: of job finetune by path, where they differ from the config of the comparison.
    combinations: of values to choose from on val, each as fields by path; one without fields where nothing is tuned.
  """
  name: str
  slug: str
  fields: Mapping[str, Any]
  combinations: Sequence[Mapping[str, Any]] = ({},)

  @property
  def tuned(self) -> bool:
    """Whether anything is chosen on val."""
    return len(self.combinations) > 1


@dataclasses.dataclass(frozen=True)
class Cell:
  """One fine-tuning of a comparison.

  Attributes:
    variant: see there.
    seed: of the run.
    tuned: the combination of values that it has.
    trial: whether it is there to choose the combination on val; it does not read the test split.
  """
  variant: Variant
  seed: int
  tuned: Mapping[str, Any]
  trial: bool

  @property
  def title(self) -> str:
    """For the log."""
    tuned = ''.join(f', {field} {value}' for field, value in self.tuned.items()) if self.trial else ''
    return f'{self.variant.name}{tuned}, seed {self.seed}'

  @property
  def folder(self) -> str:
    """In the workdir of the comparison; that of a trial depends on its values, so that it stays when others are added.
    """
    if not self.trial:
      return f'cells/{self.variant.slug}-seed-{self.seed}'
    return f'trials/{self.variant.slug}-{digest(json.dumps(self.tuned, sort_keys=True))[:8]}-seed-{self.seed}'


def declared_variants(config: ConfigDict) -> list[Variant]:
  """The variants of `config.compare.variants`; raises ValueError for one that cannot be right by itself."""
  if not config.compare.variants or not config.compare.seeds:
    raise ValueError('config.compare.variants and config.compare.seeds need at least one entry each')
  if config.compare.axis:
    _check_known('config.compare.axis', config.compare.axis)
  entries = [_parsed(entry) for entry in config.compare.variants]
  named = {method for entry in entries for method in entry.methods}
  variants = [_variant(config, entry, named) for entry in entries]
  check_names(variants)
  return variants


def check_names(variants: Sequence[Variant]) -> None:
  """Raises ValueError for two variants of one name or folder."""
  seen: dict[str, Variant] = {}
  for variant in variants:
    other = seen.setdefault(variant.slug.lower(), variant)
    if other is not variant and other.name == variant.name:
      raise ValueError(f'config.compare.variants has {variant.name!r} twice; once is enough, and other fields need '
                       'another name')
    if other is not variant:
      raise ValueError(f'config.compare.variants: {other.name!r} and {variant.name!r} would share the folder '
                       f'{variant.slug}; rename one of them')


def equal_compute_variants(config: ConfigDict, plain: Variant, own: float, others: Sequence[float]) -> list[Variant]:
  """Plain fine-tuning with as many images through the network as others have, once for each distinct factor.

  Args:
    config: of the comparison.
    plain: the variant that is trained longer.
    own: its images per step.
    others: those of the variants that it is compared with, with each combination of values that they try.
  """
  # Nearly equal ones are one.
  factors = sorted({factor for other in others if (factor := round(other / own, 2)) > _EQUAL})
  variants = []
  for factor in factors:
    times = f' x{factor:g}' if len(factors) > 1 else ''
    fields = {**plain.fields, **_longer(config, plain, factor)}
    # The folder does not depend on how many factors there are.
    variants.append(dataclasses.replace(plain, name=f'{plain.name}, {EQUAL_COMPUTE}{times}', fields=fields,
                                        slug=f'{plain.slug}-equal-compute-x{factor:g}'))
  return variants


def compared_with(config: ConfigDict, variants: Sequence[Variant]) -> dict[str, list[Variant]]:
  """The plain variants that differ from the first one in `config.compare.axis` alone, by name, and what each is
  compared with: all variants, or those of its value where the axis means something to plain fine-tuning too.
  """
  axis, fields = config.compare.axis, flat(config.to_dict())
  value = lambda variant: variant.fields.get(axis, fields.get(axis))
  off_axis = lambda variant: {name: value for name, value in variant.fields.items() if name != axis}
  of_source = axis.partition('.')[0] in _OF_SOURCE
  plain = [variant for variant in variants if off_axis(variant) == off_axis(variants[0])]
  return {one.name: [other for other in variants if not axis or of_source or value(other) == value(one)]
          for one in plain}


def cell_config(config: ConfigDict, cell: Cell) -> ConfigDict:
  """The config of one fine-tuning; it depends on nothing but its variant, its seed and what all variants share."""
  shared = {name: value for name, value in config.to_dict().items() if name not in _ELSEWHERE}
  own = ConfigDict(nested(flat(shared) | dict(cell.variant.fields) | dict(cell.tuned)))
  own.job, own.seed, own.embeddings_dir = 'finetune', cell.seed, ''
  if own.model.weights != 'pretrain':
    del own['pretrain']
  return own


@dataclasses.dataclass(frozen=True)
class _Entry:
  """An entry of `config.compare.variants`: its name, its fields, and the methods that its short form adds."""
  name: str
  fields: Mapping[str, Any]
  methods: Sequence[str] = ()


def _parsed(entry: Any) -> _Entry:
  if not isinstance(entry, str):
    return _Entry(str(entry[0]), entry[1])
  method, *added = entry.split('+')
  name = '+'.join((PLAIN if method == 'none' else method, *added))
  return _Entry(name, {'selection.method': method}, added)


def _variant(config: ConfigDict, entry: _Entry, named: set[str]) -> Variant:
  """The variant of an entry; `named` are the methods that any entry adds."""
  fields = {**_switches(entry.methods, named, config.methods.to_dict()), **entry.fields}
  tune = fields.pop(_TUNE, config.compare.tune)
  where = f'config.compare.variants, {entry.name!r}'
  _check_fields(where, fields)
  check_field(f'{where}: {_TUNE}', tune, TUNE)
  slug = re.sub(r'[^\w.+-]+', '-', entry.name).strip('-.')[:80] or 'variant'
  if config.model.weights == 'pretrain' and (other := [name for name in fields if name in _OF_NETWORK]):
    raise ValueError(f'{where} sets {other[0]}, and config.model.weights is \'pretrain\', which is done once for all '
                     'variants; pre-train with --config=configs/pretrain.py and give its workdir')
  variant = Variant(entry.name, slug, fields)
  return dataclasses.replace(variant, combinations=_combinations(config, variant, tune))


def _check_fields(where: str, fields: Mapping[str, Any]) -> None:
  """Raises ValueError for fields that a variant cannot set, or values that they cannot have."""
  for path, value in fields.items():
    _check_known(where, path)
    if path in FIELDS:
      check_field(f'{where}: {path}', value, FIELDS[path])


def _check_known(where: str, path: str) -> None:
  """Raises ValueError for a field that a variant cannot set."""
  known = [name for name in defaults() if name.partition('.')[0] not in (*_ELSEWHERE, *_SHARED)]
  if path not in known:
    group = [name for name in known if name.startswith(f'{path.rpartition(".")[0]}.')]
    top = sorted({name.partition('.')[0] for name in known})
    raise ValueError(f'{where}: there is no field {path!r} that a variant can set; known: {", ".join(group or top)}')


def _switches(added: Sequence[str], named: set[str], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Fields of the fine-tuning methods that any short form names: off except for those `added` in this one.

  These have the fields of `settings` where they switch it on, else the published ones. Other methods are as in the
  config.
  """
  if unknown := sorted(name for name in named if name not in METHODS):
    raise ValueError(f'config.compare.variants names the fine-tuning method {unknown[0]!r}; known: '
                     f'{", ".join(METHODS)} (and it is written after a selection: none+l2_sp)')
  fields: dict[str, Any] = {}
  for name in sorted(named):
    method = METHODS[name]
    switch = dataclasses.fields(method)[0]
    values: Mapping[str, Any] = {switch.name: switch.default}
    if name in added:
      values = settings[name] if method(**settings[name]).active else method.published
    fields |= {f'methods.{name}.{field}': value for field, value in values.items()}
  return fields


def _combinations(config: ConfigDict, variant: Variant, tune: Sequence[Any]) -> list[dict[str, Any]]:
  """The combinations of values to try for a variant; as many as `config.compare.trials` says, the same in each start.
  """
  fields = flat(config.to_dict()) | dict(variant.fields)
  choices = {field: [value for k, value in enumerate(values) if value not in values[:k]]
             for field, values in tune if _matters(field, fields)}
  where = f'config.compare.tune for {variant.name!r}'
  for field, values in choices.items():
    for value in values:
      _check_fields(where, {field: value})
  found = [dict(zip(choices, values)) for values in itertools.product(*choices.values())]
  if config.compare.trials and config.compare.trials < len(found):
    chosen = np.random.default_rng(0).permutation(len(found))[:config.compare.trials]
    found = [found[k] for k in sorted(chosen.tolist())]
  return found


def _matters(field: str, fields: Mapping[str, Any]) -> bool:
  """Whether a field changes anything for a variant with these fields."""
  group, _, name = field.partition('.')
  if group in _OF_SOURCE and fields['selection.method'] == 'none':
    return False
  if group == 'methods':
    method = name.partition('.')[0]
    settings = {path.rpartition('.')[2]: value for path, value in fields.items()
                if path.startswith(f'methods.{method}.')}
    return method not in METHODS or METHODS[method](**settings).active
  return True


def _longer(config: ConfigDict, plain: Variant, factor: float) -> dict[str, Any]:
  """The length of a training times a factor."""
  fields = flat(config.to_dict()) | dict(plain.fields)
  if fields['train.steps']:
    return {'train.steps': round(factor * fields['train.steps'])}
  return {'train.epochs': factor * fields['train.epochs']}


def is_plain(settings: finetune.Settings) -> bool:
  """Whether a variant trains on the target alone."""
  return not settings.selection.used
