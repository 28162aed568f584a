"""One training, from the first step to the test split: what fine-tuning and pre-training share."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import importlib.metadata
import math
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import flax
import jax
from ml_collections import ConfigDict
import numpy as np
import optax

from ft_jax import parallel, progress
from ft_jax.data.pipeline import EvalBatches, TIMEOUT, Transform
from ft_jax.data.splits import Splits
from ft_jax.methods import all_needs, Method, SetupContext
from ft_jax.models import resnet
from ft_jax.models.resnet import ResNet
from ft_jax.progress import log
from ft_jax.training import optimizer
from ft_jax.training.checkpoints import Checkpoints, Damaged
from ft_jax.training.divergence import Divergences, handle
from ft_jax.training.evaluate import Evaluation, make_predict
from ft_jax.training.initial_weights import drawn, weights_fingerprint
from ft_jax.training.loop import evaluated, Plan, Run, spoken, Stream, train
from ft_jax.training.step import create_state, Diverged, make_train_step, TrainState
from ft_jax.workdir import Workdir

METRICS = ('top1', 'mean_per_class')



def make_plan(config: ConfigDict, examples: int) -> Plan:
  """The length of a training and of its parts.

  Raises:
    ValueError: a length that is no step at all.
  """
  steps = config.steps or round(config.epochs * examples / config.batch_size)
  if not 1 <= steps < 2**31:
    raise ValueError(f'train.epochs {config.epochs} of {examples} images in batches of {config.batch_size} are {steps} steps; '
                     'expected at least one, and fewer than 2^31 (train.steps sets the number itself)')
  keep = {max(1, round(epoch * examples / config.batch_size)) for epoch in config.keep_epochs}
  return Plan(steps, config.eval_every or math.ceil(steps / 10), config.log_every or math.ceil(steps / 100),
              tuple(sorted(step for step in keep if step <= steps)))


def check(config: ConfigDict, metric: str, model: ResNet, image_size: int, fresh: Collection[str] = (),
          own: Mapping[str, Any] | None = None) -> None:
  """Raises ValueError for settings of a training that cannot be right, before anything long begins.

  Args:
    config: the fields of `configs.default.train_config`, which `settings.check_fields` has seen.
    metric: chooses the best checkpoint.
    model: with the right heads, of any number of classes.
    image_size: pixels a side.
    fresh: the heads that start fresh on weights that do not.
    own: parameters of methods, as of `own_params`.
  """
  if metric not in METRICS:
    raise ValueError(f'metric is {metric!r}; known: {", ".join(METRICS)}')
  if not config.steps and not config.epochs:
    raise ValueError('train.steps and train.epochs are both 0; one of them gives the length')
  parallel.check_batch(config.batch_size, 'train.batch_size')
  check_parts(config.accumulate_steps, config.batch_size, 'train.batch_size')
  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.uint8))
  _optimizer(config, _schedule(config, 1000), {**shapes['params'], **(own or {})}, fresh)
  if model.frozen and not any(jax.tree.leaves(resnet.frozen_mask(model.clone(batch_norm='train'), shapes['params']))):
    raise ValueError(f'train.freeze is {config.freeze!r}, which no parameter matches; paths look like '
                     f'{next(iter(flax.traverse_util.flatten_dict(shapes["params"], sep="/")))!r}')
  if all(jax.tree.leaves(resnet.frozen_mask(model, shapes['params']))):
    raise ValueError(f'train.freeze is {config.freeze!r}, which leaves no parameter to train')


def check_parts(parts: int, size: int, what: str) -> None:
  """Raises ValueError where each device's share of a batch cannot be cut into equal parts."""
  each = size // jax.device_count()
  if each % parts:
    raise ValueError(f'train.accumulate_steps is {parts}, into which the {each} images of a device ({what} {size}) cannot be cut evenly')


def check_batch_norm(config: ConfigDict, model: ResNet, image_size: int, images: int) -> None:
  """Raises ValueError where BatchNorm takes its statistics of one value per channel: its output is then constant.

  Args:
    config: the fields of `configs.default.train_config`.
    model: as it is trained.
    image_size: pixels a side.
    images: how many go through the network in a step together, over all devices.
  """
  devices = jax.device_count()
  each, shared = images // devices // config.accumulate_steps, devices if model.axis_name else 1
  if each * shared != 1:
    return
  image = jax.ShapeDtypeStruct((each, image_size, image_size, 3), np.uint8)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  is_norm = lambda module, _: isinstance(module, resnet.BatchNorm)
  _, captured = jax.eval_shape(
      lambda *args: model.apply(*args, mutable=['intermediates'], capture_intermediates=is_norm), variables, image)
  stays = flax.traverse_util.flatten_dict(resnet.frozen_mask(model, variables['batch_stats']), sep='/')
  for path, (output, *_) in flax.traverse_util.flatten_dict(captured['intermediates'], sep='/').items():
    layer = path.removesuffix('/__call__')
    if not stays[f'{layer}/mean'] and math.prod(output.shape[:-1]) == 1:
      raise ValueError(
          f'BatchNorm {layer} would see one value per channel, so its output would not depend on the image: {each} image '
          f'of {output.shape[1]}x{output.shape[2]} pixels there (images per step {images}, train.batch_size '
          f'{config.batch_size}, devices {devices}, train.accumulate_steps {config.accumulate_steps}, image_size {image_size}, model.stem '
          f'{model.stem}); use larger batches or images, a smaller train.accumulate_steps, model.stem=3x3, '
          + ('model.sync_batch_norm=true ' if devices > 1 and not model.axis_name else '') + 'or model.batch_norm=frozen')


def only_heads(model: ResNet, image_size: int) -> bool:
  """Whether nothing but heads is trained."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.uint8))
  stays = flax.traverse_util.flatten_dict(resnet.frozen_mask(model, shapes['params']), sep='/')
  return all(fixed for path, fixed in stays.items() if not path.startswith('heads/'))


def log_doubts(config: ConfigDict, random_features: bool) -> None:
  """Warns of settings with which a training ends well and means nothing.

  Args:
    config: the fields of `configs.default.train_config`.
    random_features: whether the network starts from random weights and only its heads are trained.
  """
  if not config.learning_rate:
    log.warning('warning: train.learning_rate is 0, so nothing is learnt: only the statistics of BatchNorm change')
  if random_features:
    log.warning('warning: train.freeze is %r and model.weights is empty, so all but the heads stays as it was drawn at random; give '
                'weights, or freeze less', config.freeze)


def own_params(methods: Mapping[str, Method], begin: SetupContext) -> dict[str, Any]:
  """Parameters that methods have of their own, as `{'methods': {method: ...}}`; {} where none has."""
  own = {name: params for name, method in methods.items() if (params := method.params(begin))}
  return {'methods': own} if own else {}


def _optimizer(config: ConfigDict, schedule: optax.Schedule, params: Any, fresh: Collection[str]) -> optax.GradientTransformation:
  groups = config.learning_rate_groups or (*((f'heads/{head}/.*', 10.0) for head in sorted(fresh)), ('.*', 1.0))
  return optimizer.make_optimizer(
      config.optimizer, schedule, params, momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay,
      learning_rate_groups=groups, weight_decay_groups=config.weight_decay_groups, layer_decay=config.layer_decay, clip_norm=config.clip_norm)


def _schedule(config: ConfigDict, steps: int) -> optax.Schedule:
  return optimizer.make_schedule(config.schedule, config.learning_rate, steps, milestones=config.milestones,
                                 decay=config.decay, warmup=config.warmup)


def _begin(config: ConfigDict, checkpoints: Checkpoints, schedule: optax.Schedule, variables: Mapping[str, Any], begin: SetupContext,
           methods: Mapping[str, Method]) -> tuple[TrainState, optax.GradientTransformation, int]:
  """The state to start from, the optimizer, and the steps that the state has behind it."""
  variables = {**variables, 'params': {**variables['params'], **own_params(methods, begin)}}
  fresh = set(begin.model.heads) - set(begin.start['params'].get('heads', {})) if begin.start else ()
  tx = _optimizer(config, schedule, variables['params'], fresh)
  needs = all_needs(methods, begin.model)
  kept = begin.start if needs.start or needs.teacher else None
  state_with = lambda states: create_state(variables, tx, start=kept, methods=states, averaged=config.ema_decay > 0)

  def restore(step: int) -> TrainState:
    saved = checkpoints.structure(step).get('methods', {})  # what was made then is in the checkpoint
    return checkpoints.restore(step, state_with({name: saved.get(name, {}) for name in methods}))

  if checkpoints.latest_step is None:
    # Methods draw numbers of their own, and fit some, on each host by itself.
    return parallel.same_arrays(state_with({name: method.setup(begin) for name, method in methods.items()})), tx, 0
  state, done = _whole(checkpoints, lambda: checkpoints.latest_step, restore)
  return state, tx, done


def _whole(checkpoints: Checkpoints, choose: Callable[[], int | None], restore: Callable[[int], TrainState]) -> tuple[TrainState, int]:
  """The state of the step that `choose` names, and the step; what is damaged is set aside until one is whole."""
  while True:
    step = choose()
    try:
      return restore(step), step
    except Damaged as error:
      checkpoints.set_aside(step, str(error))


def fit(config: ConfigDict, work: Workdir, *, model: ResNet, variables: Mapping[str, Any], streams: Mapping[str, Stream],
        splits: Splits, transform: Transform, metric: str, seed: int, start: Mapping[str, Any] | None = None,
        methods: Mapping[str, Method] | None = None, true_labels: np.ndarray | None = None, timeout: float = TIMEOUT) -> dict[str, Any]:
  """Trains, keeps the newest and the best checkpoint, evaluates the best one, and returns the results.

  Args:
    config: the fields of `configs.default.train_config`; `check` has seen them.
    work: where everything is written; a run that is there goes on from its newest checkpoint.
    model: with a head for each stream.
    variables: where it starts.
    streams: by the name of their heads, where they have labels; the first one counts epochs and is evaluated.
    splits: of the first stream.
    transform: what images go through.
    metric: chooses the best checkpoint.
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
  plan = make_plan(config, len(streams[head].source))
  schedule = _schedule(config, plan.steps)
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
    state, tx, start = _begin(config, checkpoints, schedule, variables, begin, methods)
  except BaseException:
    checkpoints.close()  # its threads would print tracebacks over the message
    raise
  if start:
    log.info('going on from step %d of %d', start, plan.steps)
  devices = checkpoints.devices
  _tell_devices(devices, start, model, config.batch_size)
  labelled = {name: stream.weight for name, stream in streams.items() if stream.weight is not None}
  views = all_needs(methods, model).all_views
  run = Run(work, plan, streams, splits, transform, make_predict(model, head), checkpoints, metric, schedule, seed, timeout)
  losses = Divergences(work.diverged_json)
  if start < plan.steps or not checkpoints.evaluated(start):
    step = make_train_step(model, tx, labelled, methods=methods, seed=seed, microbatches=config.accumulate_steps,
                           ema_decay=config.ema_decay)
    again = lambda: _begin(config, checkpoints, schedule, variables, begin, methods)
    while True:
      try:
        state = train(run, step, state, start, losses.skipped, views)
        break
      except Diverged as diverged:
        handle(diverged, run, losses, config.skip_diverged)
        state, _, start = again()
  checkpoints.tidy()
  state, best = _whole(checkpoints, lambda: checkpoints.best_step, lambda step: checkpoints.restore(step, state))
  state = parallel.replicate(state)
  checkpoints.close()
  return {'best_step': best, 'steps': plan.steps, 'steps_per_epoch': len(streams[head].source) / streams[head].batch_size, 'seed': seed,
          'metric': metric, **_environment(model), 'devices_from_step': devices, 'skipped_batches': len(losses.skipped),
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
