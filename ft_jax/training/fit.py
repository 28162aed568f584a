"""One training, from the first step to the test split: what fine-tuning and pre-training share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import optax

from ft_jax import parallel, progress
from ft_jax.data.pipeline import EvalBatches, TIMEOUT, Transform
from ft_jax.data.splits import Splits
from ft_jax.methods import all_needs, Method, SetupContext
from ft_jax.models.resnet import ResNet
from ft_jax.progress import log
from ft_jax.training.checkpoints import Checkpoints, Damaged
from ft_jax.training.divergence import Divergences, handle
from ft_jax.training.evaluate import Evaluation, make_predict
from ft_jax.training.initial_weights import drawn, weights_fingerprint
from ft_jax.training.loop import evaluated, Run, spoken, Stream, train
from ft_jax.training.optimizer import Factors
from ft_jax.training.settings import own_params, Training
from ft_jax.training.step import create_state, Diverged, make_train_step, TrainState
from ft_jax.workdir import Workdir


def _begin(training: Training, checkpoints: Checkpoints, tx: optax.GradientTransformation, variables: Mapping[str, Any],
           begin: SetupContext, methods: Mapping[str, Method]) -> tuple[TrainState, int]:
  """The state to start from, and the steps that it has behind it."""
  variables = {**variables, 'params': {**variables['params'], **own_params(methods, begin)}}
  needs = all_needs(methods, begin.model)
  kept = begin.start if needs.start or needs.teacher else None
  state_with = lambda states: create_state(variables, tx, start=kept, methods=states, averaged=training.ema_decay > 0)

  def restore(step: int) -> TrainState:
    saved = checkpoints.structure(step).get('methods', {})  # what was made then is in the checkpoint
    return checkpoints.restore(step, state_with({name: saved.get(name, {}) for name in methods}))

  if checkpoints.latest_step is None:
    # Methods draw numbers of their own, and fit some, on each host by itself.
    return parallel.same_arrays(state_with({name: method.setup(begin) for name, method in methods.items()})), 0
  return _whole(checkpoints, lambda: checkpoints.latest_step, restore)


def _whole(checkpoints: Checkpoints, choose: Callable[[], int | None], restore: Callable[[int], TrainState]) -> tuple[TrainState, int]:
  """The state of the step that `choose` names, and the step; what is damaged is set aside until one is whole."""
  while True:
    step = choose()
    try:
      return restore(step), step
    except Damaged as error:
      checkpoints.set_aside(step, str(error))


def fit(training: Training, work: Workdir, *, model: ResNet, factors: Factors, variables: Mapping[str, Any],
        streams: Mapping[str, Stream], splits: Splits, transform: Transform, seed: int, start: Mapping[str, Any] | None = None,
        methods: Mapping[str, Method] | None = None, true_labels: np.ndarray | None = None, timeout: float = TIMEOUT) -> dict[str, Any]:
  """Trains, keeps the newest and the best checkpoint, evaluates the best one, and returns the results.

  Args:
    training: its settings.
    work: where everything is written; a run that is there goes on from its newest checkpoint.
    model: with a head for each stream.
    factors: of the learning rate and the weight decay of each parameter, those of methods included.
    variables: where it starts.
    streams: by the name of their heads, where they have labels; the first one counts epochs and is evaluated.
    splits: of the first stream.
    transform: what images go through.
    seed: of the order of data.
    start: the pre-trained part of `variables`: heads that are not in it start fresh. None where nothing is pre-trained.
    methods: what is done beside the cross-entropies, by name.
    true_labels: int32 `[n]`, labels of the training examples before noise was put in, where it was.
    timeout: seconds that a batch of images may take; 0 for any.

  Raises:
    ValueError: a setting that does not fit.
    Interrupted: a signal asked to stop; the state is saved.
    Stalled: images did not come; the state is saved.
    Diverged: the loss or the gradient is not finite any more.
  """
  head = next(iter(streams))
  plan = training.plan(len(streams[head].source))
  schedule = training.make_schedule(plan.steps)
  tx = training.make_optimizer(schedule, factors)
  methods = methods or {}
  checkpoints = Checkpoints(work.path, {
      **{f'{name} images': stream.source.fingerprint for name, stream in streams.items()}, 'val images': splits.val.fingerprint,
      **_made_from_weights(variables, seed, start)}, keep=plan.keep, formerly={
          **{f'{name} images': stream.source.legacy_fingerprint for name, stream in streams.items()},
          'val images': splits.val.legacy_fingerprint})
  labels = splits.train.labels

  def batches_of(split: str, rows: Sequence[int] | None = None) -> Iterator[Any]:
    source = getattr(splits, split)
    batches = EvalBatches(source if rows is None else source.subset(rows), transform, streams[head].batch_size, timeout)
    return progress.bar(batches, f'pre-trained network on {split}', len(batches))

  begin = SetupContext(model=model, image_size=transform.size, classes=len(splits.train.class_names), labels=labels,
                       true_labels=labels if true_labels is None else true_labels, batch_size=streams[head].batch_size,
                       seed=seed, pretrained=bool(start), has_source=len(streams) > 1, start=start or {}, batches=batches_of)
  try:
    state, start = _begin(training, checkpoints, tx, variables, begin, methods)
  except BaseException:
    checkpoints.close()  # its threads would print tracebacks over the message
    raise
  if start:
    log.info('going on from step %d of %d', start, plan.steps)
  devices = checkpoints.devices
  _tell_devices(devices, start, model, training.batch_size)
  labelled = {name: stream.weight for name, stream in streams.items() if stream.weight is not None}
  views = all_needs(methods, model).all_views
  run = Run(work, plan, streams, splits, transform, make_predict(model, head), checkpoints, training.metric, schedule, seed, timeout)
  losses = Divergences(work.diverged_json)
  if start < plan.steps or not checkpoints.evaluated(start):
    step = make_train_step(model, tx, labelled, methods=methods, seed=seed, microbatches=training.accumulate_steps,
                           ema_decay=training.ema_decay)
    again = lambda: _begin(training, checkpoints, tx, variables, begin, methods)
    while True:
      try:
        state = train(run, step, state, start, losses.skipped, views)
        break
      except Diverged as diverged:
        handle(diverged, run, losses, training.skip_diverged)
        state, start = again()
  checkpoints.tidy()
  state, best = _whole(checkpoints, lambda: checkpoints.best_step, lambda step: checkpoints.restore(step, state))
  state = parallel.replicate(state)
  checkpoints.close()
  return {'best_step': best, 'steps': plan.steps, 'steps_per_epoch': len(streams[head].source) / streams[head].batch_size, 'seed': seed,
          'metric': training.metric, **_environment(model), 'devices_from_step': devices, 'skipped_batches': len(losses.skipped),
          **_final(run, state, best)}


def _made_from_weights(variables: Mapping[str, Any], seed: int, start: Mapping[str, Any] | None) -> dict[str, str]:
  """What a checkpoint says of the weights that training began with.

  Random ones are not compared by their values: the last bits of drawn numbers depend on the processor and the compiler. (Versions that did
  so used the name 'pre-trained weights' for them too.)
  """
  if start:
    return {'pre-trained weights': weights_fingerprint(variables)}
  return {'random weights': drawn(seed)}


def _tell_devices(devices: Sequence[Sequence[int]], start: int, model: ResNet, batch_size: int) -> None:
  """Says what it means where a run goes on with another number of devices from step `start` on; `devices` are (from step, how many)."""
  if len(devices) < 2 or devices[-1][0] != start:
    return
  before, now = devices[-2][1], devices[-1][1]
  if model.axis_name or model.batch_norm == 'frozen':
    log.info('on %d devices now, %d before: the same batches and, but for rounding, the same result', now, before)
  else:
    log.warning('warning: on %d devices now, %d before: BatchNorm takes its statistics of the %d images of each device now, of %d '
                'before, so the rest of the run is not what it would have been (with model.sync_batch_norm=true it is)',
                now, before, batch_size // now, batch_size // before)


def _final(run: Run, state: TrainState, best: int) -> dict[str, Any]:
  """What results.json says of val and test (None where there is none) at the best checkpoint."""
  results: dict[str, Any] = {'val': None, 'test': None}
  for name, source in (('val', run.splits.val), ('test', run.splits.test)):
    if source is not None:
      evaluation = evaluated(run, state, source, name)
      log.info('%s (%s images, checkpoint of step %d): %s', name, f'{len(source):,d}', best, spoken(evaluation.summary()))
      results[name] = _split_results(evaluation, source.class_names)
  return results


def _split_results(evaluation: Evaluation, class_names: Sequence[str]) -> dict[str, Any]:
  """What results.json says of one split; confusions as (true, predicted, how often), where there are any."""
  confusion = evaluation.confusion
  per_class = [{'name': name, 'images': int(row.sum()), 'right': int(row[k])} for k, (name, row) in enumerate(zip(class_names, confusion))]
  return {**evaluation.summary(), 'images': int(confusion.sum()), 'per_class': per_class,
          'confusion': [[int(t), int(p), int(confusion[t, p])] for t, p in np.argwhere(confusion)]}


def _environment(model: ResNet) -> dict[str, Any]:
  """What the numbers may depend on."""
  devices = jax.devices()
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'ott-jax', 'tensorflow-datasets', 'grain', 'numpy', 'pillow',
              'simplejpeg', 'opencv-python-headless')
  return {
      'devices': f'{len(devices)} x {devices[0].device_kind}',
      'batch_norm': _batch_norm(model, len(devices)),
      'precision': {'training': model.precision},
      'commit': _commit(),
      'versions': {'python': platform.python_version(), **{name: _version(name) for name in packages}},
      'command': sys.argv,
  }


def _version(package: str) -> str | None:
  """None where it is there by another name, as OpenCV may be."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """The commit of this program, with a + where files differ from it; None where it is no git checkout.

  Only a repository that begins where this program does is asked: one around it, as that of a project whose environment it is installed
  in, has another commit, and its settings may name programs that git runs (core.fsmonitor).
  """
  root = pathlib.Path(__file__).parents[2]
  if not (root / '.git').exists():
    return None
  git = ('git', '-c', 'core.fsmonitor=false', '-C', str(root))
  env = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}  # they may name another repository
  run = lambda *words: subprocess.run((*git, *words), env=env, capture_output=True, text=True, check=True).stdout.strip()
  try:
    commit, changed = run('rev-parse', 'HEAD'), run('status', '--porcelain', '--untracked-files=no')
  except (OSError, subprocess.CalledProcessError):
    return None
  return commit + ('+' if changed else '')


def _batch_norm(model: ResNet, devices: int) -> str:
  if model.batch_norm == 'frozen':
    return 'frozen: statistics, scales and biases of the weights'
  return 'statistics of the whole batch' if model.axis_name else f'statistics of each of {devices} devices'
