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
from ft_jax.models import export
from ft_jax.progress import log
from ft_jax.settings import check_fields
from ft_jax.training import initial_weights
from ft_jax.workdir import write_bytes

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
# For so long jax guarantees that newer versions read what an older one exported, counted from the release of the older one:
# https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees
READABLE_MONTHS = 6
_TEMPLATES = pathlib.Path(__file__).parents[1] / 'pages' / 'templates'


def run(config: ConfigDict, workdir: epath.PathLike, today: datetime.date | None = None) -> dict[str, Any]:
  """Writes model.safetensors, model.stablehlo, classes.txt, model.json, README.txt and example.py; returns what model.json holds.

  `today` is the date of the export; None is the clock's.
  """
  check_fields(config)
  if jax.process_count() > 1:
    raise ValueError('job export runs in one process; start it on one host alone, with --num_processes=1')
  run = trained.load(config.workdir)
  about = describe(run, today or datetime.date.today())
  notes = _notes(run, about, epath.Path('.'))
  # Everything is made before anything is written, so that the files are of one network.
  files = {
      'model.safetensors': safetensors_file(run, about),
      'model.stablehlo': stablehlo_file(run),
      'classes.txt': ''.join(f'{" ".join(name.split())}\n' for name in run.class_names).encode(errors='backslashreplace'),
      'model.json': (json.dumps(about, indent=1, ensure_ascii=False) + '\n').encode(errors='backslashreplace'),
      'example.py': (_TEMPLATES / 'example.py').read_bytes(),
      'README.txt': ''.join(f'{name}\n  ' + '\n  '.join(lines) + '\n' for name, lines in notes.items()).encode(),
  }
  folder = trained.output_folder(workdir)
  log.info('exporting %s -> %s', run.described(), folder)
  for name, data in files.items():
    write_bytes(folder / name, data)
  _say(_notes(run, about, folder), {name: len(data) for name, data in files.items()})
  return about


def describe(run: trained.Trained, today: datetime.date) -> dict[str, Any]:
  """What a user of the files has to know, as JSON."""
  model, transform = run.config.model, run.transform
  return {
      'architecture': {'name': model.name, **run.model.options},
      'classes': list(run.class_names),
      'preprocessing': {
          'image_size': transform.size, 'short_side': transform.short_side, 'mean': list(run.model.input.mean),
          'std': list(run.model.input.std),
          'steps': [f'decode to RGB, turned as its EXIF tag says, and scale to a short side of {transform.short_side} pixels (antialiased '
                    'bilinear)', f'cut out the middle, {transform.size} x {transform.size}',
                    'model.stablehlo takes these uint8 pixels [b, h, w, 3] as they are',
                    'model.safetensors takes (pixels / 255 - mean) / std, as [b, 3, h, w]']},
      'stablehlo': {'input': f'uint8 [b, {transform.size}, {transform.size}, 3], any b from 1', 'precision': model.dtype,
                    'output': {'logits': f'float32 [b, {len(run.class_names)}]', 'probabilities': f'float32 [b, {len(run.class_names)}]'},
                    'platforms': list(PLATFORMS), 'jax': jax.__version__,
                    'calling_convention_version': jax.config.jax_export_calling_convention_version, 'exported': str(today),
                    'readable_until': str(months_later(today, READABLE_MONTHS))},
      'trained': {'job': run.config.job, 'data': run.config[run.head].name, 'step': run.results['best_step'],
                  'weights_fingerprint': initial_weights.weights_fingerprint(run.variables),
                  **{split: {key: run.results[split][key] for key in ('top1', 'mean_per_class', 'loss', 'images')}
                     for split in ('val', 'test') if run.results[split]}},
  }


def safetensors_file(run: trained.Trained, about: dict[str, Any]) -> bytes:
  """The state dict with torchvision's names; in its header the classes and the preprocessing, as JSON."""
  from safetensors import numpy as safetensors

  # 'pt' is what other readers look for.
  metadata = {'format': 'pt', **{
      key: json.dumps(about[key], ensure_ascii=False).encode(errors='backslashreplace').decode()  # a name may be of any bytes
      for key in ('architecture', 'classes', 'preprocessing')}}
  return safetensors.save(export.state_dict(run.model, run.variables, run.head), metadata)


def stablehlo_file(run: trained.Trained) -> bytes:
  """uint8 images `[b, h, w, 3]` to `{'logits', 'probabilities'}` `[b, K]`, for any b and for all `PLATFORMS`, with the weights inside."""
  # What is fastest here may be slow there, and the choice would be written down.
  model = run.model.clone(portable=True)

  def classify(images: jax.Array) -> dict[str, jax.Array]:
    logits = model.apply(run.variables, images, train=False).logits[run.head]
    return {'logits': logits, 'probabilities': jax.nn.softmax(logits)}

  size = run.transform.size
  shape = jax_export.symbolic_shape(f'b, {size}, {size}, 3')
  exported = jax_export.export(jax.jit(classify), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.uint8))
  return bytes(exported.serialize())


def months_later(day: datetime.date, months: int) -> datetime.date:
  """The same day of a later month, or its last one."""
  years, month = divmod(day.month - 1 + months, 12)
  year, month = day.year + years, month + 1
  return datetime.date(year, month, min(day.day, calendar.monthrange(year, month)[1]))


def _notes(run: trained.Trained, about: dict[str, Any], folder: epath.Path) -> dict[str, list[str]]:
  """Lines on each file in `folder`."""
  model, classes, size, stablehlo = run.config.model, len(run.class_names), run.transform.size, about['stablehlo']
  published = model.width == 64 and model.stem == '7x7'
  network = f'torchvision.models.{model.name}(num_classes={classes})' if published else \
      f'a {model.name} with torchvision\'s names, width {model.width} and stem {model.stem}'
  return {
      'model.safetensors': [
          f'for torch: {network}', f'.load_state_dict(safetensors.torch.load_file({str(folder / "model.safetensors")!r})); strict'],
      'model.stablehlo': [
          f'for jax on {", ".join(PLATFORMS)}: uint8 [b, {size}, {size}, 3] to logits and probabilities [b, {classes}]',
          f"jax.export.deserialize(open({str(folder / 'model.stablehlo')!r}, 'rb').read()).call(images)",
          f'jax {stablehlo["jax"]} (calling convention {stablehlo["calling_convention_version"]}) reads it; newer versions are guaranteed',
          f'to read it if they were released within {READABLE_MONTHS} months of that one, so until {stablehlo["readable_until"]}',
          'at the latest; export again by then (model.safetensors does not expire)'],
      'classes.txt': ['the classes, one a line'],
      'model.json': ['the same and how images are prepared, the network, its accuracy'],
      'README.txt': ['these lines'],
      'example.py': [f'python {shlex.quote(str(folder / "example.py"))} IMAGE ...  (needs jax, flatbuffers, Pillow)'],
  }


def _say(notes: dict[str, list[str]], sizes: dict[str, int]) -> None:
  for name, (first, *more) in notes.items():
    log.info('  %-18s %8s  %s', name, _spoken(sizes[name]), first)
    for line in more:
      log.info('  %18s %8s  %s', '', '', line)


def _spoken(size: int) -> str:
  return f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size / 1e3:.1f} kB'
