"""Job compare: the same fine-tuning in several variants and with several seeds, and what the differences are worth.

Each variant and seed is the job finetune in a folder of its own. Where `config.compare.tune` names values, each variant
chooses among them on val first, all with the same number of trials. Where the baseline is plain fine-tuning, it runs
once more with as many images through the network as joint training has.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import json
import time
from typing import Any
import uuid

from etils import epath
import jax
from ml_collections import ConfigDict

from ft_jax import compiled, parallel, stopping, workers
from ft_jax.data import opened_once
from ft_jax.jobs import finetune, pretrain
from ft_jax.jobs.compare_cells import Grid, is_result, Outcome, POLL
from ft_jax.jobs.compare_variants import (
  Cell,
  cell_config,
  check_names,
  compared_with,
  declared_variants,
  equal_compute_variants,
  is_plain,
  Variant,
)
from ft_jax.pages import comparison
from ft_jax.progress import log
from ft_jax.settings import check_fields, flat
from ft_jax.studies.comparison import summarize
from ft_jax.training.loop import Interrupted
from ft_jax.workdir import read_json, Workdir, write_results, write_text
from selection import storage

FORMAT_VERSION = 1
# Trials on fewer val images, over all seeds, are warned of: the standard error of an accuracy is then 5 points.
FEW_VAL = 100
# Groups and fields that decide which images a fine-tuning has, and how they are embedded.
_OF_IMAGES = ('target', 'source', 'data', 'noise', 'model', 'image_size', 'augment')


def run(config: ConfigDict, workdir: epath.PathLike, processes: int = 1) -> dict[str, Any]:
  """Runs every fine-tuning that is not finished, each in a workdir inside; returns what results.json holds.

  Args:
    config: of the job.
    workdir: where everything is written; several hosts may share it, and each takes what is left to do.
    processes: that work side by side on this host.

  Raises:
    ValueError: a setting that cannot be used, in any variant.
    RuntimeError: some of the fine-tunings failed; the others are finished.
  """
  _check_processes(processes, workdir)
  variants, settings = plan(config)
  work = Workdir(workdir, config.to_dict(), shared=True)
  pretrained = work.path / 'pretrain' if config.model.weights == 'pretrain' else None
  grid = Grid(config, variants, work.path, parallel.agreed(uuid.uuid4().hex), pretrained)
  report = Report(grid, work, processes)
  if not parallel.agreed(lambda: grid.complete):
    with compiled.once(), opened_once():
      if parallel.is_main():
        work.results_json.unlink(missing_ok=True)
      _prepare(grid, work, settings)
      if processes > 1:
        _supervise(grid, report, processes)
      else:
        _work(grid, report)
  return report.finish()


def plan(config: ConfigDict) -> tuple[list[Variant], list[finetune.Settings]]:
  """The variants of a comparison, and the settings of the first fine-tuning of each.

  Raises:
    ValueError: one that cannot work.
  """
  check_fields(config)
  if config.selection.file:
    raise ValueError('config.selection.file is one selection for all variants; set it in the fields of a variant, as '
                     "('birds', {'selection.file': 'birds.json'}) in config.compare.variants")
  if twice := [seed for k, seed in enumerate(config.compare.seeds) if seed in config.compare.seeds[:k]]:
    raise ValueError(f'config.compare.seeds has {twice[0]} twice; once is enough')
  variants = declared_variants(config)
  settings = {variant.name: _check_variant(config, variant) for variant in variants}
  if config.compare.equal_compute and is_plain(settings[variants[0].name][0]):
    images = {name: [each.images_per_step for each in combinations] for name, combinations in settings.items()}
    for name, others in compared_with(config, variants).items():
      place = [variant.name for variant in variants].index(name)
      added = equal_compute_variants(config, variants[place], images[name][0],
                                     [number for other in others for number in images[other.name]])
      variants[place + 1:place + 1] = added
      settings |= {variant.name: _check_variant(config, variant) for variant in added}
    check_names(variants)
  _log_tuning(variants)
  return variants, [settings[variant.name][0] for variant in variants]


def _check_variant(config: ConfigDict, variant: Variant) -> list[finetune.Settings]:
  """The settings of a variant with each of its combinations; raises ValueError where one is refused."""
  cells = [Cell(variant, config.compare.seeds[0], tuned, trial=True) for tuned in variant.combinations]
  try:
    return [finetune.Settings.from_config(cell_config(config, cell)) for cell in cells]
  except ValueError as error:
    raise ValueError(f'config.compare.variants, {variant.name!r}: {error}') from error


def _check_processes(processes: int, workdir: epath.PathLike) -> None:
  """Raises ValueError where so many processes cannot work side by side."""
  if processes > 1:
    workers.share_gpu_memory()
  if processes < 1:
    raise ValueError(f'--workers is {processes}; expected at least 1')
  if processes > 1 and storage.is_url(workdir):
    raise ValueError(f'--workers is {processes}, but {workdir} is on object storage, where no process can claim a run; '
                     'use --workers=1, or a folder on a disk')
  if processes > 1 and jax.process_count() > 1:
    raise ValueError(f'--workers is {processes}, but this is one of {jax.process_count()} processes that train '
                     'together; use --workers=1, or start the command on each host with --num_processes=1')
  if processes > 1 and jax.default_backend() == 'tpu':
    raise ValueError(f'--workers is {processes}, but one process uses the whole TPU; use --workers=1')


def _log_tuning(variants: Sequence[Variant]) -> None:
  """Logs where variants have fewer trials than others, as a field means nothing to them."""
  trials = {variant.name: len(variant.combinations) for variant in variants}
  most = max(trials.values())
  if fewer := {name: count for name, count in trials.items() if count < most}:
    log.info('tuning: %d combinations for each variant, but %s, as the other fields mean nothing there; give such '
             "variants more values of their own ('compare.tune' in their fields) for the same budget", most,
             ', '.join(f'{count} for {name}' for name, count in fewer.items()))


def warn_of_few_val(images: int, seeds: int) -> None:
  """Warns where so few val images choose among values that chance decides."""
  if images * seeds < FEW_VAL:
    log.warning('warning: values are chosen on %d val images with %s, where one image is %.1f points, so chance '
                'decides much of it; a larger config.target.val_fraction or config.compare.tune_seeds, or fewer '
                'values, help', images, '1 seed' if seeds == 1 else f'{seeds} seeds', 100 / (images * seeds))


def _prepare(grid: Grid, work: Workdir, settings: Sequence[finetune.Settings]) -> None:
  """Opens and checks the images once for each kind of variant; then makes what fine-tunings share.

  Raises:
    ValueError: images that a variant cannot be trained on.
  """
  opened: dict[str, tuple[finetune.Settings, finetune.Sets]] = {}
  with grid.lock_for('prepare'):
    for variant, each in zip(grid.variants, settings):
      shared = {name: each.fields[name] for name in _OF_IMAGES}
      key = json.dumps([shared, each.selection.embeds, each.selection.class_means, each.uses_source])
      try:
        if key not in opened:
          opened[key] = each, finetune.open_checked(each, work)
        _, sets = opened[key]
        each.check_sets(sets.splits, sets.pool)
      except ValueError as error:
        raise ValueError(f'config.compare.variants, {variant.name!r}: {error}') from error
    smallest = min(len(sets.splits.val) for _, sets in opened.values())
    if any(variant.tuned for variant in grid.variants):
      warn_of_few_val(smallest, min(grid.config.compare.tune_seeds, len(grid.config.compare.seeds)))
    pretraining = None
    if grid.pretrained is not None:  # with the seed of the comparison, whatever the seeds of the fine-tunings are
      pretraining = pretrain.Settings.from_config(finetune.pretrain_config(grid.config))
    for each, sets in opened.values():
      own = dataclasses.replace(each, pretraining=pretraining if each.pretraining is not None else None)
      finetune.prepare(own, work, sets, grid.config.embeddings_dir or work.embeddings, grid.pretrained or '')


def _work(grid: Grid, report: 'Report') -> None:
  """Runs cells in this process until none is left; several processes of one training run each cell together."""
  while not parallel.agreed(lambda: grid.complete):
    with grid.next_cell() as cell:
      if cell is None:
        time.sleep(POLL)
      else:
        report.begin(cell)
        grid.run(cell)
    report.update()


def _supervise(grid: Grid, report: 'Report', processes: int) -> None:
  """Lets several processes run the cells, and reports what they finish."""
  logs = grid.folder / 'workers'
  arguments = (grid.config.to_dict(), grid.variants, grid.folder, grid.start, grid.pretrained)
  with stopping.signals() as stop, workers.started(processes, work_on, arguments, logs) as started:
    log.info('%d processes work on it; their logs are in %s', processes, logs)
    ended: set[str] = set()
    while any(process.is_alive() for process in started) and not stop():
      time.sleep(POLL)
      report.update()
      for process in started:
        if process.exitcode and process.name not in ended and stop.signal is None:
          ended.add(process.name)
          log.warning('warning: %s; see %s', workers.describe_end(process), logs)
  if stop.signal is not None:
    raise Interrupted(stop.signal, 'stopped; the same command resumes from there')
  report.update()
  if not grid.complete:
    raise RuntimeError(f'the processes ended before everything was done; see their logs in {logs}; '
                       'the same command resumes from what is finished')


def work_on(config: Mapping[str, Any], variants: Sequence[Variant], folder: epath.Path, start: str,
            pretrained: epath.Path | None) -> None:
  """What each of several processes does: it runs cells until none is left."""
  grid = Grid(ConfigDict(config), variants, folder, start, pretrained)
  compiled.keep(grid.config.compile_cache)
  with compiled.once(), opened_once():
    while not grid.complete:
      with grid.next_cell() as cell:
        if cell is None:
          time.sleep(POLL)
        else:
          log.info('%s', cell.title)
          grid.run(cell)


class Report:
  """Says how far a comparison is, and writes compare.json after each cell."""

  def __init__(self, grid: Grid, work: Workdir, processes: int):
    self._grid, self._work, self._processes = grid, work, processes
    self._write_after = 0.0
    # What was finished before is not logged again.
    self._logged = {cell.folder for cell in grid.known() if grid.outcome(cell)}
    self._chosen = {variant.name for variant in grid.variants if variant.tuned and grid.choice(variant)}
    if self._logged:
      log.info('%d of %d runs are finished', len(self._logged), grid.size)

  def begin(self, cell: Cell) -> None:
    """Logs which cell is run now."""
    log.info('[%d/%d] %s%s', len(self._logged) + 1, self._grid.size, cell.title, self._time_left())

  def update(self) -> None:
    """Logs cells that have ended, and writes compare.json where there are some."""
    ended = [(cell, outcome) for cell in self._grid.known() if (outcome := self._grid.outcome(cell)) is not None]
    new = [(cell, outcome) for cell, outcome in ended if cell.folder not in self._logged]
    for cell, outcome in new:
      self._logged.add(cell.folder)
      what = f'[{len(self._logged)}/{self._grid.size}] {cell.title}: {self._summary(cell, outcome)}'
      if is_result(cell, outcome):
        log.info('%s%s', what, self._time_left())
      else:
        log.error('%s; see %s', what, self._work.path / cell.folder / 'log.txt')
    self._log_choices()
    if new and time.monotonic() >= self._write_after:
      began = time.monotonic()
      write_compare_json(self._grid, self._work)
      # Statistics and pictures of many runs may take longer than a short run.
      self._write_after = time.monotonic() + 20 * (time.monotonic() - began)

  def finish(self) -> dict[str, Any]:
    """Writes the results; returns what results.json holds.

    Raises:
      RuntimeError: a cell failed.
    """
    grid, work = self._grid, self._work
    write_compare_json(grid, work)
    if parallel.is_main():
      log.info('%s', comparison.markdown(read_json(work.path / 'compare.json')))
    log.info('report: %s', work.report_html)
    problems = [f'{cell.title}: {outcome.error} ({work.path / cell.folder / "log.txt"})'
                for cell, outcome in grid.failed()]
    problems += [f'{variant.name}: {choice.error}' for variant in grid.variants
                 if (choice := grid.choice(variant)) and choice.error]
    if problems:
      raise RuntimeError(f'{len(problems)} of {grid.size} runs failed: {"; ".join(problems[:5])}. The same command '
                         'tries them again')
    results = parallel.agreed(lambda: results_by_variant(grid))
    if parallel.agreed(work.results) != results:  # another grid may have been finished before
      write_results(work, results)
    return results

  def _summary(self, cell: Cell, outcome: Outcome) -> str:
    if outcome.results is None:
      return outcome.error
    split = 'test' if outcome.results['test'] else 'val'
    return f'{split} top-1 {outcome.results[split]["top1"]:.1%} in {outcome.seconds:.0f} s'

  def _log_choices(self) -> None:
    """Logs what was chosen on val, once, and where the best value is the smallest or largest that was tried."""
    for variant in self._grid.variants:
      choice = self._grid.choice(variant)
      if not variant.tuned or choice is None or variant.name in self._chosen:
        continue
      self._chosen.add(variant.name)
      if choice.tuned is None:
        log.error('%s: %s', variant.name, choice.error)
        continue
      log.info('%s: best on val is %s', variant.name, ', '.join(f'{k} {v}' for k, v in choice.tuned.items()))
      for field, value, side in at_edge(variant, choice.tuned):
        further = {'smallest': 'smaller', 'largest': 'larger'}[side]
        log.warning('warning: %s: the best %s is %s, the %s that was tried; try %s ones too', variant.name, field,
                    value, side, further)

  def _time_left(self) -> str:
    """An estimate for what is left, from the mean time of finished cells of each variant; '' while there are none."""
    grid, times = self._grid, collections.defaultdict[str, list[float]](list)
    for cell in grid.known():
      if (outcome := grid.outcome(cell)) is not None and outcome.results is not None:
        times[cell.variant.name].append(outcome.seconds)
    if not times:
      return ''
    overall = [seconds for of_variant in times.values() for seconds in of_variant]
    seconds = 0.0
    for variant in grid.variants:
      done = sum(grid.outcome(cell) is not None for cell in grid.trials(variant) + grid.cells(variant))
      left = len(grid.trials(variant)) + len(grid.config.compare.seeds) - done
      known = times.get(variant.name, overall)
      seconds += left * sum(known) / len(known)
    return f', about {format_seconds(seconds / self._processes)} left' if seconds else ''


def format_seconds(seconds: float) -> str:
  """A time for people: 50 s, 12 min, 3.5 h."""
  if seconds < 90:
    return f'{seconds:.0f} s'
  return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


def at_edge(variant: Variant, tuned: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
  """The fields whose chosen value is the smallest or the largest of several numbers that were tried, and which it is.
  """
  found = []
  for field, value in tuned.items():
    values = [combination[field] for combination in variant.combinations]
    numeric = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in values)
    if numeric and len(set(values)) > 1 and value in (min(values), max(values)):
      found.append((field, value, 'smallest' if value == min(values) else 'largest'))
  return found


def write_compare_json(grid: Grid, work: Workdir) -> None:
  """Writes what is known of a comparison and what it says, and its page; see docs/compare.md for the fields."""
  if not parallel.is_main():
    return
  known = compare_json(grid)
  predicted = {cell['folder']: work.path / cell['folder'] / 'predictions.json'
               for variant in known['variants'] for cell in variant['cells'] if not cell['error']}
  predictions = {folder: read_json(path) for folder, path in predicted.items() if path.exists()}
  write_text(work.path / 'compare.json',
             json.dumps(summarize(known, predictions), indent=1, allow_nan=False) + '\n')
  comparison.write(work)


def compare_json(grid: Grid) -> dict[str, Any]:
  """What compare.json holds, from the cells that have ended so far."""
  ended = [outcome.results for variant in grid.variants for cell in grid.cells(variant)
           if (outcome := grid.outcome(cell)) is not None and outcome.results]
  split = 'test' if not ended or ended[0]['test'] else 'val'
  return {
      'format': FORMAT_VERSION, 'job': 'compare', 'target': grid.config.target.name, 'split': split,
      'metric': grid.config.target.metric, 'images': ended[0][split]['images'] if ended else 0,
      'seeds': list(grid.config.compare.seeds), 'baseline': grid.variants[0].name, 'axis': grid.config.compare.axis,
      'variants': [_variant_json(grid, variant) for variant in grid.variants]}


def _variant_json(grid: Grid, variant: Variant) -> dict[str, Any]:
  choice = grid.choice(variant)
  trials = [(cell, outcome) for cell in grid.trials(variant) if (outcome := grid.outcome(cell)) is not None]
  cells = [(cell, outcome) for cell in grid.cells(variant) if (outcome := grid.outcome(cell)) is not None]
  metric = grid.config.target.metric
  # Those that say what a variant is are there even where the config sets them for all.
  shown = {name: value for name, value in flat(grid.config.to_dict()).items()
           if name in ('selection.method', grid.config.compare.axis)}
  return {
      'name': variant.name, 'fields': shown | dict(variant.fields), 'tuned': choice and choice.tuned,
      'error': choice.error or None if choice else None,
      'trials': [{'fields': dict(cell.tuned), 'seed': cell.seed, 'folder': cell.folder, 'error': outcome.error or None,
                  'val': outcome.results['val'][metric] if outcome.results else None} for cell, outcome in trials],
      'cells': [_cell_json(cell, outcome, metric) for cell, outcome in cells]}


def _cell_json(cell: Cell, outcome: Outcome, metric: str) -> dict[str, Any]:
  about = {'seed': cell.seed, 'folder': cell.folder, 'error': outcome.error or None}
  if outcome.results is None:
    return about | {'log': f'{cell.folder}/log.txt'}
  measured = outcome.results['test'] or outcome.results['val']
  return about | {'val': outcome.results['val'][metric], 'top1': measured['top1'],
                  'mean_per_class': measured['mean_per_class'], 'cost': outcome.results.get('cost'),
                  'wall_seconds': outcome.seconds}


def results_by_variant(grid: Grid) -> dict[str, Any]:
  """What results.json holds: the accuracies of each variant by seed; the first variant is the baseline."""
  each = compare_json(grid)
  values = lambda variant, key: [cell[key] for cell in variant['cells']]
  rows: list[dict[str, Any]] = [
      {'method': variant['name'], **{key: values(variant, key) for key in ('top1', 'mean_per_class')}}
      for variant in each['variants']]
  for row in rows:
    row['gain'] = [a - b for a, b in zip(row['top1'], rows[0]['top1'])]
  return {'job': 'compare', 'split': each['split'], 'seeds': each['seeds'], 'images': each['images'], 'rows': rows}
