"""What happens where a training diverges: the batch is named, and left out where the settings allow it."""

from collections.abc import Mapping
import json
from typing import Any

from etils import epath

from ft_jax import parallel
from ft_jax.data.pipeline import place_of, rows_at
from ft_jax.progress import log
from ft_jax.training.loop import Diverged, Run
from ft_jax.workdir import read_json, write_text


class Divergences:
  """diverged.json: the steps whose loss, gradient or parameters were not finite, and the batches left out for it."""

  def __init__(self, path: epath.Path):
    self._path = path
    self._records: list[dict[str, Any]] = parallel.agreed(lambda: read_json(path) if path.exists() else [])

  @property
  def skipped(self) -> list[int]:
    """Places in the order of the batches that are left out."""
    return [record['place'] for record in self._records if record['skipped']]

  def add(self, place: int, record: Mapping[str, Any]) -> None:
    """Adds the record of the batch at a place, or replaces the one that an earlier start of the run wrote of it."""
    others = (earlier for earlier in self._records if earlier['place'] != place)
    self._records = [*others, {'place': place, **record}]
    write_text(self._path, json.dumps(self._records, indent=1) + '\n')


def handle(diverged: Diverged, run: Run, divergences: Divergences, most: int) -> None:
  """Leaves the batch out where at most `most` may be left out; else raises the error with advice for the user."""
  place = place_of(diverged.step - 1, divergences.skipped)
  ids = _ids_at(run, diverged.step - 1, place)
  skips = len(divergences.skipped) < most
  divergences.add(place, {'step': diverged.step, 'what': diverged.what, 'skipped': skips, 'examples': ids})
  run.checkpoints.wait()
  good = run.checkpoints.latest_step
  if good == diverged.step:  # it was saved before it was evaluated
    run.checkpoints.set_aside(good, str(diverged))
    good = run.checkpoints.latest_step
  last = f'the checkpoint of step {good} in {run.work.path / "checkpoints"}'
  if not good:
    last = 'the beginning, there is no checkpoint yet'
  batch = '; '.join(f'{name} {", ".join(some[:3])}{", ..." if len(some) > 3 else ""}' for name, some in ids.items())
  message = f'{diverged} (its batch: {batch}; all of it in {run.work.diverged_json}). The last good state is {last}'
  if skips:
    log.warning('warning: %s. Resuming from there without this batch', message)
    return
  run.checkpoints.close()
  raise Diverged(diverged.step, diverged.what, f'{message}; {_advice(most)}')


def _ids_at(run: Run, step: int, place: int) -> dict[str, list[str]]:
  """The ids of the images of a step (counted from 0), whose batch is at a place in the order, by stream."""
  return {name: stream.images.ids[rows_at(stream.images, place - stream.first, stream.batch_size, stream=name,
                                          seed=run.data.seed, balanced=stream.balanced)].tolist()
          for name, stream in run.data.streams.items() if stream.is_in(step)}


def _advice(most: int) -> str:
  advice = 'use a smaller train.learning_rate or some train.warmup'
  if not most:
    return (f'{advice}; or, if it is the images, resume with --config.train.skip_diverged=1, which leaves such a '
            'batch out')
  batches = 'batch was' if most == 1 else 'batches were'
  return f'{most} {batches} left out before, so the images are hardly the reason: {advice}'
