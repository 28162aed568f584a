"""One training, from the first step to the test split: what fine-tuning and pre-training share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import types
from typing import Any

import jax
import numpy as np
import optax

from ft_jax import parallel, progress
from ft_jax.data.image_set import ImageSet
from ft_jax.data.pipeline import EvalBatches
from ft_jax.environment import environment
from ft_jax.methods import all_needs, Method, SetupContext
from ft_jax.models.network import Network
from ft_jax.progress import log
from ft_jax.training import neighbours
from ft_jax.training.checkpoint_files import Damaged
from ft_jax.training.checkpoints import Checkpoints
from ft_jax.training.cost import training_cost
from ft_jax.training.divergence import Divergences, handle
from ft_jax.training.evaluate import Evaluation, make_predict
from ft_jax.training.initial_weights import drawn, weights_fingerprint
from ft_jax.training.loop import Diverged, evaluate_split, format_summary, Run, Stream, train, TrainingData
from ft_jax.training.optimizer import Factors
from ft_jax.training.refit import refit_head
from ft_jax.training.settings import own_params, Training
from ft_jax.training.step import create_state, make_train_step, StepFn, TrainState
from ft_jax.workdir import Workdir, write_text

__all__ = ['fit', 'InitialNetwork', 'Stream', 'TrainingData']


@dataclasses.dataclass(frozen=True)
class InitialNetwork:
  """A network before training.

  Attributes:
    model: the network, with a head for each labelled stream.
    variables: the values that it starts with.
    pretrained: the pre-trained part of `variables`: heads that are not in it start fresh; {} for random weights.
    factors: of the learning rate and the weight decay of each parameter, those of methods included.
  """
  model: Network
  variables: Mapping[str, Any]
  pretrained: Mapping[str, Any]
  factors: Factors


def fit(training: Training, work: Workdir, data: TrainingData, network: InitialNetwork,
        methods: Mapping[str, Method] = types.MappingProxyType({}), refit: bool = False) -> dict[str, Any]:
  """Trains, keeps the newest and the best checkpoint, evaluates the best one, and returns the results.

  A run that is in the folder already resumes from its newest checkpoint.

  Args:
    training: settings.
    work: the folder where everything is written.
    data: the images.
    network: what is trained.
    methods: the methods that are switched on, by name.
    refit: whether the head is fitted once more at the end; see `refit_head`.

  Raises:
    ValueError: a setting that does not fit the data, or a checkpoint of other data.
    Interrupted: a signal asked to stop; the state is saved.
    Stalled: images stopped coming; the state is saved.
    Diverged: loss, gradient or parameters are not finite any more.
  """
  plan = training.plan(len(data.first.images))
  restart = data.first.first
  schedule = training.make_schedule(plan.steps, restart)
  optimizer = training.make_optimizer(schedule, network.factors)
  checkpoints = _open_checkpoints(work, plan.keep, data, network)
  starting = _Starting(checkpoints, optimizer, network, methods,
                       setup_context(data, network, plan.steps, training.accumulate_steps), training.ema_decay > 0)
  with _closed_on_error(checkpoints):
    state, start = starting.newest_state()
  if start:
    log.info('resuming from step %d of %d', min(start, plan.steps), plan.steps)
  devices = checkpoints.devices
  needs = all_needs(methods, network.model)
  log_changed_devices(devices, start, network.model, training.batch_size)
  predict, bank = make_predict(network.model, data.head), None
  if not data.loss_weights:  # there is no head
    predict, bank = neighbours.make_features(network.model), neighbours.sample_bank(data.splits.train, data.seed)
  run = Run(work, plan, data, needs.all_views, predict, schedule, training.metric, checkpoints, bank)
  divergences = Divergences(work.diverged_json)
  if start < plan.steps or not checkpoints.evaluated(start):
    step = make_train_step(network.model, optimizer, data.loss_weights, methods=methods, seed=data.seed,
                           microbatches=training.accumulate_steps, ema_decay=training.ema_decay, restart=restart)
    state = _train(run, step, state, start, divergences, training.skip_diverged, starting.newest_state)
  checkpoints.tidy()
  state, best = restore_whole(checkpoints, lambda: checkpoints.best_step,
                              lambda step: checkpoints.restore(step, state))
  refitted = None
  if refit:
    state, best, refitted = refit_head(run, network.model, state, best)
  checkpoints.close()
  return {'best_step': best, 'steps': plan.steps, 'steps_per_epoch': len(data.first.images) / data.first.batch_size,
          'seed': data.seed, 'metric': training.metric, **environment(),
          'batch_norm': _batch_norm(network.model), 'precision': {'training': network.model.precision},
          'stream_steps': {name: [stream.first + 1, stream.end or plan.steps] for name, stream in data.streams.items()},
          'refit_head': refitted, 'devices_from_step': devices, 'skipped_batches': len(divergences.skipped),
          'cost': parallel.agreed(lambda: training_cost(data, needs, plan.steps, work.metrics())),
          **_final_evaluations(run, parallel.replicate(state), best)}


def _train(run: Run, step: StepFn, state: TrainState, start: int, divergences: Divergences, skip_diverged: int,
           newest_state: Callable[[], tuple[TrainState, int]]) -> TrainState:
  """The state after the last step; a batch that diverges is left out where `skip_diverged` allows it."""
  while True:
    try:
      return train(run, step, state, start, divergences.skipped)
    except Diverged as diverged:
      handle(diverged, run, divergences, skip_diverged)
      state, start = newest_state()


def setup_context(data: TrainingData, network: InitialNetwork, steps: int, microbatches: int) -> SetupContext:
  """What methods are set up with, in a training of so many steps."""
  train, first = data.splits.train, data.first

  def batches(split: str, rows: Sequence[int] | None = None) -> Iterator[Any]:
    images = {'train': data.splits.train, 'val': data.splits.val}[split]
    if rows is not None:
      images = images.subset(rows)
    each = EvalBatches(images, data.transform, first.batch_size, data.timeout)
    return progress.bar(each, f'pre-trained network on {split}', len(each))

  return SetupContext(
      model=network.model, classes=len(train.class_names), labels=train.labels,
      true_labels=train.labels if data.true_labels is None else data.true_labels, batch_size=first.batch_size,
      seed=data.seed, pretrained=bool(network.pretrained), has_source=len(data.streams) > 1, start=network.pretrained,
      batches=batches, steps=steps, microbatches=microbatches)


@dataclasses.dataclass(frozen=True)
class _Starting:
  """How the state that training starts with comes about.

  Attributes:
    checkpoints, optimizer, network, methods: of the run.
    context: what the methods are set up with.
    averaged: whether the state has moving averages.
  """
  checkpoints: Checkpoints
  optimizer: optax.GradientTransformation
  network: InitialNetwork
  methods: Mapping[str, Method]
  context: SetupContext
  averaged: bool

  def newest_state(self) -> tuple[TrainState, int]:
    """The state of the newest whole checkpoint, or the one before the first step, and its number of steps."""
    if self.checkpoints.latest_step is not None:
      return restore_whole(self.checkpoints, lambda: self.checkpoints.latest_step, self._restore)
    states = {name: method.setup(self.context) for name, method in self.methods.items()}
    # Each host computes the methods' states by itself, and the last bits may differ.
    return parallel.same_arrays(self._state(states)), 0

  def _restore(self, step: int) -> TrainState:
    # A method's state in the checkpoint tells its structure; setting the method up again would take long.
    saved = self.checkpoints.structure(step).get('methods', {})
    return self.checkpoints.restore(step, self._state({name: saved.get(name, {}) for name in self.methods}))

  def _state(self, states: Mapping[str, Any]) -> TrainState:
    variables = self.network.variables
    params = {**variables['params'], **own_params(self.methods, self.context)}
    needs = all_needs(self.methods, self.network.model)
    start = self.context.start if needs.start or needs.teacher else None
    return create_state({**variables, 'params': params}, self.optimizer, start=start, methods=states,
                        averaged=self.averaged)


def restore_whole(checkpoints: Checkpoints, choose: Callable[[], int | None],
                  restore: Callable[[int], TrainState]) -> tuple[TrainState, int]:
  """The state of the checkpoint that `choose` names, and its step; damaged ones are set aside until one is whole."""
  while True:
    step = choose()
    assert step is not None, 'set_aside raises where no checkpoint is left'
    try:
      return restore(step), step
    except Damaged as error:
      checkpoints.set_aside(step, str(error))


def _open_checkpoints(work: Workdir, keep: Sequence[int], data: TrainingData, network: InitialNetwork) -> Checkpoints:
  """The run's checkpoints, which must be of the same images and weights."""
  images = {f'{name} images': stream.images for name, stream in data.streams.items()}
  images['val images'] = data.splits.val
  made_from = {name: image_set.fingerprint for name, image_set in images.items()}
  return Checkpoints(work.path, {**made_from, **weights_record(network, data.seed)}, keep=keep,
                     formerly={name: image_set.legacy_fingerprint for name, image_set in images.items()})


def weights_record(network: InitialNetwork, seed: int) -> dict[str, str]:
  """What a checkpoint records of the weights that training started with.

  Random ones are not compared by their values: the last bits of drawn numbers depend on the processor and the compiler.
  (Versions that did so used the name 'pre-trained weights' for them too.)
  """
  if network.pretrained:
    return {'pre-trained weights': weights_fingerprint(network.variables)}
  return {'random weights': drawn(seed)}


@contextlib.contextmanager
def _closed_on_error(checkpoints: Checkpoints) -> Iterator[None]:
  """Closes the checkpoints on an error: their threads would print tracebacks over its message."""
  try:
    yield
  except BaseException:
    checkpoints.close()
    raise


def log_changed_devices(devices: Sequence[Sequence[int]], start: int, model: Network, batch_size: int) -> None:
  """Logs what it means that a run resumes at step `start` on another number of devices; `devices` are (from step,
  number).
  """
  if len(devices) < 2 or devices[-1][0] != start:
    return
  before, now = devices[-2][1], devices[-1][1]
  if model.axis_name or model.batch_norm == 'frozen' or not model.has_batch_norm:
    log.info('on %d devices now, %d before: the same batches and, but for rounding, the same result', now, before)
  else:
    log.warning('warning: on %d devices now, %d before: BatchNorm takes its statistics from the %d images of each '
                'device now, from %d before, so the rest of the run differs from a run without the change (with '
                'model.sync_batch_norm=true it does not)', now, before, batch_size // now, batch_size // before)


def _batch_norm(model: Network) -> str:
  """What results.json says of the statistics of BatchNorm."""
  if not model.has_batch_norm:
    return 'none in this network'
  if model.batch_norm == 'frozen':
    return 'frozen: statistics, scales and biases of the weights'
  streams = ', each stream apart' if model.batch_norm == 'per_stream' else ''
  devices = 'the whole batch' if model.axis_name else f'each of {jax.device_count()} devices'
  return f'statistics of {devices}{streams}'


def _final_evaluations(run: Run, state: TrainState, best: int) -> dict[str, Any]:
  """What results.json says of val and test (None where there is none) at the best checkpoint.

  predictions.json gets the predictions on test, or on val where there is no test split.
  """
  results: dict[str, Any] = {'val': None, 'test': None}
  predictions: dict[str, Any] = {}
  for name, images in (('val', run.data.splits.val), ('test', run.data.splits.test)):
    if images is not None:
      evaluation = evaluate_split(run, state, images, name)
      summary = format_summary(evaluation.summary())
      log.info('%s (%s images, checkpoint of step %d): %s', name, f'{len(images):,d}', best, summary)
      results[name] = _split_results(evaluation, images.class_names)
      predictions = predictions_table(name, images, evaluation)
  write_text(run.work.predictions_json, json.dumps(predictions) + '\n')
  return results


def predictions_table(split: str, images: ImageSet, evaluation: Evaluation) -> dict[str, Any]:
  """What predictions.json says: of each image its id, and the numbers of its class and of the predicted class."""
  return {'split': split, 'classes': list(images.class_names), 'ids': images.ids.tolist(),
          'labels': images.labels.tolist(), 'predictions': evaluation.predictions.tolist()}


def _split_results(evaluation: Evaluation, class_names: Sequence[str]) -> dict[str, Any]:
  """What results.json says of one split; confusions as (true class, predicted class, number), where there are any."""
  confusion = evaluation.confusion
  per_class = [{'name': name, 'images': int(row.sum()), 'right': int(row[k])}
               for k, (name, row) in enumerate(zip(class_names, confusion))]
  return {**evaluation.summary(), 'images': int(confusion.sum()), 'per_class': per_class,
          'confusion': [[int(t), int(p), int(confusion[t, p])] for t, p in np.argwhere(confusion)]}
