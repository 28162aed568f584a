"""The cells of a comparison: which of them are finished, which one is next, and how one is run.

What is known is in the files of the workdir alone, so several processes can work on one comparison: each takes the next
cell that is neither finished nor locked by another one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import math
import re
import time
import traceback
from typing import Any, NamedTuple

from etils import epath
import filelock
import jax
from ml_collections import ConfigDict

from ft_jax import compiled, parallel, progress
from ft_jax.jobs import finetune
from ft_jax.jobs.compare_variants import Cell, cell_config, PLAIN, Variant
from ft_jax.progress import log
from ft_jax.settings import MAY_CHANGE
from ft_jax.training.loop import Diverged
from ft_jax.workdir import as_now, differences, read_config, read_json, run_fields, Workdir, write_text
from selection import storage

# Seconds between two looks at the cells that other processes are working on.
POLL = 1.0
# Fields that change nothing about a finished cell.
_WITHOUT_EFFECT = (*MAY_CHANGE, 'compare', 'predict', 'stability', 'study', 'checkpoints', 'workdir', 'embeddings_dir')


class Outcome(NamedTuple):
  """How a cell ended.

  Attributes:
    results: what its results.json holds; None where it failed.
    error: why it failed; '' where it did not.
    diverged: whether the reason is that its loss was not finite any more.
    seconds: that its last start took.
  """
  results: Mapping[str, Any] | None
  error: str
  diverged: bool
  seconds: float


class Choice(NamedTuple):
  """What came of the trials of a variant.

  Attributes:
    tuned: the best combination; None where a trial failed.
    error: why; '' where none failed.
  """
  tuned: Mapping[str, Any] | None
  error: str = ''


@dataclasses.dataclass
class Grid:
  """The cells of a comparison.

  Attributes:
    config: of the comparison.
    variants: the baseline first.
    folder: the workdir.
    start: identifies this start of the command: a cell that failed is tried once in each.
    pretrained: the workdir of the shared pre-training; None where there is none.
  """
  config: ConfigDict
  variants: Sequence[Variant]
  folder: epath.Path
  start: str
  pretrained: epath.Path | None = None

  def __post_init__(self) -> None:
    self._outcomes: dict[str, Outcome] = {}
    self._choices: dict[str, Choice] = {}

  # What there is.

  def trials(self, variant: Variant) -> list[Cell]:
    """The cells that choose the combination of a variant."""
    if not variant.tuned:
      return []
    seeds = self.config.compare.seeds[:self.config.compare.tune_seeds]
    return [Cell(variant, seed, tuned, trial=True) for tuned in variant.combinations for seed in seeds]

  def cells(self, variant: Variant) -> list[Cell]:
    """The cells of a variant that are compared with those of others; [] while its trials are not finished."""
    choice = self.choice(variant)
    if choice is None or choice.tuned is None:
      return []
    return [Cell(variant, seed, choice.tuned, trial=False) for seed in self.config.compare.seeds]

  def known(self) -> list[Cell]:
    """All trials, variant by variant, and then all cells that can be run, those of one seed before those of the next.
    """
    trials = [cell for variant in self.variants for cell in self.trials(variant)]
    cells = [cell for variant in self.variants for cell in self.cells(variant)]
    order = list(self.config.compare.seeds)
    return trials + sorted(cells, key=lambda cell: order.index(cell.seed))

  @property
  def size(self) -> int:
    """The number of cells, those that cannot be run yet included."""
    trials = sum(len(self.trials(variant)) for variant in self.variants)
    return trials + len(self.variants) * len(self.config.compare.seeds)

  # How far it is.

  def outcome(self, cell: Cell) -> Outcome | None:
    """How a cell ended; None where it is to be run."""
    if cell.folder not in self._outcomes and (found := self._read(cell)) is not None:
      self._outcomes[cell.folder] = found
    return self._outcomes.get(cell.folder)

  def choice(self, variant: Variant) -> Choice | None:
    """The combination of a variant that is best on val, by the mean over seeds; None while trials are missing."""
    if not variant.tuned:
      return Choice(variant.combinations[0])
    if variant.name not in self._choices:
      trials = self.trials(variant)
      outcomes = [(cell, outcome) for cell in trials if (outcome := self.outcome(cell)) is not None]
      if len(outcomes) == len(trials):
        self._choices[variant.name] = _choose(variant, outcomes, self.config.target.metric)
    return self._choices.get(variant.name)

  def open(self) -> list[Cell]:
    """The cells that can be run and are not finished."""
    return [cell for cell in self.known() if self.outcome(cell) is None]

  @property
  def complete(self) -> bool:
    """Whether nothing is left to be run in this start."""
    return all(self.choice(variant) is not None for variant in self.variants) and not self.open()

  def failed(self) -> list[tuple[Cell, Outcome]]:
    """The cells that failed in this start, and why."""
    ended = [(cell, self.outcome(cell)) for cell in self.known()]
    return [(cell, outcome) for cell, outcome in ended if outcome is not None and not is_result(cell, outcome)]

  # How it goes on.

  @contextlib.contextmanager
  def next_cell(self) -> Iterator[Cell | None]:
    """The next cell, which no other process has while the block runs; None where all that are left are taken."""
    with contextlib.ExitStack() as locks:
      chosen = parallel.agreed(lambda: self._take(locks))
      yield None if chosen is None else next(cell for cell in self.known() if cell.folder == chosen)

  @contextlib.contextmanager
  def lock_for(self, name: str) -> Iterator[None]:
    """Within it, no other process is within it with this name; it waits until that is so."""
    release = self._lock(name) if parallel.is_main() else None
    while release is None and parallel.is_main():
      time.sleep(POLL)
      release = self._lock(name)
    try:
      yield
    finally:
      if release is not None:
        release()

  def run(self, cell: Cell) -> None:
    """Runs a cell, or resumes it; an error is its outcome."""
    parallel.agreed(lambda: self._make_room(cell))
    settings = finetune.Settings.from_config(cell_config(self.config, cell))
    work = Workdir(self.folder / cell.folder, settings.fields)
    began, error, diverged = time.perf_counter(), '', False
    with progress.logged_to(work.path / 'log.txt') if parallel.is_main() else contextlib.nullcontext():
      try:
        finetune.fine_tune(settings, work.path, self.config.embeddings_dir or self.folder / 'embeddings',
                           pretrained=self.pretrained or '', trial=cell.trial)
      except Exception as failure:
        if jax.process_count() > 1:
          raise  # the other processes wait for this one
        error, diverged = _message(failure), isinstance(failure, Diverged)
        log.error('error: %s', error)
        if not isinstance(failure, (ValueError, OSError, RuntimeError)):
          log.error('%s', traceback.format_exc())
    if not error and not self.config.compare.keep_checkpoints and parallel.is_main():
      _remove(work.path / 'checkpoints')
    seconds = time.perf_counter() - began
    write_text(work.path / 'outcome.json', json.dumps(
        {'start': self.start, 'error': error or None, 'diverged': diverged, 'seconds': seconds}, indent=1) + '\n')
    compiled.clear_compiled()

  def _read(self, cell: Cell) -> Outcome | None:
    folder = self.folder / cell.folder
    told = read_json(folder / 'outcome.json') if (folder / 'outcome.json').exists() else {}
    seconds = told.get('seconds', 0.0)
    if (folder / 'results.json').exists():
      if told and not self._changed(cell):
        return Outcome(read_json(folder / 'results.json'), '', False, seconds)
      return None
    again = told.get('start') != self.start and not (cell.trial and told.get('diverged'))
    if not told or again or self._changed(cell):
      return None
    return Outcome(None, told['error'], told['diverged'], seconds)

  def _changed(self, cell: Cell, folder: str = '') -> list[str]:
    """Fields in which the run in a folder, by default that of the cell, differs from it; [] where there is no run."""
    stored = read_config(self.folder / (folder or cell.folder))
    if stored is None:
      return []
    wanted = as_now(json.loads(json.dumps(cell_config(self.config, cell).to_dict())))
    return differences(_effective(stored), _effective(wanted))

  def _take(self, locks: contextlib.ExitStack) -> str | None:
    """The folder of the next cell, which is locked until `locks` is closed."""
    for cell in self.open():
      release = self._lock(cell.folder.replace('/', '-'))
      if release is None:
        continue
      if self.outcome(cell) is None:  # another process may have finished it just now
        locks.callback(release)
        return cell.folder
      release()
    return None

  def _lock(self, name: str) -> Callable[[], None] | None:
    """Locks a name; returns what releases it, or None where another process has it. A process that ends releases all.
    """
    if storage.is_url(self.folder):  # object storage has no locks
      return lambda: None
    folder = storage.make_folder(self.folder / 'locks')
    lock = filelock.FileLock(folder / f'{name}.lock', timeout=0)
    try:
      lock.acquire()
    except filelock.Timeout:
      return None
    except NotImplementedError:  # nor have some disks
      return lambda: None
    return lock.release

  def _make_room(self, cell: Cell) -> None:
    """Moves a run with other settings away, and says so; takes over a run of an earlier version."""
    changed, folder = self._changed(cell), self.folder / cell.folder
    if changed:
      old = storage.make_folder(self.folder / 'replaced')
      number = next(n for n in range(1, 10**6) if not (old / f'{folder.name}-{n}').exists())
      log.info('%s is done again, as its settings have changed (%s); the old run is now %s', cell.title,
               '; '.join(changed[:3]), old / f'{folder.name}-{number}')
      folder.rename(old / f'{folder.name}-{number}')
    former = re.sub(f'^{PLAIN}', 'none', f'{cell.variant.name}-{cell.seed}')
    if folder.exists() or cell.trial or not re.fullmatch(r'[\w+]+-\d+', former):
      return
    if not read_config(self.folder / former) or self._changed(cell, former):
      return
    storage.make_folder(folder.parent)
    (self.folder / former).rename(folder)
    own = json.dumps(cell_config(self.config, cell).to_dict(), indent=2)
    write_text(folder / 'config.json', own + '\n')
    log.info('%s: an earlier version began this run, in %s', cell.title, self.folder / former)


def _effective(config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a fine-tuning that its result depends on."""
  without = _WITHOUT_EFFECT if config['model']['weights'] == 'pretrain' else (*_WITHOUT_EFFECT, 'pretrain')
  return run_fields(config, may_change=without)


def _choose(variant: Variant, outcomes: Sequence[tuple[Cell, Outcome]], metric: str) -> Choice:
  """The best combination of a variant: the highest mean over seeds, then the lowest loss, then the first one."""
  if failed := [outcome for cell, outcome in outcomes if not is_result(cell, outcome)]:
    return Choice(None, f'a trial failed: {failed[0].error}')
  best, best_score = None, (-math.inf, -math.inf)
  for tuned in variant.combinations:
    of_tuned = [outcome.results for cell, outcome in outcomes if cell.tuned == tuned]
    finished = [results['val'] for results in of_tuned if results is not None]
    if len(finished) < len(of_tuned):
      continue  # it diverged
    score = sum(val[metric] for val in finished) / len(finished), -sum(val['loss'] for val in finished) / len(finished)
    if score > best_score:
      best, best_score = tuned, score
  if best is None:
    return Choice(None, 'every trial diverged; try smaller learning rates (config.compare.tune)')
  return Choice(best)


def is_result(cell: Cell, outcome: Outcome) -> bool:
  """Whether an outcome is a result; a trial that diverged has one: its values are no good."""
  return outcome.results is not None or cell.trial and outcome.diverged


def _remove(folder: epath.Path) -> None:
  if folder.exists():
    folder.rmtree()


def _message(error: BaseException) -> str:
  """An error in one line."""
  return ' '.join(str(error).split()) or type(error).__name__
