"""A finished run as Python sees it: its results, and its network applied to images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import html
import os
import pathlib
from typing import Any, NamedTuple

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np
import PIL.Image

from ft_jax import arguments, parallel, progress, trained
from ft_jax import config as config_fields
from ft_jax.data.image_set import ImageSet
from ft_jax.data.path_list import file_problem, from_files, open_paths
from ft_jax.data.pipeline import EvalBatches
from ft_jax.workdir import read_metrics
import selection

# What `predict` and `features` take.
Images = ImageSet | str | os.PathLike[str] | np.ndarray | Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The best checkpoint on one split.

  Attributes:
    top1: fraction of the images that are classified correctly.
    mean_per_class: mean over the classes of that fraction.
    loss: mean cross-entropy.
    images: number of images.
    per_class: that fraction by the name of the class; NaN for a class without images.
  """
  top1: float
  mean_per_class: float
  loss: float
  images: int
  per_class: Mapping[str, float] = dataclasses.field(repr=False)

  @classmethod
  def of(cls, result: Mapping[str, Any]) -> 'Evaluation':
    """That of a split in results.json."""
    counts = {row['name']: (row['right'], row['images']) for row in result['per_class']}
    per_class = {name: right / images if images else float('nan') for name, (right, images) in counts.items()}
    return cls(result['top1'], result['mean_per_class'], result['loss'], result['images'], per_class)


class Predictions(NamedTuple):
  """What a network sees in `n` images.

  Attributes:
    class_names: the likeliest class of each image, `[n]`.
    probabilities: float32 `[n, K]`, in the order of `Run.class_names`.
    ids: names of the images, `[n]`: paths, those of the image set, or for arrays the position and a hash of the
      pixels.
  """
  class_names: list[str]
  probabilities: np.ndarray
  ids: list[str]


class Run:
  """A finished fine-tuning or pre-training.

  Attributes:
    workdir: its folder.
    config: its settings.
    results: what results.json holds.
    class_names: of the classes that the network tells apart, in the order of its outputs.
  """

  def __init__(self, workdir: str | os.PathLike[str]) -> None:
    """Opens the run in a workdir; see `ft_jax.load`."""
    self._network = trained.load(arguments.as_path('workdir', workdir), 'workdir', classifier=False)
    self.workdir: epath.Path = self._network.path
    self.config: ConfigDict = self._network.config
    self.results: dict[str, Any] = self._network.results
    self.class_names: tuple[str, ...] = self._network.class_names

  @property
  def val(self) -> Evaluation:
    """The checkpoint on val, on which it was chosen."""
    return Evaluation.of(self.results['val'])

  @property
  def test(self) -> Evaluation | None:
    """The checkpoint on test; None for a run without test images."""
    return Evaluation.of(self.results['test']) if self.results['test'] else None

  @functools.cached_property
  def selection(self) -> selection.Selection | None:
    """What was selected of the source; None for plain fine-tuning and for pre-training."""
    path = self.workdir / 'selection.json'
    return selection.Selection.load(path) if path.exists() else None

  @property
  def metrics(self) -> Any:
    """Losses and accuracies by step: a pandas DataFrame if pandas is installed, else a list of dicts."""
    lines = read_metrics(self.workdir)
    try:
      import pandas
    except ImportError:
      return lines
    return pandas.DataFrame(lines)

  @property
  def report(self) -> epath.Path:
    """The path of report.html."""
    return self.workdir / 'report.html'

  def predict(self, images: Images) -> Predictions:
    """The classes that the network sees in images.

    Args:
      images: an ImageSet; a path, of an image, a folder with all that is below it, or a text file of paths; uint8
        `[n, h, w, 3]` or `[n, h, w]`, or one image `[h, w, 3]` or `[h, w]`; or a list of paths, arrays or Pillow
        images.

    Raises:
      ValueError: an image that cannot be read, or an array of another shape or type.
    """
    if not self._network.head:
      raise ValueError(f'{self.workdir} is a pre-training without labels, which has no classifier: it cannot predict '
                       '(features gives what it sees); fine-tune it first')
    ids, outputs = self._outputs(images)
    probabilities = outputs['probabilities']
    return Predictions([self.class_names[k] for k in probabilities.argmax(1).tolist()], probabilities, ids)

  def features(self, images: Images) -> np.ndarray:
    """The features of images before the classifier, float32 `[n, d]`; see `predict`."""
    return self._outputs(images)[1]['features']

  def export(self, folder: str | os.PathLike[str] | None = None) -> epath.Path:
    """Writes the network for torch and for other programs with jax; see configs/export.py.

    Args:
      folder: where to; None is `export` in the workdir.

    Returns:
      The folder.
    """
    from ft_jax.jobs import export

    config = config_fields.get_config()
    config.job, config.workdir = 'export', os.fspath(self.workdir)
    to = self.workdir / 'export' if folder is None else epath.Path(folder)
    with arguments.errors_in_arguments(), progress.log_shown(arguments.in_arguments):
      export.run(config, to)
    return to

  def _outputs(self, images: Images) -> tuple[list[str], dict[str, np.ndarray]]:
    """The ids of images and what the network gives for each."""
    with arguments.errors_in_arguments(), progress.log_shown(arguments.in_arguments):
      opened = _image_set(images)
      if opened is None or not len(opened):
        sizes = {'features': self._network.model.features_dim, 'probabilities': len(self.class_names)}
        return [], {name: np.zeros((0, size), np.float32) for name, size in sizes.items()}
      return opened.ids.tolist(), self._apply(opened)

  def _apply(self, images: ImageSet) -> dict[str, np.ndarray]:
    network = self._network
    # Few sizes, as each is compiled: that of the run's own evaluation, or less for fewer images.
    devices = jax.device_count()
    size = min(network.config.train.batch_size, 1 << (len(images) - 1).bit_length())
    batches = EvalBatches(images, network.transform, -(-size // devices) * devices)
    names = ('features', 'probabilities') if network.head else ('features',)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ('row', *names)}
    forward, variables = self._forward
    shown = progress.bar(batches, 'predicting', len(batches))
    for result in parallel.read_late(forward(variables, parallel.shard(batch)) for batch in shown):
      for name, values in found.items():
        values.append(result[name][result['mask']])
    order = np.argsort(np.concatenate(found['row']))
    return {name: np.concatenate(found[name])[order] for name in names}

  @functools.cached_property
  def _forward(self) -> tuple[Callable[..., dict[str, jax.Array]], Any]:
    """The network as a function of replicated variables and a batch, and these variables."""
    model, head = self._network.model, self._network.head

    def forward(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
      outputs: Any = model.apply(variables, batch['input'], train=False)
      result = {'features': outputs.features.astype(np.float32), 'row': batch['row'], 'mask': batch['mask']}
      if head:
        result['probabilities'] = jax.nn.softmax(outputs.logits[head])
      return jax.lax.all_gather(result, parallel.AXIS, tiled=True)

    return parallel.pmap(forward), parallel.replicate(self._network.variables)

  def __repr__(self) -> str:
    results, config = self.results, self.config
    data = config[trained.HEADS[config.job]]
    verb = {'finetune': 'fine-tuned', 'pretrain': 'pre-trained'}[config.job]
    parts = [f'{config.model.name}, {verb} on {data.name} ({len(self.class_names)} classes), in {self.workdir}']
    if self.selection is not None:
      about = results['selection']
      parts.append(f'together with {about["images"]:,d} images of {config.source.name} '
                   f'({about["units"]:,d} {about["noun"]}, selected by {about["method"]})')
    split = 'test' if self.test else 'val'
    measured = self.test or self.val
    parts.append(f'{split} top-1 {measured.top1:.1%}, mean per class {measured.mean_per_class:.1%}, '
                 f'loss {measured.loss:.3f} ({measured.images:,d} images; checkpoint of step {results["best_step"]})')
    return f'Run: {"; ".join(parts)}. Report: {self.report}'

  def _repr_html_(self) -> str:
    """The report, in a frame of its own so that its styles stay there."""
    page = html.escape(self.report.read_text(), quote=True)
    return (f'<p>{html.escape(repr(self))}</p>'
            f'<iframe srcdoc="{page}" style="width: 100%; height: 720px; border: 1px solid #ddd"></iframe>')


def _image_set(images: Images) -> ImageSet | None:
  """Images of any kind that `predict` takes as a set; None for an empty list."""
  if isinstance(images, ImageSet):
    return images
  if isinstance(images, (str, os.PathLike)):
    opened = open_paths(os.fspath(images))
    if opened.problems:
      where = f', as {os.fspath(images)} lists' if opened.is_list else ''
      raise ValueError(f'images: {next(iter(opened.problems.values()))}{where}')
    return opened.images
  if isinstance(images, (bytes, PIL.Image.Image)):
    return ImageSet.from_arrays([images], name='images')
  # A column of paths has a shape too.
  if hasattr(images, 'shape') and (array := np.asarray(images)).dtype.kind not in 'OSU':
    one = array.ndim == 2 or array.ndim == 3 and array.shape[-1] == 3
    if array.ndim and not len(array):
      return None
    return ImageSet.from_arrays(array[None] if one else array, name='images')
  if isinstance(images, Mapping) or not isinstance(images, Iterable):
    raise ValueError(f'images is of type {type(images).__name__}; expected a path, a list of paths, arrays or Pillow '
                     'images, an array uint8 [n, h, w, 3], or an ft_jax.ImageSet')
  given = list(images)
  if not given:
    return None
  if all(isinstance(image, (str, os.PathLike)) for image in given):
    return from_files(given, name='images', argument='images')
  return ImageSet.from_arrays([_read(image, i) for i, image in enumerate(given)], name='images')


def _read(image: Any, i: int) -> Any:
  """The bytes of a file in place of its path; any other image of a list as it is."""
  if not isinstance(image, (str, os.PathLike)):
    return image
  path = pathlib.Path(os.path.expanduser(image))
  if problem := file_problem(path):
    raise ValueError(f'images[{i}]: {problem}')
  return path.read_bytes()
