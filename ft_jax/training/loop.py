"""The steps of one training: batches to the devices, metrics, evaluations and checkpoints, and what ends it before its time."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
from typing import Any, NamedTuple

from flax import jax_utils
import jax
import numpy as np
import optax

from ft_jax import parallel, progress, stopping
from ft_jax.data.image_set import ImageSet
from ft_jax.data.pipeline import EvalBatches, Stalled, train_batches, Transform
from ft_jax.data.splits import Splits
from ft_jax.methods import View
from ft_jax.progress import log
from ft_jax.training.checkpoints import Checkpoints
from ft_jax.training.evaluate import evaluate, Evaluation, PredictFn
from ft_jax.training.settings import Plan
from ft_jax.training.step import Diverged, run_steps, StepFn, TrainState
from ft_jax.workdir import MetricsWriter, Workdir

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
  source: ImageSet
  batch_size: int
  weight: float | None
  balanced: bool = False


class Run(NamedTuple):
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
  seed: int
  timeout: float


def train(run: Run, step: StepFn, state: TrainState, start: int, skip: Sequence[int], views: Collection[View]) -> TrainState:
  """The steps from `start` on.

  Args:
    run: see there.
    step: of `make_train_step`.
    state: on the host.
    start: steps that it has behind it.
    skip: places of batches that are left out; see `data.pipeline.place_of`.
    views: further views of images, as methods need them.

  Returns:
    The state after the last step, on the host; it is saved and evaluated.

  Raises:
    Interrupted: a signal asked to stop; the state is saved.
    Stalled: images did not come; the state is saved.
    Diverged: loss or gradient are not finite any more.
  """
  plan = run.plan
  log.info('training %d steps of %s', plan.steps, ' + '.join(f'{stream.batch_size} {name} images' for name, stream in run.streams.items()))
  with stopping.signals() as stop, progress.counter('training', plan.steps, initial=start) as shown:
    observer = Observer(run, MetricsWriter(run.work, start), start, stop)

    def show(step: int, loss: float) -> None:
      shown.set_postfix(loss=f'{loss:.3f}', refresh=False)
      shown.update(step - shown.n)

    shown.set_postfix_str('compiling the step')
    batches = jax_utils.prefetch_to_device(observer.until_stalled(_batches(run, start, skip, views, lambda: stop.asked)), 2)
    images = sum(stream.batch_size for stream in run.streams.values())
    try:
      state, done = run_steps(step, parallel.replicate(state), batches, start=start, steps=plan.steps, images=images,
                              log_every=plan.log_every, due=plan.due, observer=observer, stop=stop, progress=show,
                              evaluated=not plan.due(start) or run.checkpoints.evaluated(start))
    except BaseException as error:
      with contextlib.suppress(Exception):  # what is being written is not lost by it
        run.checkpoints.wait()
      if stop.asked and isinstance(error, Diverged):
        raise Interrupted(stop.signal, f'stopped: {error}; the same command goes on from the last checkpoint') from error
      raise
    finally:
      observer.writer.close()
    run.checkpoints.wait()
    # Asked for while the last state was written, too: nothing is lost, and what comes next would take its time.
    if not observer.complete or stop.asked:
      run.checkpoints.close()
      where = f'step {done} of {plan.steps}, saved in {run.work.path}; the same command goes on from there'
      if observer.stalled:
        raise Stalled(f'{observer.stalled}; stopped at {where}')
      raise Interrupted(stop.signal, f'stopped at {where}')
  return parallel.unreplicate(state)


def evaluated(run: Run, state: TrainState, source: ImageSet, what: str, stop: Callable[[], bool] = lambda: False) -> Evaluation:
  """A state (replicated) on a split, which `what` names; `stop` is asked before each batch."""
  batches = EvalBatches(source, run.transform, next(iter(run.streams.values())).batch_size, run.timeout)
  shown = progress.bar(batches, what, len(batches))
  return evaluate(run.predict, state.eval_variables, _unless(stop, shown), len(source.class_names))


class _Stopped(Exception):
  """In the middle of an evaluation."""


def _unless(stop: Callable[[], bool], batches: Iterable[Any]) -> Iterator[Any]:
  for batch in batches:
    if stop():
      raise _Stopped
    yield batch


def _val_metrics(run: Run, state: TrainState, stop: Callable[[], bool]) -> dict[str, float]:
  metrics = {f'val/{key}': value for key, value in evaluated(run, state, run.splits.val, 'val', stop).summary().items()}
  if state.average:  # what the parameters themselves are worth
    alone = evaluated(run, state.replace(average={}), run.splits.val, 'val, without average', stop)
    metrics |= {f'val_without_average/{key}': value for key, value in alone.summary().items()}
  return metrics


class Interrupted(SystemExit):
  """A signal asked the run to stop; it is saved and can go on."""

  def __init__(self, number: int, message: str):
    super().__init__(128 + number)
    self.message = message


class Observer:
  """Writes metrics, evaluates on val, keeps checkpoints.

  Attributes:
    complete: whether what was saved last was evaluated.
    stalled: why images did not come any more; '' where they did.
  """

  def __init__(self, run: Run, writer: MetricsWriter, start: int, stop: Callable[[], bool]):
    self.writer, self.complete, self.stalled = writer, False, ''
    self._run, self._stop = run, stop
    self._last, self._steps, self._waited, self._told = start, 0, 0.0, False

  def until_stalled(self, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches; they end where images do not come. Of several processes, the others would wait for this one."""
    try:
      yield from batches
    except Stalled as error:
      if jax.process_count() > 1:
        raise
      self.stalled = str(error)

  def evaluate(self, step: int, state: TrainState) -> dict[str, float] | None:
    """See `train.Observer`."""
    try:
      return _val_metrics(self._run, state, self._stop)
    except _Stopped:
      return None
    except Stalled as error:
      if jax.process_count() > 1:
        raise
      self.stalled = str(error)
      return None

  def save(self, step: int, state: TrainState, val: dict[str, float] | None) -> None:
    """See `train.Observer`."""
    metrics = {'score': val[f'val/{self._run.metric}'], 'loss': val['val/loss']} if val else None
    state = parallel.unreplicate(state)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.batch_stats))):
      raise Diverged(step, 'a parameter is not finite any more')
    self.writer.flush()  # behind a checkpoint no line may be missing
    self._run.checkpoints.save(step, state, metrics)
    self.complete = val is not None

  def wrote(self, step: int, metrics: dict[str, float]) -> None:
    """See `train.Observer`."""
    steps, self._last = step - self._last, step
    if 'train/loss' in metrics:
      metrics = {**metrics, 'learning_rate': float(self._run.schedule(step - 1))}
    if 'waiting_share' in metrics:
      self._tell_waiting(steps, metrics['waiting_share'])
    metrics = self.writer.write(step, metrics)
    if 'val/loss' in metrics:
      val = {key.removeprefix('val/'): value for key, value in metrics.items() if key.startswith('val/')}
      trained = f'   training loss {metrics["train/loss"]:.3f}' if 'train/loss' in metrics else ''
      rate = f'   {metrics["images_per_second"]:,.0f} images/s' if 'images_per_second' in metrics else ''
      log.info('  step %*d/%d%s   val %s%s', len(str(self._run.plan.steps)), step, self._run.plan.steps, trained, spoken(val), rate)

  def _tell_waiting(self, steps: int, share: float) -> None:
    """Says once that the images hold the training up, from what a window of so many steps adds."""
    self._steps, self._waited = self._steps + steps, self._waited + steps * share
    share = self._waited / self._steps
    if not self._told and share > WAITING and self._steps >= WAITING_STEPS:
      self._told = True
      log.info('  the device waits for images %.0f %% of the time: more CPU cores help, and for small targets --config.data.cache=true',
               100 * share)


def _batches(run: Run, start: int, skip: Sequence[int], views: Collection[View],
             cancelled: Callable[[], bool]) -> Iterator[dict[str, dict[str, np.ndarray]]]:
  """Batches of all streams side by side, in the devices' parts; see `train_batches`."""
  each = {name: train_batches(stream.source, run.transform, stream.batch_size, stream=name, seed=run.seed, start=start,
                              balanced=stream.balanced, views={view.name: dataclasses.replace(run.transform, **view.recipe) for view in views if view.stream == name},
                              skip=skip, timeout=run.timeout, cancelled=cancelled)
          for name, stream in run.streams.items()}
  for batches in zip(*each.values()):
    yield {name: parallel.shard(batch) for name, batch in zip(each, batches)}


def spoken(summary: Mapping[str, float]) -> str:
  """The summary of an evaluation in words."""
  return f'top-1 {summary["top1"]:.1%}, mean per class {summary["mean_per_class"]:.1%}, loss {summary["loss"]:.3f}'

