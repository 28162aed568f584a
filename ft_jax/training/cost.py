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
  views = sum(data.streams[view.stream].batch_size * data.streams[view.stream].steps(data.first.first, steps)
              for view in needs.forwarded_views)
  return {'steps': steps, 'images': data.images_in(0, steps) + views, 'seconds': training_seconds(data, steps, metrics)}


def training_seconds(data: TrainingData, steps: int, metrics: Sequence[Mapping[str, float]]) -> float | None:
  """The seconds of all steps, from the speeds in metrics.jsonl.

  Each line has the speed since the line before. Where it has none (a first step, which is compiled), its images count
  as the others do on average.
  """
  timed, seconds, before = 0, 0.0, 0  # images, their seconds, and the step of the last line
  for line in metrics:
    step = int(line['step'])
    if line.get('images_per_second'):
      images = data.images_in(before, step)
      timed, seconds = timed + images, seconds + images / line['images_per_second']
    before = step
  return seconds * data.images_in(0, steps) / timed if timed else None
