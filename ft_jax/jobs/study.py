"""Job study: which checkpoint of a pre-training to start from, on frozen features (FE) and by fine-tuning (FT).

After Deng et al., "Towards Inadequately Pre-trained Models in Transfer Learning" (ICCV 2023): checkpoints from the
middle of a pre-training can have the better features, while fine-tuning continues to gain from more of it. Their
targets, recipes and tables are not public in code; the protocol is ours and is described in full in docs/checkpoints.md
and in `ft_jax.studies`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
import functools
import itertools
import json
import time
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict

from ft_jax import compiled, models, parallel, trained
from ft_jax.data import open_set
from ft_jax.data.image_set import digest
from ft_jax.data.pipeline import make_transform
from ft_jax.embedding import Encoder, PRECISION
from ft_jax.jobs import finetune
from ft_jax.models.network import OPTIONS
from ft_jax.pages import study as study_page
from ft_jax.pages import study_csv
from ft_jax.pages.page import format_percent
from ft_jax.progress import log
from ft_jax.settings import check_fields, defaults, flat, MAY_CHANGE, RENAMED
from ft_jax.studies import history, study_results
from ft_jax.studies.measurements import Measurements
from ft_jax.studies.study_data import FrozenFeatures, open_target, Parts, Target
from ft_jax.workdir import check_name, own, read_config, run_fields, write_bytes, write_text
from selection import storage

# Groups of a config that a fine-tuning from a checkpoint does not have: a stopped one resumes where they are changed.
_ELSEWHERE = ('checkpoints', 'compare', 'predict', 'pretrain', 'stability', 'study', 'workdir')
# Fields that do not change what comes of it: a finished one stays where they are changed.
_WITHOUT_EFFECT = ('data', 'data_dir', 'embeddings_dir')
# Fields, by path, that came after the first version of the parts. At their defaults they are left out of what a part is
# made of: so the parts that were made before are found. tests/jobs/test_study.py says where one is missing here.
ADDED: tuple[str, ...] = (
    'model.precision', 'source.duplicates', 'source.shuffle_labels', 'model.stages', 'source_weight_schedule',
    'source_first', 'target_last', 'refit_head', 'augment.jitter', 'augment.jitter_probability', 'augment.grey',
    'augment.blur', 'augment.blur_sigma', 'augment.solarize', 'methods.moco.queue', 'methods.moco.temperature',
    'methods.moco.momentum', 'methods.moco.projection', 'methods.byol.enabled', 'methods.byol.momentum',
    'methods.byol.hidden', 'methods.byol.projection')


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
  """Writes study.json, study.csv and report.html; returns what study.json holds. Finished parts are not repeated."""
  check_fields(config)
  kept = history.read(config.checkpoints, config.model, config.study.epochs)
  config = ConfigDict(config.to_dict())
  config.model.update({name: kept.network[name] for name in ('name', *OPTIONS) if name in kept.network})
  check(config, kept)
  if config.study.fine_tune:
    check_name(storage.absolute(workdir))
  targets = [open_target(config, name) for name in _names(config)]
  folder = trained.output_folder(workdir)
  if read_config(folder):
    raise ValueError(f'--workdir={workdir} holds a run, whose files would be mixed with those of the study; give '
                     'another --workdir')
  parallel.check_shared(folder, '--workdir')
  log.info('study of %d checkpoints of %s (%s) on %s -> %s', len(kept.checkpoints), kept.path,
           ', '.join(entry.name for entry in kept.checkpoints), ', '.join(target.name for target in targets), folder)
  if kept.image_size not in (0, config.image_size):
    log.warning('warning: %s was trained at %d pixels, and config.image_size is %d', kept.path, kept.image_size,
                config.image_size)
  study = _Study(config, kept, targets, folder)
  with compiled.once():
    study.freeze()
    if config.study.fine_tune:
      study.fine_tune()
  results = study.write()
  for target in results['targets']:
    for what, chosen in zip(('frozen features', 'fine-tuning'), target['recommended'].values()):
      if chosen:
        log.info('%s, %s: %s', target['name'], what, chosen['sentence'])
  log.info('report: %s', folder / 'report.html')
  return results


def check(config: ConfigDict, kept: history.History) -> None:
  """Raises ValueError for settings that cannot be right."""
  settings = config.study
  if not settings.seeds:
    raise ValueError('config.study.seeds is empty; expected at least one seed (three give a standard error worth '
                     'the name)')
  for name in ('seeds', 'targets', 'epochs'):
    if twice := [value for value in settings[name] if list(settings[name]).count(value) > 1]:
      raise ValueError(f'config.study.{name} has {twice[0]!r} twice; once is enough')
  if config.noise.kind:
    raise ValueError(f'config.noise.kind is {config.noise.kind!r}; the study knows no label noise')
  if not config.target.test:
    raise ValueError('config.target.test is empty; the study chooses on val and needs test to say by how much')
  if not _names(config):
    raise ValueError('config.target.name is empty; name your images, such as folder:/data/pets or tfds:oxford_iiit_pet')
  for name in _names(config):
    finetune.Settings.from_config(_own(config, name, settings.seeds[0], kept.checkpoints[0].weights))


def _names(config: ConfigDict) -> list[str]:
  """The targets, each once."""
  return list(dict.fromkeys(name for name in (config.target.name, *config.study.targets) if name))


def _own(config: ConfigDict, target: str, seed: int, weights: str) -> ConfigDict:
  """The config of one fine-tuning."""
  own = ConfigDict({name: value for name, value in config.to_dict().items() if name not in _ELSEWHERE})
  own.job, own.seed, own.target.name, own.model.weights = 'finetune', seed, target, weights
  return own


def _fields(config: Mapping[str, Any], without: Sequence[str] = ()) -> str:
  """The fields of a fine-tuning that its result depends on, as text, less some groups."""
  text, known, fields = functools.partial(json.dumps, sort_keys=True, default=str), defaults(), flat(config)
  unused = [path for path in ADDED if path in fields and text(fields[path]) == text(known[path])]
  used = run_fields(config, may_change=(*MAY_CHANGE, *unused))
  # A group of new fields alone, such as that of a new method, is empty now.
  kept = _first_names(_without_empty(used, {path.rpartition('.')[0] for path in unused}))
  return text({name: value for name, value in kept.items() if name not in without})


def _without_empty(config: Mapping[str, Any], groups: Collection[str], prefix: str = '') -> dict[str, Any]:
  """The config without those of the groups, by path, that have no field left."""
  inner = lambda value, path: _without_empty(value, groups, f'{path}.') if isinstance(value, Mapping) else value
  return {name: inner(value, f'{prefix}{name}') for name, value in config.items()
          if value != {} or f'{prefix}{name}' not in groups}


def _first_names(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """A config with the first name that each field had: cached parts are named by those."""
  first = {new: old.rpartition('.')[2] for old, new in RENAMED.items()}
  rename = lambda value, path: _first_names(value, f'{path}.') if isinstance(value, Mapping) else value
  return {first.get(f'{prefix}{name}', name): rename(value, f'{prefix}{name}') for name, value in config.items()}


class _Study:
  """What is found, by target and checkpoint: `freeze` and `fine_tune` add to it, `write` writes it."""

  def __init__(self, config: ConfigDict, kept: history.History, targets: Sequence[Target], folder: epath.Path):
    """Reads each checkpoint once, so that one that does not fit is known at once; loads what is finished."""
    self._config, self._history, self._targets, self._folder = config, kept, targets, folder
    self._owned = own(folder) if parallel.is_main() else None
    self._parts, network = Parts(folder / 'parts'), models.from_config(config.model, {}, config.image_size)
    self._options = network.options
    self._pool, self._legacy_pool = _pool(config)
    self._prints = history.fingerprints(kept, config.image_size)
    encoder = Encoder(
        config.model.name, network, {}, make_transform(config.image_size, config.augment), config.train.batch_size,
        config.data.timeout, folder / 'features', folder / 'unfinished')
    self._measure = Measurements(
        kept.checkpoints, self._prints, lambda entry: history.load(entry, config.model, config.image_size), encoder,
        self._parts, config.study.seeds, config.study.threshold, config.study.centred, config.target.metric)
    self._found: list[list[dict[str, Any]]] = [
        [{'about': None, 'change': None, 'probes': {}, 'ft': {}, 'ft_change': {}} for _ in kept.checkpoints]
        for _ in targets]
    for t, c, seed in self._fine_tunings():
      for what, made_of in (('ft', self._tuned), ('ft_change', self._tuned_change)):
        # The second name is that of earlier versions.
        if part := self._parts.get(*made_of(t, c, seed)) or self._parts.get(*made_of(t, c, seed, legacy=True)):
          self._found[t][c][what][seed] = part

  def _fine_tunings(self) -> list[tuple[int, int, int]]:
    """(target, checkpoint, seed): all of a seed before those of the next."""
    targets, checkpoints = range(len(self._targets)), range(len(self._history.checkpoints))
    order = itertools.product(self._config.study.seeds, targets, checkpoints)
    return [(t, c, seed) for seed, t, c in order]

  # What parts are made of.

  def _tuned(self, t: int, c: int, seed: int, legacy: bool = False) -> tuple[Any, ...]:
    own = _own(self._config, self._targets[t].name, seed, '').to_dict()  # wherever the weights lie
    target = self._targets[t]
    stamp, pool = (target.legacy_stamp, self._legacy_pool) if legacy else (target.stamp, self._pool)
    return 'fine_tuned', self._prints[c], stamp[seed], _fields(own, _WITHOUT_EFFECT), pool

  def _tuned_change(self, t: int, c: int, seed: int, legacy: bool = False) -> tuple[Any, ...]:
    # Both networks embedded with one precision, whichever it was, and one of them may be gone.
    return 'tuned_change', *self._tuned(t, c, seed, legacy)[1:], *self._measure.key(self._targets[t], seed, legacy)[1:]

  # Frozen.

  def freeze(self) -> None:
    """Measures frozen features: of each target and checkpoint once."""
    began, entries, measure = time.perf_counter(), self._history.checkpoints, self._measure
    for t, target in enumerate(self._targets):
      before = None
      for c, entry in enumerate(entries):
        frozen, found = measure.frozen(target, c), self._found[t][c]
        found['about'] = measure.about(target, c, frozen)
        found['probes'] = {seed: measure.accuracies(target, c, frozen, seed) for seed in self._config.study.seeds}
        if before is not None:
          found['change'] = {'since': entries[c - 1].name, **measure.change(target, c, before, frozen)}
        before = frozen
        compiled.clear_compiled()
        log.info('[%d/%d] %s, frozen %s: %s %%', t * len(entries) + c + 1, len(entries) * len(self._targets),
                 target.name, entry.name, _format_probes(found['probes'].values()))
    log.info('frozen features: %.0f s', time.perf_counter() - began)
    self.write()

  # Fine-tuned.

  def fine_tune(self) -> None:
    """From each checkpoint on each target with each seed."""
    todo = self._fine_tunings()
    for count, (t, c, seed) in enumerate(todo):
      target, checkpoint = self._targets[t], self._history.checkpoints[c]
      own = _own(self._config, target.name, seed, checkpoint.weights)
      name = digest(*map(str, self._tuned(t, c, seed)), _fields(own.to_dict()))
      folder = self._folder / 'fine_tuned' / f'{checkpoint.name.replace(" ", "-")}-seed-{seed}-{name}'
      if seed not in self._found[t][c]['ft']:
        log.info('[%d/%d] %s from %s, seed %d', count + 1, len(todo), target.name, checkpoint.name, seed)
        self._fine_tune(own, t, c, seed, folder)
        compiled.clear_compiled()
        # Its pictures take longer than a short fine-tuning; after the last one everything is written anyway.
        self.write(page=c == len(self._history.checkpoints) - 1 and count < len(todo) - 1)
      if parallel.is_main() and (folder / 'checkpoints').exists():
        (folder / 'checkpoints').rmtree()  # only now, when the part is written

  def _fine_tune(self, own: ConfigDict, t: int, c: int, seed: int, folder: epath.Path) -> None:
    """Runs a fine-tuning, or resumes it, and keeps what is asked of it."""
    if parallel.is_main() and (folder / 'results.json').exists() and not (folder / 'checkpoints').exists():
      folder.rmtree()  # the part that was found with it is lost
    finetune.run(own, folder, self._folder / 'embeddings')
    tuned, target, measure = trained.load(str(folder)), self._targets[t], self._measure
    head = tuned.variables['params'].pop('heads')[tuned.head]
    after = FrozenFeatures(lambda: measure.embed(target, tuned.variables, f'the network of {folder}', cached=False))
    predictions = (after.features @ head['kernel'] + head['bias']).argmax(1)
    rows, found = target.rows[seed], self._found[t][c]
    change = measure.difference(target, seed, measure.frozen(target, c), after)
    found['ft_change'][seed] = self._parts.put(*self._tuned_change(t, c, seed), found=change)
    scored = measure.score(target, seed, predictions[rows.val], predictions[rows.test])
    found['ft'][seed] = self._parts.put(
        *self._tuned(t, c, seed), found={**scored, 'report': f'fine_tuned/{folder.name}/report.html'})

  # Written.

  def write(self, page: bool = True) -> dict[str, Any]:
    """Writes what is known; returns what study.json holds."""
    settings, kept = self._config.study, self._history
    options = ', '.join(f'{name} {value}' for name, value in self._options.items())
    names, sources = [entry.name for entry in kept.checkpoints], [entry.source for entry in kept.checkpoints]
    per_class, has_val = self._config.target.metric == 'mean_per_class', bool(self._config.target.val)
    results = {
        'job': 'study', 'checkpoints': kept.path, 'model': f'{self._config.model.name} ({options})',
        'precision': {'training': self._config.model.precision, 'embeddings': PRECISION},
        'source': kept.source, 'metric': self._config.target.metric, 'seeds': list(settings.seeds),
        'threshold': settings.threshold, 'parts_of': self._measure.parts_of,
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'history': [{'name': entry.name, 'epoch': entry.epoch, 'step': entry.step, 'source': entry.source}
                    for entry in kept.checkpoints],
        'targets': [study_results.target_results(target, settings.seeds, names, sources, found, per_class, has_val)
                    for target, found in zip(self._targets, self._found)]}
    write_text(self._folder / 'study.json', json.dumps(results, indent=1, allow_nan=False) + '\n')
    write_bytes(self._folder / 'study.csv', study_csv.text(results).encode())
    if page:
      study_page.write(self._folder / 'report.html', results, self._config.to_dict())
    return results


def _format_probes(probes: Iterable[Mapping[str, Any]]) -> str:
  """The accuracy of three classifiers on test, over seeds."""
  each = list(probes)
  names = {'linear': 'linear', 'k-NN': 'neighbours', 'nearest mean': 'nearest_mean'}
  return ', '.join(f'{name} {format_percent([probe[key]["test"] for probe in each])}' for name, key in names.items())


def _pool(config: ConfigDict) -> tuple[str, str]:
  """A fingerprint of what fine-tuning uses besides the target, and that of earlier versions; '' where it is nothing."""
  if config.selection.method == 'none':
    return '', ''
  given = storage.located(config.selection.file).read_bytes().hex() if config.selection.file else ''
  source = open_set(config.source.name, config.source.train, config.data_dir)
  return digest(source.fingerprint, given), digest(source.legacy_fingerprint or source.fingerprint, given)
