"""Job study: which checkpoint of a pre-training to start from, on frozen features (FE) and by fine-tuning (FT).

After Deng et al., "Towards Inadequately Pre-trained Models in Transfer Learning" (ICCV 2023): checkpoints from the
middle of a pre-training can have the better features, while fine-tuning goes on to gain from more of it. Their targets,
recipes and tables are not public in code; the protocol is ours and is said in full in docs/checkpoints.md and in
`ft_jax.studies`.
"""

from collections.abc import Mapping, Sequence
import functools
import json
import time
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np

from ft_jax import compiled, models, parallel, trained
from ft_jax.data import open_set
from ft_jax.data.image_set import digest
from ft_jax.data.pipeline import make_transform
from ft_jax.embedding import Encoder, PRECISION, remove_partial
from ft_jax.jobs import finetune
from ft_jax.models.network import OPTIONS
from ft_jax.pages import study as study_page
from ft_jax.pages import study_csv
from ft_jax.pages.page import format_percent
from ft_jax.progress import log
from ft_jax.settings import check_fields, defaults, flat, MAY_CHANGE, RENAMED
from ft_jax.studies import history, probe, spectrum, study_results, transferability
from ft_jax.studies.study_data import changed, described, Frozen, open_target, Parts, Target
from ft_jax.workdir import check_name, own, read_config, run_fields, write_bytes, write_text
from selection import storage

# Groups of a config that a fine-tuning from a checkpoint does not know: a stopped one goes on where they are changed.
_ELSEWHERE = ('checkpoints', 'compare', 'predict', 'pretrain', 'stability', 'study', 'workdir')
# Fields that do not change what comes of it: a finished one stays where they are changed.
_WITHOUT_EFFECT = ('data', 'data_dir', 'embeddings_dir')
# Fields, by path, that came after the first version of the parts. At their defaults they are left out of what a part is
# made of: so the parts that were made before are found. tests/jobs/test_study.py says where one is missing here.
ADDED: tuple[str, ...] = ('model.precision', 'source.duplicates')


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
  """Writes study.json, study.csv and report.html; returns what the first holds. What was done before is not done again."""
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
  log.info('study of %d checkpoints of %s (%s) on %s -> %s', len(kept.kept), kept.path, ', '.join(entry.name for entry in kept.kept),
           ', '.join(target.name for target in targets), folder)
  if kept.image_size not in (0, config.image_size):
    log.warning('warning: %s was trained at %d pixels, and config.image_size is %d', kept.path, kept.image_size, config.image_size)
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
    finetune.Settings.from_config(_own(config, name, settings.seeds[0], kept.kept[0].weights))


def _names(config: ConfigDict) -> list[str]:
  return [*([config.target.name] if config.target.name else []), *(name for name in config.study.targets if name != config.target.name)]


def _own(config: ConfigDict, target: str, seed: int, weights: str) -> ConfigDict:
  """The config of one fine-tuning."""
  own = ConfigDict({name: value for name, value in config.to_dict().items() if name not in _ELSEWHERE})
  own.job, own.seed, own.target.name, own.model.weights = 'finetune', seed, target, weights
  return own


def _fields(config: Mapping[str, Any], without: Sequence[str] = ()) -> str:
  """The fields of a fine-tuning that its result depends on, as text, less some groups."""
  text, known, fields = functools.partial(json.dumps, sort_keys=True, default=str), defaults(), flat(config)
  unused = [path for path in ADDED if path in fields and text(fields[path]) == text(known[path])]
  kept = _first_names(run_fields(config, may_change=(*MAY_CHANGE, *unused)))
  return text({name: value for name, value in kept.items() if name not in without})


def _first_names(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """A config with the first name that each field had: cached parts are named by those."""
  first = {new: old.rpartition('.')[2] for old, new in RENAMED.items()}
  return {first.get(f'{prefix}{name}', name): _first_names(value, f'{prefix}{name}.') if isinstance(value, Mapping) else value
          for name, value in config.items()}


class _Study:
  """What is found, by target and checkpoint: `freeze` and `fine_tune` add to it, `write` tells it."""

  def __init__(self, config: ConfigDict, kept: history.History, targets: Sequence[Target], folder: epath.Path):
    """Reads each checkpoint once, so that one that does not fit is known before anything long begins; takes up what is finished."""
    self._config, self._history, self._targets, self._folder = config, kept, targets, folder
    self._owned = own(folder) if parallel.is_main() else None
    self._transform, self._parts = make_transform(config.image_size, config.augment), Parts(folder / 'parts')
    self._network = models.from_config(config.model, {}, config.image_size)
    self._which = 'centred' if config.study.centred else 'plain'
    self._pool, self._legacy_pool = _pool(config)
    self._prints = history.fingerprints(kept, config.image_size)
    self._found = [[{'about': None, 'change': None, 'probes': {}, 'ft': {}, 'ft_change': {}} for _ in kept.kept] for _ in targets]
    for t, c, seed in self._fine_tunings():
      for what, made_of in (('ft', self._tuned), ('ft_change', self._tuned_change)):
        # The second name is that of earlier versions.
        if part := self._parts.get(*made_of(t, c, seed)) or self._parts.get(*made_of(t, c, seed, legacy=True)):
          self._found[t][c][what][seed] = part

  def _fine_tunings(self) -> list[tuple[int, int, int]]:
    """(target, checkpoint, seed): a seed of all before the next one."""
    return [(t, c, seed) for seed in self._config.study.seeds for t in range(len(self._targets)) for c in range(len(self._history.kept))]

  # What parts are made of.

  def _seen(self, target: Target, seed: int, legacy: bool = False) -> tuple[Any, ...]:
    """What features, and numbers of their parts, depend on beside the network; `legacy` as earlier versions had it."""
    settings, stamp = self._config.study, (target.legacy_stamp if legacy else target.stamp)[seed]
    return (PRECISION, self._config.model.dtype, self._transform.size, self._transform.short_side, stamp, settings.threshold,
            settings.centred)

  def _tuned(self, t: int, c: int, seed: int, legacy: bool = False) -> tuple[Any, ...]:
    own = _own(self._config, self._targets[t].name, seed, '').to_dict()  # wherever the weights lie
    target = self._targets[t]
    stamp, pool = (target.legacy_stamp, self._legacy_pool) if legacy else (target.stamp, self._pool)
    return 'fine_tuned', self._prints[c], stamp[seed], _fields(own, _WITHOUT_EFFECT), pool

  def _tuned_change(self, t: int, c: int, seed: int, legacy: bool = False) -> tuple[Any, ...]:
    # Both networks were seen with one precision, whichever it was, and one of them may be gone.
    return 'tuned_change', *self._tuned(t, c, seed, legacy)[1:], *self._seen(self._targets[t], seed, legacy)[1:]

  # Features.

  def _frozen(self, target: Target, checkpoint: int) -> Frozen:
    entry = self._history.kept[checkpoint]

    def make() -> np.ndarray:
      variables = history.load(entry, self._config.model, self._config.image_size).variables
      return self._embedded(self._folder / 'features', target, variables, entry.name)

    return Frozen(make)

  def _embedded(self, folder: epath.Path | None, target: Target, variables: Mapping[str, Any], network: str) -> np.ndarray:
    unfinished = self._folder / 'unfinished'
    try:
      encoder = Encoder(self._config.model.name, self._network, variables, self._transform,
                        self._config.train.batch_size, self._config.data.timeout, folder, unfinished)
      features = np.concatenate([encoder.embed(source, f'{source.name} by {network}').features for source in target.sources])
    except ValueError as error:
      raise ValueError(f'{target.name} by {network}: {error}') from error
    remove_partial(unfinished)
    return features

  # Frozen.

  def freeze(self) -> None:
    """All that frozen features tell: of each target and checkpoint once."""
    began, entries, seeds = time.perf_counter(), self._history.kept, self._config.study.seeds
    for t, target in enumerate(self._targets):
      before = None
      for c, entry in enumerate(entries):
        frozen, found = self._frozen(target, c), self._found[t][c]
        found['about'] = self._about(target, c, frozen)
        for seed in seeds:
          found['probes'][seed] = self._probe(target, c, frozen, seed)
        if before is not None:
          found['change'] = {'since': entries[c - 1].name, **self._changed(target, c, before, frozen)}
        before = frozen
        compiled.clear_compiled()
        told = ', '.join(f'{name} {format_percent([found["probes"][seed][key]["test"] for seed in seeds])}'
                         for name, key in (('linear', 'linear'), ('k-NN', 'neighbours'), ('nearest mean', 'nearest_mean')))
        log.info('[%d/%d] %s, frozen %s: %s %%', t * len(entries) + c + 1, len(entries) * len(self._targets), target.name, entry.name, told)
    log.info('frozen features: %.0f s', time.perf_counter() - began)
    self.write()

  def _about(self, target: Target, checkpoint: int, frozen: Frozen) -> dict[str, Any]:
    """Spectra and scores, of what the first seed learns from."""
    seed = self._config.study.seeds[0]
    key = ('features', self._prints[checkpoint], *self._seen(target, seed))
    if part := self._parts.get(*key):
      return part
    entry, rows = self._history.kept[checkpoint], target.rows[seed].learnt
    classifier = history.load(entry, self._config.model, self._config.image_size).classifier
    probabilities = None if classifier is None else _softmax(frozen.features[rows], classifier)
    try:
      scores = transferability.scores(frozen.features[rows], target.labels[rows], probabilities)
      spectra = frozen.spectra(rows)
    except ValueError as error:
      raise ValueError(f'{target.name} by {entry.name}: {error}') from error
    return self._parts.put(*key, found={'spectrum': described(spectra, self._config.study.threshold), 'scores': scores,
                                        'note': spectra['plain'].note})

  def _probe(self, target: Target, checkpoint: int, frozen: Frozen, seed: int) -> dict[str, Any]:
    """Each classifier on the features, and the linear one on each part of them."""
    key = ('frozen', self._prints[checkpoint], *self._seen(target, seed), self._config.target.metric)
    if part := self._parts.get(*key):
      return part
    rows, labels = target.rows[seed], target.labels
    which = frozen.spectra(rows.learnt)[self._which]
    main, residual = spectrum.parts(frozen.features, which, spectrum.main_size(which.values, self._config.study.threshold))
    linear, neighbours = (functools.partial(classify, score=self._score) for classify in (probe.linear, probe.neighbours))
    found = {}
    for name, features, classify in (('linear', frozen.features, linear), ('nearest_mean', frozen.features, probe.nearest_mean),
                                     ('neighbours', frozen.features, neighbours), ('main', main, linear), ('residual', residual, linear)):
      probed = classify(probe.Labelled(features[rows.train], labels[rows.train]), probe.Labelled(features[rows.val], labels[rows.val]),
                        features[rows.test], len(target.class_names))
      found[name] = {**self._scored(target, seed, probed.val, probed.test), 'chosen': probed.chosen, 'at_edge': probed.at_edge}
    return self._parts.put(*key, found=found)

  @property
  def _score(self) -> probe.Score:
    return probe.mean_per_class if self._per_class else probe.top1

  @property
  def _per_class(self) -> bool:
    return self._config.target.metric == 'mean_per_class'

  def _scored(self, target: Target, seed: int, of_val: np.ndarray, of_test: np.ndarray) -> dict[str, Any]:
    """What predictions on a seed's val and test are worth, and the rows of test that are wrong."""
    _, val, test = target.rows[seed]
    truth, classes = target.labels, len(target.class_names)
    return {'val': self._score(truth[val], of_val, classes), 'test': self._score(truth[test], of_test, classes),
            'wrong': test[of_test != truth[test]].tolist()}

  def _changed(self, target: Target, checkpoint: int, before: Frozen, after: Frozen) -> dict[str, Any]:
    """The change since the checkpoint before, of what the first seed learns from."""
    seed = self._config.study.seeds[0]
    key = ('change', *self._prints[checkpoint - 1:checkpoint + 1], *self._seen(target, seed))
    return self._parts.get(*key) or self._parts.put(
        *key, found=changed(before, after, target.rows[seed].learnt, self._which, self._config.study.threshold))

  # Fine-tuned.

  def fine_tune(self) -> None:
    """From each checkpoint on each target with each seed."""
    todo = self._fine_tunings()
    for count, (t, c, seed) in enumerate(todo):
      own = _own(self._config, self._targets[t].name, seed, self._history.kept[c].weights)
      name = digest(*map(str, self._tuned(t, c, seed)), _fields(own.to_dict()))
      folder = self._folder / 'fine_tuned' / f'{self._history.kept[c].name.replace(" ", "-")}-seed-{seed}-{name}'
      if seed not in self._found[t][c]['ft']:
        log.info('[%d/%d] %s from %s, seed %d', count + 1, len(todo), self._targets[t].name, self._history.kept[c].name, seed)
        self._fine_tune(own, t, c, seed, folder)
        compiled.clear_compiled()
        # Its pictures take longer than a short fine-tuning; behind the last one all is written anyway.
        self.write(page=c == len(self._history.kept) - 1 and count < len(todo) - 1)
      if parallel.is_main() and (folder / 'checkpoints').exists():
        (folder / 'checkpoints').rmtree()  # only now: what was found with it is kept

  def _fine_tune(self, own: ConfigDict, t: int, c: int, seed: int, folder: epath.Path) -> None:
    """Runs a fine-tuning, or goes on with it, and keeps what is asked of it."""
    if parallel.is_main() and (folder / 'results.json').exists() and not (folder / 'checkpoints').exists():
      folder.rmtree()  # what was found with it is lost
    finetune.run(own, folder, self._folder / 'embeddings')
    tuned, target = trained.load(str(folder)), self._targets[t]
    head = tuned.variables['params'].pop('heads')[tuned.head]
    after = Frozen(lambda: self._embedded(None, target, tuned.variables, f'the network of {folder}'))
    predictions = (after.features @ head['kernel'] + head['bias']).argmax(1)
    rows, found = target.rows[seed], self._found[t][c]
    change = changed(self._frozen(target, c), after, rows.learnt, self._which, self._config.study.threshold)
    found['ft_change'][seed] = self._parts.put(*self._tuned_change(t, c, seed), found=change)
    found['ft'][seed] = self._parts.put(*self._tuned(t, c, seed), found={
        **self._scored(target, seed, predictions[rows.val], predictions[rows.test]), 'report': f'fine_tuned/{folder.name}/report.html'})

  # Told.

  def write(self, page: bool = True) -> dict[str, Any]:
    """Writes what is known; returns what study.json holds."""
    settings, kept = self._config.study, self._history
    options = ', '.join(f'{name} {value}' for name, value in self._network.options.items())
    results = {
        'job': 'study', 'checkpoints': kept.path, 'model': f'{self._config.model.name} ({options})',
        'precision': {'training': self._config.model.precision, 'embeddings': PRECISION},
        'source': kept.source, 'metric': self._config.target.metric, 'seeds': list(settings.seeds), 'threshold': settings.threshold,
        'parts_of': self._which, 'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'history': [{name: getattr(entry, name) for name in ('name', 'epoch', 'step', 'source')} for entry in kept.kept],
        'targets': [study_results.told(target, settings.seeds, [entry.name for entry in kept.kept], [entry.source for entry in kept.kept],
                                       found, self._per_class, bool(self._config.target.val))
                    for target, found in zip(self._targets, self._found)]}
    write_text(self._folder / 'study.json', json.dumps(results, indent=1, allow_nan=False) + '\n')
    write_bytes(self._folder / 'study.csv', study_csv.text(results).encode())
    if page:
      study_page.write(self._folder / 'report.html', results, self._config.to_dict())
    return results


def _softmax(features: np.ndarray, classifier: Mapping[str, np.ndarray]) -> np.ndarray:
  """What a classifier makes of features, float64 `[n, K]`."""
  logits = features.astype(np.float64) @ classifier['kernel'] + classifier['bias']
  powers = np.exp(logits - logits.max(1, keepdims=True))
  return powers / powers.sum(1, keepdims=True)


def _pool(config: ConfigDict) -> tuple[str, str]:
  """What fine-tuning takes beside the target, as a fingerprint, and as earlier versions had it; '' where it takes nothing."""
  if config.selection.method == 'none':
    return '', ''
  given = storage.located(config.selection.file).read_bytes().hex() if config.selection.file else ''
  source = open_set(config.source.name, config.source.train, config.data_dir)
  return digest(source.fingerprint, given), digest(source.legacy_fingerprint or source.fingerprint, given)
