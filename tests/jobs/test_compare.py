"""A comparison switches on what its entries name, as published or as the config has it."""

import pytest

from configs import default
from ft_jax import methods
from ft_jax.jobs import compare


def test_entries_name_a_selection_and_methods():
  config = default.get_config()
  config.methods.l2_sp.head_weight = 0.5
  config.methods.bss.weight = 0.3
  config.compare.methods = ('none', 'uot+l2_sp', 'none+lwf')
  one = compare.config_of_run(config, 'uot+l2_sp', 3)
  assert (one.selection.method, one.seed, one.methods.l2_sp.weight, one.methods.l2_sp.head_weight) == ('uot', 3, 0.01,
                                                                                                       0.5)
  config.methods.l2_sp.weight = 0.2
  assert compare.config_of_run(config, 'none+l2_sp', 0).methods.l2_sp.weight == 0.2
  for entry, expected in (('none', ['bss']), ('uot+l2_sp', ['l2_sp', 'bss']), ('none+lwf', ['bss', 'lwf'])):
    on = methods.active(compare.config_of_run(config, entry, 0).methods.to_dict())
    assert list(on) == expected, 'what any entry names is off in the others, and all else as the config has it'
  config.compare.methods = ('none', 'none+l2')
  with pytest.raises(ValueError, match="config.compare.methods names the fine-tuning method 'l2'; known: .*l2_sp"):
    compare.config_of_run(config, 'none+l2', 0)
