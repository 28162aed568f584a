"""Arguments become the config that flags would have made, and messages name arguments."""

import pathlib
import re

import numpy as np
import pytest

from ft_jax import arguments, config


def made(**given):
  return arguments.make_config('default', 'finetune', given)


def test_arguments_are_the_fields_of_the_config():
  expected = config.get_config()
  expected.seed = 3
  expected.target.name = 'folder:photos'
  expected.train.epochs = 20.0
  expected.train.milestones = (0.5,)
  expected.model.name = 'resnet18'
  expected.methods.l2_sp.weight = 0.01
  expected.methods.bss.weight = 0.02
  expected.methods.self_label.enabled = True
  expected.embeddings_dir = 'cache'
  given = made(seed=np.int64(3), target={'name': 'folder:photos'}, train={'epochs': 20, 'milestones': [0.5]},
               model='resnet18', methods={'l2_sp': 0.01, 'bss': {'weight': 0.02}, 'self_label': True},
               embeddings_dir=pathlib.Path('cache'))
  assert given.to_dict() == expected.to_dict()


def test_the_config_that_they_change_has_a_name():
  assert arguments.make_config('pets', 'finetune', {'seed': 1}).target.metric == 'mean_per_class'
  with pytest.raises(ValueError, match="^config 'pretrain' is for job pretrain; expected one for finetune$"):
    arguments.make_config('pretrain', 'finetune', {})


@pytest.mark.parametrize('name,message', [
    (None, 'config is None; expected the name of a config, such as pets, or the path of a file'),
    ('pet', "config 'pet': there is no file pet; did you mean 'pets'?; known configs: "),
    ('pets:x', "config 'pets:x': unknown recipe 'x'; expected :supervised or :mocov2"),
    ('export:x', "config 'export:x': this config takes no argument after a colon")])
def test_configs_that_do_not_exist(name, message):
  with pytest.raises(ValueError, match=f'^{re.escape(message)}'):
    arguments.make_config(name, 'finetune', {})


def test_a_pretraining_has_no_target():
  with pytest.raises(TypeError, match=r"^pretrain\(\) has no argument 'target'; .*known: workdir, weights, config, "):
    arguments.make_config('pretrain', 'pretrain', {'target': {'name': 'folder:photos'}})


@pytest.mark.parametrize('given,message', [
    ({'train': {'epochs': -1}}, r"train\['epochs'\] is -1; expected a number from 0"),
    ({'train': {'epochs': 'many'}}, r"train\['epochs'\] is 'many'; expected a number"),
    ({'train': {'batch_size': 2.5}}, r"train\['batch_size'\] is 2.5; expected a whole number"),
    ({'train': 5}, 'train is 5; expected a dict of its fields: accumulate_steps, batch_size, '),
    ({'train': {'epoch': 1}}, r"train has no field 'epoch'; did you mean 'epochs'\?; known: accumulate_steps, "),
    ({'train': {'clip': 1.0}}, r"train\['clip'\] is now called train\['clip_norm'\]"),
    ({'methods': {'l2sp': 1}}, r"methods has no field 'l2sp'; did you mean 'l2_sp'\?; known: "),
    ({'methods': {'l2_sp': {'beta': 1.0}}}, r"methods\['l2_sp'\] has no field 'beta'; known: "),
    ({'methods': {'l2_sp': 'strong'}}, r"methods\['l2_sp'\]\['weight'\] is 'strong'; expected"),
    ({'model': {'weights': 3}}, 'weights is 3; expected text'),
    ({'target': {'name': ['photos']}}, r"target is \['photos'\]; expected text"),
    ({'train': {'steps': np.zeros((40, 2))}}, r"train\['steps'\] is array\(\[\[0\., 0\.\], \[0"),
    ({'seed': -1}, 'seed is -1; expected a whole number from 0')])
def test_wrong_values_are_refused(given, message):
  with pytest.raises(ValueError, match=f'^{message}'):
    made(**given)


@pytest.mark.parametrize('given,message', [
    ({'sead': 1}, r"finetune\(\) has no argument 'sead'; did you mean 'seed'\?; known: workdir, weights, config, "),
    ({'predict': {}}, r"finetune\(\) has no argument 'predict'; known: "),
    ({'weigths': ''}, r"finetune\(\) has no argument 'weigths'; did you mean 'weights'\?; known: "),
    ({'epochs': 20}, r"finetune\(\) has no argument 'epochs'; did you mean train={'epochs': ...}\?; known: "),
    ({'temperature': 20},
     r"finetune\(\) has no argument 'temperature'; did you mean methods={'\w+': {'temperature': ...}}\?")])
def test_arguments_that_do_not_exist(given, message):
  with pytest.raises(TypeError, match=f'^{message}'):
    made(**given)


@pytest.mark.parametrize('message,expected', [
    ('config.train.epochs is -1', "train['epochs'] is -1"),
    ('train.steps and train.epochs are both 0', "train['steps'] and train['epochs'] are both 0"),
    ('config.source.name is empty, or use --config.selection.method=none.',
     "source is empty, or use selection={'method': 'none'}."),
    ('(--config.selection.by=cluster --config.selection.clusters=...)',
     "(selection={'by': 'cluster'} selection={'clusters': ...})"),
    ('use --config.model.weights= for a fresh network', "use weights='' for a fresh network"),
    ('--config.target.without="(\'a\', \'b\')"', "target={'without': ('a', 'b')}"),
    ("--config.compile_cache='' goes without", "compile_cache='' goes without"),
    ('small targets --config.data.cache=true', "small targets data={'cache': True}"),
    ('methods.fixmatch and --config.methods.fixmatch.weight=1',
     "methods['fixmatch'] and methods={'fixmatch': {'weight': 1}}"),
    ('give another --workdir; the same command resumes', 'give another workdir; the same call resumes'),
    ('give the run, such as --workdir=runs/pets', "give the run, such as workdir='runs/pets'"),
    ('no config.json of one; see ft_jax/config.py', 'no config.json of one; see ft_jax/config.py'),
    ('config.predict.images: there is no file', 'images: there is no file'),
    ('runs/train.steps/selection.json, see main.py', 'runs/train.steps/selection.json, see main.py')])
def test_messages_name_arguments(message, expected):
  assert arguments.in_arguments(message) == expected
