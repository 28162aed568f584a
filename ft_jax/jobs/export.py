"""Job export: a trained network as a state dict for torch, and as a StableHLO function for whatever runs jax."""

import json
import pathlib
import shlex
from typing import Any

from etils import epath
import jax
from jax import export as jax_export
import jax.numpy as jnp
from ml_collections import ConfigDict

from ft_jax.jobs import setup, trained
from ft_jax.models import resnet, to_torch
from ft_jax.progress import log
from ft_jax.settings import check_fields
from ft_jax.workdir import write_bytes

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
_TEMPLATES = pathlib.Path(__file__).parents[1] / 'templates'


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
  """Writes model.safetensors, model.stablehlo, classes.txt, model.json and example.py; returns what model.json holds."""
  check_fields(config)
  if jax.process_count() > 1:
    raise ValueError('job export runs in one process; start it on one host alone, with --num_processes=1')
  run = trained.load(config.workdir)
  about = describe(run)
  # Everything is made before anything is written, so that the files are of one network.
  files = {
      'model.safetensors': safetensors_file(run, about),
      'model.stablehlo': stablehlo_file(run),
      'classes.txt': ''.join(f'{" ".join(name.split())}\n' for name in run.class_names).encode(errors='backslashreplace'),
      'model.json': (json.dumps(about, indent=1, ensure_ascii=False) + '\n').encode(errors='backslashreplace'),
      'example.py': (_TEMPLATES / 'example.py').read_bytes(),
  }
  folder = trained.output_folder(workdir)
  log.info('exporting %s -> %s', run.described(), folder)
  for name, data in files.items():
    write_bytes(folder / name, data)
  _say(run, folder, {name: len(data) for name, data in files.items()})
  return about


def describe(run: trained.Trained) -> dict[str, Any]:
  """What a user of the files has to know, as JSON."""
  model, transform = run.config.model, run.transform
  return {
      'architecture': {'name': model.name, 'width': model.width, 'stem': model.stem},
      'classes': list(run.class_names),
      'preprocessing': {
          'image_size': transform.size, 'short_side': transform.short_side, 'mean': list(resnet.IMAGENET_MEAN),
          'std': list(resnet.IMAGENET_STD),
          'steps': [f'decode to RGB, turned as its EXIF tag says, and scale to a short side of {transform.short_side} pixels (antialiased '
                    'bilinear)', f'cut out the middle, {transform.size} x {transform.size}',
                    'model.stablehlo takes these uint8 pixels [b, h, w, 3] as they are',
                    'model.safetensors takes (pixels / 255 - mean) / std, as [b, 3, h, w]']},
      'stablehlo': {'input': f'uint8 [b, {transform.size}, {transform.size}, 3], any b from 1', 'precision': model.dtype,
                    'output': {'logits': f'float32 [b, {len(run.class_names)}]', 'probabilities': f'float32 [b, {len(run.class_names)}]'},
                    'platforms': list(PLATFORMS), 'jax': jax.__version__},
      'trained': {'job': run.config.job, 'data': run.config[run.head].name, 'step': run.results['best_step'],
                  'weights_fingerprint': setup.weights_fingerprint(run.variables),
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
  return safetensors.save(to_torch.state_dict(run.variables, run.head), metadata)


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


def _say(run: trained.Trained, folder: epath.Path, sizes: dict[str, int]) -> None:
  model, classes = run.config.model, len(run.class_names)
  published = model.width == 64 and model.stem == '7x7'
  network = f'torchvision.models.{model.name}(num_classes={classes})' if published else \
      f'a {model.name} with torchvision\'s names, width {model.width} and stem {model.stem}'
  size = run.transform.size
  notes = {
      'model.safetensors': [
          f'for torch: {network}', f'.load_state_dict(safetensors.torch.load_file({str(folder / "model.safetensors")!r})); strict'],
      'model.stablehlo': [f'for jax on {", ".join(PLATFORMS)}: uint8 [b, {size}, {size}, 3] to logits and probabilities [b, {classes}]',
                          f"jax.export.deserialize(open({str(folder / 'model.stablehlo')!r}, 'rb').read()).call(images)"],
      'classes.txt': ['the classes, one a line'],
      'model.json': ['the same and how images are prepared, the network, its accuracy'],
      'example.py': [f'python {shlex.quote(str(folder / "example.py"))} IMAGE ...  (needs jax, flatbuffers, Pillow)'],
  }
  for name, (first, *more) in notes.items():
    log.info('  %-18s %8s  %s', name, _spoken(sizes[name]), first)
    for line in more:
      log.info('  %18s %8s  %s', '', '', line)


def _spoken(size: int) -> str:
  return f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size / 1e3:.1f} kB'
