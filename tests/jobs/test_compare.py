"""A comparison: its variants and their cells, what is chosen on val, what is run again and what is not."""

import pytest

from configs import default
from ft_jax import methods
from ft_jax.jobs.compare_variants import Cell, cell_config, declared_variants


def fine_tuning(config, number: int, seed: int = 0):
  """The config of the fine-tuning of a variant."""
  variant = declared_variants(config)[number]
  return cell_config(config, Cell(variant, seed, variant.combinations[0], trial=False))


def test_short_forms_name_a_selection_and_methods():
  config = default.get_config()
  config.methods.l2_sp.head_weight = 0.5
  config.methods.bss.weight = 0.3
  config.compare.variants = ('none', 'uot+l2_sp', 'none+lwf')
  one = fine_tuning(config, 1, 3)
  assert (one.selection.method, one.seed) == ('uot', 3)
  assert (one.methods.l2_sp.weight, one.methods.l2_sp.head_weight) == (0.01, 0.5)
  for number, expected in enumerate((['bss'], ['l2_sp', 'bss'], ['bss', 'lwf'])):
    on = methods.active(fine_tuning(config, number).methods.to_dict())
    assert list(on) == expected, 'what any entry names is off in the others, and all else as the config has it'
  config.methods.l2_sp.weight = 0.2
  config.compare.variants = ('none', 'none+l2_sp')
  assert fine_tuning(config, 1).methods.l2_sp.weight == 0.2
  config.compare.variants = ('none', 'none+l2')
  with pytest.raises(ValueError, match="config.compare.variants names the fine-tuning method 'l2'; known: .*l2_sp"):
    declared_variants(config)
