"""Job export: a trained network as a state dict for torch, and as a StableHLO function for whatever runs jax."""

import calendar
import datetime
import json
import pathlib
import shlex
from typing import Any

from etils import epath
import jax
from jax import export as jax_export
import jax.numpy as jnp
from ml_collections import ConfigDict

from ft_jax import trained
from ft_jax.models.export import state_dict
from ft_jax.progress import log
from ft_jax.settings import check_fields
from ft_jax.training import initial_weights
from ft_jax.workdir import write_bytes

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
# How long newer versions of jax are guaranteed to read what an older one exported, from the release of the older one:
# https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees
READABLE_MONTHS = 6
_TEMPLATES = pathlib.Path(__file__).parents[1] / 'pages' / 'templates'


def run(config: ConfigDict, workdir: epath.PathLike, today: datetime.date | None = None) -> dict[str, Any]:
  """Writes model.safetensors, model.stablehlo, classes.txt, model.json, README.txt and example.py.

  Args:
    config: of job export.
    workdir: the folder to write to.
    today: the date of the export; None is the clock's.

  Returns:
    What model.json holds.
  """
  check_fields(config)
  if jax.process_count() > 1:
    raise ValueError('job export runs in one process; start it on one host alone, with --num_processes=1')
  run = trained.load(config.workdir)
  about = describe(run, today or datetime.date.today())
  # All files are computed before the first is written, so that those in the folder are of one network.
  files = {
      'model.safetensors': safetensors_file(run, about),
      'model.stablehlo': stablehlo_file(run),
      'classes.txt': _classes_file(run),
      'model.json': _encode(json.dumps(about, indent=1, ensure_ascii=False) + '\n'),
      'example.py': (_TEMPLATES / 'example.py').read_bytes(),
      'README.txt': _readme_file(notes(run, about, epath.Path('.'))),
  }
  folder = trained.output_folder(workdir)
  log.info('exporting %s -> %s', run.summary(), folder)
  for name, data in files.items():
    write_bytes(folder / name, data)
  _log_files(notes(run, about, folder), {name: len(data) for name, data in files.items()})
  return about


def describe(run: trained.Trained, today: datetime.date) -> dict[str, Any]:
  """What a user of the files has to know, as JSON."""
  transform, classes = run.transform, len(run.class_names)
  steps = [
      f'decode to RGB, turned as its EXIF tag says, and scale to a short side of {transform.short_side} pixels '
      '(antialiased bilinear)',
      f'crop the center, {transform.size} x {transform.size}',
      'model.stablehlo takes these uint8 pixels [b, h, w, 3] as they are',
      'model.safetensors takes (pixels / 255 - mean) / std, as [b, 3, h, w]',
  ]
  return {
      'architecture': {'name': run.config.model.name, **run.model.options},
      'classes': list(run.class_names),
      'preprocessing': {
          'image_size': transform.size, 'short_side': transform.short_side, 'mean': list(run.model.input.mean),
          'std': list(run.model.input.std), 'steps': steps},
      'stablehlo': {
          'input': f'uint8 [b, {transform.size}, {transform.size}, 3], any b from 1',
          'precision': run.config.model.dtype,
          'output': {name: f'float32 [b, {classes}]' for name in ('logits', 'probabilities')},
          'platforms': list(PLATFORMS), 'jax': jax.__version__,
          'calling_convention_version': jax.config.values['jax_export_calling_convention_version'],
          'exported': str(today),
          'readable_until': str(months_later(today, READABLE_MONTHS))},
      'trained': {
          'job': run.config.job, 'data': run.config[run.head].name, 'step': run.results['best_step'],
          'weights_fingerprint': initial_weights.weights_fingerprint(run.variables), **_accuracies(run)},
  }


def safetensors_file(run: trained.Trained, about: dict[str, Any]) -> bytes:
  """The state dict with the network's names in torch; in its header the classes and the preprocessing, as JSON."""
  from safetensors import numpy as safetensors

  # A name may hold any bytes.
  texts = {key: _encode(json.dumps(about[key], ensure_ascii=False)).decode()
           for key in ('architecture', 'classes', 'preprocessing')}
  # Other readers look for the format 'pt'.
  return safetensors.save(state_dict(run.model, run.variables, run.head), {'format': 'pt', **texts})


def stablehlo_file(run: trained.Trained) -> bytes:
  """uint8 images `[b, h, w, 3]` to `{'logits', 'probabilities'}` `[b, K]`, for any b and all `PLATFORMS`, with the
  weights inside.
  """
  # What is fastest here may be slow there, and the exported function would keep it.
  model = run.model.clone(portable=True)

  def classify(images: jax.Array) -> dict[str, jax.Array]:
    logits = model.predict(run.variables, images).logits[run.head]
    return {'logits': logits, 'probabilities': jax.nn.softmax(logits)}

  size = run.transform.size
  shape = jax_export.symbolic_shape(f'b, {size}, {size}, 3')
  exported = jax_export.export(jax.jit(classify), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.uint8))
  return bytes(exported.serialize())


def months_later(day: datetime.date, months: int) -> datetime.date:
  """The same day of a later month, or the last day of that month."""
  years, month = divmod(day.month - 1 + months, 12)
  year, month = day.year + years, month + 1
  return datetime.date(year, month, min(day.day, calendar.monthrange(year, month)[1]))


def notes(run: trained.Trained, about: dict[str, Any], folder: epath.Path) -> dict[str, list[str]]:
  """Lines on each file in `folder`."""
  name, classes, size, stablehlo = run.config.model.name, len(run.class_names), run.transform.size, about['stablehlo']
  network = run.model.torch_constructor(name, classes)
  if not network:
    options = ''.join(f', {option} {value}' for option, value in run.model.options.items())
    network = f'the tensors of a {name}{options}, by the names that its family has in torch'
  path = {name: str(folder / name) for name in ('model.safetensors', 'model.stablehlo', 'example.py')}
  return {
      'model.safetensors': [
          f'for torch: {network}',
          f'.load_state_dict(safetensors.torch.load_file({path["model.safetensors"]!r})); strict'],
      'model.stablehlo': [
          f'for jax on {", ".join(PLATFORMS)}: uint8 [b, {size}, {size}, 3] to logits and probabilities [b, {classes}]',
          f"jax.export.deserialize(open({path['model.stablehlo']!r}, 'rb').read()).call(images)",
          f'jax {stablehlo["jax"]} (calling convention {stablehlo["calling_convention_version"]}) reads it; newer '
          'versions are guaranteed',
          f'to read it if they were released within {READABLE_MONTHS} months of that one, so until '
          f'{stablehlo["readable_until"]}',
          'at the latest; export again by then (model.safetensors does not expire)'],
      'classes.txt': ['the classes, one a line'],
      'model.json': ['the same and how images are prepared, the network, its accuracy'],
      'README.txt': ['these lines'],
      'example.py': [f'python {shlex.quote(path["example.py"])} IMAGE ...  (needs jax, flatbuffers, Pillow)'],
  }


def _accuracies(run: trained.Trained) -> dict[str, dict[str, float]]:
  """Of val, and of test where there is one."""
  return {split: {key: run.results[split][key] for key in ('top1', 'mean_per_class', 'loss', 'images')}
          for split in ('val', 'test') if run.results[split]}


def _classes_file(run: trained.Trained) -> bytes:
  return _encode(''.join(f'{" ".join(name.split())}\n' for name in run.class_names))


def _readme_file(lines: dict[str, list[str]]) -> bytes:
  return ''.join(f'{name}\n  ' + '\n  '.join(of_file) + '\n' for name, of_file in lines.items()).encode()


def _encode(text: str) -> bytes:
  return text.encode(errors='backslashreplace')


def _log_files(lines: dict[str, list[str]], sizes: dict[str, int]) -> None:
  for name, (first, *more) in lines.items():
    log.info('  %-18s %8s  %s', name, _format_size(sizes[name]), first)
    for line in more:
      log.info('  %18s %8s  %s', '', '', line)


def _format_size(size: int) -> str:
  return f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size / 1e3:.1f} kB'
