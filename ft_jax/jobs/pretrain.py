"""Job pretrain: supervised pre-training on `config.source`; its workdir is then a `model.weights`."""

from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from ft_jax import methods, parallel
from ft_jax.data.image_set import digest
from ft_jax.data.splits import (
  cache_in_memory,
  check_classes,
  check_same_images,
  drop_unreadable,
  open_splits,
  skipped_summary,
  split_fingerprints,
  Splits,
)
from ft_jax.jobs import setup
from ft_jax.pages import report
from ft_jax.progress import log
from ft_jax.settings import check_fields
from ft_jax.training import fit, initial_weights
from ft_jax.training.settings import log_doubts, Trainable, Training
from ft_jax.workdir import Workdir, write_results


def run(config: ConfigDict, workdir: epath.PathLike, left_out: Sequence[str] = ()) -> dict[str, Any]:
  """Runs the job, or goes on with it; returns what results.json holds.

  `left_out` are ids of images that a fine-tuning does not want to be trained on, as its target has them.
  """
  check_fields(config)
  if not config.source.name:
    raise ValueError('config.source.name is empty; name the data to pre-train on')
  if config.model.weights == 'pretrain':
    raise ValueError("config.model.weights is 'pretrain', which is what this job does; use --config.model.weights= for a fresh network")
  setup.check_data(config.data)
  initial_weights.check_weights(config.model)
  setup.make_transform(config)
  # The number of classes is not known yet and does not matter for what is checked.
  if on := methods.active(config.methods.to_dict() if 'methods' in config else {}):  # of a fine-tuning's own pre-training it has none
    raise ValueError(f'config.methods.{next(iter(on))} is switched on, which is for fine-tuning and not for job pretrain')
  if config.get('noise') and (config.noise.kind or config.noise.rate):
    raise ValueError(f'config.noise.kind is {config.noise.kind!r}, which is for the target of a fine-tuning and not for job pretrain')
  model = setup.build_model(config.model, {'source': 2}, config.train.freeze)
  training = Training.from_config(config.train)
  fresh = ('source',) if config.model.weights and config.model.source_head == 'fresh' else ()
  trainable = Trainable.of(training, model, config.image_size, training.batch_size, fresh=fresh)
  work = Workdir(workdir, config.to_dict())
  done = parallel.agreed(work.results)
  if not done:
    log.info('pre-training %s -> %s', config.model.name, work.path)
    write_results(work, _train(config, training, trainable, work, left_out))
  elif done['source'].get('left_out', _NOTHING) != _ids(left_out):
    raise ValueError(f'{work.path} holds a pre-training that left out other copies of target images than this run does; move that '
                     'folder away to pre-train again, or set config.source.duplicates to what it was')
  done = parallel.agreed(lambda: _reported(work))
  log.info('pre-trained weights: %s', work.path)
  return done


def _reported(work: Workdir) -> dict[str, Any]:
  """Writes the report of a finished run where it is not there; returns its results."""
  if not work.report_html.exists():
    report.write(work)
  return work.results()


def _ids(left_out: Sequence[str]) -> dict[str, Any]:
  return {'images': len(left_out), 'fingerprint': digest(*sorted(left_out))}


_NOTHING = _ids(())


def _train(config: ConfigDict, training: Training, trainable: Trainable, work: Workdir,
           left_out: Sequence[str]) -> dict[str, Any]:
  splits = open_splits(config.source, config.data_dir, config.seed)
  if left_out:
    splits = Splits(*(None if source is None else source.subset(np.flatnonzero(~np.isin(source.ids, left_out)))
                            for source in splits))
  log.info('data: %s: %s train, %s val images of %d classes', splits.train.name, f'{len(splits.train):,d}', f'{len(splits.val):,d}',
           len(splits.train.class_names))
  splits, _, skipped = drop_unreadable(splits, 'source', config.data.on_error)
  check_same_images(splits)
  check_classes(splits)
  log_doubts(training, trainable.only_heads and not config.model.weights)
  splits = cache_in_memory(splits, 'source', config.data.cache)
  classes = len(splits.train.class_names)
  weights = None
  if config.model.weights:
    kept = config.model.source_head == 'pretrained'
    weights = initial_weights.load_weights(config.model.weights, classes=classes if kept else None,
                                 class_names=splits.train.class_names if kept else None)
  model = setup.build_model(config.model, {'source': classes}, config.train.freeze)
  variables = setup.init_variables(model, config.image_size, config.seed, weights.variables if weights else None)
  streams = {'source': fit.Stream(splits.train, config.train.batch_size, 1.0)}
  data = fit.TrainingData(streams, splits, setup.make_transform(config), config.seed, config.data.timeout)
  network = fit.InitialNetwork(model, variables, weights.variables if weights else {}, trainable.factors)
  results = fit.fit(training, work, data, network)
  return {'job': 'pretrain', **results, 'source': {'name': config.source.name, 'classes': classes,
                                                   'fingerprints': split_fingerprints(splits), 'left_out': _ids(left_out)},
          'skipped': skipped_summary(skipped), 'weights': weights.about if weights else None}
