"""The measurements that benchmarks/results.py prints, for 2 CPU cores: 48-pixel images, a quarter-width ResNet-18.

All of them, resumable, with the results copied to docs/results/ (many hours):

    python benchmarks/results.py --run --data_dir=DATA

or one after the other, the starts first:

    python main.py --config=configs/results.py:supervised --config.data_dir=DATA --workdir=runs/results/supervised
    python main.py --config=configs/results.py:main/supervised/caltech101-5 --config.data_dir=DATA --workers=2 \
        --workdir=runs/results/main/supervised/caltech101-5

The argument is a pre-training (`supervised`, `moco`, `byol`, `long`), `study`, or <experiment>/<start>/<target>: a row
of EXPERIMENTS, a row of STARTS, and a target with the number of its training images a class. DATA holds folders of
<split>/<class>/<image>: tiny_imagenet (the source), caltech101, cub50, pets. The settings are ours; the numbers compare
methods at this scale and say nothing about the papers' own.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import default, pretrain

Variant = tuple[str, Mapping[str, Any]]

FOLDER = 'runs/results'  # of the workdirs

PLAIN: Variant = ('plain', {'selection.method': 'none'})
RANDOM: Variant = ('random', {'selection.method': 'random'})
UOT: Variant = ('uot', {'selection.method': 'uot'})
SELF_LABEL = {'methods.self_label.enabled': True}
# The published radii are of other networks, so these are tried on val.
LAYERWISE = {'methods.layerwise.distance': 'frobenius', 'methods.layerwise.growth': 1.0, 'compare.tune': (
    ('methods.layerwise.radius', (0.3, 1.0, 3.0)), ('methods.layerwise.head_radius', (3.0, 10.0)))}
# Steps of 32 target images, enough for plain fine-tuning to classify nearly all of its training images correctly.
STEPS = {'pets-5': 250, 'caltech101-5': 300, 'caltech101-15': 600, 'caltech101-30': 1000, 'cub50-10': 300,
         'cub50-30': 600}


def get_config(what: str = 'supervised') -> ConfigDict:
  """The config of a pre-training, of the study, or of an experiment; see above."""
  if what in PRETRAININGS:
    return _pretraining(what)
  if what == 'study':
    return _study()
  parts = what.split('/')
  if len(parts) != 3 or parts[0] not in EXPERIMENTS or parts[1] not in STARTS or parts[2] not in STEPS:
    raise ValueError(f'{what!r}; expected {", ".join(PRETRAININGS)}, study, or <experiment>/<start>/<target> of '
                     f'{", ".join(EXPERIMENTS)} / {", ".join(STARTS)} / {", ".join(STEPS)}')
  return _experiment(*parts)


def _pretraining(kind: str) -> ConfigDict:
  config = pretrain.get_config('' if kind == 'long' else kind) if kind in ('moco', 'byol') else default.get_config()
  _small(config)
  config.job = 'pretrain'
  config.train.batch_size = 128
  config.train.epochs = 20.0
  config.train.keep_epochs = ()
  config.train.optimizer = 'sgd'
  if kind in ('moco', 'byol'):  # short for a training without labels: momenta are lower and rates higher than published
    config.train.learning_rate = 0.06
    config.train.weight_decay = 5e-4
    config.methods.update(SHORT[kind])
    return config
  config.augment.scale = (0.3, 1.0)
  config.train.learning_rate = 0.1
  config.train.learning_rate_groups = (('.*', 1.0),)
  config.train.schedule = 'cosine'
  config.train.warmup = 0.05
  config.train.weight_decay = 5e-4
  if kind == 'long':  # a third of the images, seen so often that the network knows nearly all of them by heart
    config.model.width = 32
    config.source.train = 'train[:33%]'
    config.augment.scale = (0.7, 1.0)
    config.train.epochs = 60.0
    config.train.weight_decay = 1e-4
    config.train.keep_epochs = (1, 2, 3, 5, 8, 12, 18, 25, 35, 45, 60)
  return config


def _small(config: ConfigDict) -> None:
  config.source.name = 'folder:tiny_imagenet'
  config.image_size = 48
  config.augment.short_side = 48
  config.augment.antialias = True
  config.model.name = 'resnet18'
  config.model.width = 16


def _tuning(config: ConfigDict, target: str) -> None:
  """The fine-tuning that experiments and study share; `target` is such as caltech101-5."""
  _small(config)
  config.augment.scale = (0.3, 1.0)
  name, _, per_class = target.partition('-')
  config.target.name = f'folder:{name}'
  config.target.train_per_class = int(per_class)
  config.data.cache = True
  config.train.batch_size = 32
  config.train.steps = STEPS[target]
  config.train.learning_rate = 0.03
  config.train.schedule = 'cosine'
  config.train.warmup = 0.05
  config.train.eval_every = 100


def _experiment(experiment: str, start: str, target: str) -> ConfigDict:
  config = default.get_config()
  _tuning(config, target)
  config.job = 'compare'
  config.selection.size = 20
  for field, value in STARTS[start].items():
    config.update_from_flattened_dict({field: value})
  for field, value in EXPERIMENTS[experiment].items():
    config.update_from_flattened_dict({field: value})
  if experiment == 'controls':
    other = f'{FOLDER}/main/{start}/cub50-10/cells/uot-seed-0/selection.json'
    config.compare.variants += (
        # As many target images as in the other variants, and as many images altogether as in joint training.
        _with(UOT, 'uot first, then plain', source_first=0.5, target_last=0.5, train__steps=2 * STEPS[target]),
        _with(UOT, 'what uot selects for cub50', selection__file=other))
  return config


def _study() -> ConfigDict:
  config = default.get_config()
  _tuning(config, 'pets-5')
  config.job = 'study'
  config.model.width = 32
  config.source.name = ''
  config.selection.method = 'none'
  config.checkpoints = f'{FOLDER}/long'
  config.target.train_per_class = 0
  config.study.targets = ('folder:caltech101', 'folder:cub50')
  config.train.batch_size = 64
  config.train.steps = 150
  config.train.eval_every = 50
  return config


SHORT: Mapping[str, Mapping[str, Any]] = {
    'moco': {'moco': {'queue': 4096, 'momentum': 0.99}},
    'byol': {'byol': {'hidden': 512, 'projection': 128, 'momentum': 0.99}},
}

PRETRAININGS = ('supervised', 'moco', 'byol', 'long')

STARTS: Mapping[str, Mapping[str, Any]] = {
    'random': {},
    'supervised': {'model.weights': f'{FOLDER}/supervised'},
    'moco': {'model.weights': f'{FOLDER}/moco'},
    'byol': {'model.weights': f'{FOLDER}/byol'},
    # ImageNet's own first three stages, full width: of torchvision's ResNet-18.
    'imagenet': {'model.weights': 'resnet18_in1k_stages123.safetensors', 'model.width': 64, 'model.stages': 3},
}

# Each variant tries four settings on val, with two seeds each: plain fine-tuning weight decay instead of lambda.
JOINT_TRIALS = (('train.learning_rate', (0.01, 0.03)), ('source_weight', (0.3, 1.0)))
PLAIN_TRIALS = (('train.learning_rate', (0.01, 0.03)), ('train.weight_decay', (1e-4, 1e-3)))
TUNED = {'compare.tune': JOINT_TRIALS, 'compare.tune_seeds': 2}
TUNED_PLAIN: Variant = ('plain', {'selection.method': 'none', 'compare.tune': PLAIN_TRIALS})


def _with(variant: Variant, name: str, **fields: Any) -> Variant:
  return name, {**variant[1], **{field.replace('__', '.'): value for field, value in fields.items()}}


def _curve(field: str, values: tuple[Any, ...], *variants: Variant) -> tuple[Variant, ...]:
  return tuple((f'{name} {value}', {**fields, field: value}) for value in values for name, fields in variants)


EXPERIMENTS: Mapping[str, Mapping[str, Any]] = {
    'main': {'compare.variants': (TUNED_PLAIN, RANDOM, UOT), 'compare.seeds': (0, 1, 2, 3, 4), **TUNED},
    'controls': {'compare.variants': (
        PLAIN, RANDOM, UOT,
        ('nearest', {'selection.method': 'nearest'}),
        ('least', {'selection.method': 'least'}),
        ('all', {'selection.method': 'all'}),
        _with(UOT, 'uot, source labels shuffled', source__shuffle_labels=True),
        _with(UOT, 'uot, target alone at the end', target_last=0.25),
        _with(UOT, 'uot, lambda falls to 0', source_weight_schedule='cosine'),
        _with(UOT, 'uot, BatchNorm by stream', model__batch_norm='per_stream'),
        _with(PLAIN, 'plain, head fitted again', refit_head=True),
        _with(UOT, 'uot, head fitted again', refit_head=True),
        _with(UOT, 'uot, copies of target images kept', source__duplicates='keep')), 'compare.seeds': (0, 1, 2)},
    'size': {'compare.variants': (PLAIN, *_curve('selection.size', (5, 10, 20, 50, 100), RANDOM, UOT)),
             'compare.axis': 'selection.size', 'compare.seeds': (0, 1, 2)},
    'lambda': {'compare.variants': (PLAIN, *_curve('source_weight', (0.1, 0.3, 1.0, 3.0), RANDOM, UOT)),
               'compare.axis': 'source_weight', 'compare.seeds': (0, 1, 2)},
    'mu': {'compare.variants': (PLAIN, *_curve('source_ratio', (1.0, 3.0, 9.0), RANDOM, UOT)),
           'compare.axis': 'source_ratio', 'compare.seeds': (0, 1, 2)},
    'images': {'compare.variants': _curve('target.train_per_class', (3, 5, 10, 20, 30), PLAIN, RANDOM, UOT),
               'compare.axis': 'target.train_per_class', 'compare.seeds': (0, 1, 2)},
    'steps': {'compare.variants': _curve('train.steps', (100, 200, 400, 800), PLAIN, RANDOM, UOT),
              'compare.axis': 'train.steps', 'compare.seeds': (0, 1, 2)},
    **{f'noise{percent}': {'noise.kind': 'symmetric', 'noise.rate': percent / 100, 'compare.variants': (
        PLAIN, ('self_label', {**PLAIN[1], **SELF_LABEL}), ('layerwise', {**PLAIN[1], **LAYERWISE}),
        ('both', {**PLAIN[1], **SELF_LABEL, **LAYERWISE}), UOT, ('uot + self_label', {**UOT[1], **SELF_LABEL}),
        ('uot + layerwise', {**UOT[1], **LAYERWISE}), ('uot + both', {**UOT[1], **SELF_LABEL, **LAYERWISE})),
        'compare.seeds': (0, 1, 2)} for percent in (20, 40, 60, 80)},
}
