"""Reads what tests/fixtures/make_torch_resnet.py recorded from torch in resnet_training.npz."""

import pathlib
import re

import jax
import numpy as np
from safetensors.numpy import save_file
from torch_weights import load_torch, RESNET

from ft_jax.models import build, export

CLASSES, WIDTH = 7, 2


class Record:
  """Images, labels and what torch made of them, for one network."""

  def __init__(self, name: str):
    with np.load(pathlib.Path(__file__).parent / 'fixtures' / 'resnet_training.npz') as arrays:
      self.images, self.labels = arrays['images'], arrays['labels']
      self._arrays = {key.removeprefix(f'{name}/'): arrays[key] for key in arrays if key.startswith(f'{name}/')}
    model = build(name, {'source': CLASSES}, width=WIDTH)
    shapes = jax.eval_shape(model.init, jax.random.key(0), self.images[:1])
    # Nothing but names and shapes is taken from here.
    self._zeros = export.state_dict(RESNET, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes), 'source')

  def outputs(self, mode: str) -> dict[str, np.ndarray]:
    """Of 'eval' (two images) or 'train'."""
    return {key.removeprefix(f'{mode}/'): value for key, value in self._arrays.items() if key.startswith(f'{mode}/')}

  def tensors(self, kind: str) -> dict[str, np.ndarray]:
    """By torch's names: 'weights', 'statistics' (after one forward pass), 'gradients', 'after' (the optimiser's
    steps)."""
    kept = {'weights': r'.*(?<!num_batches_tracked)', 'statistics': r'.*running_(mean|var)'}.get(
        kind, r'.*(?<!running_mean)(?<!running_var)(?<!num_batches_tracked)')
    names = sorted(name for name in self._zeros if re.fullmatch(kept, name))
    ends = np.cumsum([self._zeros[name].size for name in names])
    assert ends[-1] == len(self._arrays[kind])
    parts = np.split(self._arrays[kind], ends[:-1])
    return {name: part.reshape(self._zeros[name].shape).astype(np.float32) for name, part in zip(names, parts)}

  def variables(self, folder: pathlib.Path) -> dict:
    """The weights as variables of the network with a head 'source', by way of a file."""
    save_file(self.tensors('weights'), folder / 'weights.safetensors')
    return load_torch(folder / 'weights.safetensors')


def error(value, expected) -> float:
  """The largest difference, relative to the largest value."""
  return float(np.abs(np.asarray(value) - expected).max() / np.abs(expected).max())
