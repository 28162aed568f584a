"""The fields of a config by their path, such as `train.batch_size`, and their defaults."""

from collections.abc import Mapping
import json
from typing import Any


def flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """The fields of nested mappings by path: `{'train.batch_size': 256, ...}`."""
  fields = {}
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
  """Every field of configs/default.py and its value, by path, as JSON has it: tuples are lists."""
  from configs import default  # it imports ft_jax.methods

  return json.loads(json.dumps(flat(default.get_config().to_dict())))
