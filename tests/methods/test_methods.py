"""All methods together: each pair trains or says why not, each state survives a restart, each field is documented, none
costs nothing.
"""

import dataclasses
import inspect
import itertools
import re
from typing import Any

import jax
import method_case
import numpy as np
import pytest

from ft_jax import methods
from ft_jax.methods import METHODS
from ft_jax.models import resnet
from ft_jax.models.batch_norm import BatchNorm
from ft_jax.training import step
from ft_jax.training.checkpoints import Checkpoints

FINE_TUNING = [name for name, method in METHODS.items() if not method.pretrains]
PAIRS = list(itertools.combinations(FINE_TUNING, 2))


def published(*names: str, **fields: Any) -> dict[str, methods.Method]:
  """Methods as published, with what a run of a few steps needs in `fields` of each."""
  return methods.active({name: {**METHODS[name].published, **SHORT.get(name, {}), **fields} for name in names})


# What is published in epochs and in hundreds of images, at the length of these runs.
SHORT: dict[str, dict[str, Any]] = {
    'self_label': {'reweight_epoch': 1, 'correct_epoch': 2, 'threshold': 0.5}, 'delta': {'attention_images': 8},
    'bi_tuning': {'queue': 4, 'projection': 8}}


def tiny() -> resnet.ResNet:
  """One stage of one block: what is compiled a hundred times."""
  return resnet.ResNet((1,), resnet.BasicBlock, heads={}, width=4, stem='3x3')


@pytest.mark.parametrize('names', PAIRS, ids='+'.join)
def test_every_pair_trains_or_says_why_not(names):
  """Twelve steps on one batch of real images: the cross-entropy of the target falls, and everything stays finite."""
  try:
    active = published(*names)
  except ValueError as error:
    assert re.fullmatch(rf'methods\.({"|".join(names)}) and methods\.({"|".join(names)}) cannot be combined: .{{20,}}',
                        str(error))
    return
  state, history = method_case.run(active, steps=12, model=tiny(), rate=0.02)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
  losses = [metrics['loss_target'] for metrics in history]
  assert np.mean(losses[-3:]) < np.mean(losses[:3]), losses


def groups() -> list[list[str]]:
  """The methods in a few sets whose members can be combined."""
  found: list[list[str]] = []
  for name in FINE_TUNING:
    for group in found:
      try:
        published(*group, name)
      except ValueError:
        continue
      group.append(name)
      break
    else:
      found.append([name])
  return found


@pytest.mark.slow
@pytest.mark.parametrize('names', groups(), ids='+'.join)
def test_interrupted_equals_uninterrupted(names, tmp_path):
  """Two steps, a checkpoint, and two steps more are four steps, bit for bit: parameters and the state of every method.
  """
  active = published(*names)
  batches = lambda first: lambda number: method_case.batch(seed=first + number)
  whole, _ = method_case.run(active, steps=4, batches=batches(0))
  state, _ = method_case.run(active, steps=2, batches=batches(0))
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(2, state, {'score': 0.0, 'loss': 0.0})
  checkpoints.wait()
  saved = checkpoints.structure(2)
  restored = checkpoints.restore(2, state.replace(methods={name: saved['methods'].get(name, {}) for name in names}))
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  again, _ = method_case.run(active, steps=2, state=restored, batches=batches(2))
  jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_a_method_without_weight_is_none_at_all():
  """Every switch at its default, or at zero: no method is active, so the step is the plain one."""
  assert methods.active(methods.defaults()) == {}
  for name, fields in methods.defaults().items():
    switch, value = next(iter(fields.items()))
    assert not value, (name, switch)
    assert methods.active({name: {**METHODS[name].published, switch: value}}) == {}


@pytest.mark.parametrize('name', METHODS)
def test_every_method_is_documented(name):
  """Its class says the formula and where it comes from, and every field what it is."""
  method = METHODS[name]
  assert published(name)[name].active
  assert len(inspect.getdoc(method)) > 60 and method.__doc__ != methods.Method.__doc__
  source = inspect.getsource(method)
  for field in dataclasses.fields(method):
    assert re.search(rf'^  {field.name}: .*  # .{{5,}}$', source, re.M), field.name


def test_a_method_of_the_other_job_is_refused():
  """One that pre-trains would have no loss to add in a fine-tuning, and the others no labels in a pre-training."""
  for names, job in ((('l2_sp', 'bss'), 'finetune'), (('moco',), 'pretrain'), ((), 'pretrain')):
    methods.check_job(published(*names), job)
  with pytest.raises(ValueError, match=r'config.methods.moco is switched on, which is for pre-training without labels '
                                       r'\(--config.job=pretrain\) and not for job finetune'):
    methods.check_job(published('moco', 'l2_sp'), 'finetune')
  with pytest.raises(ValueError, match='config.methods.l2_sp is switched on, which is for fine-tuning and not for job '
                                       'pretrain'):
    methods.check_job(published('l2_sp'), 'pretrain')
  with pytest.raises(ValueError, match='methods.moco and methods.byol cannot be combined: each is a whole'):
    published('moco', 'byol')


def test_wrong_settings_are_named():
  with pytest.raises(ValueError, match=r"methods.l2_sp has no field 'strength'; known: weight, head_weight"):
    methods.active({'l2_sp': {'strength': 1.0}})
  with pytest.raises(ValueError, match="there is no method 'l2sp'; known: .*l2_sp"):
    methods.active({'l2sp': {'weight': 1.0}})
  with pytest.raises(ValueError, match='methods.l2_sp.weight is nan; expected a finite number'):
    methods.active({'l2_sp': {'weight': float('nan')}})


@dataclasses.dataclass(frozen=True)
class OtherNorm(methods.Method):
  """A method with a normalisation layer of its own."""
  enabled: bool = True

  def norm(self):
    return BatchNorm


def test_two_normalisation_layers_are_refused():
  """Only one can take BatchNorm's place; the other would be left out without a word."""
  both = {**published('stoch_norm'), 'other_norm': OtherNorm()}
  context = method_case.context(method_case.network())
  methods.check(published('stoch_norm'), context)
  with pytest.raises(ValueError,
                     match='methods.stoch_norm and methods.other_norm cannot be combined: each replaces BatchNorm'):
    methods.check(both, context)
  with pytest.raises(ValueError, match='methods.stoch_norm and methods.other_norm'):  # where nothing checked them
    step.make_step(method_case.network(), None, {'target': 1.0}, methods=both)


@pytest.mark.parametrize('name', METHODS)
def test_hooks_are_declared(name):
  """The step asks `mixes` and `softens`; a hook that is not declared would never be called."""
  method = METHODS[name]
  assert method.mixes == (method.mix is not methods.Method.mix)
  assert method.softens == (method.soften is not methods.Method.soften)


@dataclasses.dataclass(frozen=True)
class OtherView(methods.Method):
  """A method that wants another view of source images under the name that FixMatch uses."""
  enabled: bool = True

  def needs(self, model):
    return methods.Needs(views=(methods.View('source', 'strong', cutout=0.1),))


def test_two_recipes_of_one_view_are_refused():
  """A batch has one array of that name."""
  both = {**published('fixmatch'), 'other_view': OtherView()}
  with pytest.raises(ValueError,
                     match='methods.fixmatch and methods.other_view cannot be combined: each needs a view '
                           "'source/strong'"):
    methods.check(both, method_case.context(method_case.network()))


def test_views_differ_by_their_recipe_alone():
  assert methods.View('target', 'key').recipe == {}
  view = methods.View('source', 'strong', randaugment=2, cutout=0.0)
  assert view.recipe == {'randaugment': 2, 'cutout': 0.0} and view.path == 'source/strong'
  needs = methods.Needs(views=(view,), forwarded_views=(view, methods.View('target', 'key')))
  assert needs.all_views == (view, methods.View('target', 'key'))
