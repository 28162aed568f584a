"""Job compare: the same fine-tuning with each selection, fine-tuning method and seed, and their mean differences."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from ft_jax import compiled
from ft_jax.jobs import finetune
from ft_jax.methods import METHODS
from ft_jax.pages import comparison
from ft_jax.progress import log
from ft_jax.settings import check_fields
from ft_jax.workdir import Workdir, write_results


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
  """Runs every fine-tuning that is not finished, each in a workdir inside; returns what results.json holds."""
  check(config)
  methods, seeds = config.compare.methods, config.compare.seeds
  first = {method: finetune.Settings.from_config(config_of_run(config, method, seeds[0])) for method in methods}
  work = Workdir(workdir, config.to_dict())
  runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
  with compiled.once():
    for count, (seed, method) in enumerate(itertools.product(seeds, methods)):
      log.info('[%d/%d] %s, seed %d', count + 1, len(methods) * len(seeds), method, seed)
      settings = first[method]
      if seed != seeds[0]:
        settings = finetune.Settings.from_config(config_of_run(config, method, seed))
      # The images are embedded once for all of them.
      runs[method].append(finetune.fine_tune(settings, work.path / f'{method}-{seed}', work.embeddings))
      compiled.clear_compiled()
  results = summarize(runs, list(seeds))
  write_results(work, results)
  log.info('%s', comparison.markdown(results))
  comparison.write(work)
  log.info('report: %s', work.report_html)
  return results


def check(config: ConfigDict) -> None:
  """Raises ValueError for settings of the comparison itself that cannot be right."""
  check_fields(config)
  methods, seeds = list(config.compare.methods), list(config.compare.seeds)
  if not methods or not seeds:
    raise ValueError('config.compare.methods and config.compare.seeds need at least one entry each')
  if twice := [method for method in methods if methods.count(method) > 1]:
    raise ValueError(f'config.compare.methods has {twice[0]!r} twice; once is enough')
  if config.selection.file:
    raise ValueError('config.selection.file is one selection, and this job makes one for each method; use '
                     '--config.job=finetune')
  if config.model.weights == 'pretrain':
    raise ValueError("config.model.weights is 'pretrain', which every fine-tuning would repeat; pre-train once with "
                     '--config=configs/pretrain.py and give its workdir')


def config_of_run(config: ConfigDict, method: str, seed: int) -> ConfigDict:
  """The config of one fine-tuning; `method` is an entry of `config.compare.methods`."""
  own = ConfigDict(config.to_dict())
  own.job, own.seed = 'finetune', seed
  own.selection.method, *added = method.split('+')
  named = {name for entry in config.compare.methods for name in entry.split('+')[1:]}
  own.methods.update(_switches(added, named, own.methods.to_dict()))
  # It does not depend on the other runs, so that it is kept when methods or seeds are added.
  own.compare.methods, own.compare.seeds = (method,), (seed,)
  return own


def summarize(runs: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> dict[str, Any]:
  """What results.json holds, from the results of the fine-tunings by method; the first one is the baseline."""
  baseline = next(iter(runs))
  split = 'test' if runs[baseline][0]['test'] else 'val'
  rows: list[dict[str, Any]] = [
      {'method': method, **{key: [run[split][key] for run in of_method] for key in ('top1', 'mean_per_class')}}
      for method, of_method in runs.items()]
  for row in rows:
    row['gain'] = [a - b for a, b in zip(row['top1'], rows[0]['top1'])]
  images = runs[baseline][0][split]['images']
  return {'job': 'compare', 'split': split, 'seeds': list(seeds), 'images': images, 'rows': rows}


def _switches(added: Sequence[str], named: Collection[str],
              settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
  """Fields of the fine-tuning methods that any entry names: off except for those `added` in this one.

  These have the fields of `settings` where they switch it on, else the published ones. Other methods are as in the
  config.
  """
  if unknown := sorted(name for name in named if name not in METHODS):
    raise ValueError(f'config.compare.methods names the fine-tuning method {unknown[0]!r}; known: '
                     f'{", ".join(METHODS)} (and it is written after a selection: none+l2_sp)')
  on = {name: settings[name] if METHODS[name](**settings[name]).active else METHODS[name].published for name in added}
  switches = {name: dataclasses.fields(METHODS[name])[0] for name in named}
  return {name: on[name] if name in added else {switch.name: switch.default} for name, switch in switches.items()}
