"""What is done where a training diverges: the batch is named, and left out where that is wanted."""

from collections.abc import Mapping
import json
from typing import Any

from etils import epath

from ft_jax import parallel
from ft_jax.data.pipeline import place_of, rows_at
from ft_jax.progress import log
from ft_jax.training.loop import Run
from ft_jax.training.step import Diverged
from ft_jax.workdir import read_json, write_text


class Divergences:
  """The file that tells of steps whose loss or gradient was not finite, and which batches were left out therefore."""

  def __init__(self, path: epath.Path):
    self._path = path
    self._told: list[dict[str, Any]] = parallel.agreed(lambda: read_json(path) if path.exists() else [])

  @property
  def skipped(self) -> list[int]:
    """Places in the order of the batches that are left out."""
    return [told['place'] for told in self._told if told['skipped']]

  def add(self, place: int, told: Mapping[str, Any]) -> None:
    """Tells of the batch at a place; of one that did not end the run once, it is told once."""
    self._told = [*(before for before in self._told if before['place'] != place), {'place': place, **told}]
    write_text(self._path, json.dumps(self._told, indent=1) + '\n')


def handle(diverged: Diverged, run: Run, losses: Divergences, most: int) -> None:
  """Leaves the batch out, where so many may be; else raises the error with what a user may do."""
  place = place_of(diverged.step - 1, losses.skipped)
  ids = {name: stream.source.ids[rows_at(stream.source, place, stream.batch_size, stream=name, seed=run.seed,
                                         balanced=stream.balanced)].tolist() for name, stream in run.streams.items()}
  skips = len(losses.skipped) < most
  losses.add(place, {'step': diverged.step, 'what': diverged.what, 'skipped': skips, 'examples': ids})
  run.checkpoints.wait()
  good = run.checkpoints.latest_step
  if good == diverged.step:  # saved before it was evaluated
    run.checkpoints.set_aside(good, str(diverged))
    good = run.checkpoints.latest_step
  last = f'the checkpoint of step {good} in {run.work.path / "checkpoints"}' if good else 'the beginning, there is no checkpoint yet'
  batch = '; '.join(f'{name} {", ".join(some[:3])}{", ..." if len(some) > 3 else ""}' for name, some in ids.items())
  told = f'{diverged} (its batch: {batch}; all of it in {run.work.diverged_json}). The last good state is {last}'
  if skips:
    log.warning('warning: %s. Going on from there without this batch', told)
    return
  run.checkpoints.close()
  advice = 'use a smaller train.learning_rate or some train.warmup'
  if most:
    advice = f'{most} {"batch was" if most == 1 else "batches were"} left out before, so it is hardly the images: {advice}'
  else:
    advice += '; or, if it is the images, go on with --config.train.skip_diverged=1, which leaves such a batch out'
  raise Diverged(diverged.step, diverged.what, f'{told}; {advice}')
