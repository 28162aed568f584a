"""What pre-training without labels costs: reading and training together, relative to two supervised steps.

    python benchmarks/pretraining.py [--name resnet18] [--width 64] [--size 64] [--batch 64] [--rounds 5]

JPEG files of 96 x 96 pixels go through the whole pipeline (decoding, crops, the published augmentations, two views)
into training steps. Blocks of a few steps of each kind take turns in one process, and the median of their ratios is
printed; so is the time that one core takes to read an image. The target: a MoCo step costs at most 1.5 times two
supervised steps of the same images. (It sends a second view forward, so a third more than one supervised step is the
least.)
"""

import argparse
from collections.abc import Iterator
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
from ml_collections import ConfigDict
import numpy as np
import optax
import simplejpeg
from sklearn import datasets

from benchmarks._measure import verdict
from configs import pretrain
from ft_jax import methods, parallel
from ft_jax.data.image_set import ImageSet
from ft_jax.data.pipeline import make_transform, train_batches
from ft_jax.methods.base import SetupContext
from ft_jax.models import build
from ft_jax.training.step import create_state, make_train_step

CLASSES, STEPS = 200, 4


def photographs(count: int) -> ImageSet:
  """JPEG files of crops of photographs."""
  photos, rng = datasets.load_sample_images().images, np.random.default_rng(0)
  files = []
  for k in range(count):
    y, x = rng.integers(0, 300, 2)
    files.append(simplejpeg.encode_jpeg(np.ascontiguousarray(photos[k % 2][y:y + 96, x:x + 96]), 90, 'RGB'))
  return ImageSet.from_arrays(files, np.arange(count) % CLASSES, [str(k) for k in range(CLASSES)])


class Case:
  """A pre-training, ready to run."""

  def __init__(self, args: argparse.Namespace, kind: str, images: ImageSet):
    config = pretrain.get_config(kind)
    config.image_size = args.size
    fields: ConfigDict = config.methods
    if kind == 'moco':
      fields.moco.queue = args.batch * 64
    active = methods.active(fields.to_dict())
    heads = {} if active else {'source': CLASSES}
    model = build(args.name, heads, width=args.width, size=args.size)
    context = SetupContext(
        model=model, classes=CLASSES, labels=images.labels, true_labels=images.labels, batch_size=args.batch, seed=0,
        pretrained=False, has_source=False, start={}, batches=lambda split, rows=None: [], steps=1000)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), np.zeros((1, args.size, args.size, 3), np.uint8)))
    own = {name: method.params(context) for name, method in active.items()}
    params = {**variables['params'], **({'methods': own} if own else {})}
    optimizer = optax.sgd(0.001, 0.9)
    state = create_state({**variables, 'params': params}, optimizer,
                         methods={name: method.setup(context) for name, method in active.items()})
    self._state = parallel.replicate(state)
    self._step = make_train_step(model, optimizer, dict.fromkeys(heads, 1.0), methods=active)
    transform = make_transform(config.image_size, config.augment)
    views = {view.name: ConfigDict({**config.augment.to_dict(), **view.recipe})
             for view in methods.all_needs(active, model).all_views}
    self._transforms = [transform, *(make_transform(config.image_size, view) for view in views.values())]
    self._images = images
    self._batches: Iterator[dict[str, np.ndarray]] = train_batches(
        images, transform, args.batch, stream='source', seed=0, start=0,
        views=dict(zip(views, self._transforms[1:])))

  def run(self) -> float:
    """Seconds of a step, on average over a few, reading included."""
    began = time.perf_counter()
    for _ in range(STEPS):
      self._state, metrics = self._step(self._state, {'source': parallel.shard(next(self._batches))})
    jax.block_until_ready(metrics)
    return (time.perf_counter() - began) / STEPS

  def read(self) -> float:
    """Seconds of one core for all views of an image."""
    rng, seconds = np.random.default_rng(0), []
    for _ in range(5):
      began = time.thread_time()  # whatever else the machine does
      for k in range(200):
        for transform in self._transforms:
          transform.train(self._images[k % len(self._images)], rng)
      seconds.append((time.thread_time() - began) / 200)
    return min(seconds)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--name', default='resnet18')
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--size', type=int, default=64)
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  images = photographs(args.batch * 64)
  cases = {kind: Case(args, kind, images) for kind in ('', 'moco', 'byol')}
  for case in cases.values():
    case.run()  # compiles
  times = [{kind: case.run() for kind, case in cases.items()} for _ in range(args.rounds)]
  print(f'{args.name}, width {args.width}, {args.size} pixels, batch {args.batch}, {jax.devices()[0].device_kind}: '
        f'supervised {1e3 * statistics.median(each[""] for each in times):.0f} ms a step')
  print('| pre-training | time of a step, relative to two supervised ones | reading an image, ms of one core |\n'
        '|---|---|---|')
  ratios = {kind: statistics.median(each[kind] / (2 * each['']) for each in times) for kind in cases}
  for kind, case in cases.items():
    print(f'| {kind or "supervised"} | {ratios[kind]:.2f} | {1e3 * case.read():.2f} |')
  print(verdict(ratios['moco'] <= 1.5, 'a MoCo step costs at most 1.5 times two supervised steps'))


if __name__ == '__main__':
  main()
