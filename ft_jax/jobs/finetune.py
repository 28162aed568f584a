"""Job finetune: select pre-training data for a target, fine-tune on both together, see what came of it."""

from collections.abc import Mapping, Sequence
import dataclasses
import io
import types
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np

from ft_jax import embedding, methods, noise, parallel
from ft_jax.data import duplicates, open_set, overlap
from ft_jax.data.decode import thumbnail
from ft_jax.data.image_set import digest, ImageSet
from ft_jax.data.pipeline import Transform
from ft_jax.data.splits import (
  cache_in_memory,
  check_classes,
  check_same_images,
  drop_unreadable,
  log_classes_not_evaluated,
  open_splits,
  skipped_summary,
  split_fingerprints,
  Splits,
)
from ft_jax.embedding import embedded, remove_partial
from ft_jax.jobs import pretrain, setup
from ft_jax.pages import report
from ft_jax.progress import log
from ft_jax.settings import check_fields
from ft_jax.training import fit, initial_weights
from ft_jax.training.settings import log_doubts, own_params, Trainable, Training
from ft_jax.workdir import Workdir, write_results
import selection
from selection import plots, storage, strategies
from selection.result import NOUNS


def run(config: ConfigDict, workdir: epath.PathLike, embeddings: epath.PathLike = '') -> dict[str, Any]:
  """Runs the job, or goes on with it; returns what results.json holds.

  Embeddings are kept in `config.embeddings_dir`, else in `embeddings`, else in the workdir.
  """
  training, trainable = check(config)
  work = Workdir(workdir, config.to_dict())
  done = parallel.agreed(work.results)
  if done and parallel.agreed(work.report_html.exists):
    log.info('%s is finished: %s', work.path, work.report_html)
    return done

  log.info('fine-tuning %s -> %s', config.model.name, work.path)
  splits = open_splits(config.target, config.data_dir, config.seed)
  if not done:
    check_classes(splits, 'target.without')  # before every image is tried
  # Plain fine-tuning uses nothing of the pre-training data, which need not be there.
  wanted = _uses_pool(config) and config.source.name
  pool = open_set(config.source.name, config.source.train, config.data_dir) if wanted else None
  needed = pool if config.selection.method != 'none' else None
  splits, readable, skipped = drop_unreadable(splits, 'target', config.data.on_error, needed)
  pool = pool if needed is None else readable
  opened = {**{f'target {name}': source for name, source in splits._asdict().items()}, overlap.POOL: pool}
  check_same_images(splits, pool)
  common = overlap.settled(work, splits, pool, config.source.duplicates)
  splits, pool = common.splits, pool if common.pool is None else common.pool
  if not done:
    check_classes(splits, 'target.without')  # of what is left
    log_classes_not_evaluated(splits)
    _log_doubts(config, training, trainable)
  splits, true_labels, noise_told = noise.add(config.noise, config.seed, splits, work.predicted_json)
  if not done:
    _describe(splits, pool)
    if config.selection.method != 'none':
      _check_pool(config, pool)
    folder = storage.located(config.embeddings_dir or embeddings or work.embeddings)
    splits = cache_in_memory(splits, 'target', config.data.cache)
    results = _train(config, training, trainable, work, splits, pool, folder, common, skipped.get(overlap.POOL, ()), true_labels)
    write_results(work, {**results, 'noise': noise_told, 'skipped': skipped_summary(skipped), 'duplicates': common.summary()})
  done = parallel.agreed(lambda: _reported(work, splits.train, pool, _pairs(common, opened)))
  log.info('report: %s', work.report_html)
  return done


def _uses_pool(config: ConfigDict) -> bool:
  """Whether any image of the pool is trained on."""
  return config.selection.method != 'none' or config.model.weights == 'pretrain'


def _reported(work: Workdir, target: ImageSet, pool: ImageSet | None, pairs: Sequence[report.DuplicatePair]) -> dict[str, Any]:
  """Writes the report of a finished run; returns its results."""
  chosen = _load_selection(work, pool) if work.selection_json.exists() else None
  report.write(work, _selection_section(target, pool, chosen) if chosen else None, pairs)
  return work.results()


def _load_selection(work: Workdir, pool: ImageSet) -> selection.Selection:
  """The selection that the run began with; raises ValueError where it was made for other images than the pool's."""
  chosen = selection.Selection.load(work.selection_json)
  if not pool.is_known_as(made_for := chosen.source.get('fingerprint', pool.fingerprint)):
    raise ValueError(f'{work.selection_json} was made for {chosen.source.get("name")} (fingerprint {made_for}), whose images, labels or '
                     f'duplicates (config.source.duplicates) have changed since then (fingerprint {pool.fingerprint}); bring them back, or '
                     'give another --workdir')
  return chosen


def _train(config: ConfigDict, training: Training, trainable: Trainable, work: Workdir, splits: Splits, pool: ImageSet | None, embeddings: epath.Path,
           common: overlap.Overlap, unreadable: Sequence[str], true_labels: np.ndarray | None) -> dict[str, Any]:
  """Weights, selection, joint fine-tuning, evaluation: the results.

  `unreadable` are ids that the pool has lost, `common` says which others; `true_labels` are those of train before noise was put in.
  """
  active = methods.active(config.methods.to_dict())
  weights = _weights(config, work, pool, common)
  transform = setup.make_transform(config)
  chosen = _select(config, work, weights, splits.train, pool, transform, embeddings,
                   {'cannot be read': unreadable, 'are in the target too': common.dropped})
  remove_partial(work.unfinished)
  streams = {'target': fit.Stream(splits.train, config.train.batch_size, 1.0, config.target.balanced)}
  heads = {'target': len(splits.train.class_names)}
  if chosen is not None:
    labelled = not _unlabelled(active)
    if not labelled:
      log.info('source images take part without labels, by methods.%s: config.source_weight and a source head are not used',
               _unlabelled(active))
    if labelled:  # the source head keeps all classes of the pool, as in the paper; only the chosen ones ever come
      heads['source'] = len(pool.class_names)
    helping = pool.of_classes(chosen.classes) if chosen.by == 'class' else pool.subset(chosen.rows)
    if not len(helping):
      raise ValueError(f'the selection ({config.selection.file or work.selection_json}) has no image of {pool.name}; '
                       'select again, or train without: --config.selection.method=none')
    if labelled and len(present := np.unique(helping.labels)) == 1:
      log.warning('warning: all source images are of one class, %s, so their labels teach nothing; choose more '
                  '(config.selection.size)', pool.class_names[present[0]])
    streams['source'] = fit.Stream(helping, _source_batch(config), config.source_weight if labelled else None)

  needs = methods.all_needs(active, setup.build_model(config.model, heads))
  start = {key: weights.variables[key] for key in ('params', 'batch_stats')} if weights else None
  if needs.trained_classifier:
    heads['pretrained'] = len(start['params']['heads']['pretrained']['bias'])
  model = setup.build_model(config.model, heads, config.train.freeze)
  variables = setup.init_variables(model, config.image_size, config.seed, start)
  data = fit.TrainingData(streams, splits, transform, config.seed, config.data.timeout, true_labels)
  results = fit.fit(training, work, data, fit.InitialNetwork(model, variables, start or {}, trainable.factors), active)
  embeddings = embedding.PRECISION if chosen is not None and chosen.encoder and not config.selection.file else None  # None: none were made
  return {
      'job': 'finetune', **results, 'precision': {**results['precision'], 'embeddings': embeddings},
      'target': {'name': config.target.name, 'classes': len(splits.train.class_names), 'fingerprint': splits.train.fingerprint,
                 'train': len(splits.train), 'val': len(splits.val), 'test': len(splits.test) if splits.test else 0,
                 'fingerprints': split_fingerprints(splits)},
      'source': None if pool is None else {
          'name': config.source.name, 'classes': len(pool.class_names), 'images': len(pool), 'fingerprint': pool.fingerprint},
      'selection': None if chosen is None else {
          'method': chosen.method, 'by': chosen.by, 'noun': NOUNS[chosen.by], 'units': len(chosen.units),
          'classes': list(chosen.class_names), 'images': len(streams['source'].images),
          'fingerprint': streams['source'].images.fingerprint},
      'weights': weights.about if weights else None}


def check(config: ConfigDict) -> tuple[Training, Trainable]:
  """Raises ValueError for what can be known before anything long begins."""
  check_fields(config)
  if not config.target.name:
    raise ValueError('config.target.name is empty; name your images, such as folder:/data/pets or tfds:oxford_iiit_pet')
  per_class, fraction = config.target.train_per_class, config.target.train_fraction
  if fraction < 1 and per_class:
    raise ValueError('config.target.train_fraction and config.target.train_per_class both say how many images are drawn; set one')
  if config.target.test == 'rest' and not per_class and fraction == 1:
    raise ValueError("config.target.test is 'rest', what is not drawn for training, but config.target.train_per_class is 0 and "
                     'train_fraction is 1; set either')
  _check_selection(config)
  overlap.check(config.source.duplicates)
  noise.check(config.noise)
  setup.check_data(config.data)
  if config.embeddings_dir:
    storage.located(config.embeddings_dir)
  setup.make_transform(config)
  initial_weights.check_weights(config.model)
  # The numbers of classes are not known yet and do not matter for what is checked.
  active = methods.active(config.methods.to_dict())
  heads = _heads(config, active)
  if _unlabelled(active) and config.model.source_head == 'pretrained':
    raise ValueError(f"config.model.source_head is 'pretrained', but with methods.{_unlabelled(active)} source images have no labels and "
                     'there is no head for their classes; use --config.model.source_head=fresh')
  model = setup.build_model(config.model, dict.fromkeys(heads, 2), config.train.freeze)
  fresh = {'target'} | ({'source'} & set(heads) if config.model.source_head == 'fresh' else set()) if config.model.weights else ()
  nothing = np.zeros(0, np.int32)
  begin = methods.SetupContext(
      model=model, image_size=config.image_size, classes=2, labels=nothing, true_labels=nothing, batch_size=config.train.batch_size,
      seed=config.seed, pretrained=bool(config.model.weights), has_source=config.selection.method != 'none', start={},
      batches=lambda split, rows=None: [])
  methods.check(active, begin)
  training = Training.from_config(config.train, config.target.metric)
  sizes = {'target': config.train.batch_size}
  if config.selection.method != 'none':
    sizes['source'] = _source_batch(config)
    training.check_batch(sizes['source'], 'config.source_ratio * config.train.batch_size')
  views = [view.stream for view in methods.all_needs(active, model).forwarded_views]
  images = sum(sizes.get(stream, 0) for stream in (*sizes, *views))
  trainable = Trainable.of(training, model, config.image_size, images, fresh=fresh, own=own_params(active, begin))
  if config.model.weights == 'pretrain':
    # BatchNorm is trained there, whatever the fine-tuning does.
    own = setup.build_model(config.model, {'source': 2}, config.pretrain.freeze).clone(batch_norm='train')
    Trainable.of(Training.from_config(config.pretrain), own, config.image_size, config.pretrain.batch_size)
  return training, trainable


def _log_doubts(config: ConfigDict, training: Training, trainable: Trainable) -> None:
  """Warns of settings with which a run may end well and mean nothing."""
  heads_alone = trainable.only_heads
  log_doubts(training, heads_alone and not config.model.weights)
  if config.selection.method == 'none' or _unlabelled(methods.active(config.methods.to_dict())):
    return
  if not config.source_weight:
    log.warning('warning: config.source_weight is 0: source images are read, and only BatchNorm learns of them; '
                'config.selection.method=none leaves them out')
  elif heads_alone:
    log.warning('warning: train.freeze is %r, so source images train their own head alone and do nothing for the '
                'target; config.selection.method=none leaves them out', config.train.freeze)


def _heads(config: ConfigDict, active: Mapping[str, methods.Method]) -> list[str]:
  """Names of the heads that are trained."""
  needs = methods.all_needs(active, setup.build_model(config.model, {'target': 2}))
  labelled = config.selection.method != 'none' and not _unlabelled(active)
  return ['target', *(['source'] if labelled else []), *(['pretrained'] if needs.trained_classifier else [])]


def _unlabelled(active: Mapping[str, methods.Method]) -> str:
  """The method with which source images take part without labels; '' where they have them."""
  return next((name for name, method in active.items() if method.unlabelled_source), '')


def _check_selection(config: ConfigDict) -> None:
  settings = config.selection
  if not config.source.name and settings.method != 'none':
    raise ValueError(f'config.selection.method is {settings.method!r} but config.source.name is empty; '
                     'name the pre-training data, or use --config.selection.method=none')
  if settings.method not in selection.STRATEGIES:
    raise ValueError(f'config.selection.method is {settings.method!r}; known: {", ".join(selection.STRATEGIES)}')
  if settings.file and settings.method == 'none':
    raise ValueError("config.selection.file is set, but config.selection.method is 'none', which uses no selection; set either")
  if settings.file and not storage.located(settings.file).is_file():
    raise ValueError(f'config.selection.file: there is no file {settings.file}; expected a selection.json, or ids as text, one a line')
  if settings.by not in selection.UNITS:
    raise ValueError(f'config.selection.by is {settings.by!r}; known: {", ".join(selection.UNITS)}')
  if settings.features not in FEATURES:
    raise ValueError(f'config.selection.features is {settings.features!r}; known: {", ".join(FEATURES)}')
  if _projects(config) and (config.model.weights in ('', 'pretrain') or config.model.weights.startswith('timm:')):
    raise ValueError(f"config.selection.features is 'projection', which config.model.weights {config.model.weights!r} do not have; give "
                     "MoCo-v2's .pth.tar, or use --config.selection.features=pooled")
  cost = _parameters(config).get('cost')
  if cost is not None and cost not in strategies.COSTS:
    raise ValueError(f'config.selection.cost is {cost!r}; known: {", ".join(strategies.COSTS)}')
  if settings.by == 'example' and cost == 'bures':
    raise ValueError("config.selection.cost is 'bures', which compares classes or clusters, but config.selection.by is 'example'")
  if settings.size < 1 and settings.method not in {*strategies.BY_SHARE, 'none'}:
    raise ValueError(f'config.selection.size is {settings.size:g}, a share of transported mass, which {settings.method} does not go by; '
                     'give a number of units')


def _check_pool(config: ConfigDict, pool: ImageSet) -> None:
  """Raises ValueError where the pool has not what is to be chosen from it or learnt of it."""
  if len(pool.class_names) < 2 and not _unlabelled(methods.active(config.methods.to_dict())):
    raise ValueError(f'{pool.name} has one class, {pool.class_names[0]}, so its labels teach nothing; use its images without them, by '
                     '--config.methods.fixmatch.weight=1')
  if config.selection.file:
    return
  size, by = config.selection.size, config.selection.by
  if len(pool.class_names) < 2 and by == 'class':
    raise ValueError(f"config.selection.by is 'class', but {pool.name} has one class, {pool.class_names[0]}; choose by cluster "
                     '(--config.selection.by=cluster --config.selection.clusters=...) or by example')
  most = {'class': len(pool.class_names), 'cluster': config.selection.clusters, 'example': len(pool)}[by]
  if not 0 < size <= most or size >= 1 and size != round(size):
    raise ValueError(f'config.selection.size is {size:g}; expected 1 to {most}, the number of {NOUNS[by]} of {pool.name}, or a share '
                     'below 1')
  if by == 'cluster' and not 0 < config.selection.clusters <= len(pool):
    raise ValueError(f'config.selection.clusters is {config.selection.clusters}; expected 1 to {len(pool)}, the images of {pool.name}')


def _parameters(config: ConfigDict) -> dict[str, Any]:
  """The selection method's own."""
  return {name: config.selection[name] for name in strategies.defaults(config.selection.method) if name in config.selection}


def _source_batch(config: ConfigDict) -> int:
  size = config.source_ratio * config.train.batch_size
  if not 1 <= size < 2**31 or size != round(size):
    raise ValueError(f'config.source_ratio {config.source_ratio} of batch {config.train.batch_size} is {size} source images a step; '
                     'expected a whole number from 1 (config.selection.method=none trains without)')
  return round(size)


def _describe(splits: Splits, pool: ImageSet | None) -> None:
  test = f', {len(splits.test):,d} test' if splits.test else ''
  log.info('target: %s: %s train, %s val%s images of %d classes', splits.train.name, f'{len(splits.train):,d}',
           f'{len(splits.val):,d}', test, len(splits.train.class_names))
  if pool is not None:
    classes = f'of {len(pool.class_names):,d} classes' if len(pool.class_names) > 1 else 'of one class'
    log.info('source: %s: %s images %s', pool.name, f'{len(pool):,d}', classes)
    if pool.class_names == splits.train.class_names:
      log.warning('warning: target and source have the same classes; is %s the pre-training data?', pool.name)


def _projects(config: ConfigDict) -> bool:
  """Whether images are compared by the output of the projection head."""
  return config.selection.features == 'projection' and config.selection.method != 'none' and not config.selection.file


def _weights(config: ConfigDict, work: Workdir, pool: ImageSet | None, common: overlap.Overlap) -> initial_weights.Weights | None:
  """The pre-trained variables, with the source head where it is to come from them; pre-trains first where the config says so."""
  if not config.model.weights:
    log.warning('warning: config.model.weights is empty, so the network starts from random weights')
    return None
  active = methods.active(config.methods.to_dict())
  classifier = any(method.needs(setup.build_model(config.model, {})).classifier for method in active.values())
  has_head = config.model.source_head == 'pretrained' and 'source' in _heads(config, active)
  classes = len(pool.class_names) if has_head else None
  if config.model.weights != 'pretrain':
    return initial_weights.load_weights(config.model.weights, classes=classes, class_names=pool.class_names if has_head else None,
                              classifier=classifier, projection=_projects(config))
  # A run of its own beside the others, with its own checkpoints and report.
  # Only what it depends on: it is not lost where something else is changed.
  fields = config.to_dict()
  own = ConfigDict({name: fields[name] for name in ('seed', 'data_dir', 'image_size', 'source', 'model', 'augment', 'data')})
  own.job, own.train, own.model.weights = 'pretrain', fields['pretrain'], ''
  own.model.source_head, own.model.batch_norm = 'fresh', 'train'
  own.data.cache = False  # that is for the target: the pool is large
  own.source.duplicates = 'drop'  # results.json says what was left out, whatever the rule was
  if common.classes:
    own.source.without = common.classes
  pretrain.run(own, work.path / 'pretrain', common.dropped)
  return initial_weights.load_weights(str(work.path / 'pretrain'), classes=classes, classifier=classifier)


def _select(config: ConfigDict, work: Workdir, weights: initial_weights.Weights | None, target: ImageSet, pool: ImageSet | None,
            transform: Transform, folder: epath.Path, lost: Mapping[str, Sequence[str]]) -> selection.Selection | None:
  """The selection of this run, None for plain fine-tuning; a run that goes on from a checkpoint keeps the one it began with."""
  settings = config.selection
  if pool is None or settings.method == 'none':
    return None
  if parallel.agreed(lambda: work.has_checkpoint() and work.selection_json.exists()):
    return _load_selection(work, pool)
  if settings.file:
    return _kept(_given(settings.file, pool, lost), work, pool)
  embedded = [_embedded(config, folder, work.unfinished, weights, source, transform, what)
              for source, what in ((pool, 'source'), (target, 'target'))]
  size = settings.size if settings.size < 1 else int(settings.size)
  chosen = selection.select(*embedded, size, by=settings.by, method=settings.method, seed=config.seed,
                            clusters=settings.clusters if settings.by == 'cluster' else None, **_parameters(config))
  return _kept(chosen, work, pool)


def _kept(chosen: selection.Selection, work: Workdir, pool: ImageSet) -> selection.Selection:
  """The selection with the name of its source, written to the workdir."""
  chosen = dataclasses.replace(chosen, source={'name': pool.name, 'fingerprint': pool.fingerprint})
  if parallel.is_main():
    chosen.save(work.selection_json)
  parallel.check_same({'selection': digest(chosen.units.tobytes().hex())}, 'units')
  log.info('%s', chosen.table(12))
  return chosen


def _given(path: str, pool: ImageSet, lost: Mapping[str, Sequence[str]] = types.MappingProxyType({})) -> selection.Selection:
  """A selection that was made before: classes of the same names, or images whose ids are in the pool.

  Args:
    path: selection.json, or a text file of ids.
    pool: what it is used with.
    lost: ids of images that the pool has lost, by the reason; they are left out.

  Raises:
    ValueError: it was made from other classes, or with ids that are not in the pool.
  """
  if not path.endswith('.json'):
    return _of_ids(path, _read_ids(path, str(pool.ids[0])), pool, lost)
  chosen = selection.Selection.load(path)
  if pool.is_known_as(chosen.source.get('fingerprint')):
    _check_fits(path, chosen, pool)
    return chosen
  if chosen.by == 'class' and tuple(chosen.names) == pool.class_names:
    return dataclasses.replace(chosen, rows=None, ids=None, row_units=None, counts=np.bincount(pool.labels, minlength=len(chosen.scores)))
  if chosen.ids is None:
    different = f'its {NOUNS[chosen.by]} are not those of {pool.name}' if chosen.by == 'class' else f'it is of {NOUNS[chosen.by]}'
    if chosen.by == 'class' and any(lost.values()):
      different += ' (images that cannot be read or are in the target too were left out, and with them perhaps a class: see the warnings ' \
          'above, and config.source.duplicates)'
    raise ValueError(f'{path} does not fit: {different}, and it knows no ids of images; select again, with ids=... in selection.Embeddings')
  return _of_ids(path, chosen.ids.tolist(), pool, lost)


def _check_fits(path: str, chosen: selection.Selection, pool: ImageSet) -> None:
  """Raises ValueError where a file that says it was made for the pool was not: anybody can write that."""
  known = chosen.by == 'class' or chosen.rows is not None
  if not known or chosen.by == 'class' and tuple(chosen.names) != pool.class_names or \
      chosen.rows is not None and len(chosen.rows) and chosen.rows.max() >= len(pool):
    raise ValueError(f'{path} says that it was made for {pool.name}, but its {NOUNS[chosen.by]} are not of it; select again')


def _read_ids(path: str, example: str) -> list[str]:
  try:
    text = storage.located(path).read_bytes().decode('utf-8-sig')  # with or without a mark at its start
    lines = io.StringIO(text, newline=None).read().split('\n')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is no text (UTF-8); expected ids of images, one a line, such as {example!r}') from error
  ids = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
  if not ids:
    raise ValueError(f'{path} is empty; expected ids of images, one a line, such as {example!r}')
  return ids


def _of_ids(path: str, ids: Sequence[str], pool: ImageSet, lost: Mapping[str, Sequence[str]]) -> selection.Selection:
  left = [str(i) for i in ids]
  for reason, those in lost.items():
    if out := set(those).intersection(left):
      log.warning('warning: %s of %s images of %s %s and are left out', f'{len(out):,d}', f'{len(ids):,d}', path, reason)
      left = [i for i in left if i not in out]
  return selection.Selection.of_rows(pool.at_ids(left), pool.ids)


def _embedded(config: ConfigDict, folder: epath.Path, unfinished: epath.Path, weights: initial_weights.Weights | None, source: ImageSet,
              transform: Transform, what: str) -> selection.Embeddings:
  """Features of a source, as means of its classes where those are enough; made once for these weights, images and preprocessing.

  `selection.features` of 'projection' are the 128 numbers behind MoCo-v2's projection head (Liu et al., NeurIPS 2022).
  """
  means = config.selection.by == 'class' and _parameters(config).get('cost') != 'bures'
  variables = setup.init_variables(setup.build_model(config.model, {}), config.image_size, config.seed,
                                   weights.variables if weights else None)
  if _projects(config):
    variables['projection'] = weights.variables['projection']
  # Another jax may draw other ones by the same seed.
  random = '' if weights else f'{initial_weights.drawn(config.seed)} by jax {jax.__version__}, {config.model.width} {config.model.stem}'
  return embedded(folder, config.model, variables, source, transform, config.train.batch_size, what, means, config.data.timeout,
                  unfinished, random)


def _selection_section(target: ImageSet, pool: ImageSet, chosen: selection.Selection, most: int = 120) -> report.SelectionSection:
  """What the report shows of a selection, with a few images of each class."""
  members = {unit: np.flatnonzero(pool.labels == unit) if chosen.by == 'class' else chosen.rows_of(unit)
             for unit in chosen.units[:most].tolist()}
  rows = [report.ChosenUnit(pool.ids[unit] if chosen.by == 'example' else chosen.name(unit), chosen.score_text(unit).replace('%', ' %'),
                            len(images), drawn_by, _examples(pool, images, 4))
          for (unit, images), drawn_by in zip(members.items(), chosen.explain(3))]
  how = f'{len(chosen.units):,d} of {len(chosen.scores):,d} {NOUNS[chosen.by]} of {pool.name}, '
  how += 'taken from a list' if chosen.method == 'given' else f'chosen by {chosen.method}'
  settings = [f'{name} {value}' for name, value in chosen.parameters.items() if value is not None and name != 'max_iterations']
  settings += [chosen.solver_summary] if chosen.solver else []
  how += f' ({", ".join(settings)}).' if settings else '.'
  if chosen.measure == 'share':
    how += (f' The share of a {chosen.by} is the part of the transported mass that comes from it; the last column says which target '
            'classes that mass goes to.')
  if len(chosen.units) > most:
    how += f' The first {most} are shown; selection.json has all of them.'
  target_rows = [(name, _examples(target, np.flatnonzero(target.labels == k), 2)) for k, name in enumerate(target.class_names[:most])]
  picture = plots.overview(chosen) if chosen.has_scores else None
  measure = chosen.measure if chosen.has_scores else ''
  return report.SelectionSection(how, chosen.by, NOUNS[chosen.by], measure, rows, picture, target_rows)


def _pairs(common: overlap.Overlap, opened: Mapping[str, ImageSet | None], most: int = 6) -> list[report.DuplicatePair]:
  """Pictures of the first copies of each split and of what they are copies of; `opened` are the splits with their copies."""
  def picture(split: str, example_id: str) -> bytes:
    source = opened[split]
    example = source[int(source.at_ids([example_id])[0])]
    return thumbnail(example.image, example.id, 96)

  return [report.DuplicatePair(duplicates.KINDS[copy.kind], (name, copy.id, picture(name, copy.id)),
                               (copy.split, copy.other, picture(copy.split, copy.other)))
          for name, copies in common.found.items() for copy in copies[:most]]


def _examples(source: ImageSet, rows: np.ndarray, most: int) -> list[bytes]:
  rows = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)]
  return [thumbnail(example.image, example.id, 64) for example in (source[int(row)] for row in rows)]


FEATURES = ('pooled', 'projection')
