"""Job study: which checkpoint of a pre-training to start from, on frozen features (FE) and by fine-tuning (FT).

After Deng et al., "Towards Inadequately Pre-trained Models in Transfer Learning" (ICCV 2023): checkpoints from the middle of a pre-training
can have the better features, while fine-tuning goes on to gain from more of it. Their targets, recipes and tables are not public in code;
the protocol is ours and is said in full here and in `ft_jax.studies`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import json
import time
from typing import Any, NamedTuple

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np

from ft_jax import compiled, progress, report, study_page
from ft_jax.data.damage import without_damaged
from ft_jax.data.sources import digest, open_source, Source
from ft_jax.jobs import finetune, history, setup, trained
from ft_jax.jobs.embedding import embedded
from ft_jax.progress import log
from ft_jax.studies import choice, probe, spectrum, transferability
from ft_jax.workdir import write_bytes, write_text

PROBES = ('linear', 'nearest_mean', 'neighbours', 'main', 'residual')
# Fields of a config that say nothing of a fine-tuning from a checkpoint: it stays where they are changed.
_ELSEWHERE = ('checkpoints', 'compare', 'data', 'data_dir', 'embeddings_dir', 'predict', 'pretrain', 'stability', 'study', 'workdir')


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
  """Writes study.json, study.csv and report.html; returns what the first holds. What was done before is not done again."""
  check(config)
  kept = history.read(config.checkpoints, config.model, config.study.epochs)
  if kept.image_size not in (0, config.image_size):
    log.warning('warning: %s was trained at %d pixels, and config.image_size is %d', kept.path, kept.image_size, config.image_size)
  config = ConfigDict(config.to_dict())
  config.model.update({name: kept.network[name] for name in ('name', 'width', 'stem')})
  targets = [_open(config, name) for name in _names(config)]
  folder = trained.output_folder(workdir)
  log.info('study of %d checkpoints of %s (%s) on %s -> %s', len(kept.kept), kept.path, ', '.join(entry.name for entry in kept.kept),
           ', '.join(target.name for target in targets), folder)
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


def check(config: ConfigDict) -> None:
  """Raises ValueError for settings that cannot be right."""
  settings = config.study
  if not settings.seeds:
    raise ValueError('config.study.seeds is empty; expected at least one seed (three give a standard error worth the name)')
  for name in ('seeds', 'targets', 'epochs'):
    if twice := [value for value in settings[name] if list(settings[name]).count(value) > 1]:
      raise ValueError(f'config.study.{name} has {twice[0]!r} twice; once is enough')
  if not 0 < settings.threshold < 1:
    raise ValueError(f'config.study.threshold is {settings.threshold}; expected a part of the sum of singular values, between 0 and 1')
  if config.noise.kind:
    raise ValueError(f'config.noise.kind is {config.noise.kind!r}; the study knows no label noise')
  if not config.target.test:
    raise ValueError('config.target.test is empty; the study chooses on val and needs test to say by how much')
  if not _names(config):
    raise ValueError('config.target.name is empty; name your images, such as folder:/data/pets or tfds:oxford_iiit_pet')
  if not config.checkpoints:
    history.read('', config.model)
  for name in _names(config):
    finetune.check(_own(config, name, settings.seeds[0], config.checkpoints))


def _names(config: ConfigDict) -> list[str]:
  return [*([config.target.name] if config.target.name else []), *(name for name in config.study.targets if name != config.target.name)]


def _own(config: ConfigDict, target: str, seed: int, weights: str) -> ConfigDict:
  """The config of one fine-tuning."""
  own = ConfigDict(config.to_dict())
  own.job, own.seed, own.target.name, own.model.weights = 'finetune', seed, target, weights
  return own


class Target(NamedTuple):
  """An image set with all that is needed of it.

  Attributes:
    name: as the config has it.
    sources: its splits as they are opened, before any val split is carved out of them.
    splits: of each seed.
    rows: of each seed, the rows of train, val and test in the features of all `sources`, one after the other.
    stamp: what the numbers of a seed depend on, as a fingerprint.
  """
  name: str
  sources: tuple[Source, ...]
  splits: dict[int, setup.Splits]
  rows: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]
  stamp: dict[int, str]

  @property
  def labels(self) -> np.ndarray:
    """int32 `[n]`, of all sources."""
    return np.concatenate([source.labels for source in self.sources])

  @property
  def classes(self) -> int:
    """How many there are."""
    return len(self.sources[0].class_names)

  @property
  def learnt(self) -> np.ndarray:
    """The rows of the first seed's train and val: what spectra and scores are of."""
    train, val, _ = next(iter(self.rows.values()))
    return np.sort(np.concatenate([train, val]))


def _open(config: ConfigDict, name: str) -> Target:
  fields = ConfigDict({**config.target.to_dict(), 'name': name})
  splits = {seed: setup.open_splits(fields, config.data_dir, seed) for seed in config.study.seeds}
  expressions = dict.fromkeys(split for split in (fields.train, fields.val, fields.test) if split and split != 'rest')
  sources = tuple(open_source(name, split, config.data_dir).without(fields.without) for split in expressions)
  if config.data.on_error == 'skip':
    sources = tuple(without_damaged(source, f'{name} {split}', split == fields.train)[0] for split, source in zip(expressions, sources))
  places = {name: row for row, name in enumerate(np.concatenate([source.ids for source in sources]).tolist())}
  rows = {seed: tuple(np.array([places[i] for i in split.ids.tolist() if i in places], np.int64) for split in of_seed)
          for seed, of_seed in splits.items()}
  stamp = {seed: digest(*(source.fingerprint for source in sources), *(part.tobytes().hex() for part in of_seed))
           for seed, of_seed in rows.items()}
  return Target(name, sources, splits, rows, stamp)


class Parts:
  """Finished parts of a study: a JSON file each, named by what it was made of."""

  def __init__(self, folder: epath.Path):
    self._folder = folder

  def get(self, kind: str, *made_of: Any) -> dict[str, Any] | None:
    """What was found before, or None; a damaged file is as good as none."""
    try:
      return json.loads(self._path(kind, made_of).read_text())
    except (FileNotFoundError, ValueError):
      return None

  def put(self, kind: str, *made_of: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps what was found; returns it as `get` will."""
    self._folder.mkdir(parents=True, exist_ok=True)
    write_text(self._path(kind, made_of), json.dumps(found, allow_nan=False) + '\n')
    return json.loads(json.dumps(found))

  def _path(self, kind: str, made_of: Sequence[Any]) -> epath.Path:
    return self._folder / f'{kind}-{digest(*map(str, made_of))}.json'


class Frozen:
  """The features of all images of a target by one frozen network; made, or read, when they are asked for."""

  def __init__(self, make: Callable[[], np.ndarray], learnt: np.ndarray):
    """`learnt` are the rows that spectra and scores are of."""
    self._make, self._rows = make, learnt

  @functools.cached_property
  def all(self) -> np.ndarray:
    """float32 `[n, d]`."""
    return self._make()

  @property
  def learnt(self) -> np.ndarray:
    """float32 `[n, d]`: those of the rows that spectra and scores are of."""
    return self.all[self._rows]

  @functools.cached_property
  def spectra(self) -> dict[str, spectrum.Spectrum]:
    """`plain` and `centred`."""
    gram = spectrum.gram(self.learnt)
    return {'plain': spectrum.spectrum(gram, centred=False), 'centred': spectrum.spectrum(gram, centred=True)}


def changed(before: Frozen, after: Frozen, which: str, threshold: float) -> dict[str, Any]:
  """How far the main part and the residual of the same images' features are from what they were; angles in degrees."""
  first, second = before.spectra[which], after.spectra[which]
  sizes = [spectrum.main_size(each.values, threshold) for each in (first, second)]
  change = spectrum.change(first, sizes[0], second, sizes[1], spectrum.cross(before.learnt, after.learnt))
  # JSON has no infinity: what something is more than nothing is not known.
  return {'angles': spectrum.principal_angles(first, sizes[0], second, sizes[1]).tolist(),
          **{name: value if np.isfinite(value) else None for name, value in change._asdict().items()}}


def described(spectra: Mapping[str, spectrum.Spectrum], threshold: float) -> dict[str, dict[str, Any]]:
  """The numbers of each spectrum."""
  told = {}
  for which, each in spectra.items():
    k = spectrum.main_size(each.values, threshold)
    told[which] = {'images': each.images, 'dimensions': len(each.mean), 'values': each.values.tolist(), 'main': k,
                   'share': float(each.values[:k].sum() / each.values.sum()) if each.values.any() else 0.0,
                   'energy': spectrum.energy(each.values, k),
                   'effective_rank': spectrum.effective_rank(each.values), 'stable_rank': spectrum.stable_rank(each.values)}
  return told


class _Study:
  """What is found, by target and checkpoint."""

  def __init__(self, config: ConfigDict, kept: history.History, targets: Sequence[Target], folder: epath.Path):
    """Reads each checkpoint once, so that one that does not fit is known before anything long begins."""
    self._config, self._history, self._targets, self._folder = config, kept, targets, folder
    self._transform, self._parts = setup.make_transform(config), Parts(folder / 'parts')
    self._which = 'centred' if config.study.centred else 'plain'
    loaded = progress.bar((history.load(entry, config.model, config.image_size) for entry in kept.kept), 'reading checkpoints',
                          len(kept.kept), 'checkpoint')
    self._prints = []
    classifiers = {}
    for entry, (_, fingerprint, classifier) in zip(kept.kept, loaded):
      self._prints.append(fingerprint)
      classifiers.setdefault(None if classifier is None else classifier['kernel'].shape, entry.name)
    if len(classifiers) > 1:
      (one, first), (other, second) = list(classifiers.items())[:2]
      raise ValueError(f'config.checkpoints: {kept.path} holds checkpoints of two runs: the classifier of {first} is {one} and that of '
                       f'{second} {other}; put each run into a folder of its own')
    self._found = [[{'about': None, 'change': None, 'probes': {}, 'ft': {}} for _ in kept.kept] for _ in targets]

  def _frozen(self, target: Target, checkpoint: int) -> Frozen:
    entry = self._history.kept[checkpoint]

    def make() -> np.ndarray:
      variables = history.load(entry, self._config.model, self._config.image_size).variables
      return self._embedded(self._folder / 'features', target, variables, entry.name)

    return Frozen(make, target.learnt)

  def _embedded(self, folder: epath.Path | None, target: Target, variables: Mapping[str, Any], network: str) -> np.ndarray:
    try:
      return np.concatenate([
          embedded(folder, self._config.model, variables, source, self._transform, self._config.train.batch_size,
                   f'{source.name} by {network}').features for source in target.sources])
    except ValueError as error:
      raise ValueError(f'{target.name} by {network}: {error}') from error

  def freeze(self) -> None:
    """All that frozen features tell: of each target and checkpoint once."""
    began, entries = time.perf_counter(), self._history.kept
    for t, target in enumerate(self._targets):
      before = None
      for c, entry in enumerate(entries):
        frozen, found = self._frozen(target, c), self._found[t][c]
        found['about'] = self._about(target, c, frozen)
        for seed in self._config.study.seeds:
          found['probes'][seed] = self._probe(target, c, frozen, seed)
        if before is not None:
          found['change'] = {'since': entries[c - 1].name, **self._changed(target, (self._prints[c - 1], self._prints[c]), before, frozen)}
        before = frozen
        told = ', '.join(f'{name} {report.spoken([found["probes"][seed][key]["test"] for seed in found["probes"]])}'
                         for name, key in (('linear', 'linear'), ('k-NN', 'neighbours'), ('nearest mean', 'nearest_mean')))
        log.info('[%d/%d] %s, frozen %s: %s %%', t * len(entries) + c + 1, len(entries) * len(self._targets), target.name, entry.name, told)
    log.info('frozen features: %.0f s', time.perf_counter() - began)
    self.write()

  def _seen(self, target: Target, seed: int) -> tuple[Any, ...]:
    """What features and the numbers from them depend on beside the network."""
    settings = self._config.study
    return (self._config.model.dtype, self._transform.size, self._transform.short_side, target.stamp[seed], settings.threshold,
            settings.centred)

  def _about(self, target: Target, checkpoint: int, frozen: Frozen) -> dict[str, Any]:
    key = ('features', self._prints[checkpoint], *self._seen(target, self._config.study.seeds[0]))
    if kept := self._parts.get(*key):
      return kept
    entry = self._history.kept[checkpoint]
    classifier = history.load(entry, self._config.model, self._config.image_size).classifier
    probabilities = None
    if classifier is not None:
      logits = frozen.learnt.astype(np.float64) @ classifier['kernel'] + classifier['bias']
      probabilities = np.exp(logits - logits.max(1, keepdims=True))
      probabilities /= probabilities.sum(1, keepdims=True)
    try:
      scores = transferability.scores(frozen.learnt, target.labels[target.learnt], probabilities)
      return self._parts.put(*key, found={'spectrum': described(frozen.spectra, self._config.study.threshold), 'scores': scores,
                                          'note': frozen.spectra['plain'].note})
    except ValueError as error:
      raise ValueError(f'{target.name} by {entry.name}: {error}') from error

  def _probe(self, target: Target, checkpoint: int, frozen: Frozen, seed: int) -> dict[str, Any]:
    key = ('frozen', self._prints[checkpoint], *self._seen(target, seed), self._config.target.metric)
    if kept := self._parts.get(*key):
      return kept
    which = frozen.spectra[self._which]
    main, residual = spectrum.parts(frozen.all, which, spectrum.main_size(which.values, self._config.study.threshold))
    linear, neighbours = (functools.partial(classify, score=self._score) for classify in (probe.linear, probe.neighbours))
    labels, (train, val, test) = target.labels, target.rows[seed]
    found = {}
    for name, features, classify in (('linear', frozen.all, linear), ('nearest_mean', frozen.all, probe.nearest_mean),
                                     ('neighbours', frozen.all, neighbours), ('main', main, linear), ('residual', residual, linear)):
      probed = classify(probe.Labelled(features[train], labels[train]), probe.Labelled(features[val], labels[val]), features[test],
                        target.classes)
      found[name] = {**self._scored(target, seed, probed.val, probed.test), 'chosen': probed.chosen, 'at_edge': probed.at_edge}
    return self._parts.put(*key, found=found)

  @property
  def _score(self) -> probe.Score:
    return probe.mean_per_class if self._config.target.metric == 'mean_per_class' else probe.top1

  def _scored(self, target: Target, seed: int, of_val: np.ndarray, of_test: np.ndarray) -> dict[str, Any]:
    """What predictions on a seed's val and test are worth, and the rows of test that are wrong."""
    _, val, test = target.rows[seed]
    truth = target.labels
    return {'val': self._score(truth[val], of_val, target.classes), 'test': self._score(truth[test], of_test, target.classes),
            'wrong': test[of_test != truth[test]].tolist()}

  def _changed(self, target: Target, prints: tuple[str, str], before: Frozen, after: Frozen) -> dict[str, Any]:
    key = ('change', *prints, *self._seen(target, self._config.study.seeds[0]))
    return self._parts.get(*key) or self._parts.put(*key, found=changed(before, after, self._which, self._config.study.threshold))

  def fine_tune(self) -> None:
    """From each checkpoint on each target with each seed; a seed of all before the next one."""
    todo = [(seed, t, c) for seed in self._config.study.seeds for t in range(len(self._targets)) for c in range(len(self._history.kept))]
    for count, (seed, t, c) in enumerate(todo):
      target, entry = self._targets[t], self._history.kept[c]
      own = _own(self._config, target.name, seed, entry.weights)
      fields = json.dumps({name: value for name, value in own.to_dict().items() if name not in _ELSEWHERE}, sort_keys=True, default=str)
      key = ('fine_tuned', self._prints[c], *self._seen(target, seed), self._config.target.metric, fields.replace(entry.weights, ''))
      found = self._parts.get(*key)
      made = found is None
      if made:
        log.info('[%d/%d] %s from %s, seed %d', count + 1, len(todo), target.name, entry.name, seed)
        found = self._parts.put(*key, found=self._fine_tuned(own, target, c, seed, digest(*map(str, key))))
      self._found[t][c]['ft'][seed] = found
      if made:  # the page's pictures take longer than a short fine-tuning
        self.write(page=entry is self._history.kept[-1])

  def _fine_tuned(self, own: ConfigDict, target: Target, checkpoint: int, seed: int, name: str) -> dict[str, Any]:
    """Runs a fine-tuning, or goes on with it; its report stays, its checkpoints do not."""
    folder = self._folder / 'fine_tuned' / f'{self._history.kept[checkpoint].name.replace(" ", "-")}-seed-{seed}-{name}'
    if (folder / 'results.json').exists() and not (folder / 'checkpoints').exists():
      folder.rmtree()  # what was found with it is lost
    finetune.run(own, folder, self._folder / 'embeddings')
    tuned = trained.load(str(folder))
    head = tuned.variables['params'].pop('heads')[tuned.head]
    after = Frozen(lambda: self._embedded(None, target, tuned.variables, f'the network of {folder}'), target.learnt)
    predictions = (after.all @ head['kernel'] + head['bias']).argmax(1)
    _, val, test = target.rows[seed]
    found = {**self._scored(target, seed, predictions[val], predictions[test]), 'report': f'fine_tuned/{folder.name}/report.html',
             **changed(self._frozen(target, checkpoint), after, self._which, self._config.study.threshold)}
    (folder / 'checkpoints').rmtree()
    return found

  def write(self, page: bool = True) -> dict[str, Any]:
    """Writes what is known; returns what study.json holds."""
    settings, kept = self._config.study, self._history
    results = {
        'job': 'study', 'checkpoints': kept.path, 'model': f'{self._config.model.name} (width {self._config.model.width})',
        'source': kept.source,
        'metric': self._config.target.metric, 'seeds': list(settings.seeds), 'threshold': settings.threshold, 'parts_of': self._which,
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'history': [{name: getattr(entry, name) for name in ('name', 'epoch', 'step', 'source')} for entry in kept.kept],
        'targets': [self._told(target, found) for target, found in zip(self._targets, self._found)]}
    write_text(self._folder / 'study.json', json.dumps(results, indent=1, allow_nan=False) + '\n')
    write_bytes(self._folder / 'study.csv', study_page.table(results).encode())
    if page:
      study_page.write(self._folder / 'report.html', results, self._config.to_dict())
    return results

  def _told(self, target: Target, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seeds = self._config.study.seeds
    train, val, test = next(iter(target.rows.values()))
    rows = [row(each, seeds) for each in found]
    return {'name': target.name, 'classes': target.classes, 'train': len(train), 'val': len(val), 'test': len(test),
            'notes': list(_notes(self._config, target, found)), 'rows': rows,
            'correlations': correlations([entry.source for entry in self._history.kept], rows),
            'recommended': {
                'fe': self._chosen(target, [{seed: probed['linear'] for seed, probed in each['probes'].items()} for each in found]),
                'ft': self._chosen(target, [each['ft'] for each in found])}}

  def _chosen(self, target: Target, found: Sequence[Mapping[int, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """The choice among checkpoints by the seeds that all of them have."""
    seeds = [seed for seed in self._config.study.seeds if all(seed in each for each in found)]
    if not seeds:
      return None
    per_class = self._config.target.metric == 'mean_per_class'
    test = [np.stack([_contributions(target, seed, each[seed]['wrong'], per_class) for seed in seeds]) for each in found]
    chosen = choice.choose([float(np.mean([each[seed]['val'] for seed in seeds])) for each in found], test)
    against = lambda row: None if row is None or row == chosen.row else {
        'row': row, 'margin': chosen.margins[row].mean, 'standard_error': chosen.margins[row].standard_error}
    last, other = len(found) - 1, chosen.best_other
    return {'row': chosen.row, 'seeds': len(seeds), 'last': against(last), 'best_other': against(other),
            'difference': other is not None and chosen.margins[last if chosen.row != last else other].seen,
            'similar': list(chosen.similar), 'sentence': choice.sentence(chosen, [entry.name for entry in self._history.kept])}


def _contributions(target: Target, seed: int, wrong: Sequence[int], per_class: bool) -> np.ndarray:
  """See `choice.contributions`; 0 for images that are not of the test split."""
  test, labels = target.rows[seed][2], target.labels
  told = np.zeros(len(labels))
  told[test] = choice.contributions(~np.isin(test, wrong), labels[test], per_class)
  return told


def row(found: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
  """What study.json says of a checkpoint on a target."""
  fe = {name: {key: [found['probes'][seed][name][key] for seed in seeds if seed in found['probes']] for key in ('val', 'test', 'chosen')}
        for name in PROBES}
  done = [found['ft'][seed] for seed in seeds if seed in found['ft']]
  return {'fe': fe, 'ft': {key: [each[key] for each in done] for key in ('val', 'test', 'report')},
          **(found['about'] or {'spectrum': None, 'scores': {}}), 'change': found['change'], 'fine_tuned': _mean_change(done)}


def _mean_change(done: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """The means over seeds; of the angles, of as many as all have: the main part of each network has a size of its own."""
  if not done:
    return None
  size = min(len(each['angles']) for each in done)
  return {'angles': np.mean([each['angles'][:size] for each in done], 0).tolist(),
          **{key: None if None in values else float(np.mean(values))
             for key, values in ((key, [each[key] for each in done]) for key in ('main', 'residual'))}}


def correlations(source: Sequence[Mapping[str, float] | None], rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """How well source accuracy and each score rank the checkpoints: against the mean test scores on frozen features and by fine-tuning."""
  values = {'source accuracy': [entry['top1'] if entry else None for entry in source],
            **{name: [each['scores'][name] for each in rows] for name in rows[0].get('scores', {})}}
  known = lambda numbers: numbers and all(number is not None for number in numbers)
  fe = [np.mean(each['fe']['linear']['test']) for each in rows]
  ft = [np.mean(each['ft']['test']) for each in rows] if all(each['ft']['test'] for each in rows) else None
  against = lambda numbers, accuracies: transferability.correlate(numbers, accuracies)._asdict() if accuracies else None
  return {name: {'fe': against(numbers, fe), 'ft': against(numbers, ft)} for name, numbers in values.items() if known(numbers)}


def _notes(config: ConfigDict, target: Target, found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  """Sentences that a reader of the numbers should know."""
  seed = config.study.seeds[0]
  train, val, _ = target.rows[seed]
  names = target.sources[0].class_names
  lone = [names[k] for k in np.flatnonzero(np.bincount(target.labels[train], minlength=target.classes) == 1).tolist()]
  absent = np.flatnonzero(np.bincount(target.labels[val], minlength=target.classes) == 0)
  if lone:
    yield (f'{len(lone)} of {target.classes} classes have one training image ({", ".join(lone[:5])}{", ..." if len(lone) > 5 else ""}), '
           'which is trained on: strengths and checkpoints are chosen by the val images of the other classes, without folds.')
  elif len(absent):
    yield f'{len(absent)} of {target.classes} classes have no image in val.'
  if config.target.val:
    yield 'val is a split of its own, so on frozen features every seed gives the same: what is left is the error of the test images.'
  about = [each['about'] for each in found if each['about']]
  if about and about[0]['note']:
    yield about[0]['note'] + '. H-score is then at its bound for every checkpoint, and only the regularised one says anything.'
  if about and about[0]['scores'].get('leep', 0.0) is None:
    yield 'The checkpoints have no classifier, so there is no LEEP and no NCE.'
  if any(probed['linear']['at_edge'] for each in found for probed in each['probes'].values()):
    yield 'For some checkpoints the best strength of the logistic regression lies at the end of its grid.'
