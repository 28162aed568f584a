"""Job pretrain: pre-training on `config.source`, with its labels or, by a method of `config.methods` such as MoCo,
without; its workdir can be the `model.weights` of other runs."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from ft_jax import methods, models, parallel
from ft_jax.data.image_set import digest, ImageSet
from ft_jax.data.pipeline import make_transform, Transform
from ft_jax.data.splits import (
  cache_in_memory,
  check_classes,
  check_same_images,
  drop_unreadable,
  Given,
  open_splits,
  Reading,
  skipped_summary,
  split_fingerprints,
  Splits,
  SplitSettings,
)
from ft_jax.methods import Method, SetupContext
from ft_jax.models.network import Network
from ft_jax.pages import report
from ft_jax.progress import log
from ft_jax.settings import check_fields
from ft_jax.training import fit, initial_weights
from ft_jax.training.initial_weights import Weights
from ft_jax.training.settings import log_doubts, own_params, Trainable, Training
from ft_jax.workdir import read_json, Workdir, write_results

# How many classes the source has is not known before it is opened; it changes nothing that is refused before.
UNKNOWN = 2
NO_LABELS = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class Settings:
  """A config as objects, whose constructors refuse what cannot be right.

  Attributes:
    fields: of the config, as config.json has them.
    seed: of everything random.
    data_dir: of the image sets.
    source: the splits to pre-train on.
    reading: of images.
    transform: what images go through.
    methods: that pre-train without labels, by name; {} where labels are learnt.
    model: with the head 'source', whose number of classes is not known yet; without a head where labels are not used.
    weights: where its variables come from; '' for random ones.
    source_head: 'fresh' or 'pretrained'.
    training: the length, the optimizer, ...
    trainable: what training does to each parameter of the model.
  """
  fields: Mapping[str, Any]
  seed: int
  data_dir: str
  source: SplitSettings
  reading: Reading
  transform: Transform
  methods: Mapping[str, Method]
  model: Network
  weights: str
  source_head: str
  training: Training
  trainable: Trainable

  @classmethod
  def from_config(cls, config: ConfigDict, source_given: bool = False) -> 'Settings':
    """Raises ValueError for what can be known before any data are opened; see `run`."""
    check_fields(config)
    if not config.source.name and not source_given:
      raise ValueError('config.source.name is empty; name the data to pre-train on')
    if config.model.weights == 'pretrain':
      raise ValueError("config.model.weights is 'pretrain', which is what this job does; use "
                       "--config.model.weights= for a "
                       'fresh network')
    # The pre-training within a fine-tuning has neither field.
    active = methods.active(config.methods.to_dict() if 'methods' in config else {})
    methods.check_job(active, 'pretrain')
    if 'noise' in config and (config.noise.kind or config.noise.rate):
      raise ValueError(f'config.noise.kind is {config.noise.kind!r}, which is for the target of a fine-tuning and '
                       'not for job pretrain')
    if config.source.shuffle_labels:
      raise ValueError('config.source.shuffle_labels is True, which is for the selected images of a fine-tuning and '
                       'not for job pretrain')
    initial_weights.check_weights(config.model)
    training = Training.from_config(config.train)
    heads = {} if active else {'source': UNKNOWN}
    model = models.from_config(config.model, heads, config.image_size, config.train.freeze)
    if active:
      _check_unlabelled(config, next(iter(active)))
    context = _setup_context(model, training, config.seed, bool(config.model.weights), NO_LABELS)
    methods.check(active, context)
    fresh = tuple(heads) if config.model.weights and config.model.source_head == 'fresh' else ()
    images = training.batch_size * (1 + len(methods.all_needs(active, model).forwarded_views))
    trainable = Trainable.of(training, model, images, fresh=fresh, own=own_params(active, context))
    return cls(
        fields=config.to_dict(), seed=config.seed, data_dir=config.data_dir,
        source=SplitSettings.from_config(config.source), reading=Reading.from_config(config.data),
        transform=make_transform(config.image_size, config.augment), methods=active, model=model,
        weights=config.model.weights,
        source_head=config.model.source_head, training=training, trainable=trainable)

  def check_images(self, train: ImageSet) -> None:
    """Raises ValueError where there are too few images to train on; reads none of them."""
    self.training.plan(len(train))
    methods.check(self.methods,
                  _setup_context(self.model, self.training, self.seed, bool(self.weights), train.labels))

  def without(self, classes: Sequence[str]) -> 'Settings':
    """The same without some classes of the source."""
    if not classes:
      return self
    fields = {**self.fields, 'source': {**self.fields['source'], 'without': tuple(classes)}}
    return dataclasses.replace(self, fields=fields, source=dataclasses.replace(self.source, without=tuple(classes)))


def run(config: ConfigDict, workdir: epath.PathLike, *, source: Given | None = None) -> dict[str, Any]:
  """Runs the job, or resumes it; returns what results.json holds.

  Args:
    config: of the job.
    workdir: where everything is written.
    source: image sets in place of `config.source.name`, by split; see `open_splits`.

  Raises:
    ValueError: a setting, image or file that cannot be used.
    Interrupted: a signal asked to stop; the state is saved.
  """
  return pretrain(Settings.from_config(config, source is not None), workdir, source=source)


def pretrain(settings: Settings, workdir: epath.PathLike, left_out: Sequence[str] = (),
             source: Given | None = None) -> dict[str, Any]:
  """See `run`; `left_out` are ids of images that are not trained on, as the target of a fine-tuning has them too."""
  work = Workdir(workdir, settings.fields)
  done = parallel.agreed(work.results)
  if not done:
    log.info('pre-training %s -> %s', settings.fields['model']['name'], work.path)
    splits, skipped = _open_splits(settings, left_out, source)
    weights = _weights(settings, splits)
    classes = len(splits.train.class_names)
    model = settings.model.clone(heads=dict.fromkeys(settings.model.heads, classes))
    start = weights.variables if weights else None
    variables = initial_weights.init_variables(model, settings.seed, start)
    streams = {'source': fit.Stream(splits.train, settings.training.batch_size, None if settings.methods else 1.0)}
    data = fit.TrainingData(streams, splits, settings.transform, settings.seed, settings.reading.timeout)
    results = fit.fit(settings.training, work, data,
                      fit.InitialNetwork(model, variables, start or {}, settings.trainable.factors), settings.methods)
    about = {'name': settings.source.name or splits.train.name, 'classes': classes,
             'fingerprints': split_fingerprints(splits), 'left_out': _summary(left_out)}
    write_results(work, {'job': 'pretrain', **results, 'methods': list(settings.methods), 'source': about,
                         'skipped': skipped_summary(skipped), 'weights': weights.about if weights else None})
  elif done['source'].get('left_out', _summary(())) != _summary(left_out):
    raise ValueError(f'{work.path} holds a pre-training that left out other copies of target images than this '
                     'run does; move that folder away to pre-train again, or set config.source.duplicates to what it '
                     'was')
  done = parallel.agreed(lambda: _write_report(work))
  log.info('pre-trained weights: %s', work.path)
  return done


def _open_splits(settings: Settings, left_out: Sequence[str],
                 source: Given | None) -> tuple[Splits, dict[str, list[str]]]:
  """What is trained on, and the ids of images that cannot be read, by split."""
  splits = open_splits(settings.source, settings.data_dir, settings.seed, source, 'source', not settings.methods)
  if left_out:
    remaining = lambda images: images and images.subset(np.flatnonzero(~np.isin(images.ids, left_out)))
    splits = Splits(*map(remaining, splits))
  log.info('data: %s: %s train, %s val images of %d classes', splits.train.name, f'{len(splits.train):,d}',
           f'{len(splits.val):,d}', len(splits.train.class_names))
  _check_splits(settings, splits)  # before every image is read
  splits, _, skipped = drop_unreadable(splits, 'source', settings.reading.on_error)
  check_same_images(splits)
  if skipped:
    _check_splits(settings, splits)
  if settings.methods and len(splits.train.class_names) == 1:
    log.info('the source has one class, so nearest neighbours measure nothing: the last checkpoint is the best')
  elif settings.methods:
    log.info('val measures the features: top-1 and loss are those of nearest neighbours among labelled training images')
  log_doubts(settings.training, settings.trainable.only_heads and not settings.weights)
  return cache_in_memory(splits, 'source', settings.reading.cache), skipped


def _check_splits(settings: Settings, splits: Splits) -> None:
  """Raises ValueError for splits that cannot be trained on."""
  if not settings.methods:
    check_classes(splits)
  settings.check_images(splits.train)


def _check_unlabelled(config: ConfigDict, method: str) -> None:
  """Raises ValueError for fields that contradict a pre-training without labels, by `method`."""
  if config.model.source_head == 'pretrained':
    raise ValueError(f"config.model.source_head is 'pretrained', but methods.{method} uses no labels, so there is no "
                     'classifier; use --config.model.source_head=fresh')
  if config.train.ema_decay:
    raise ValueError(f'train.ema_decay is {config.train.ema_decay}, which averages the network but not the projection '
                     f'of methods.{method} (it has a moving average of its own: methods.{method}.momentum); use '
                     '--config.train.ema_decay=0')


def _setup_context(model: Network, training: Training, seed: int, pretrained: bool, labels: np.ndarray) -> SetupContext:
  """What methods are checked against."""
  return SetupContext(
      model=model, classes=UNKNOWN, labels=labels, true_labels=labels, batch_size=training.batch_size, seed=seed,
      pretrained=pretrained, has_source=True, start={}, batches=lambda split, rows=None: [],
      microbatches=training.accumulate_steps)


def _weights(settings: Settings, splits: Splits) -> Weights | None:
  """The variables to start from, with the classifier where it is wanted; None for random ones."""
  if not settings.weights:
    return None
  class_names = splits.train.class_names if settings.source_head == 'pretrained' else None
  classes = len(class_names) if class_names else None
  return initial_weights.load_weights(settings.weights, settings.model, classes=classes, class_names=class_names)


def _summary(left_out: Sequence[str]) -> dict[str, Any]:
  """What results.json says of images that are left out."""
  return {'images': len(left_out), 'fingerprint': digest(*sorted(left_out))}


def _write_report(work: Workdir) -> dict[str, Any]:
  """Writes the report of a finished run where it is not there; returns its results."""
  if not work.report_html.exists():
    report.write(work)
  return read_json(work.results_json)
