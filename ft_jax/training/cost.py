"""What a training costs: steps, images through the network, and seconds."""

from collections.abc import Mapping, Sequence
from typing import Any

from ft_jax.methods import Needs
from ft_jax.training.loop import TrainingData


def training_cost(data: TrainingData, needs: Needs, steps: int,
                  metrics: Sequence[Mapping[str, float]]) -> dict[str, Any]:
  """The cost of a training, as results.json has it.

  Args:
    data: the images.
    needs: what the methods need; views of images that they send through the network count as images.
    steps: number of updates.
    metrics: lines of metrics.jsonl.

  Returns:
    `steps`; `images`, those that went through the network to be trained on; `seconds` that the steps took over all
    starts of the run, without evaluations, checkpoints and compilation, or None where the run was too short to tell.
  """
  views = sum(data.streams[view.stream].batch_size for view in needs.forwarded_views)
  return {'steps': steps, 'images': steps * (data.images_per_step + views),
          'seconds': training_seconds(data.images_per_step, steps, metrics)}


def training_seconds(images_per_step: int, steps: int, metrics: Sequence[Mapping[str, float]]) -> float | None:
  """The seconds of all steps, from the speeds in metrics.jsonl.

  Each line has the speed since the line before. Where it has none (a first step, which is compiled), its steps count as
  the others do on average.
  """
  timed, seconds, before = 0, 0.0, 0
  for line in metrics:
    step = int(line['step'])
    if line.get('images_per_second'):
      timed += step - before
      seconds += (step - before) * images_per_step / line['images_per_second']
    before = step
  return seconds * steps / timed if timed else None
