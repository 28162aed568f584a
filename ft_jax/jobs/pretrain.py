"""Job pretrain: supervised pre-training on `config.source`; its workdir is then a `model.weights`."""

from typing import Any

from etils import epath
from ml_collections import ConfigDict

from ft_jax import report
from ft_jax.jobs import fit, setup
from ft_jax.progress import log
from ft_jax.workdir import Workdir, write_results


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
  """Runs the job, or goes on with it; returns what results.json holds."""
  if not config.source.name:
    raise ValueError('config.source.name is empty; name the data to pre-train on')
  work = Workdir(workdir, config.to_dict())
  if work.results():
    log.info('%s is finished', work.path)
    return work.results()
  log.info('pre-training %s -> %s', config.model.name, work.path)
  splits = setup.open_splits(config.source, config.data_dir, config.seed)
  log.info('data: %d train and %d val images of %d classes (%s)', len(splits.train), len(splits.val),
           len(splits.train.class_names), splits.train.name)
  weights = setup.load_weights(config.model.weights) if config.model.weights else None
  model = setup.build_model(config.model, {'source': len(splits.train.class_names)})
  variables = setup.init_variables(model, config.image_size, config.seed, weights)
  results = fit.fit(
      config.train, work, model=model, variables=variables,
      streams={'source': fit.Stream(splits.train, config.train.batch_size, 1.0)}, splits=splits,
      transform=setup.make_transform(config), metric='top1', seed=config.seed)
  write_results(work, {'job': 'pretrain', **results})
  report.write(work)
  return work.results()
