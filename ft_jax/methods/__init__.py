"""Published fine-tuning methods, one file each. Any of them are switched on together; the table is at the foot."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import linen as nn

from ft_jax.methods.base import LossTerm, Method, Needs, Plan, SetupContext, State, StepContext
from ft_jax.methods.bi_tuning import BiTuning
from ft_jax.methods.bss import BSS
from ft_jax.methods.co_tuning import CoTuning
from ft_jax.methods.cutmix import CutMix
from ft_jax.methods.delta import Delta
from ft_jax.methods.fixmatch import FixMatch
from ft_jax.methods.l2_sp import L2SP
from ft_jax.methods.label_smoothing import LabelSmoothing
from ft_jax.methods.layerwise import Layerwise
from ft_jax.methods.lwf import LwF
from ft_jax.methods.mixup import Mixup
from ft_jax.methods.self_label import SelfLabel
from ft_jax.methods.stoch_norm import StochNorm
from ft_jax.models.network import Network
from ft_jax.settings import check_field, like

__all__ = ['METHODS', 'LossTerm', 'Method', 'Needs', 'Plan', 'SetupContext', 'State', 'StepContext', 'active', 'all_needs', 'check', 'defaults',
           'norm']


def defaults() -> dict[str, dict[str, Any]]:
  """The fields of every method and their values: all are off."""
  return {name: dataclasses.asdict(method()) for name, method in METHODS.items()}


def active(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Method]:
  """The methods that are switched on, in the order of the table.

  Args:
    settings: fields by method, as `config.methods`; what is left out has its default.

  Raises:
    ValueError: a method or a field that is not known, a value of another type, or methods that cannot be together.
  """
  for name, fields in settings.items():
    if name not in METHODS:
      raise ValueError(f'there is no method {name!r}; known: {", ".join(METHODS)}')
    known = {field.name: field.default for field in dataclasses.fields(METHODS[name])}
    for key, value in fields.items():
      if key not in known:
        raise ValueError(f'methods.{name} has no field {key!r}; known: {", ".join(known)}')
      check_field(f'methods.{name}.{key}', value, like(known[key]))
  made = {name: METHODS[name](**{key: tuple(value) if isinstance(value, list) else value for key, value in settings[name].items()})
          for name in METHODS if name in settings}
  made = {name: method for name, method in made.items() if method.active}
  for one in made:
    for other, reason in made[one].excludes.items():
      if other in made:
        raise ValueError(f'methods.{one} and methods.{other} cannot be together: {reason}')
  return made


def check(methods: Mapping[str, Method], plan: Plan) -> None:
  """Raises ValueError for methods whose settings cannot be right, or that a run has not what they need."""
  norm(methods)
  for name, method in methods.items():
    switch = dataclasses.fields(method)[0].name
    if getattr(method, switch) is not True and isinstance(getattr(method, switch), (int, float)) and getattr(method, switch) < 0:
      raise ValueError(f'methods.{name}.{switch} is {getattr(method, switch)}; expected a number above 0, or 0 to leave the method out')
    needs = method.needs(plan.model)
    if not plan.weights and (needs.start or needs.teacher or needs.classifier):
      what = 'a pre-trained classifier' if needs.classifier else 'pre-trained weights'
      raise ValueError(f'methods.{name} needs {what}, but config.model.weights is empty')
    method.check(plan)


def norm(methods: Mapping[str, Method]) -> Callable[..., nn.Module] | None:
  """The normalisation layer that replaces BatchNorm, or None; raises ValueError where two methods have one."""
  found = {name: layer for name, method in methods.items() if (layer := method.norm()) is not None}
  if len(found) > 1:
    both = ' and '.join(f'methods.{name}' for name in found)
    raise ValueError(f'{both} cannot be together: each replaces BatchNorm by a normalisation layer of its own; switch on one '
                     'of them only')
  return next(iter(found.values()), None)


def all_needs(methods: Mapping[str, Method], model: Network) -> Needs:
  """What all of them together need."""
  each = [method.needs(model) for method in methods.values()]
  joined = [[getattr(needs, field) for needs in each] for field in Needs._fields]
  return Needs(*(any(values) if isinstance(default, bool) else tuple(dict.fromkeys(item for value in values for item in value))
                 for values, default in zip(joined, Needs())))


# Labels go through `relabel` in this order.
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
}
