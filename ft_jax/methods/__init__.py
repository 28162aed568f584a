"""Published methods, one file each. Any set of those for fine-tuning can be switched on together; the table is at the
foot.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import itertools
from typing import Any, TypeVar

from flax import linen as nn

from ft_jax.methods.base import LossTerm, Method, Needs, SetupContext, State, StepContext, View
from ft_jax.methods.bi_tuning import BiTuning
from ft_jax.methods.bss import BSS
from ft_jax.methods.byol import BYOL
from ft_jax.methods.co_tuning import CoTuning
from ft_jax.methods.cutmix import CutMix
from ft_jax.methods.delta import Delta
from ft_jax.methods.fixmatch import FixMatch
from ft_jax.methods.l2_sp import L2SP
from ft_jax.methods.label_smoothing import LabelSmoothing
from ft_jax.methods.layerwise import Layerwise
from ft_jax.methods.lwf import LwF
from ft_jax.methods.mixup import Mixup
from ft_jax.methods.moco import MoCo
from ft_jax.methods.self_label import SelfLabel
from ft_jax.methods.stoch_norm import StochNorm
from ft_jax.models.network import Network
from ft_jax.settings import check_field, like

__all__ = ['METHODS', 'LossTerm', 'Method', 'Needs', 'SetupContext', 'State', 'StepContext', 'View', 'active',
           'all_needs', 'check', 'check_job', 'defaults', 'norm']

T = TypeVar('T')


def defaults() -> dict[str, dict[str, Any]]:
  """The fields of every method with their default values, which switch all of them off."""
  return {name: dataclasses.asdict(method()) for name, method in METHODS.items()}


def active(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Method]:
  """The methods that are switched on, in the order of the table.

  Args:
    settings: fields by method, as `config.methods`; fields that are left out have their defaults.

  Raises:
    ValueError: an unknown method or field, a value of another type, or methods that cannot be combined.
  """
  for name, fields in settings.items():
    if name not in METHODS:
      raise ValueError(f'there is no method {name!r}; known: {", ".join(METHODS)}')
    known = {field.name: field.default for field in dataclasses.fields(METHODS[name])}
    for key, value in fields.items():
      if key not in known:
        raise ValueError(f'methods.{name} has no field {key!r}; known: {", ".join(known)}')
      check_field(f'methods.{name}.{key}', value, like(known[key]))
  methods = {name: _made(METHODS[name], settings[name]) for name in METHODS if name in settings}
  methods = {name: method for name, method in methods.items() if method.active}
  for name, method in methods.items():
    for other, reason in method.excludes.items():
      if other in methods:
        raise ValueError(f'methods.{name} and methods.{other} cannot be combined: {reason}')
  return methods


def check_job(methods: Mapping[str, Method], job: str) -> None:
  """Raises ValueError for methods of the other kind: some pre-train on the source alone, the others fine-tune.

  Args:
    methods: that are switched on, by name.
    job: pretrain or finetune.
  """
  for name, method in methods.items():
    if method.pretrains != (job == 'pretrain'):
      kind = 'pre-training without labels (--config.job=pretrain)' if method.pretrains else 'fine-tuning'
      raise ValueError(f'config.methods.{name} is switched on, which is for {kind} and not for job {job}')


def _made(method: type[Method], fields: Mapping[str, Any]) -> Method:
  return method(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def check(methods: Mapping[str, Method], context: SetupContext) -> None:
  """Raises ValueError for methods with settings that cannot be right, or that need something that the run does not
  have.
  """
  norm(methods)
  all_needs(methods, context.model)
  for name, method in methods.items():
    switch, value = method.switch
    if isinstance(value, (int, float)) and value < 0:
      raise ValueError(f'methods.{name}.{switch} is {value}; expected a number above 0, or 0 to leave the method out')
    needs = method.needs(context.model)
    if not context.pretrained and (needs.start or needs.teacher or needs.classifier):
      what = 'a pre-trained classifier' if needs.classifier else 'pre-trained weights'
      raise ValueError(f'methods.{name} needs {what}, but config.model.weights is empty')
    method.check(context)


def norm(methods: Mapping[str, Method]) -> Callable[..., nn.Module] | None:
  """The normalisation layer that replaces BatchNorm, or None; raises ValueError where two methods have one."""
  found = {name: layer for name, method in methods.items() if (layer := method.norm()) is not None}
  if len(found) > 1:
    both = ' and '.join(f'methods.{name}' for name in found)
    raise ValueError(f'{both} cannot be combined: each replaces BatchNorm with a normalisation layer of its own; '
                     'switch on only one of them')
  return next(iter(found.values()), None)


def all_needs(methods: Mapping[str, Method], model: Network) -> Needs:
  """What all of them together need.

  Raises:
    ValueError: two methods declare a view of the same name with different recipes.
  """
  each = {name: method.needs(model) for name, method in methods.items()}
  needs = each.values()
  declared: dict[str, tuple[str, View]] = {}
  for name, own in each.items():
    for view in own.all_views:
      other, same = declared.setdefault(view.path, (name, view))
      if view != same:
        raise ValueError(f'methods.{other} and methods.{name} cannot be combined: each needs a view {view.path!r}, '
                         'with different recipes')
  return Needs(
      start=any(own.start for own in needs),
      teacher=any(own.teacher for own in needs),
      classifier=any(own.classifier for own in needs),
      trained_classifier=any(own.trained_classifier for own in needs),
      layers=_distinct(own.layers for own in needs),
      views=_distinct(own.views for own in needs),
      forwarded_views=_distinct(own.forwarded_views for own in needs))


def _distinct(several: Iterable[tuple[T, ...]]) -> tuple[T, ...]:
  return tuple(dict.fromkeys(itertools.chain.from_iterable(several)))


# Methods that relabel do so in this order.
METHODS: dict[str, type[Method]] = {
    'self_label': SelfLabel,
    'l2_sp': L2SP,
    'layerwise': Layerwise,
    'delta': Delta,
    'bss': BSS,
    'co_tuning': CoTuning,
    'lwf': LwF,
    'stoch_norm': StochNorm,
    'bi_tuning': BiTuning,
    'fixmatch': FixMatch,
    'label_smoothing': LabelSmoothing,
    'mixup': Mixup,
    'cutmix': CutMix,
    'moco': MoCo,
    'byol': BYOL,
}
