"""The steps of one training: batches to the devices, metrics, evaluations, checkpoints, and what ends it early.

`train` is the whole loop; the classes and functions below it are its parts, in the order in which it uses them.
"""

import collections
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import itertools
import math
import signal
import time
from typing import Any

from flax import jax_utils
import jax
import numpy as np
import optax
import tqdm

from ft_jax import parallel, progress, stopping
from ft_jax.data.image_set import ImageSet
from ft_jax.data.pipeline import EvalBatches, Stalled, TIMEOUT, train_batches, Transform
from ft_jax.data.splits import Splits
from ft_jax.methods import View
from ft_jax.metrics import MetricsWriter
from ft_jax.progress import log
from ft_jax.training import neighbours
from ft_jax.training.checkpoints import Checkpoints
from ft_jax.training.evaluate import evaluate, Evaluation, PredictFn
from ft_jax.training.settings import Plan
from ft_jax.training.step import Batch, Metrics, StepFn, TrainState, Weight
from ft_jax.workdir import Workdir

# A device that waits for images is worth a log line from this fraction of the time on, and after so many steps.
WAITING, WAITING_STEPS = 0.2, 20


@dataclasses.dataclass(frozen=True)
class Stream:
  """Images of one kind in the steps from `first` (counted from 0) to before `end`.

  Attributes:
    images: the set that they are drawn from.
    batch_size: images a step, over all devices.
    weight: of their loss, or the weight of each step; None where their labels are not used.
    balanced: whether every class comes equally often.
    first: the first step that has them.
    end: the first step that does not have them any more; None where all others have them.
  """
  images: ImageSet
  batch_size: int
  weight: Weight | None
  balanced: bool = False
  first: int = 0
  end: int | None = None

  def is_in(self, step: int) -> bool:
    """Whether a step (counted from 0) has these images."""
    return self.first <= step and (self.end is None or step < self.end)

  def steps(self, first: int, end: int) -> int:
    """How many of the steps from `first` to before `end` have these images."""
    return max(0, min(end, end if self.end is None else self.end) - max(first, self.first))


@dataclasses.dataclass(frozen=True)
class TrainingData:
  """The images of one training, and how they become batches.

  Attributes:
    streams: by name, which is the name of their head where their labels are used; the first one counts epochs and is
      evaluated.
    splits: the splits of the first stream's data set.
    transform: what happens to an image.
    seed: of the run; the order of the images follows from it.
    timeout: seconds that a batch may take; 0 for any time.
    true_labels: int32 `[n]`, labels of the training examples before noise was added; None where none was.
  """
  streams: Mapping[str, Stream]
  splits: Splits
  transform: Transform
  seed: int
  timeout: float = TIMEOUT
  true_labels: np.ndarray | None = None

  @property
  def head(self) -> str:
    """The name of the first stream."""
    return next(iter(self.streams))

  @property
  def first(self) -> Stream:
    """The stream that counts epochs and is evaluated."""
    return self.streams[self.head]

  @property
  def loss_weights(self) -> dict[str, Weight]:
    """The weight of the loss of each labelled stream."""
    return {name: stream.weight for name, stream in self.streams.items() if stream.weight is not None}

  def images_in(self, first: int, end: int) -> int:
    """Images of all streams in the steps from `first` (counted from 0) to before `end`."""
    return sum(stream.batch_size * stream.steps(first, end) for stream in self.streams.values())

  def summary(self) -> str:
    """What a step is of, for the log."""
    parts = []
    for name, stream in self.streams.items():
      steps = f' from step {stream.first + 1} on' if stream.first else ''
      steps += f' up to step {stream.end}' if stream.end is not None else ''
      parts.append(f'{stream.batch_size} {name} images{steps}')
    return ' + '.join(parts)


@dataclasses.dataclass(frozen=True)
class Run:
  """What does not change from one step to the next.

  Attributes:
    work: the folder of the run.
    plan: the number of steps, and which of them are evaluated and logged.
    data: the images.
    views: further views of images that methods need.
    predict: the forward pass of an evaluation.
    schedule: the learning rate of each step.
    metric: the val metric that chooses the best checkpoint.
    checkpoints: the run's.
    bank: where the network has no head, the labelled images whose features vote in an evaluation; `predict` is then
      that of `neighbours.make_features`.
  """
  work: Workdir
  plan: Plan
  data: TrainingData
  views: Collection[View]
  predict: PredictFn
  schedule: optax.Schedule
  metric: str
  checkpoints: Checkpoints
  bank: ImageSet | None = None


class Diverged(RuntimeError):
  """Loss, gradient or parameters are not finite any more.

  Attributes:
    step: the first step that shows it, counted from 1.
    what: what is not finite.
  """

  def __init__(self, step: int, what: str, message: str = ''):
    self.step, self.what = step, what
    super().__init__(message or f'{what} at step {step}')


class Interrupted(SystemExit):
  """A signal asked the run to stop; its state is saved, and the run can be resumed."""

  def __init__(self, number: int, message: str):
    super().__init__(128 + number)
    self.message = message


def train(run: Run, step: StepFn, state: TrainState, start: int, skip: Sequence[int],
          clock: Callable[[], float] = time.perf_counter) -> TrainState:
  """Runs the steps from `start` on; evaluates, writes metrics and saves, in this order, where the plan says so.

  It ends early where a signal asks for it or where images stop coming; the state is saved then, without an evaluation,
  and a resumed run begins with the evaluation that is missing. Before the first stream has come, the state is saved
  without an evaluation.

  Args:
    run: see there.
    step: of `make_train_step`.
    state: the state after `start` steps, on the host.
    start: number of steps done before.
    skip: places of batches that are left out; see `data.pipeline.place_of`.
    clock: gives seconds.

  Returns:
    The state after the last step, on the host; it is evaluated and saved.

  Raises:
    Interrupted: a signal asked to stop; the state is saved.
    Stalled: images stopped coming; the state is saved.
    Diverged: loss, gradient, parameters or the loss on val are not finite any more.
  """
  plan, checkpoints = run.plan, run.checkpoints
  log.info('training %d steps of %s', plan.steps, run.data.summary())
  with stopping.signals() as stop, progress.counter('training', plan.steps, initial=start) as bar:
    bar.set_postfix_str('compiling the step')
    with _saving(checkpoints, stop), contextlib.closing(MetricsWriter(run.work, start)) as writer:
      batches = TrainBatches(run, start, skip, cancelled=lambda: stop.asked)
      window = MetricsWindow(lambda step: run.data.images_in(step - 1, step), bar, clock)
      metrics_log = MetricsLog(run, writer, start)
      state, done, complete, stops = parallel.replicate(state), start, False, False
      evaluates = plan.due(start) and not checkpoints.evaluated(start)
      while True:
        # The end of a window of metrics; an evaluation and a stop end one too.
        if evaluates or stops or done % plan.log_every == 0:
          metrics, val = window.means(), None
          if evaluates and not stops and done > run.data.first.first:  # its head has been trained
            val = evaluate_val(run, done, state, stop, batches)
            stops = val is None
          if metrics or val:
            metrics_log.write(done, metrics | (val or {}))
          if evaluates or stops and done > start:
            save(run, writer, done, state, val)
            complete = val is not None
          window.restart()
        if stops or done == plan.steps:
          break
        batch = window.wait_for(batches)
        if batch is not None:
          state, step_metrics = step(state, batch)
          done += 1
          window.add(done, step_metrics)
        stops = batch is None or done < plan.steps and stop()
        evaluates = batch is not None and plan.due(done)
    checkpoints.wait()
    # A stop asked for while the last state was written counts too: nothing is lost, and what follows takes time.
    if done < plan.steps or not complete or stop.asked:
      checkpoints.close()
      where = f'step {done} of {plan.steps}, saved in {run.work.path}; the same command resumes from there'
      if batches.stalled:
        raise Stalled(f'{batches.stalled}; stopped at {where}')
      raise Interrupted(stop.signal or signal.SIGTERM, f'stopped at {where}')
  return parallel.unreplicate(state)


@contextlib.contextmanager
def _saving(checkpoints: Checkpoints, stop: stopping.Stop) -> Iterator[None]:
  """An error within it does not lose the checkpoint that is being written."""
  try:
    yield
  except BaseException as error:
    with contextlib.suppress(Exception):
      checkpoints.wait()
    if stop.asked and isinstance(error, Diverged):
      message = f'stopped: {error}; the same command resumes from the last checkpoint'
      raise Interrupted(stop.signal or signal.SIGTERM, message) from error
    raise


class TrainBatches:
  """Batches of all streams on the devices, two of them ahead; they end where images stop coming.

  Attributes:
    stalled: why images stopped coming; '' while they come.
  """

  def __init__(self, run: Run, start: int, skip: Sequence[int], cancelled: Callable[[], bool]):
    """From step `start` on; `cancelled` is asked while images take long, and the batches end where it says so."""
    self.stalled = ''
    data = run.data
    each = {name: train_batches(
        stream.images, data.transform, stream.batch_size, stream=name, seed=data.seed, start=max(start, stream.first),
        first=stream.first, balanced=stream.balanced, views=_transforms(data.transform, run.views, name), skip=skip,
        timeout=data.timeout, cancelled=cancelled) for name, stream in data.streams.items()}
    self._batches = jax_utils.prefetch_to_device(self._until_stalled(data, start, each), 2)

  def __iter__(self) -> Iterator[Batch]:
    return self._batches

  def __next__(self) -> Batch:
    return next(self._batches)

  def _until_stalled(self, data: TrainingData, start: int,
                     each: Mapping[str, Iterator[Mapping[str, np.ndarray]]]) -> Iterator[Any]:
    try:
      for step in itertools.count(start):
        batches = {}
        for name, stream in data.streams.items():
          if stream.is_in(step):
            batch = next(each[name], None)
            if batch is None:
              return
            batches[name] = parallel.shard(batch)
        yield batches
    except Stalled as error:
      self.stall(error)

  def stall(self, error: Stalled) -> None:
    """Notes why images stopped coming; of several processes, where the others would wait for this one, it raises."""
    if jax.process_count() > 1:
      raise error
    self.stalled = str(error)


def _transforms(transform: Transform, views: Collection[View], stream: str) -> dict[str, Transform]:
  """The transform of each further view of a stream's images."""
  return {view.name: dataclasses.replace(transform, **view.recipe) for view in views if view.stream == stream}


class MetricsWindow:
  """The metrics of the steps since the last line of metrics.

  The metrics of a step are read when the next one is under way, so the device does not wait for the host. The means of
  a window also say how fast it was, and whether the device waited for images: `images_per_second`, and `waiting_share`,
  the fraction of the time until a batch was there, counted where the device had finished all steps before. It had
  finished at some moment of that wait, so this is an upper bound. Neither counts evaluations, checkpoints, or the first
  step with its streams, which is compiled: a window of that step alone has neither.
  """

  def __init__(self, images: Callable[[int], int], bar: tqdm.tqdm, clock: Callable[[], float]):
    """`images` gives those of a step; the progress bar gets the loss of each step that is read; `clock` gives seconds.
    """
    self._images_in, self._bar, self._clock = images, bar, clock
    self._metrics: list[dict[str, float]] = []
    self._names: set[str] = set()
    self._unread: tuple[int, Metrics] | None = None
    self._began: float | None = None  # None until the first step is done
    self._images, self._waited = 0, 0.0

  def wait_for(self, batches: Iterator[Batch]) -> Batch | None:
    """The next batch, or None where there is none; counts the time for which the device waits."""
    asked = self._clock()
    batch = next(batches, None)
    if batch is not None and self._began is not None and self._device_is_idle():
      self._waited += self._clock() - asked
    return batch

  def _device_is_idle(self) -> bool:
    if self._unread is None:
      return True
    _, metrics = self._unread
    return all(value.is_ready() for value in metrics.values())  # type: ignore[attr-defined]  # missing in jax's types

  def add(self, step: int, metrics: Metrics) -> None:
    """Adds the metrics of the step that was just dispatched, and reads those of the step before.

    Raises:
      Diverged: loss or gradient of the step before are not finite.
    """
    self.read()
    self._unread = step, metrics
    if self._began is None or self._names != metrics.keys():
      self._names = {*metrics}
      self.read()
      self._began = self._clock()
      self._images, self._waited = 0, 0.0
    else:
      self._images += self._images_in(step)

  def read(self) -> None:
    """Reads the metrics of the last step, where that was not done; raises as of `add`."""
    if self._unread is None:
      return
    step, unread = self._unread
    self._unread = None
    metrics = {name: float(value) for name, value in parallel.unreplicate(unread).items()}
    if not math.isfinite(metrics['loss']):
      raise Diverged(step, f'the loss is {metrics["loss"]}')
    if not math.isfinite(metrics['gradient_norm']):
      raise Diverged(step, f'the norm of the gradient is {metrics["gradient_norm"]}')
    self._metrics.append(metrics)
    self._bar.set_postfix(loss=f'{metrics["loss"]:.3f}', refresh=False)
    self._bar.update(step - self._bar.n)

  def means(self) -> dict[str, float]:
    """The means over the window as `train/<metric>`, and its speed; {} without a step. Raises as of `add`."""
    self.read()
    values = collections.defaultdict(list)
    for metrics in self._metrics:
      for name, value in metrics.items():
        values[name].append(value)
    means = {f'train/{name}': sum(found) / len(found) for name, found in values.items()}
    if self._began is not None and self._images and (elapsed := self._clock() - self._began) > 0:
      means |= {'images_per_second': self._images / elapsed, 'waiting_share': self._waited / elapsed}
    return means

  def restart(self) -> None:
    """Begins a new window."""
    self._metrics.clear()
    self._images, self._waited = 0, 0.0
    if self._began is not None:
      self._began = self._clock()


class MetricsLog:
  """Writes lines of metrics, and logs evaluations and a device that waits for images."""

  def __init__(self, run: Run, writer: MetricsWriter, start: int):
    self._run, self._writer = run, writer
    self._last, self._steps, self._waited, self._warned = start, 0, 0.0, False

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Writes the means of the window that ended at `step`, with val's metrics where the state was evaluated."""
    steps, self._last = step - self._last, step
    if 'train/loss' in metrics:
      metrics = {**metrics, 'learning_rate': float(self._run.schedule(step - 1))}
    if 'waiting_share' in metrics:
      self._log_waiting(steps, metrics['waiting_share'])
    metrics = self._writer.write(step, metrics)
    if 'val/loss' in metrics:
      self._log_val(step, metrics)

  def _log_val(self, step: int, metrics: Mapping[str, float]) -> None:
    steps = self._run.plan.steps
    val = {name.removeprefix('val/'): value for name, value in metrics.items() if name.startswith('val/')}
    trained = f'   training loss {metrics["train/loss"]:.3f}' if 'train/loss' in metrics else ''
    rate = f'   {metrics["images_per_second"]:,.0f} images/s' if 'images_per_second' in metrics else ''
    log.info('  step %*d/%d%s   val %s%s', len(str(steps)), step, steps, trained, format_summary(val), rate)

  def _log_waiting(self, steps: int, share: float) -> None:
    """Logs once that the device waits for images, from the share of a window of so many steps and of those before."""
    self._steps, self._waited = self._steps + steps, self._waited + steps * share
    share = self._waited / self._steps
    if not self._warned and share > WAITING and self._steps >= WAITING_STEPS:
      self._warned = True
      log.info('  the device waits for images %.0f %% of the time: more CPU cores help, and for small targets '
               '--config.data.cache=true', 100 * share)


def evaluate_val(run: Run, step: int, state: TrainState, stop: Callable[[], bool],
                 batches: TrainBatches) -> dict[str, float] | None:
  """Val metrics of the state after `step` steps; None where a stop was asked for or images stopped coming meanwhile.

  Raises:
    Diverged: the loss is not finite.
  """
  try:
    val = val_metrics(run, state, stop)
  except _Stopped:
    return None
  except Stalled as error:
    batches.stall(error)
    return None
  if not math.isfinite(val['val/loss']):
    raise Diverged(step, f'the loss on val is {val["val/loss"]}')
  return val


def val_metrics(run: Run, state: TrainState, stop: Callable[[], bool]) -> dict[str, float]:
  """Val metrics of a replicated state: of its averages where there are any, and then of the parameters themselves too.
  """
  val = run.data.splits.val
  metrics = {f'val/{name}': value for name, value in evaluate_split(run, state, val, 'val', stop).summary().items()}
  if state.average:
    own = evaluate_split(run, state.replace(average={}), val, 'val, without average', stop)
    metrics |= {f'val_without_average/{name}': value for name, value in own.summary().items()}
  return metrics


def evaluate_split(run: Run, state: TrainState, images: ImageSet, name: str,
                   stop: Callable[[], bool] = lambda: False) -> Evaluation:
  """Evaluates a replicated state on a split, which the progress bar calls `name`; `stop` is asked before each batch."""
  classes = len(images.class_names)
  batches = _eval_batches(run, images, name, stop)
  if run.bank is None:
    return evaluate(run.predict, state.eval_variables, batches, classes)
  bank = _eval_batches(run, run.bank, f'neighbours for {name}', stop)
  return neighbours.evaluate(run.predict, state.eval_variables, bank, batches, classes)


def _eval_batches(run: Run, images: ImageSet, name: str, stop: Callable[[], bool]) -> Iterator[Any]:
  """The batches of an evaluation; `_Stopped` is raised where `stop` says so."""
  batches = EvalBatches(images, run.data.transform, run.data.first.batch_size, run.data.timeout)
  return _unless(stop, progress.bar(batches, name, len(batches)))


class _Stopped(Exception):
  """A stop was asked for during an evaluation."""


def _unless(stop: Callable[[], bool], batches: Iterable[Any]) -> Iterator[Any]:
  for batch in batches:
    if stop():
      raise _Stopped
    yield batch


def save(run: Run, writer: MetricsWriter, step: int, state: TrainState, val: Mapping[str, float] | None) -> None:
  """Saves the state after `step` steps, with its val metrics where it was evaluated.

  Raises:
    Diverged: a parameter is not finite: the metrics of a step are those before its update, which may have been too
      large.
  """
  state = parallel.unreplicate(state)
  if not all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.batch_stats))):
    raise Diverged(step, 'a parameter is not finite any more')
  metrics = {'score': val[f'val/{run.metric}'], 'loss': val['val/loss']} if val else None
  writer.flush()  # no line before a checkpoint may be missing
  run.checkpoints.save(step, state, metrics)


def format_summary(summary: Mapping[str, float]) -> str:
  """The summary of an evaluation for a log line."""
  return (f'top-1 {summary["top1"]:.1%}, mean per class {summary["mean_per_class"]:.1%}, '
          f'loss {summary["loss"]:.3f}')
