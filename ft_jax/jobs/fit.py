"""One training, from the first step to the test split: what fine-tuning and pre-training share."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import importlib.metadata
import math
import platform
import signal
import sys
import time
from typing import Any, NamedTuple

from flax import jax_utils
import jax
from ml_collections import ConfigDict
import numpy as np
import optax

from ft_jax import optimizer, parallel, progress
from ft_jax.checkpoints import Checkpoints
from ft_jax.data.pipeline import EvalBatches, train_batches, Transform
from ft_jax.data.sources import Source
from ft_jax.evaluate import evaluate, Evaluation, make_predict
from ft_jax.jobs.setup import Splits, weights_fingerprint
from ft_jax.models.resnet import ResNet
from ft_jax.progress import log
from ft_jax.train import create_state, make_train_step, run_steps, TrainState
from ft_jax.workdir import MetricsWriter, Workdir

METRICS = ('top1', 'mean_per_class')
# A waiting device is worth a line from this share of the time on, and from so many steps on.
WAITING, WAITING_STEPS = 0.2, 20


class Stream(NamedTuple):
  """Images of one kind in every step: `batch_size` of them over all devices, and the weight of their loss."""
  source: Source
  batch_size: int
  weight: float


class Plan(NamedTuple):
  """Lengths in steps."""
  steps: int
  eval_every: int
  log_every: int


def make_plan(config: ConfigDict, examples: int) -> Plan:
  """The length of a training and of its parts.

  Raises:
    ValueError: a length that is no step at all.
  """
  steps = config.steps or round(config.epochs * examples / config.batch_size)
  if steps < 1:
    raise ValueError(f'train.epochs {config.epochs} of {examples} images in batches of {config.batch_size} are {steps} steps; '
                     'expected at least one (train.steps sets the number itself)')
  return Plan(steps, config.eval_every or math.ceil(steps / 10), config.log_every or math.ceil(steps / 100))


def check(config: ConfigDict, metric: str, model: ResNet, image_size: int) -> None:
  """Raises ValueError for settings of a training that cannot be right, before anything long begins."""
  if metric not in METRICS:
    raise ValueError(f'metric is {metric!r}; known: {", ".join(METRICS)}')
  for name in ('steps', 'epochs', 'eval_every', 'log_every', 'learning_rate', 'weight_decay'):
    if not 0 <= config[name] < float('inf'):
      raise ValueError(f'train.{name} is {config[name]}; expected a number from 0')
  if not config.steps and not config.epochs:
    raise ValueError('train.steps and train.epochs are both 0; one of them gives the length')
  parallel.check_batch(config.batch_size, 'train.batch_size')
  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.uint8))
  _optimizer(config, _schedule(config, 1000), shapes['params'])


def _optimizer(config: ConfigDict, schedule: optax.Schedule, params: Any) -> optax.GradientTransformation:
  return optimizer.sgd(schedule, params, momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay,
                       learning_rate_groups=config.learning_rate_groups, weight_decay_groups=config.weight_decay_groups)


def _schedule(config: ConfigDict, steps: int) -> optax.Schedule:
  return optimizer.make_schedule(config.schedule, config.learning_rate, steps, milestones=config.milestones,
                                 decay=config.decay, warmup=config.warmup)


def fit(config: ConfigDict, work: Workdir, *, model: ResNet, variables: Mapping[str, Any], streams: Mapping[str, Stream],
        splits: Splits, transform: Transform, metric: str, seed: int) -> dict[str, Any]:
  """Trains, keeps the newest and the best checkpoint, evaluates the best one, and returns the results.

  Args:
    config: the fields of `configs.default.train_config`; `check` has seen them.
    work: where everything is written; a run that is there goes on from its newest checkpoint.
    model: with a head for each stream.
    variables: where it starts.
    streams: by the name of their heads; the first one counts epochs and is evaluated.
    splits: of the first stream.
    transform: what images go through.
    metric: chooses the best checkpoint.
    seed: of the order of data.

  Raises:
    ValueError: a setting that does not fit.
    Interrupted: a signal asked to stop; the state is saved.
  """
  head = next(iter(streams))
  plan = make_plan(config, len(streams[head].source))
  schedule = _schedule(config, plan.steps)
  tx = _optimizer(config, schedule, variables['params'])
  checkpoints = Checkpoints(work.path, {
      **{f'{name} images': stream.source.fingerprint for name, stream in streams.items()}, 'val images': splits.val.fingerprint,
      'pre-trained weights': weights_fingerprint(variables)})
  state, start = create_state(variables, tx), 0
  if checkpoints.latest_step is not None:
    start = checkpoints.latest_step
    state = checkpoints.restore(start, state)
    log.info('going on from step %d of %d', start, plan.steps)
  predict = make_predict(model, head)
  num_classes = len(splits.train.class_names)

  def evaluate_split(state: TrainState, source: Source, what: str) -> Evaluation:
    batches = EvalBatches(source, transform, streams[head].batch_size)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    return evaluate(predict, variables, progress.bar(batches, what, len(batches)), num_classes)

  if start < plan.steps:
    log.info('training %d steps of %s', plan.steps,
             ' + '.join(f'{stream.batch_size} {name} images' for name, stream in streams.items()))
  observer = _Observer(plan, MetricsWriter(work, start), checkpoints, metric, start, sum(s.batch_size for s in streams.values()),
                       lambda state: evaluate_split(state, splits.val, 'val'), schedule)
  with _signals() as stop, progress.counter('training', plan.steps, initial=start) as shown:

    def show(step: int, loss: float) -> None:
      shown.set_postfix(loss=f'{loss:.3f}', refresh=False)
      shown.update(step - shown.n)

    if start < plan.steps:
      shown.set_postfix_str('compiling the step')
      state, done = run_steps(
          make_train_step(model, tx, {name: stream.weight for name, stream in streams.items()}), parallel.replicate(state),
          _device_batches(streams, transform, seed, start), start=start, steps=plan.steps, log_every=plan.log_every,
          eval_every=plan.eval_every, observer=observer, stop=lambda: bool(stop), progress=show)
      if done < plan.steps:
        checkpoints.save(done, parallel.unreplicate(state), None)
        checkpoints.close()
        observer.writer.close()
        raise Interrupted(stop[0], f'stopped at step {done} of {plan.steps}, saved in {work.path}; the same command goes on from there')
    checkpoints.wait()
  observer.writer.close()

  best = checkpoints.best_step
  state = parallel.replicate(checkpoints.restore(best, parallel.unreplicate(state) if start < plan.steps else state))
  checkpoints.close()
  results = {'best_step': best, 'steps': plan.steps, 'seed': seed, 'metric': metric,
             **_environment(model), 'val': None, 'test': None}
  for name, source in (('val', splits.val), ('test', splits.test)):
    if source is not None:
      evaluation = evaluate_split(state, source, name)
      log.info('%s (%s images, checkpoint of step %d): %s', name, f'{len(source):,d}', best, _spoken(evaluation.summary()))
      results[name] = _split_results(evaluation, splits.train.class_names)
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
    summary = self._evaluate(state).summary()
    self._checkpoints.save(step, parallel.unreplicate(state), {'score': summary[self._metric], 'loss': summary['loss']})
    self._time += time.perf_counter() - spent  # the rate is that of training alone
    return {f'val/{key}': value for key, value in summary.items()}

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


def _device_batches(streams: Mapping[str, Stream], transform: Transform, seed: int, start: int) -> Iterator[Any]:
  """Batches of all streams side by side, on the devices one step ahead."""
  each = {name: train_batches(stream.source, transform, stream.batch_size, stream=name, seed=seed, start=start)
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
  packages = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'ott-jax', 'tensorflow-datasets', 'grain', 'numpy')
  return {
      'devices': f'{len(devices)} x {devices[0].device_kind}',
      'batch_norm': _batch_norm(model, len(devices)),
      'versions': {'python': platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}},
      'command': sys.argv,
  }


def _batch_norm(model: ResNet, devices: int) -> str:
  if model.batch_norm == 'frozen':
    return 'frozen: statistics, scales and biases of the weights'
  return 'statistics of the whole batch' if model.axis_name else f'statistics of each of {devices} devices'


def _spoken(summary: Mapping[str, float]) -> str:
  return f'top-1 {summary["top1"]:.1%}, mean per class {summary["mean_per_class"]:.1%}, loss {summary["loss"]:.3f}'
