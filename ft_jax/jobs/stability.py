"""Job stability: how flat the minimum is that a run found, and how far it lies from its start; a page, a table, the
numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
import json
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from ft_jax import parallel, progress, trained
from ft_jax.data.image_set import digest, ImageSet
from ft_jax.data.memory_cache import free_memory
from ft_jax.data.pipeline import Batch, EvalBatches, TIMEOUT
from ft_jax.data.splits import drop_unreadable, open_splits, Reading, SplitSettings
from ft_jax.methods.base import flat
from ft_jax.pages import stability as stability_page
from ft_jax.pages.page import format_with_error
from ft_jax.progress import log
from ft_jax.settings import check_fields
from ft_jax.studies import stability_estimates
from ft_jax.studies.stability_estimates import Estimates, Minimum, Settings
from ft_jax.training import initial_weights
from ft_jax.training.finished_runs import load_start
from ft_jax.workdir import write_bytes, write_text

# Images of a device at a time: the product with the Hessian takes several times the memory of a training step.
MOST_IMAGES = 32
# Fraction of the free memory that the crops may take.
MOST_MEMORY = 0.8


class Start(NamedTuple):
  """The parameters that a training started with and where they were found; or None, and why they were not."""
  params: Mapping[str, Any] | None
  about: str


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
  """Writes stability.json, stability.csv and stability.html; estimates of an earlier start of the job are not repeated.

  Returns:
    What stability.json holds.
  """
  settings = check(config)
  run = trained.load(config.workdir)
  folder = trained.output_folder(workdir)
  parallel.check_shared(folder, '--workdir')
  log.info('stability of %s -> %s', run.summary(), folder)
  split, images = open_images(config, run)
  start = find_start(run)
  if start.params is None:
    log.warning('warning: no distances from the start: %s', start.about)
  # Noise of 0.001 on the weights would be lost in the rounding of bfloat16 or TF32.
  network = run.model.clone(dtype=jnp.float32, precision='highest')
  crops = read_crops(images, run, config.data.timeout)
  minimum = Minimum(network, run.head, len(run.class_names), run.variables, crops)
  estimates = Estimates(folder / 'estimates.json', parallel.agreed(_made_of(settings, run, images)))
  stability_estimates.measure(minimum, settings, estimates)
  results = {
      'job': 'stability', 'run': str(run.path), 'step': run.results['best_step'], 'split': split, 'images': len(images),
      'start': {'from': start.about if start.params else None, 'missing': None if start.params else start.about},
      **stability_estimates.summarize(minimum, settings, estimates, start.params),
      'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}'}
  write_text(folder / 'stability.json', json.dumps(results, indent=1, allow_nan=False) + '\n')
  write_bytes(folder / 'stability.csv', stability_page.csv_table(results['parameters']).encode())
  stability_page.write(folder / 'stability.html', results, run.config.to_dict())
  for line in format_results(results):
    log.info('%s', line)
  log.info('report: %s', folder / 'stability.html')
  return results


def check(config: ConfigDict) -> Settings:
  """The settings; raises ValueError for those that cannot be right."""
  check_fields(config)
  Reading.from_config(config.data)
  fields = config.stability
  return Settings(fields.sigma, fields.draws, fields.probes, fields.tolerance, config.seed)


def open_images(config: ConfigDict, run: trained.Trained) -> tuple[str, ImageSet]:
  """The name of the split that is measured on, and its images, or some of them drawn by seed.

  Raises:
    ValueError: the images have other classes than the run.
  """
  fields = run.config[run.head]  # config.target or config.source
  splits = open_splits(SplitSettings.from_config(fields), config.data_dir or run.config.data_dir, run.config.seed)
  splits, _, _ = drop_unreadable(splits, run.head, run.config.get('data', {}).get('on_error', 'raise'))
  if splits.train.class_names != run.class_names:
    raise ValueError(f'{splits.train.name} has other classes than the run in {run.path}; bring its images back '
                     '(config.data_dir is where a '
                     'relative folder: path starts)')
  split, images = ('val', splits.val) if splits.test is None else ('test', splits.test)
  wanted = config.stability.images
  if wanted and wanted < len(images):
    images = images.subset(np.sort(np.random.default_rng(config.seed).permutation(len(images))[:wanted]))
  return split, images


def find_start(run: trained.Trained) -> Start:
  """The parameters that the run started with: in its checkpoint where a method kept them, else in the weights that its
  config names.
  """
  if kept := load_start(run.path):
    return Start(kept['params'], 'the checkpoint, which has them')
  name = run.config.model.weights
  if not name:
    return Start(None, 'the run began with random weights (its config.model.weights is empty)')
  name = str(run.path / 'pretrain') if name == 'pretrain' else name
  try:
    weights = initial_weights.load_weights(name, run.model)
  except (ValueError, OSError, RuntimeError) as error:
    return Start(None, f'the weights that the run began with are not at hand: {error}')
  expected = (run.results.get('weights') or {}).get('fingerprint')
  if expected not in (None, weights.about['fingerprint']):
    return Start(None, f'{name} holds other weights now than those that the run began with')
  return Start(weights.variables['params'], name)


def read_crops(images: ImageSet, run: trained.Trained, timeout: float = TIMEOUT) -> list[Batch]:
  """The crops of all images in memory, as every network and every random vector needs them.

  Raises:
    ValueError: they do not fit.
  """
  devices = jax.device_count()
  needed, free = 3 * run.transform.size ** 2 * len(images), free_memory()
  if needed > MOST_MEMORY * free:
    raise ValueError(f'config.stability.images: the crops of {len(images):,d} images take {needed / 1e9:.1f} GB, and '
                     f'{free / 1e9:.1f} GB '
                     'of memory are free; take fewer images')
  batches = EvalBatches(images, run.transform, devices * min(MOST_IMAGES, -(-len(images) // devices)), timeout)
  return list(progress.bar(batches, 'reading', len(batches)))


def _made_of(settings: Settings, run: trained.Trained, images: ImageSet) -> dict[str, str]:
  """What estimates depend on; see `Estimates`."""
  numbers = b''.join(np.ascontiguousarray(value).tobytes() for _, value in sorted(flat(run.variables).items()))
  crops = f'{run.transform.size}/{run.transform.short_side}'
  network = digest(numbers, images.fingerprint, crops, str(settings.seed))
  return {'network': network, 'noise': repr(float(settings.sigma))}


def format_results(results: Mapping[str, Any]) -> Iterator[str]:
  """The results as lines of text."""
  noise, trace = results['noise'], results['trace']
  yield f'{results["images"]:,d} {results["split"]} images, loss {results["loss"]:.4f}'
  if noise:
    predicted = '' if noise['by_trace'] is None else f'; sigma^2 / 2 * trace would be {noise["by_trace"]:.3g}'
    yield (f'noise stability: {format_with_error(noise)}, the rise of the loss under noise of {noise["sigma"]:g} '
           f'({len(noise["differences"])} perturbed networks){predicted}')
  if trace:
    yield (f'trace of the Hessian: {format_with_error(trace["all"])}, of the perturbed weights '
           f'{format_with_error(trace["perturbed"])} '
           f'({trace["vectors"]} random vectors{"" if trace["settled"] else ", not settled"})')
  yield from _format_stages(results['stages'])


def _format_stages(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  yield f'  {"":8s}{"parameters":>12s}{"distance":>12s}{"of start":>10s}{"trace":>24s}'
  for row in stages:
    distance = '' if row['distance'] is None else f'{row["distance"]:.4g}'
    relative = '' if row['relative'] is None else f'{row["relative"]:.1%}'
    trace = format_with_error(row['trace']) if row['trace'] else ''
    yield f'  {row["name"]:8s}{row["numbers"]:12,d}{distance:>12s}{relative:>10s}{trace:>24s}'.rstrip()
