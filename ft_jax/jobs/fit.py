"""One training, from the first step to the test split: what fine-tuning and pre-training share."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import importlib.metadata
import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import flax
from flax import jax_utils
import jax
from ml_collections import ConfigDict
import numpy as np
import optax

from ft_jax import optimizer, parallel, progress
from ft_jax.checkpoints import Checkpoints, Damaged
from ft_jax.data.pipeline import EvalBatches, train_batches, Transform
from ft_jax.data.sources import Source
from ft_jax.evaluate import evaluate, Evaluation, make_predict, PredictFn
from ft_jax.jobs.setup import Splits, weights_fingerprint
from ft_jax.methods import all_needs, Begin, Method
from ft_jax.models import resnet
from ft_jax.models.resnet import ResNet
from ft_jax.progress import log
from ft_jax.train import create_state, make_train_step, run_steps, StepFn, TrainState
from ft_jax.workdir import MetricsWriter, Workdir

METRICS = ('top1', 'mean_per_class')
# A waiting device is worth a line from this share of the time on, and from so many steps on.
WAITING, WAITING_STEPS = 0.2, 20


class Stream(NamedTuple):
  """Images of one kind in every step.

  Attributes:
    source: they are drawn from it.
    batch_size: of them over all devices.
    weight: of their loss; None where their labels are not used.
    balanced: every class comes equally often.
  """
  source: Source
  batch_size: int
  weight: float | None
  balanced: bool = False


class Plan(NamedTuple):
  """Lengths in steps."""
  steps: int
  eval_every: int
  log_every: int
  keep: tuple[int, ...] = ()


def make_plan(config: ConfigDict, examples: int) -> Plan:
  """The length of a training and of its parts.

  Raises:
    ValueError: a length that is no step at all.
  """
  steps = config.steps or round(config.epochs * examples / config.batch_size)
  if steps < 1:
    raise ValueError(f'train.epochs {config.epochs} of {examples} images in batches of {config.batch_size} are {steps} steps; '
                     'expected at least one (train.steps sets the number itself)')
  keep = {max(1, round(epoch * examples / config.batch_size)) for epoch in config.keep_epochs}
  return Plan(steps, config.eval_every or math.ceil(steps / 10), config.log_every or math.ceil(steps / 100),
              tuple(sorted(step for step in keep if step <= steps)))


def check(config: ConfigDict, metric: str, model: ResNet, image_size: int, fresh: Collection[str] = (),
          own: Mapping[str, Any] | None = None) -> None:
  """Raises ValueError for settings of a training that cannot be right, before anything long begins.

  Args:
    config: the fields of `configs.default.train_config`.
    metric: chooses the best checkpoint.
    model: with the right heads, of any number of classes.
    image_size: pixels a side.
    fresh: the heads that start fresh on weights that do not.
    own: parameters of methods, as of `own_params`.
  """
  if metric not in METRICS:
    raise ValueError(f'metric is {metric!r}; known: {", ".join(METRICS)}')
  for name in ('steps', 'epochs', 'eval_every', 'log_every', 'learning_rate', 'weight_decay'):
    if not 0 <= config[name] < float('inf'):
      raise ValueError(f'train.{name} is {config[name]}; expected a number from 0')
  if wrong := [epoch for epoch in config.keep_epochs if not 0 < epoch < float('inf')]:
    raise ValueError(f'train.keep_epochs has {wrong[0]}; expected numbers of epochs above 0')
  if not config.steps and not config.epochs:
    raise ValueError('train.steps and train.epochs are both 0; one of them gives the length')
  if not 0 <= config.average < 1:
    raise ValueError(f'train.average is {config.average}; expected the part of the averages that a step keeps, as 0.999, or 0 for none')
  parallel.check_batch(config.batch_size, 'train.batch_size')
  check_parts(config.accumulate, config.batch_size, 'train.batch_size')
  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.uint8))
  _optimizer(config, _schedule(config, 1000), {**shapes['params'], **(own or {})}, fresh)
  if model.frozen and not any(jax.tree.leaves(resnet.fixed(model.clone(batch_norm='train'), shapes['params']))):
    raise ValueError(f'train.freeze is {config.freeze!r}, which no parameter matches; paths look like '
                     f'{next(iter(flax.traverse_util.flatten_dict(shapes["params"], sep="/")))!r}')
  if all(jax.tree.leaves(resnet.fixed(model, shapes['params']))):
    raise ValueError(f'train.freeze is {config.freeze!r}, which leaves no parameter to train')


def check_parts(parts: int, size: int, what: str) -> None:
  """Raises ValueError where each device's share of a batch cannot be cut into equal parts."""
  each = size // jax.device_count()
  if parts < 1 or each % parts:
    raise ValueError(f'train.accumulate is {parts}, into which the {each} images of a device ({what} {size}) cannot be cut evenly')


def own_params(methods: Mapping[str, Method], begin: Begin) -> dict[str, Any]:
  """Parameters that methods have of their own, as `{'methods': {method: ...}}`; {} where none has."""
  own = {name: params for name, method in methods.items() if (params := method.params(begin))}
  return {'methods': own} if own else {}


def _optimizer(config: ConfigDict, schedule: optax.Schedule, params: Any, fresh: Collection[str]) -> optax.GradientTransformation:
  groups = config.learning_rate_groups or (*((f'heads/{head}/.*', 10.0) for head in sorted(fresh)), ('.*', 1.0))
  return optimizer.make_optimizer(
      config.optimizer, schedule, params, momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay,
      learning_rate_groups=groups, weight_decay_groups=config.weight_decay_groups, layer_decay=config.layer_decay, clip=config.clip)


def _schedule(config: ConfigDict, steps: int) -> optax.Schedule:
  return optimizer.make_schedule(config.schedule, config.learning_rate, steps, milestones=config.milestones,
                                 decay=config.decay, warmup=config.warmup)


def _begin(config: ConfigDict, checkpoints: Checkpoints, schedule: optax.Schedule, variables: Mapping[str, Any], begin: Begin,
           methods: Mapping[str, Method]) -> tuple[TrainState, optax.GradientTransformation, int]:
  """The state to start from, the optimizer, and the steps that the state has behind it."""
  variables = {**variables, 'params': {**variables['params'], **own_params(methods, begin)}}
  fresh = set(begin.model.heads) - set(begin.start['params'].get('heads', {})) if begin.start else ()
  tx = _optimizer(config, schedule, variables['params'], fresh)
  needs = all_needs(methods, begin.model)
  kept = begin.start if needs.start or needs.teacher else None
  state_with = lambda states: create_state(variables, tx, start=kept, methods=states, averaged=config.average > 0)

  def restore(step: int) -> TrainState:
    saved = checkpoints.structure(step).get('methods', {})  # what was made then is in the checkpoint
    return checkpoints.restore(step, state_with({name: saved.get(name, {}) for name in methods}))

  if checkpoints.latest_step is None:
    return state_with({name: method.setup(begin) for name, method in methods.items()}), tx, 0
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
        methods: Mapping[str, Method] | None = None, true_labels: np.ndarray | None = None) -> dict[str, Any]:
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

  Raises:
    ValueError: a setting that does not fit.
    Interrupted: a signal asked to stop; the state is saved.
  """
  head = next(iter(streams))
  plan = make_plan(config, len(streams[head].source))
  schedule = _schedule(config, plan.steps)
  methods = methods or {}
  checkpoints = Checkpoints(work.path, {
      **{f'{name} images': stream.source.fingerprint for name, stream in streams.items()}, 'val images': splits.val.fingerprint,
      'pre-trained weights': weights_fingerprint(variables)}, keep=plan.keep)
  labels = splits.train.labels

  def batches_of(split: str, rows: Sequence[int] | None = None) -> Iterator[Any]:
    source = getattr(splits, split)
    batches = EvalBatches(source if rows is None else source.subset(rows), transform, streams[head].batch_size)
    return progress.bar(batches, f'pre-trained network on {split}', len(batches))

  begin = Begin(model, start or {}, len(splits.train.class_names), labels, labels if true_labels is None else true_labels,
                streams[head].batch_size, seed, batches_of)
  try:
    state, tx, start = _begin(config, checkpoints, schedule, variables, begin, methods)
  except BaseException:
    checkpoints.close()  # its threads would print tracebacks over the message
    raise
  if start:
    log.info('going on from step %d of %d', start, plan.steps)
  labelled = {name: stream.weight for name, stream in streams.items() if stream.weight is not None}
  run = _Run(work, plan, streams, splits, transform, make_predict(model, head), checkpoints, metric, schedule)
  if start < plan.steps:
    step = make_train_step(model, tx, labelled, methods=methods, seed=seed, parts=config.accumulate, average=config.average)
    state = _train(run, step, state, start, _device_batches(streams, transform, seed, start, all_needs(methods, model).views))
  state, best = _whole(checkpoints, lambda: checkpoints.best_step, lambda step: checkpoints.restore(step, state))
  state = parallel.replicate(state)
  checkpoints.close()
  return {'best_step': best, 'steps': plan.steps, 'steps_per_epoch': len(streams[head].source) / streams[head].batch_size, 'seed': seed,
          'metric': metric, **_environment(model), **_final(run, state, best)}


class _Run(NamedTuple):
  """What the parts of a training share; see `fit`."""
  work: Workdir
  plan: Plan
  streams: Mapping[str, Stream]
  splits: Splits
  transform: Transform
  predict: PredictFn
  checkpoints: Checkpoints
  metric: str
  schedule: optax.Schedule


def _train(run: _Run, step: StepFn, state: TrainState, start: int, batches: Iterator[Any]) -> TrainState:
  """The steps from `start` on; raises Interrupted, with the state saved, where a signal asks to stop."""
  plan = run.plan
  log.info('training %d steps of %s', plan.steps, ' + '.join(f'{stream.batch_size} {name} images' for name, stream in run.streams.items()))
  observer = _Observer(plan, MetricsWriter(run.work, start), run.checkpoints, run.metric, start,
                       sum(stream.batch_size for stream in run.streams.values()), lambda state: _val_metrics(run, state), run.schedule)
  with _signals() as stop, progress.counter('training', plan.steps, initial=start) as shown:

    def show(step: int, loss: float) -> None:
      shown.set_postfix(loss=f'{loss:.3f}', refresh=False)
      shown.update(step - shown.n)

    shown.set_postfix_str('compiling the step')
    state, done = run_steps(step, parallel.replicate(state), batches, start=start, steps=plan.steps, log_every=plan.log_every,
                            eval_every=plan.eval_every, observer=observer, stop=lambda: bool(stop), progress=show,
                            evaluate_at=plan.keep)
    if done < plan.steps:
      run.checkpoints.save(done, parallel.unreplicate(state), None)
      run.checkpoints.close()
      observer.writer.close()
      raise Interrupted(stop[0], f'stopped at step {done} of {plan.steps}, saved in {run.work.path}; the same command goes on from there')
    run.checkpoints.wait()
  observer.writer.close()
  return parallel.unreplicate(state)


def _evaluate(run: _Run, state: TrainState, source: Source, what: str) -> Evaluation:
  batches = EvalBatches(source, run.transform, next(iter(run.streams.values())).batch_size)
  return evaluate(run.predict, state.evaluated, progress.bar(batches, what, len(batches)), len(source.class_names))


def _val_metrics(run: _Run, state: TrainState) -> dict[str, float]:
  metrics = {f'val/{key}': value for key, value in _evaluate(run, state, run.splits.val, 'val').summary().items()}
  if state.average:  # what the parameters themselves are worth
    alone = _evaluate(run, state.replace(average={}), run.splits.val, 'val, without average')
    metrics |= {f'val_without_average/{key}': value for key, value in alone.summary().items()}
  return metrics


def _final(run: _Run, state: TrainState, best: int) -> dict[str, Any]:
  """What results.json says of val and test (None where there is none) at the best checkpoint."""
  results: dict[str, Any] = {'val': None, 'test': None}
  for name, source in (('val', run.splits.val), ('test', run.splits.test)):
    if source is not None:
      evaluation = _evaluate(run, state, source, name)
      log.info('%s (%s images, checkpoint of step %d): %s', name, f'{len(source):,d}', best, _spoken(evaluation.summary()))
      results[name] = _split_results(evaluation, source.class_names)
  return results


def _split_results(evaluation: Evaluation, class_names: Sequence[str]) -> dict[str, Any]:
  """What results.json says of one split; confusions as (true, predicted, how often), where there are any."""
  confusion = evaluation.confusion
  per_class = [{'name': name, 'images': int(row.sum()), 'right': int(row[k])} for k, (name, row) in enumerate(zip(class_names, confusion))]
  return {**evaluation.summary(), 'images': int(confusion.sum()), 'per_class': per_class,
          'confusion': [[int(t), int(p), int(confusion[t, p])] for t, p in np.argwhere(confusion)]}


class Interrupted(SystemExit):
  """A signal asked the run to stop; it is saved and can go on."""

  def __init__(self, number: int, message: str):
    super().__init__(128 + number)
    self.message = message


class _Observer:
  """Writes metrics, evaluates on val, keeps checkpoints."""

  def __init__(self, plan: Plan, writer: MetricsWriter, checkpoints: Checkpoints, metric: str, start: int, images_per_step: int,
               evaluate_val: Any, schedule: Any):
    self.writer = writer
    self._plan, self._checkpoints, self._metric, self._images = plan, checkpoints, metric, images_per_step
    self._evaluate, self._schedule = evaluate_val, schedule
    self._last, self._time = start, time.perf_counter()
    self._start, self._waited, self._told = start, 0.0, False

  def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
    spent = time.perf_counter()
    metrics = self._evaluate(state)
    self._checkpoints.save(step, parallel.unreplicate(state), {'score': metrics[f'val/{self._metric}'], 'loss': metrics['val/loss']})
    self._time += time.perf_counter() - spent  # the rate is that of training alone
    return metrics

  def wrote(self, step: int, metrics: dict[str, float]) -> None:
    now = time.perf_counter()
    rate = (step - self._last) * self._images / max(now - self._time, 1e-9)
    steps, self._last, self._time = step - self._last, step, now
    self.writer.write(step, {**metrics, 'learning_rate': float(self._schedule(step - 1)), 'images_per_second': rate})
    self._tell_waiting(step, steps * metrics['waiting_share'])
    if 'val/loss' in metrics:
      val = {key.removeprefix('val/'): value for key, value in metrics.items() if key.startswith('val/')}
      log.info('  step %*d/%d   training loss %.3f   val %s   %s images/s', len(str(self._plan.steps)), step, self._plan.steps,
               metrics['train/loss'], _spoken(val), f'{rate:,.0f}')

  def _tell_waiting(self, step: int, waited: float) -> None:
    """Says once that the images hold the training up; `waited` is in steps."""
    self._waited += waited
    share = self._waited / (step - self._start)
    if not self._told and share > WAITING and step - self._start >= WAITING_STEPS:
      self._told = True
      log.info('  the device waits for images %.0f %% of the time: more CPU cores help, and for small targets --config.data.cache=true',
               100 * share)


def _device_batches(streams: Mapping[str, Stream], transform: Transform, seed: int, start: int,
                    views: Collection[tuple[str, str]]) -> Iterator[Any]:
  """Batches of all streams side by side, on the devices one step ahead."""
  each = {name: train_batches(stream.source, transform, stream.batch_size, stream=name, seed=seed, start=start, balanced=stream.balanced,
                              views={view: VIEWS[view](transform) for of, view in views if of == name})
          for name, stream in streams.items()}

  def joined() -> Iterator[dict[str, dict[str, np.ndarray]]]:
    while True:
      yield {name: parallel.shard(next(batches)) for name, batches in each.items()}

  return jax_utils.prefetch_to_device(joined(), 2)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """A list that fills when SIGTERM or Ctrl-C asks to stop; a second Ctrl-C stops at once."""
  asked: list[int] = []

  def handle(number: int, frame: Any) -> None:
    del frame
    if asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    if not asked:
      log.info('stopping after this step (%s)', signal.Signals(number).name)
    asked.append(number)

  try:
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
  except ValueError:  # not in the main thread, as in some notebooks: nobody can ask
    before = {}
  try:
    yield asked
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _environment(model: ResNet) -> dict[str, Any]:
  """What the numbers may depend on."""
  devices = jax.devices()
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'ott-jax', 'tensorflow-datasets', 'grain', 'numpy', 'pillow',
              'simplejpeg', 'opencv-python-headless')
  return {
      'devices': f'{len(devices)} x {devices[0].device_kind}',
      'batch_norm': _batch_norm(model, len(devices)),
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


def _spoken(summary: Mapping[str, float]) -> str:
  return f'top-1 {summary["top1"]:.1%}, mean per class {summary["mean_per_class"]:.1%}, loss {summary["loss"]:.3f}'


# Further views of an image, as methods ask for them.
VIEWS: dict[str, Callable[[Transform], Transform]] = {
    'key': lambda transform: transform,
    'strong': lambda transform: dataclasses.replace(transform, randaugment=2, magnitude=10, cutout=0.5),
}
