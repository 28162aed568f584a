"""Job finetune: select pre-training data for a target, fine-tune on both together, evaluate and report."""

from collections.abc import Collection, Mapping
import dataclasses
from typing import Any, NamedTuple

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np

from ft_jax import embedding, methods, models, noise, parallel, selecting
from ft_jax.data import label_noise, open_set, overlap
from ft_jax.data.image_set import ImageSet
from ft_jax.data.pipeline import make_transform, Transform
from ft_jax.data.splits import (
  cache_in_memory,
  check_classes,
  check_same_images,
  drop_unreadable,
  Given,
  log_classes_not_evaluated,
  open_splits,
  Reading,
  skipped_summary,
  split_fingerprints,
  Splits,
  SplitSettings,
  unsampled_sets,
)
from ft_jax.jobs import pretrain
from ft_jax.methods import Method
from ft_jax.models.network import Network, network_variables
from ft_jax.pages import report
from ft_jax.pages.selection_section import duplicate_pairs, selection_section
from ft_jax.progress import log
from ft_jax.selecting import SelectionSettings
from ft_jax.settings import check_fields
from ft_jax.training import fit, initial_weights
from ft_jax.training.initial_weights import Weights
from ft_jax.training.optimizer import make_weight_schedule, WEIGHT_SCHEDULES
from ft_jax.training.settings import log_doubts, own_params, Trainable, Training
from ft_jax.workdir import read_json, Workdir, write_results
import selection
from selection import storage
from selection.result import NOUNS

# How many classes a head has is not known before the data are opened; it changes nothing that is refused before.
UNKNOWN = 2
NO_LABELS = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class JointSettings:
  """When and how source images take part in the training.

  Attributes:
    weight: lambda, of their loss.
    schedule: of the weight over the joint steps; one of `WEIGHT_SCHEDULES`.
    batch: how many there are in a step; 0 where there are none at all.
    source_first: fraction of the steps, at the start, that train on them alone.
    target_last: fraction of the steps, at the end, that train on the target alone.
  """
  weight: float
  schedule: str
  batch: int
  source_first: float
  target_last: float

  @property
  def phases(self) -> bool:
    """Whether some steps have images of one of the two sets alone."""
    return self.source_first > 0 or self.target_last > 0

  @property
  def sequential(self) -> bool:
    """Whether no step has images of both."""
    return self.source_first + self.target_last > 1 - 1e-6

  def check(self, methods: Mapping[str, Method]) -> None:
    """Raises ValueError for fields that cannot be right, alone or together, or with these methods."""
    if self.schedule not in WEIGHT_SCHEDULES:
      raise ValueError(f'config.source_weight_schedule is {self.schedule!r}; known: {", ".join(WEIGHT_SCHEDULES)}')
    if self.source_first + self.target_last > 1 + 1e-6:
      raise ValueError(f'config.source_first {self.source_first:g} and config.target_last {self.target_last:g} are '
                       'more than the whole training; their sum can be 1 at most')
    for name, value in (('source_first', self.source_first), ('target_last', self.target_last)):
      if value and not self.batch:
        raise ValueError(f"config.{name} is {value:g}, but config.selection.method is 'none', so there are no source "
                         'images; leave it 0')
    falls = self.schedule != 'constant'
    if falls and not self.batch:
      raise ValueError(f"config.source_weight_schedule is {self.schedule!r}, but config.selection.method is 'none', so "
                       'there are no source images; use constant')
    if falls and self.sequential:
      raise ValueError(f'config.source_weight_schedule is {self.schedule!r}, but no step has both source and target '
                       'images (config.source_first + config.target_last is 1); use constant')
    unlabelled = _unlabelled(methods)
    if unlabelled and (falls or self.source_first):
      what = 'config.source_first trains on source labels' if self.source_first else \
          'config.source_weight_schedule changes the weight of source labels'
      raise ValueError(f'{what}, which methods.{unlabelled} does not use; leave one of them out')

  def steps(self, steps: int) -> tuple[int, int]:
    """Of a training of so many steps the first one with target images, and the first one without source images.

    Raises:
      ValueError: a phase that is asked for has no step.
    """
    first = round(self.source_first * steps)
    end = first if self.sequential else max(first, steps - round(self.target_last * steps))
    for name, value, length in (('source_first', self.source_first, first),
                                ('target_last', self.target_last, steps - end)):
      if value and not 0 < length < steps:
        raise ValueError(f'config.{name} {value:g} of {steps} steps is {length} steps; expected at least one, and '
                         'fewer than all; train longer, or leave it 0')
    if self.phases and not self.sequential and end == first:
      raise ValueError(f'config.source_first {self.source_first:g} and config.target_last {self.target_last:g} leave '
                       f'none of {steps} steps to both; train longer, or make their sum 1')
    return first, end


@dataclasses.dataclass(frozen=True)
class Settings:
  """A config as objects, whose constructors refuse what cannot be right.

  Attributes:
    fields: of the config, as config.json has them.
    seed: of everything random.
    data_dir: of the image sets.
    target: its splits.
    balanced: whether every class of the target comes equally often.
    source: the pre-training data, of which `train` is selected from (and pre-trained on).
    shuffle_labels: whether the labels of the selected images are permuted.
    duplicates: what is done with images that both have; one of `overlap.RULES`.
    noise: in the labels of the target's training images.
    reading: of images.
    transform: what images go through.
    methods: that are switched on, by name.
    model: with all of its heads, whose numbers of classes are not known yet.
    weights: where its variables come from; '' for random ones.
    source_head: 'fresh' or 'pretrained'.
    training: the length, the optimizer, ...
    trainable: what training does to each parameter of the model.
    selection: which pre-training data are trained on too.
    joint: when and how source images take part in the training.
    embeddings_dir: where embeddings are cached; '' is the workdir.
    refit_head: whether the head of the target is fitted once more at the end.
    pretraining: that comes first, where there is one.
  """
  fields: Mapping[str, Any]
  seed: int
  data_dir: str
  target: SplitSettings
  balanced: bool
  source: SplitSettings
  shuffle_labels: bool
  duplicates: str
  noise: noise.NoiseSettings
  reading: Reading
  transform: Transform
  methods: Mapping[str, Method]
  model: Network
  weights: str
  source_head: str
  training: Training
  trainable: Trainable
  selection: SelectionSettings
  joint: JointSettings
  embeddings_dir: str
  refit_head: bool
  pretraining: pretrain.Settings | None

  @classmethod
  def from_config(cls, config: ConfigDict, target_given: bool = False, source_given: bool = False) -> 'Settings':
    """Raises ValueError for what can be known before any data are opened.

    Args:
      config: of job finetune.
      target_given: whether the target is given as image sets, so that it needs no name.
      source_given: likewise for the source.
    """
    check_fields(config)
    if not config.target.name and not target_given:
      raise ValueError('config.target.name is empty; name your images, such as folder:/data/pets or '
                       'tfds:oxford_iiit_pet')
    target = SplitSettings.from_config(config.target)
    chosen = SelectionSettings.from_config(config.selection)
    if chosen.used and not config.source.name and not source_given:
      raise ValueError(f'config.selection.method is {chosen.method!r} but config.source.name is empty; '
                       'name the pre-training data, or use --config.selection.method=none')
    if chosen.projects and (config.model.weights in ('', 'pretrain') or config.model.weights.startswith('timm:')):
      raise ValueError(f"config.selection.features is 'projection', which config.model.weights "
                       f"{config.model.weights!r} do not have; give MoCo-v2's .pth.tar, or use "
                       "--config.selection.features=pooled")
    overlap.check(config.source.duplicates)
    noisy = noise.NoiseSettings.from_config(config.noise)
    reading = Reading.from_config(config.data)
    if config.embeddings_dir:
      storage.located(config.embeddings_dir)
    transform = make_transform(config.image_size, config.augment)
    initial_weights.check_weights(config.model)
    active = methods.active(config.methods.to_dict())
    methods.check_job(active, 'finetune')
    training = Training.from_config(config.train, config.target.metric)
    source_batch = _source_batch(config.source_ratio, training) if chosen.used else 0
    joint = JointSettings(config.source_weight, config.source_weight_schedule, source_batch, config.source_first,
                          config.target_last)
    joint.check(active)
    model, trainable = _model(config, active, training, joint)
    if config.source.shuffle_labels and 'source' not in model.heads:
      raise ValueError('config.source.shuffle_labels is True, but no labels of source images are trained on '
                       f'(config.selection.method {chosen.method!r}); leave it False')
    pretraining = None
    if config.model.weights == 'pretrain':
      pretraining = pretrain.Settings.from_config(pretrain_config(config), source_given)
    return cls(
        fields=config.to_dict(), seed=config.seed, data_dir=config.data_dir, target=target,
        balanced=config.target.balanced,
        source=SplitSettings.from_config(config.source), shuffle_labels=config.source.shuffle_labels,
        duplicates=config.source.duplicates, noise=noisy,
        reading=reading, transform=transform, methods=active, model=model, weights=config.model.weights,
        source_head=config.model.source_head, training=training, trainable=trainable, selection=chosen,
        joint=joint, embeddings_dir=config.embeddings_dir, refit_head=config.refit_head,
        pretraining=pretraining)

  @property
  def uses_source(self) -> bool:
    """Whether any image of the pre-training data is trained on."""
    return self.selection.used or self.pretraining is not None

  @property
  def labelled_source(self) -> bool:
    """Whether selected images take part in the step with their labels, and so with a head of their own."""
    return 'source' in self.model.heads

  @property
  def images_per_step(self) -> float:
    """Images that go through the network in a step to be trained on, further views of them included, on average over
    the training.
    """
    with_target, with_source = 1 - self.joint.source_first, 1 - self.joint.target_last
    sizes = {'target': self.training.batch_size * with_target, 'source': self.joint.batch * with_source}
    needs = methods.all_needs(self.methods, self.model)
    views = sum(sizes[view.stream] for view in needs.forwarded_views)
    return round(sum(sizes.values()) + views, 6)  # 1/3 + 2/3 of a batch is a whole one

  def check_sets(self, splits: Splits, pool: ImageSet | None) -> None:
    """Raises ValueError where the images are not what can be trained on with these settings; reads none of them."""
    check_classes(splits, 'target.without')
    self.joint.steps(self.training.plan(len(splits.train)).steps)
    if pool is None or not self.selection.used:
      return
    if len(pool.class_names) < 2 and self.labelled_source:
      raise ValueError(f'{pool.name} has one class, {pool.class_names[0]}, so its labels teach nothing; use its images '
                       'without them, by --config.methods.fixmatch.weight=1')
    self.selection.check_pool(pool)


class Sets(NamedTuple):
  """The images of a run.

  Attributes:
    splits: of the target; train with label noise, where there is some.
    pool: the pre-training data; None where they are not used.
    opened: all of them by the name of the split, before copies were left out.
    copies: images that several of them have.
    skipped: ids of images that cannot be read, by the name of the split.
    noise: the true labels, and what results.json says of them.
  """
  splits: Splits
  pool: ImageSet | None
  opened: Mapping[str, ImageSet | None]
  copies: overlap.Overlap
  skipped: Mapping[str, list[str]]
  noise: noise.Noise


def run(config: ConfigDict, workdir: epath.PathLike, embeddings: epath.PathLike = '', *, target: Given | None = None,
        source: Given | None = None) -> dict[str, Any]:
  """Runs the job, or resumes it; returns what results.json holds.

  Args:
    config: of the job.
    workdir: where everything is written.
    embeddings: a folder for embeddings; `config.embeddings_dir` comes first, '' is the workdir.
    target: image sets in place of `config.target.name`, by split: train, and val and test if there are any; see
      `open_splits`.
    source: likewise, in place of `config.source.name`.

  Raises:
    ValueError: a setting, image or file that cannot be used.
    Interrupted: a signal asked to stop; the state is saved.
  """
  settings = Settings.from_config(config, target is not None, source is not None)
  return fine_tune(settings, workdir, embeddings, target, source)


def fine_tune(settings: Settings, workdir: epath.PathLike, embeddings: epath.PathLike = '', target: Given | None = None,
              source: Given | None = None, pretrained: epath.PathLike = '', trial: bool = False) -> dict[str, Any]:
  """See `run`.

  Args:
    settings, workdir, embeddings, target, source: see `run`.
    pretrained: the workdir of a finished pre-training as `settings.pretraining` has it; '' pre-trains in this run.
    trial: whether the run is there to choose settings by val: nothing is evaluated on test, and there is no report.
  """
  work = Workdir(workdir, settings.fields)
  done = parallel.agreed(work.results)
  if done and (trial or parallel.agreed(work.report_html.exists)):
    log.info('%s is finished: %s', work.path, work.report_html)
    return done
  log.info('fine-tuning %s -> %s', settings.fields['model']['name'], work.path)
  sets = _open_sets(settings, work, target, source, check=not done)
  if trial:
    sets = sets._replace(splits=sets.splits._replace(test=None))
  if not done:
    weights = _weights(settings, work, sets, source, pretrained)
    # Embeddings of target and source, and the selection.
    folder = storage.located(settings.embeddings_dir or embeddings or work.embeddings)
    chosen = _select(settings, work, sets, weights, folder)
    embedding.remove_partial(work.unfinished)
    # Joint fine-tuning, from the first batch to the test split.
    streams = _streams(settings, sets, chosen)
    network = _network(settings, sets, weights)
    data = fit.TrainingData(streams, sets.splits, settings.transform, settings.seed, settings.reading.timeout,
                            sets.noise.true_labels)
    results = fit.fit(settings.training, work, data, network, settings.methods, settings.refit_head)
    write_results(work, {'job': 'finetune', **results, **_about(settings, results, sets, weights, chosen, streams)})
  if trial:
    return parallel.agreed(lambda: read_json(work.results_json))
  done = parallel.agreed(lambda: _write_report(work, sets))
  log.info('report: %s', work.report_html)
  return done


def open_checked(settings: Settings, work: Workdir) -> Sets:
  """Opens the images of a run and checks them; `work` is of the run, or of the job that it belongs to."""
  return _open_sets(settings, work, None, None, check=True)


def prepare(settings: Settings, work: Workdir, sets: Sets, embeddings: epath.PathLike,
            pretrained: epath.PathLike) -> None:
  """Makes what several runs share: the pre-training and the embeddings of the pool.

  Args:
    settings: of one of the runs.
    work: of the job that they belong to.
    sets: the images of the run.
    embeddings: a folder for embeddings.
    pretrained: the workdir of the pre-training, where there is one.
  """
  if settings.pretraining is not None and not parallel.agreed((storage.located(pretrained) / 'results.json').exists):
    pretrain.pretrain(settings.pretraining.without(sets.copies.classes), pretrained, sets.copies.dropped)
  if sets.pool is not None and settings.selection.embeds:
    weights = _weights(settings, work, sets, None, pretrained)
    encoder = _encoder(settings, weights, storage.located(embeddings), work.unfinished)
    encoder.embed(sets.pool, 'source', settings.selection.class_means)
    embedding.remove_partial(work.unfinished)


def _source_batch(ratio: float, training: Training) -> int:
  size = ratio * training.batch_size
  if not 1 <= size < 2**31 or size != round(size):
    raise ValueError(f'config.source_ratio {ratio} of batch {training.batch_size} is {size} source images a step; '
                     'expected a whole number from 1 (config.selection.method=none trains without)')
  training.check_batch(round(size), 'config.source_ratio * config.train.batch_size')
  return round(size)


def _model(config: ConfigDict, active: Mapping[str, Method], training: Training,
           joint: JointSettings) -> tuple[Network, Trainable]:
  """The network with all of its heads, and what training does to it; raises ValueError where methods do not fit."""
  network = models.from_config(config.model, {}, config.image_size, config.train.freeze)
  needs = methods.all_needs(active, network)
  unlabelled = _unlabelled(active)
  if unlabelled and config.model.source_head == 'pretrained':
    raise ValueError(f"config.model.source_head is 'pretrained', but with methods.{unlabelled} source images have no "
                     "labels "
                     'and there is no head for their classes; use --config.model.source_head=fresh')
  heads = ['target']
  heads += ['source'] if joint.batch and not unlabelled else []
  fresh = heads if config.model.source_head == 'fresh' else ['target']
  heads += ['pretrained'] if needs.trained_classifier else []
  model = network.clone(heads=dict.fromkeys(heads, UNKNOWN))
  context = methods.SetupContext(
      model=model, classes=UNKNOWN, labels=NO_LABELS, true_labels=NO_LABELS, batch_size=training.batch_size,
      seed=config.seed, pretrained=bool(config.model.weights), has_source=joint.batch > 0, start={},
      batches=lambda split, rows=None: [])
  methods.check(active, context)
  sizes = {'target': training.batch_size, 'source': joint.batch}
  sizes = {stream: size * (1 + sum(view.stream == stream for view in needs.forwarded_views))
           for stream, size in sizes.items()}
  apart = model.batch_norm == 'per_stream' and joint.batch > 0
  alone = [sizes['source']] if joint.source_first or apart else []
  alone += [sizes['target']] if joint.target_last or apart else []
  images = min(alone, default=sum(sizes.values()))  # the fewest that go through the network together
  trainable = Trainable.of(training, model, images, fresh=fresh if config.model.weights else (),
                           own=own_params(active, context))
  return model, trainable


def _unlabelled(active: Mapping[str, Method]) -> str:
  """The method with which source images take part without labels; '' where they have them."""
  return next((name for name, method in active.items() if method.unlabelled_source), '')


def pretrain_config(config: ConfigDict) -> ConfigDict:
  """The config of a run's own pre-training: only the fields that it depends on, so that it stays when others change."""
  fields = config.to_dict()
  needed = ('seed', 'data_dir', 'image_size', 'source', 'model', 'augment', 'data')
  own = ConfigDict({name: fields[name] for name in needed})
  own.job, own.train, own.model.weights = 'pretrain', fields['pretrain'], ''
  own.model.source_head, own.model.batch_norm = 'fresh', 'train'
  own.data.cache = False  # that is for the target: the pool is large
  own.source.shuffle_labels = False  # that is for the selected images
  own.source.duplicates = 'drop'  # results.json says what was left out, whatever the rule was
  return own


def _open_sets(settings: Settings, work: Workdir, target: Given | None, source: Given | None, check: bool) -> Sets:
  """Opens target and source, without images that cannot be read and copies; checks them before any image is read.

  Args:
    settings: of the run.
    work: its workdir.
    target: in place of what the settings name.
    source: likewise.
    check: whether the run is not finished.
  """
  splits = open_splits(settings.target, settings.data_dir, settings.seed, target)
  pool = None
  # Plain fine-tuning uses nothing of the pre-training data, which need not be there.
  if settings.uses_source:
    pool = source['train'] if source else open_set(settings.source.name, settings.source.train, settings.data_dir)
  if check:
    settings.check_sets(splits, pool)
  splits, readable, skipped = drop_unreadable(splits, 'target', settings.reading.on_error,
                                              pool if settings.selection.used else None)
  pool = pool if readable is None else readable
  check_same_images(splits, pool)
  opened = {**{f'target {name}': images for name, images in splits._asdict().items()}, overlap.POOL: pool}
  unsampled = unsampled_sets(settings.target, settings.data_dir, target)
  copies = overlap.settle(work, splits, pool, settings.duplicates, unsampled)
  splits, pool = copies.splits, copies.pool
  if check:
    settings.check_sets(splits, pool)  # what is left of them
    log_classes_not_evaluated(splits)
    _log_doubts(settings)
  noisy = noise.add(settings.noise, settings.seed, splits, work.predicted_json)
  splits = noisy.splits
  if check:
    _log_sets(splits, pool)
    splits = cache_in_memory(splits, 'target', settings.reading.cache)
  return Sets(splits, pool, opened, copies, skipped, noisy)


def _log_doubts(settings: Settings) -> None:
  """Warns of settings with which a run may end well and mean nothing."""
  heads_alone = settings.trainable.only_heads
  log_doubts(settings.training, heads_alone and not settings.weights)
  if not settings.labelled_source:
    return
  if not settings.joint.weight and not settings.joint.source_first:
    log.warning('warning: config.source_weight is 0: source images are read, and only BatchNorm learns of them; '
                'config.selection.method=none leaves them out')
  elif heads_alone:
    log.warning('warning: train.freeze is %r, so source images train their own head alone and do nothing for the '
                'target; config.selection.method=none leaves them out', settings.training.freeze)


def _log_sets(splits: Splits, pool: ImageSet | None) -> None:
  test = f', {len(splits.test):,d} test' if splits.test else ''
  log.info('target: %s: %s train, %s val%s images of %d classes', splits.train.name, f'{len(splits.train):,d}',
           f'{len(splits.val):,d}', test, len(splits.train.class_names))
  if pool is None:
    return
  classes = f'of {len(pool.class_names):,d} classes' if len(pool.class_names) > 1 else 'of one class'
  log.info('source: %s: %s images %s', pool.name, f'{len(pool):,d}', classes)
  if pool.class_names == splits.train.class_names:
    log.warning('warning: target and source have the same classes; is %s the pre-training data?', pool.name)


def _weights(settings: Settings, work: Workdir, sets: Sets, source: Given | None,
             pretrained: epath.PathLike = '') -> Weights | None:
  """The pre-trained variables, with the source head where it comes from them; pre-trains where the config says so."""
  if not settings.weights:
    log.warning('warning: config.model.weights is empty, so the network starts from random weights')
    return None
  classifier = any(method.needs(settings.model).classifier for method in settings.methods.values())
  class_names = None
  if sets.pool is not None and settings.labelled_source and settings.source_head == 'pretrained':
    class_names = sets.pool.class_names
  classes = len(class_names) if class_names else None
  if settings.pretraining is None:
    return initial_weights.load_weights(settings.weights, settings.model, classes=classes, class_names=class_names,
                                        classifier=classifier, projection=settings.selection.projects)
  # A run of its own, with its own checkpoints and report.
  folder = storage.located(pretrained or work.path / 'pretrain')
  if not pretrained:
    pretrain.pretrain(settings.pretraining.without(sets.copies.classes), folder, sets.copies.dropped, source)
  return initial_weights.load_weights(str(folder), settings.model, classes=classes, classifier=classifier)


def _select(settings: Settings, work: Workdir, sets: Sets, weights: Weights | None,
            folder: epath.Path) -> selection.Selection | None:
  """The selection of the run; None for plain fine-tuning."""
  if sets.pool is None or not settings.selection.used:
    return None
  lost = {'cannot be read': sets.skipped.get(overlap.POOL, ()), 'are in the target too': sets.copies.dropped}
  make_encoder = lambda: _encoder(settings, weights, folder, work.unfinished)
  return selecting.select(settings.selection, work, sets.pool, sets.splits.train, make_encoder, settings.seed, lost)


def _encoder(settings: Settings, weights: Weights | None, folder: epath.Path,
             unfinished: epath.Path) -> embedding.Encoder:
  """Makes the features that are compared: by the network of the weights."""
  network = settings.model.clone(heads={})
  variables = initial_weights.init_variables(network, settings.seed, weights.variables if weights else None)
  if settings.selection.projects and weights:
    variables['projection'] = weights.variables['projection']
  random = ''
  if not weights:  # another jax may draw other numbers by the same seed
    options = ' '.join(map(str, network.options.values()))
    random = f'{initial_weights.drawn(settings.seed)} by jax {jax.__version__}, {options}'
  return embedding.Encoder(settings.fields['model']['name'], network, variables, settings.transform,
                           settings.training.batch_size, settings.reading.timeout, folder, unfinished, random)


def _streams(settings: Settings, sets: Sets, chosen: selection.Selection | None) -> dict[str, fit.Stream]:
  """What each step takes images from: the target, and what is selected of the source."""
  streams = {'target': fit.Stream(sets.splits.train, settings.training.batch_size, 1.0, settings.balanced)}
  if chosen is None or sets.pool is None:
    return streams
  pool = sets.pool
  rows = np.zeros(0, int) if chosen.rows is None else chosen.rows
  images = pool.of_classes(chosen.classes) if chosen.by == 'class' else pool.subset(rows)
  if not len(images):
    raise ValueError(f'the selection ({settings.selection.file or "selection.json"}) has no image of {pool.name}; '
                     'select again, or train without: --config.selection.method=none')
  if not settings.labelled_source:
    log.info('source images take part without labels, by methods.%s: config.source_weight and a source head are '
             'not used',
             _unlabelled(settings.methods))
  elif len(present := np.unique(images.labels)) == 1:
    log.warning('warning: all source images are of one class, %s, so their labels teach nothing; choose more '
                '(config.selection.size)', pool.class_names[present[0]])
  if settings.shuffle_labels:
    images = label_noise.shuffled(images, settings.seed)
  steps = settings.training.plan(len(sets.splits.train)).steps
  first, end = settings.joint.steps(steps)
  weight = None
  if settings.labelled_source:
    weight = make_weight_schedule(settings.joint.schedule, settings.joint.weight, first, end)
  return {'target': dataclasses.replace(streams['target'], first=first),
          'source': fit.Stream(images, settings.joint.batch, weight, end=end if end < steps else None)}


def _network(settings: Settings, sets: Sets, weights: Weights | None) -> fit.InitialNetwork:
  """The network with the numbers of classes of its heads, and the variables that it starts with."""
  sizes: dict[str, Collection[Any]] = {'target': sets.splits.train.class_names}
  if sets.pool is not None:
    sizes['source'] = sets.pool.class_names  # all of them, as in the paper; only the selected ones ever come
  start = network_variables(weights.variables) if weights else {}
  if 'pretrained' in settings.model.heads and start:
    sizes['pretrained'] = start['params']['heads']['pretrained']['bias']
  model = settings.model.clone(heads={head: len(sizes[head]) for head in settings.model.heads})
  variables = initial_weights.init_variables(model, settings.seed, start or None)
  return fit.InitialNetwork(model, variables, start, settings.trainable.factors)


def _about(settings: Settings, results: Mapping[str, Any], sets: Sets, weights: Weights | None,
           chosen: selection.Selection | None, streams: Mapping[str, fit.Stream]) -> dict[str, Any]:
  """What results.json says in addition to the results of the training."""
  splits, pool = sets.splits, sets.pool
  embedded = chosen is not None and chosen.encoder and settings.selection.embeds
  target = {'name': settings.target.name or splits.train.name, 'classes': len(splits.train.class_names),
            'fingerprint': splits.train.fingerprint, 'train': len(splits.train), 'val': len(splits.val),
            'test': len(splits.test) if splits.test else 0, 'fingerprints': split_fingerprints(splits)}
  source = None if pool is None else {
      'name': settings.source.name or pool.name, 'classes': len(pool.class_names), 'images': len(pool),
      'fingerprint': pool.fingerprint}
  selected = None if chosen is None else {
      'method': chosen.method, 'by': chosen.by, 'noun': NOUNS[chosen.by], 'units': len(chosen.units),
      'classes': list(chosen.class_names), 'images': len(streams['source'].images),
      'fingerprint': streams['source'].images.fingerprint, 'shuffled_labels': settings.shuffle_labels}
  return {
      # Of embeddings None where none were made.
      'precision': {**results['precision'], 'embeddings': embedding.PRECISION if embedded else None},
      'target': target, 'source': source, 'selection': selected, 'weights': weights.about if weights else None,
      'noise': sets.noise.about, 'skipped': skipped_summary(sets.skipped), 'duplicates': sets.copies.summary()}


def _write_report(work: Workdir, sets: Sets) -> dict[str, Any]:
  """Writes the report of a finished run; returns its results."""
  section = None
  if sets.pool is not None and work.selection_json.exists():
    section = selection_section(sets.splits.train, sets.pool, selecting.load(work, sets.pool))
  report.write(work, section, duplicate_pairs(sets.copies, sets.opened))
  return read_json(work.results_json)
