"""The Python interface; `import ft_jax` offers what is public here.

A call runs the same job as the command line, and may be stopped and repeated in the same way. It leaves the calling
program as it was: no signal handlers, no logging configuration; an interrupt is a KeyboardInterrupt.
"""

from collections.abc import Iterator, Mapping
import contextlib
import os
from typing import Any

from ml_collections import ConfigDict

from ft_jax import arguments, compiled, progress, stopping
from ft_jax.data import BACKENDS
from ft_jax.data.image_set import ImageSet
from ft_jax.models.network import OPTIONS
from ft_jax.run import Run
from ft_jax.workdir import read_config

__all__ = ['Run', 'finetune', 'load', 'pretrain']

# What is a set of images: text as on the command line, an ImageSet of the training images, or the fields of the group,
# where train, val and test may be ImageSets.
Images = str | os.PathLike[str] | ImageSet | Mapping[str, Any]
Path = str | os.PathLike[str]


def finetune(target: Images | None = None, source: Images | None = None, *, workdir: Path, weights: Path | None = None,
             config: str = 'default', **settings: Any) -> Run:
  """Fine-tunes a network on the target together with the part of the source that helps.

  Args:
    target: the images that the network should be good at: `folder:<path>`, `tfds:<name>`, an ImageSet of training
      images (val is split off), or a dict such as `{'train': ImageSet, 'test': ImageSet, 'metric': 'mean_per_class'}`
      or `{'name': 'folder:photos', 'val': 'val'}`.
    source: the pre-training data, likewise. Without it, fine-tuning is plain: nothing is selected.
    workdir: folder for everything that is written. If it holds an interrupted run of the same arguments, that resumes;
      a finished one is returned.
    weights: `timm:<name>`, `hf:<owner>/<name>`, a file, the workdir of another run, or `pretrain`, which first trains
      on the source. For `timm:` and a workdir, `model` is by default the network that the weights belong to.
    config: a config of configs/ that gives the settings that are not arguments here, such as `pets`.
    **settings: the other fields of the config (ft_jax/config.py): dicts of fields for groups, such as
      `train={'epochs': 20}`, `selection={'size': 50}`, `model={'name': 'resnet18'}` or short `model='resnet18'`,
      `methods={'l2_sp': 0.01}` (the method's first field) and values for the rest, such as `seed=1`, `image_size=64`.

  Raises:
    TypeError: an argument that does not exist.
    ValueError: an argument that cannot be right, or that a finished or interrupted run in the workdir had otherwise.
    OSError: the workdir cannot be written, or another process is running in it.
    KeyboardInterrupt: interrupted; the training is saved, and the same call resumes.
  """
  from ft_jax.jobs import finetune as job

  with _called():
    folder = arguments.as_path('workdir', workdir)
    made, images = _make_config('finetune', config, target, source, weights, settings)
    if not made.source.name and 'method' not in dict(settings.get('selection') or {}):
      made.selection.method = 'none'
    with compiled.kept(made.compile_cache):
      job.run(made, folder, **images)
    return Run(folder)


def pretrain(source: Images | None = None, *, workdir: Path, weights: Path | None = None, config: str = 'pretrain',
             **settings: Any) -> Run:
  """Trains a network on the source, with its labels or (`config='pretrain:moco'`, `'pretrain:byol'`) without; the
  workdir is then a `weights` of `finetune`.

  Args:
    source: see `finetune`.
    workdir: see `finetune`.
    weights: what the training starts from; None is random.
    config: see `finetune`; by default the recipe of configs/pretrain.py.
    **settings: see `finetune`.

  Raises:
    TypeError, ValueError, OSError, KeyboardInterrupt: see `finetune`.
  """
  from ft_jax.jobs import pretrain as job

  with _called():
    folder = arguments.as_path('workdir', workdir)
    made, images = _make_config('pretrain', config, None, source, weights, settings)
    with compiled.kept(made.compile_cache):
      job.run(made, folder, **images)
    return Run(folder)


def load(workdir: Path) -> Run:
  """Opens the finished run in a workdir, whether a call or the command line made it.

  Raises:
    ValueError: there is no run, it is not finished, it is of another job than finetune or pretrain, or a newer version
      wrote it.
  """
  with arguments.errors_in_arguments():
    return Run(workdir)


def _make_config(job: str, base: str, target: Images | None, source: Images | None, weights: Path | None,
                 settings: Mapping[str, Any]) -> tuple[ConfigDict, dict[str, dict[str, ImageSet]]]:
  """The config of a call, and the image sets that it was given for target and source, by split."""
  given: dict[str, Any] = dict(settings)
  images: dict[str, dict[str, ImageSet]] = {}
  for group, value in (('target', target), ('source', source)):
    if value is not None:
      given[group], sets = _image_fields(group, value)
      images |= {group: sets} if sets else {}
  if weights is not None:
    if not isinstance(weights, (str, os.PathLike)):
      raise ValueError(f'weights is {weights!r}; expected text such as timm:resnet18.tv_in1k, or a path')
    model = given.get('model', {})
    model = dict(model) if isinstance(model, Mapping) else {'name': model}
    given['model'] = {**_network_of(os.fspath(weights)), **model, 'weights': os.fspath(weights)}
  return arguments.make_config(base, job, given), images


def _image_fields(group: str, value: Images) -> tuple[Mapping[str, Any], dict[str, ImageSet]]:
  """The fields of `target` or `source`, and the image sets among them by split.

  In place of the name of a split, the config has the fingerprint of its images: a workdir then refuses other ones.
  """
  if isinstance(value, os.PathLike):
    return {'name': f'folder:{os.fspath(value)}'}, {}
  if isinstance(value, str):
    return {'name': _checked_name(group, value)}, {}
  fields = dict(value) if isinstance(value, Mapping) else {'train': value}
  sets = {split: given for split, given in fields.items() if isinstance(given, ImageSet)}
  if not sets:
    if not isinstance(value, Mapping):
      raise ValueError(f'{group} is of type {type(value).__name__}; expected text such as folder:photos, an '
                       'ft_jax.ImageSet (such as ImageSet.from_arrays(images, labels)), or a dict of fields')
    if wrong := [split for split in _SPLITS if not isinstance(fields.get(split, ''), (str, type(None)))]:
      raise ValueError(f'{group}[{wrong[0]!r}] is of type {type(fields[wrong[0]]).__name__}; expected an '
                       'ft_jax.ImageSet, such as ImageSet.from_arrays(images, labels), or the name of a split')
    if isinstance(name := fields.get('name'), str):
      _checked_name(group, name)
    return fields, {}
  if wrong := [split for split in sets if split not in _SPLITS]:
    raise ValueError(f'{group}[{wrong[0]!r}] is an image set; expected one only for {", ".join(_SPLITS)}')
  if 'train' not in sets or 'name' in fields:
    raise ValueError(f'{group} has image sets for {", ".join(sets)}; expected one for train, too, and no name')
  if text := [split for split in _SPLITS if split not in sets and fields.get(split) not in (None, '', 'rest')]:
    raise ValueError(f"{group}[{text[0]!r}] is {fields[text[0]]!r}; expected an image set, as {group}['train'] is one")
  names = {split: f'images:{given.fingerprint}' for split, given in sets.items()}
  return {'val': '', 'test': '', **fields, **names, 'name': sets['train'].name}, sets


def _checked_name(group: str, name: str) -> str:
  """The name of a set that a user gives for `target` or `source`; raises ValueError for one of no known kind."""
  if name and name.partition(':')[0] not in BACKENDS:
    hint = f'; did you mean {f"folder:{name}"!r}?' if os.path.isdir(os.path.expanduser(name)) else ''
    raise ValueError(f'{group} is {name!r}; expected {", ".join(f"{known}:..." for known in BACKENDS)}{hint}')
  return name


_SPLITS = ('train', 'val', 'test')


def _network_of(weights: str) -> dict[str, Any]:
  """The fields of `model` that the name of the weights gives away."""
  if weights.startswith('timm:'):
    return {'name': weights.removeprefix('timm:').partition('@')[0].partition('.')[0]}
  run = None if ':' in weights else read_config(weights)
  if run is None:
    return {}
  return {name: run['model'][name] for name in ('name', *OPTIONS)}


@contextlib.contextmanager
def _called() -> Iterator[None]:
  """Runs a job as a function of another program."""
  with arguments.errors_in_arguments(), progress.log_shown(arguments.in_arguments), stopping.embedded():
    try:
      yield
    except SystemExit as stopped:  # a command would end here; the training is saved
      raise KeyboardInterrupt(arguments.in_arguments(getattr(stopped, 'message', ''))) from None
