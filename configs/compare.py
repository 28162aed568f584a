"""Is joint training worth it for your own images? One command, about a hundred short trainings, one sentence of advice.

    python main.py --config=configs/compare.py --config.target.name=folder:/data/photos \
        --config.source.name=folder:/data/pool --config.model.weights=runs/pretrain --workdir=runs/worth --workers=2

`--workers` is the number of processes. The same command resumes, and adds seeds or variants to what is finished. Other
questions, each with a workdir of its own, are `configs/compare.py:controls`, `:levers`, `:size`, `:lambda`, `:mu`,
`:per_class` and `:steps`; docs/compare.md describes them. All fields of a fine-tuning can be set in addition, such as
--config.image_size=64 or --config.model.name=resnet50.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs import default

PLAIN = {'selection.method': 'none'}
RANDOM = {'selection.method': 'random'}
UOT = {'selection.method': 'uot'}
# Each variant tries six combinations of values on val.
RATES = ('train.learning_rate', (0.003, 0.01, 0.03))
WEIGHTS = ('source_weight', (0.3, 1.0))
PLAIN_TUNED = PLAIN | {'compare.tune': (('train.learning_rate', (0.001, 0.003, 0.006, 0.01, 0.03, 0.06)),)}


def get_config(question: str = 'main') -> ConfigDict:
  if question not in QUESTIONS:
    raise ValueError(f'configs/compare.py:{question} is not known; known: {", ".join(QUESTIONS)}')
  config = default.get_config()
  config.job = 'compare'
  config.model.name = 'resnet18'
  config.selection.size = 20
  config.train.batch_size = 64
  config.train.steps = 400
  config.train.schedule = 'cosine'
  config.train.warmup = 0.05
  config.compare.seeds = (0, 1, 2, 3, 4)
  config.compare.tune = (RATES, WEIGHTS)
  QUESTIONS[question](config)
  return config


def main(config: ConfigDict) -> None:
  """Selected classes, and random ones, against plain fine-tuning."""
  config.compare.variants = (('plain', PLAIN_TUNED), ('random', RANDOM), ('uot', UOT))


def controls(config: ConfigDict) -> None:
  """What the gain comes from. A selection of another target is one more: {'selection.file': its selection.json}."""
  config.compare.seeds = (0, 1, 2)
  config.compare.variants = (
      ('plain', PLAIN_TUNED), ('uot', UOT), ('random', RANDOM), ('least', {'selection.method': 'least'}),
      ('all', {'selection.method': 'all'}), ('uot, labels shuffled', UOT | {'source.shuffle_labels': True}),
      ('uot, copies kept', UOT | {'source.duplicates': 'keep'}),
      ('uot, sequential', UOT | {'source_first': 0.5, 'target_last': 0.5}),
      ('plain, head again', PLAIN_TUNED | {'refit_head': True}), ('uot, head again', UOT | {'refit_head': True}))


def levers(config: ConfigDict) -> None:
  """What may make joint training pay."""
  config.compare.seeds = (0, 1, 2)
  config.compare.variants = (
      ('plain', PLAIN_TUNED), ('uot', UOT), ('uot, own BatchNorm', UOT | {'model.batch_norm': 'per_stream'}),
      ('uot, falling weight', UOT | {'source_weight_schedule': 'linear'}),
      ('uot, target last', UOT | {'target_last': 0.3}), ('uot, mu 3', UOT | {'source_ratio': 3.0}))


def size(config: ConfigDict) -> None:
  """Accuracy against the number of classes, selected or random; sizes that the pool does not have are refused."""
  curve(config, 'selection.size', (5, 10, 20, 50), {'uot': UOT, 'random': RANDOM})


def weight(config: ConfigDict) -> None:
  """Accuracy against lambda, the weight of the source loss."""
  config.compare.tune = (RATES,)
  curve(config, 'source_weight', (0.1, 0.3, 1.0, 3.0), {'uot': UOT, 'random': RANDOM})
  config.compare.variants = (('plain', PLAIN), *config.compare.variants[1:])  # three trials, as all others have


def ratio(config: ConfigDict) -> None:
  """Accuracy against mu, source images per target image; equal compute has a variant for each."""
  curve(config, 'source_ratio', (1.0, 3.0, 9.0), {'uot': UOT, 'random': RANDOM})


def per_class(config: ConfigDict) -> None:
  """Accuracy against the number of training images of each class."""
  curve(config, 'target.train_per_class', (5, 15, 30), {'plain': PLAIN_TUNED, 'uot': UOT}, baseline=False)


def steps(config: ConfigDict) -> None:
  """Accuracy against the number of steps; plain fine-tuning with twice as many has equal compute."""
  config.compare.equal_compute = False
  curve(config, 'train.steps', (100, 200, 400, 800), {'plain': PLAIN_TUNED, 'uot': UOT}, baseline=False)
  config.compare.variants += (('plain 1600', PLAIN_TUNED | {'train.steps': 1600}),)


def curve(config: ConfigDict, axis: str, values: tuple[float, ...], kinds: dict[str, dict[str, Any]],
          baseline: bool = True) -> None:
  """A variant for each value of a field and each kind; plain fine-tuning alone where the field means nothing to it."""
  config.compare.axis = axis
  config.compare.seeds = (0, 1, 2)
  points = tuple((f'{name} {value:g}', fields | {axis: value}) for value in values for name, fields in kinds.items())
  config.compare.variants = ((('plain', PLAIN_TUNED),) if baseline else ()) + points


QUESTIONS: dict[str, Callable[[ConfigDict], None]] = {
    'main': main, 'controls': controls, 'levers': levers, 'size': size, 'lambda': weight, 'mu': ratio,
    'per_class': per_class, 'steps': steps}
