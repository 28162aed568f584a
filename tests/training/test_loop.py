"""The loop reads metrics, evaluates, saves, stops and ends where it should."""

import contextlib
import types

import numpy as np
import pytest

from ft_jax import parallel, stopping
from ft_jax.data.pipeline import Stalled
from ft_jax.training import loop
from ft_jax.training.loop import Diverged, Interrupted, MetricsLog, Run, Stream, train, TrainingData
from ft_jax.training.settings import Plan
from ft_jax.training.step import TrainState
from ft_jax.workdir import Workdir


class Metric(float):
  """A number on a device that is done with it, or not."""

  ready = True

  def is_ready(self):
    return self.ready


class Stop:
  """Answers of `stopping.Stop`, one after the other; no after the last."""

  def __init__(self, answers):
    self._answers, self.signal = iter(answers), None

  def __call__(self):
    self.signal = 15 if next(self._answers, False) else self.signal
    return self.asked

  @property
  def asked(self):
    return self.signal is not None


class Checkpoints:
  """Notes what is saved, and which lines of metrics were on disk then."""

  def __init__(self, work, evaluated):
    self.saved, self._work, self._evaluated = [], work, evaluated

  def evaluated(self, step):
    return self._evaluated

  def save(self, step, state, metrics):
    assert not self._work.metrics() or step <= self._work.metrics()[-1]['step'], 'saved before its metrics were written'
    self.saved.append((step, state.step, metrics is not None))

  def wait(self):
    pass

  def close(self):
    pass


class Bar(contextlib.nullcontext):
  """A progress bar that remembers steps and losses."""

  def __init__(self, start):
    super().__init__(self)
    self.n, self.shown, self._loss = start, [], ''

  def set_postfix_str(self, text):
    pass

  def set_postfix(self, loss, refresh):
    self._loss = loss

  def update(self, steps):
    self.n += steps
    self.shown.append((self.n, self._loss))


@pytest.fixture
def run_loop(monkeypatch, tmp_path):
  """The loop around a step that counts: its loss is the number of steps before it, or `losses[step]`."""
  monkeypatch.setattr(parallel, 'replicate', lambda tree: tree)
  monkeypatch.setattr(parallel, 'unreplicate', lambda tree: tree)

  def run(steps=10, start=0, losses=None, norms=None, stop=(), log_every=3, eval_every=4, keep=(), last=1000,
          stopped_in_evaluation=(), stalled_in_evaluation=(), val_loss=None, evaluated=True, clock=lambda: 0.0,
          batches=None, step=None, evaluate=lambda: None):
    """What the loop did: its state or the error that ended it, lines, evaluations, saved states and the progress bar.
    """
    work = Workdir(tmp_path / str(len(list(tmp_path.iterdir()))), {'job': 'finetune', 'seed': 0, 'train': {}})
    checkpoints, bar, evaluations = Checkpoints(work, evaluated), Bar(start), []

    class Batches:
      """The steps themselves as batches, until images stop coming before step `last`."""

      def __init__(self, run, start, skip, cancelled):
        self.stalled, self._steps = '', iter(range(start, last)) if batches is None else batches()

      def __next__(self):
        batch = next(self._steps, None)
        if batch is None:
          self.stalled = 'no images'
          raise StopIteration
        return batch

      stall = loop.TrainBatches.stall

    def count(state, batch):
      assert batch == state.step, 'the batch of another step'
      metrics = {'loss': Metric(state.step if losses is None else losses[state.step]),
                 'gradient_norm': Metric(1 if norms is None else norms[state.step])}
      return state.replace(step=state.step + 1), metrics

    def val_metrics(run, state, stop):
      evaluate()
      evaluations.append(state.step)
      if state.step in stopped_in_evaluation:
        stop.signal = 15
        raise loop._Stopped
      if state.step in stalled_in_evaluation:
        raise Stalled('no images of val')
      return {'val/loss': val_loss or 0.5, 'val/top1': 0.1, 'val/mean_per_class': 0.1}

    monkeypatch.setattr(loop, 'TrainBatches', Batches)
    monkeypatch.setattr(loop, 'val_metrics', val_metrics)
    monkeypatch.setattr(stopping, 'signals', lambda: contextlib.nullcontext(Stop(stop)))
    monkeypatch.setattr(loop.progress, 'counter', lambda *args, **kwargs: bar)
    data = TrainingData({'target': Stream(None, 8, 1.0)}, None, None, 0)
    whole = Run(work, Plan(steps, eval_every, log_every, keep), data, (), None, lambda step: 0.1, 'top1', checkpoints)
    state, error = TrainState(step=start, params={}, batch_stats={}, opt_state=()), None
    try:
      state = train(whole, step or count, state, start, (), clock)
    except (Interrupted, Stalled, Diverged) as ended:
      error = ended
    others = ('learning_rate', 'val/top1', 'val/mean_per_class')
    lines = [{name: value for name, value in line.items() if name not in others} for line in work.metrics()]
    return types.SimpleNamespace(state=state.step, error=error, lines=lines, evaluations=evaluations,
                                 saved=checkpoints.saved, shown=bar.shown)

  return run


def test_means_of_windows_and_each_step_once(run_loop):
  done = run_loop()
  # Step k has loss k - 1 here. An evaluation ends a window too: at 4 and 8; the end is evaluated.
  assert done.error is None and done.state == 10
  assert [(line['step'], line['train/loss']) for line in done.lines] == [
      (3, 1.0), (4, 3.0), (6, 4.5), (8, 6.5), (9, 8.0), (10, 9.0)]
  assert [line['step'] for line in done.lines if 'val/loss' in line] == done.evaluations == [4, 8, 10]
  assert done.saved == [(4, 4, True), (8, 8, True), (10, 10, True)]
  assert done.shown == [(k + 1, f'{k:.3f}') for k in range(10)]


def test_resumed_at_a_step(run_loop):
  whole, resumed = run_loop(), run_loop(start=4)
  assert resumed.state == 10 and resumed.lines == whole.lines[2:] and resumed.saved == whole.saved[1:]


def test_stops_when_asked(run_loop):
  done = run_loop(stop=[False, False, True])
  assert not done.evaluations and done.saved == [(3, 3, False)]
  assert isinstance(done.error, Interrupted) and done.error.code == 128 + 15
  assert done.error.message.startswith('stopped at step 3 of 10, saved in ')


@pytest.mark.parametrize('how', [{'stop': [False, False, False, True]}, {'stopped_in_evaluation': (4,)}])
def test_stopped_where_it_evaluates(run_loop, how):
  """Asked before the evaluation of step 4 or during it: saved without."""
  done = run_loop(**how)
  assert isinstance(done.error, Interrupted) and done.saved == [(4, 4, False)]
  assert set(done.lines[-1]) == {'step', 'train/loss', 'train/gradient_norm'} and done.lines[-1]['step'] == 4


def test_resumed_with_the_evaluation_that_is_missing(run_loop):
  again = run_loop(start=4, evaluated=False)
  assert again.lines[0] == {'step': 4, 'val/loss': 0.5} and again.saved == [(4, 4, True), (8, 8, True), (10, 10, True)]
  assert run_loop(start=10, evaluated=False).saved == [(10, 10, True)]
  once_more = run_loop(start=4, evaluated=False, stopped_in_evaluation=(4,))
  assert isinstance(once_more.error, Interrupted) and once_more.saved == [(4, 4, False)]


def test_a_stop_after_the_last_save_counts(run_loop):
  """What follows the steps takes time; here the signal comes during the last evaluation's batches."""
  done = run_loop(stopped_in_evaluation=(10,))
  assert isinstance(done.error, Interrupted) and done.saved[-1] == (10, 10, False)


def test_saved_where_images_stop_coming(run_loop):
  done = run_loop(last=6)
  assert isinstance(done.error, Stalled) and 'no images; stopped at step 6 of 10' in str(done.error)
  assert done.saved == [(4, 4, True), (6, 6, False)]
  assert run_loop(last=0).saved == []
  in_val = run_loop(stalled_in_evaluation=(8,))
  assert isinstance(in_val.error, Stalled) and 'no images of val; stopped at step 8' in str(in_val.error)
  assert in_val.saved == [(4, 4, True), (8, 8, False)]


def test_images_that_stop_coming_right_after_the_missing_evaluation(run_loop):
  """The evaluation is saved, and the run is still not at its end."""
  done = run_loop(start=4, evaluated=False, last=4)
  assert isinstance(done.error, Stalled) and done.saved == [(4, 4, True)]


@pytest.mark.parametrize('what', ['losses', 'norms'])
@pytest.mark.parametrize('at', [0, 3, 5, 9])
def test_ends_when_loss_or_gradient_are_not_finite(run_loop, what, at):
  """With the number of its step, and before any of its metrics are written or its state is saved."""
  done = run_loop(**{what: [float('nan') if k == at else 1.0 for k in range(10)]})
  assert isinstance(done.error, Diverged) and done.error.step == at + 1
  assert str(done.error).endswith(f'at step {at + 1}')
  assert all(line['step'] <= at for line in done.lines) and all(step <= at for step, _, _ in done.saved)


def test_ends_when_the_loss_on_val_is_not_finite(run_loop):
  done = run_loop(val_loss=float('inf'))
  assert isinstance(done.error, Diverged) and str(done.error) == 'the loss on val is inf at step 4' and not done.saved


def test_never_saves_parameters_that_are_not_finite(run_loop):
  def step(state, batch):
    params = {'w': np.float32('nan' if state.step == 3 else 1)}
    return state.replace(step=state.step + 1, params=params), {'loss': Metric(1), 'gradient_norm': Metric(1)}

  done = run_loop(step=step)
  assert isinstance(done.error, Diverged) and str(done.error) == 'a parameter is not finite any more at step 4'
  assert not done.saved


@pytest.mark.parametrize('ready,shares', [(True, [2 / 8, 3 / 12]), (False, [1 / 8, 1 / 12])])
@pytest.mark.parametrize('start', [0, 9])
def test_images_per_second_and_share_of_time_waiting_for_them(run_loop, start, ready, shares, monkeypatch):
  """Seconds of a fake clock: a batch takes one, a step three, the first one a hundred more, an evaluation a thousand.
  Counted is the time that an idle device waits.

  The first step of the run, also of a resumed one, is compiled and does not count, neither as time nor as images; after
  it and after each window the device has nothing left to do, so the wait for the batch counts.
  """
  monkeypatch.setattr(Metric, 'ready', ready)
  now = [0.0]

  def passed(seconds):
    now[0] += seconds

  def batches():
    while True:
      passed(1)
      yield 'batch'

  def step(state, batch):
    passed(3 if state.step > start else 103)
    return state.replace(step=state.step + 1), {'loss': Metric(1), 'gradient_norm': Metric(1)}

  fakes = dict(start=start, clock=lambda: now[0], batches=batches, step=step, evaluate=lambda: passed(1000))
  done = run_loop(steps=start + 6, log_every=3, eval_every=1000, keep=(start + 3,), **fakes)
  assert [line['waiting_share'] for line in done.lines] == pytest.approx(shares)
  assert [line['images_per_second'] for line in done.lines] == pytest.approx([8 / 4, 8 / 4])
  # Windows of one step: the first one has no speed.
  first, *others = run_loop(steps=start + 3, log_every=1, eval_every=1000, keep=(start + 2,), **fakes).lines
  assert first == {'step': start + 1, 'train/loss': 1.0, 'train/gradient_norm': 1.0}
  assert [(line['images_per_second'], line['waiting_share']) for line in others] == [(8 / 4, 1 / 4)] * 2


@pytest.mark.parametrize('share,logged', [(0.43, True), (0.05, False)])
def test_a_device_that_waits_for_images_is_logged_once(share, logged, caplog):
  """After twenty steps, over all of them; a line of metrics has the share of its own window."""
  lines = []
  writer = types.SimpleNamespace(write=lambda step, metrics: lines.append(metrics) or metrics)
  metrics_log = MetricsLog(types.SimpleNamespace(schedule=lambda step: 0.1), writer, 0)
  with caplog.at_level('INFO', 'ft_jax'):
    metrics_log.write(10, {'train/loss': 1.0, 'waiting_share': 2 * share})
    assert not caplog.text
    for step in (20, 30, 40):
      metrics_log.write(step, {'train/loss': 1.0, 'waiting_share': 0.0 if step == 20 else share})
  assert caplog.text.count(f'the device waits for images {share:.0%}'.replace('%', ' %')) == logged
  assert [line['waiting_share'] for line in lines] == [2 * share, 0.0, share, share]
