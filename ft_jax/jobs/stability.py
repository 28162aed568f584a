"""Job stability: how flat the minimum is that a run found, and how far from its start it lies: a page, a table and the numbers."""

from collections.abc import Iterator, Mapping, Sequence
import csv
import functools
import io
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
from ft_jax.models.network import Network
from ft_jax.pages import stability as stability_page
from ft_jax.pages.page import format_with_error
from ft_jax.progress import log
from ft_jax.settings import check_fields
from ft_jax.studies import stability
from ft_jax.training import initial_weights
from ft_jax.training.finished_runs import load_start
from ft_jax.workdir import write_bytes, write_text

# Images of a device at a time: the product with the Hessian takes several times the memory of a training step.
MOST_IMAGES = 32
# Part of the free memory that the crops may take.
MOST_MEMORY = 0.8


class Start(NamedTuple):
  """Where a training began: parameters and where they are from, or why they are not at hand."""
  params: Mapping[str, Any] | None
  about: str


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
  """Writes stability.json, stability.csv and stability.html; returns what the first holds. What is estimated already is not done again."""
  check(config)
  run = trained.load(config.workdir)
  folder = trained.output_folder(workdir)
  parallel.check_shared(folder, '--workdir')
  log.info('stability of %s -> %s', run.summary(), folder)
  split, source = _images(config, run)
  start = _start(run)
  if start.params is None:
    log.warning('warning: no distances from the start: %s', start.about)
  # Noise of 0.001 on the weights would be lost in the rounding of bfloat16 or TF32.
  model = run.model.clone(dtype=jnp.float32, precision='highest')
  batches = _held(source, run, config.data.timeout)
  estimates = _estimated(config.stability, config.seed, model, run, source, batches, folder)
  results = summary(config.stability, run, split, len(source), start, estimates)
  write_text(folder / 'stability.json', json.dumps(results, indent=1, allow_nan=False) + '\n')
  write_bytes(folder / 'stability.csv', table(results['parameters']).encode())
  stability_page.write(folder / 'stability.html', results, run.config.to_dict())
  _say(results, folder)
  return results


def check(config: ConfigDict) -> None:
  """Raises ValueError for settings that cannot be right."""
  check_fields(config)
  Reading.from_config(config.data)


def _images(config: ConfigDict, run: trained.Trained) -> tuple[str, ImageSet]:
  """The split that is measured on, and images of it drawn by seed."""
  fields = run.config[run.head]  # config.target or config.source
  splits = open_splits(SplitSettings.from_config(fields), config.data_dir or run.config.data_dir, run.config.seed)
  splits, _, _ = drop_unreadable(splits, run.head, run.config.get('data', {}).get('on_error', 'raise'))
  if splits.train.class_names != run.class_names:
    raise ValueError(f'{splits.train.name} has other classes than the run in {run.path}; bring its images back (config.data_dir is where a '
                     'relative folder: path starts)')
  split = 'test' if splits.test is not None else 'val'
  source = splits.test if splits.test is not None else splits.val
  wanted = config.stability.images
  if wanted and wanted < len(source):
    source = source.subset(np.sort(np.random.default_rng(config.seed).permutation(len(source))[:wanted]))
  return split, source


def _start(run: trained.Trained) -> Start:
  """The weights that the run began with: those in its checkpoint where a method kept them, else what its config names."""
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


def _held(source: ImageSet, run: trained.Trained, timeout: float = TIMEOUT) -> list[Batch]:
  """The crops of all images in memory, as every network and every vector goes through them."""
  devices = jax.device_count()
  needed, free = 3 * run.transform.size ** 2 * len(source), free_memory()
  if needed > MOST_MEMORY * free:
    raise ValueError(f'config.stability.images: the crops of {len(source):,d} images take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB '
                     'of memory are free; take fewer images')
  batches = EvalBatches(source, run.transform, devices * min(MOST_IMAGES, -(-len(source) // devices)), timeout)
  return list(progress.bar(batches, 'reading', len(batches)))


class Estimates:
  """estimates.json: the loss of each perturbed network and the products of each random vector, kept as they come."""

  def __init__(self, path: epath.Path, made_of: Mapping[str, str]):
    """Takes up what is there of the same network, images and seed (`made_of`; the draws also of the same sigma)."""
    self._path, self._made_of = path, dict(made_of)
    self.loss: float | None = None
    self.draws: list[float] = []
    self.probes: list[dict[str, float]] = []
    kept = parallel.agreed(self._read)
    before = kept.get('made_of', {})
    if before.get('network') == made_of['network']:
      self.loss = kept['loss']
      self.probes = [dict(zip(kept['parameters'], values)) for values in kept['probes']]
      self.draws = kept['draws'] if before['noise'] == made_of['noise'] else []

  def _read(self) -> dict[str, Any]:
    try:
      return json.loads(self._path.read_text()) if self._path.exists() else {}
    except ValueError:  # not ours, or damaged: it is made again
      return {}

  def write(self) -> None:
    """Writes what there is."""
    names = list(self.probes[0]) if self.probes else []
    write_text(self._path, json.dumps({'made_of': self._made_of, 'loss': self.loss, 'draws': self.draws, 'parameters': names,
                                       'probes': [[probe[name] for name in names] for probe in self.probes]}) + '\n')


def _estimated(settings: ConfigDict, seed: int, model: Network, run: trained.Trained, source: ImageSet, batches: Sequence[Batch],
               folder: epath.Path) -> Estimates:
  """All draws and random vectors that are asked for; those that are there are taken as they are."""
  transform = f'{run.transform.size}/{run.transform.short_side}'
  numbers = b''.join(np.ascontiguousarray(value).tobytes() for _, value in sorted(flat(run.variables).items()))
  made_of = {'network': digest(numbers, source.fingerprint, transform, str(seed)), 'noise': repr(float(settings.sigma))}
  estimates = Estimates(folder / 'estimates.json', parallel.agreed(made_of))
  variables = parallel.replicate(run.variables)
  noise = dict(classes=len(run.class_names), seed=seed)
  if estimates.loss is None:
    estimates.loss = next(stability.losses_under_noise(model, run.head, variables, batches, sigma=0.0, numbers=(0,), **noise))
  done = len(estimates.draws)
  if done < settings.draws:
    with progress.counter('perturbed networks', settings.draws, 'network', done) as shown:
      losses = stability.losses_under_noise(model, run.head, variables, batches, sigma=settings.sigma, numbers=range(done, settings.draws),
                                            **noise)
      for loss in losses:
        estimates.draws.append(loss)
        estimates.write()
        shown.update()
  _probe(settings, seed, model, run.head, variables, batches, estimates)
  estimates.write()
  return estimates


def _probe(settings: ConfigDict, seed: int, model: Network, head: str, variables: Any, batches: Sequence[Batch],
           estimates: Estimates) -> None:
  """Adds random vectors until the trace is settled, or there are as many as are asked for."""
  totals = [sum(probe.values()) for probe in estimates.probes]
  most = _used(totals, settings)
  if most < settings.probes and not stability.settled(totals[:most], settings.tolerance):
    done = len(totals)
    with progress.counter('random vectors for the Hessian', settings.probes * len(batches), 'batch', done * len(batches)) as shown:
      products = stability.curvatures(model, head, variables, batches, seed=seed, numbers=range(done, settings.probes), tell=shown.update)
      for product in products:
        estimates.probes.append(product)
        estimates.write()
        totals.append(sum(product.values()))
        shown.set_postfix(trace=f'{np.mean(totals):.4g}', refresh=False)
        if stability.settled(totals, settings.tolerance):
          break


def _used(totals: Sequence[float], settings: ConfigDict) -> int:
  """How many of the random vectors count: up to the one at which the trace is settled, and no more than are asked for."""
  most = min(len(totals), settings.probes)
  return next((n for n in range(1, most) if stability.settled(totals[:n], settings.tolerance)), most)


def summary(settings: ConfigDict, run: trained.Trained, split: str, images: int, start: Start, estimates: Estimates) -> dict[str, Any]:
  """What stability.json holds."""
  values = {path: np.asarray(value) for path, value in flat(run.variables['params']).items()}
  names = sorted(values, key=functools.partial(stability.order, run.model))
  distances = stability.distances(run.variables['params'], start.params) if start.params is not None else None
  totals = [sum(probe.values()) for probe in estimates.probes]
  probes = estimates.probes[:_used(totals, settings)]

  def trace(wanted: Sequence[str]) -> dict[str, float | None] | None:
    return _spread([sum(probe[name] for name in wanted) for probe in probes]) if probes else None

  def about(wanted: Sequence[str]) -> dict[str, Any]:
    moved = [distances[name] for name in wanted] if distances else []
    distance, began = (float(np.linalg.norm(norms)) for norms in zip(*moved)) if moved else (None, None)
    return {'numbers': sum(values[name].size for name in wanted), 'distance': distance, 'start': began,
            'relative': distance / began if began else None, 'trace': trace(wanted)}

  stages: dict[str, list[str]] = {}
  for name in names:
    stages.setdefault(stability.stage_of(run.model, name), []).append(name)
  perturbed = trace([name for name in names if stability.is_perturbed(run.model, name)])
  draws = [loss - estimates.loss for loss in estimates.draws[:settings.draws]]
  return {
      'job': 'stability', 'run': str(run.path), 'step': run.results['best_step'], 'split': split, 'images': images, 'loss': estimates.loss,
      'noise': {'sigma': settings.sigma, 'differences': draws, **_spread(draws),
                'by_trace': settings.sigma ** 2 / 2 * perturbed['mean'] if perturbed else None} if draws else None,
      'start': {'from': start.about if distances else None, 'missing': None if distances else start.about},
      'trace': {'vectors': len(probes), 'settled': stability.settled([sum(probe.values()) for probe in probes], settings.tolerance),
                'tolerance': settings.tolerance, 'all': trace(names), 'perturbed': perturbed,
                'by_vector': totals[:len(probes)]} if probes else None,
      'stages': [{'name': stage, **about(wanted)} for stage, wanted in stages.items()],
      'parameters': [{'name': name, 'perturbed': stability.is_perturbed(run.model, name), **about([name])} for name in names],
      'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}'}


def _spread(draws: Sequence[float]) -> dict[str, float | None]:
  return dict(zip(('mean', 'standard_error'), stability.estimate(draws)))


def table(parameters: Sequence[Mapping[str, Any]]) -> str:
  """CSV text, one row a parameter; what was not measured is empty."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['parameter', 'numbers', 'perturbed', 'distance', 'start_norm', 'relative_distance', 'trace', 'trace_standard_error'])
  for row in parameters:
    trace = row['trace'] or {'mean': None, 'standard_error': None}
    cells = (row['distance'], row['start'], row['relative'], trace['mean'], trace['standard_error'])
    writer.writerow([row['name'], row['numbers'], int(row['perturbed']), *('' if value is None else f'{value:.9g}' for value in cells)])
  return text.getvalue()


def _say(results: Mapping[str, Any], folder: epath.Path) -> None:
  for line in _lines(results):
    log.info('%s', line)
  log.info('report: %s', folder / 'stability.html')


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
  noise, trace = results['noise'], results['trace']
  yield f'{results["images"]:,d} {results["split"]} images, loss {results["loss"]:.4f}'
  if noise:
    yield (f'noise stability: {format_with_error(noise)}, the rise of the loss under noise of {noise["sigma"]:g} '
           f'({len(noise["differences"])} perturbed networks)'
           + (f'; sigma^2 / 2 * trace would be {noise["by_trace"]:.3g}' if noise['by_trace'] is not None else ''))
  if trace:
    yield (f'trace of the Hessian: {format_with_error(trace["all"])}, of the perturbed weights {format_with_error(trace["perturbed"])} '
           f'({trace["vectors"]} random vectors{"" if trace["settled"] else ", not settled"})')
  yield f'  {"":8s}{"parameters":>12s}{"distance":>12s}{"of start":>10s}{"trace":>24s}'
  for row in results['stages']:
    distance = '' if row['distance'] is None else f'{row["distance"]:.4g}'
    relative = '' if row['relative'] is None else f'{row["relative"]:.1%}'
    yield (f'  {row["name"]:8s}{row["numbers"]:12,d}{distance:>12s}{relative:>10s}'
           f'{format_with_error(row["trace"]) if row["trace"] else "":>24s}').rstrip()
