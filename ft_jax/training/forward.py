"""The forward pass of a training step: several streams of images through the network, in microbatches where memory is
short.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from ft_jax.models.network import Network, Outputs


def forward(model: Network, variables: Mapping[str, Any], images: Mapping[str, jax.Array], *, train: bool = True,
            layers: Sequence[str] = (), key: jax.Array | None = None,
            microbatches: int = 1) -> tuple[dict[str, Outputs], Any]:
  """All streams in one pass, so BatchNorm sees their mixture (Liu et al., NeurIPS 2022).

  Where the network's `batch_norm` is 'per_stream', each stream has a pass of its own, with its views, and so its own
  statistics; the running ones are those of the first stream alone (the main statistics of AdvProp, Xie et al., CVPR
  2020; scales and biases are shared).

  Args:
    model: the network.
    variables: its `{'params', 'batch_stats'}`.
    images: `[b, h, w, 3]` of each stream, uint8 or normalised float32; each has its own b.
    train: whether BatchNorm uses the batch and updates its running statistics.
    layers: modules whose outputs are wanted as `taps`, by path, as the network uses them; () leaves the model's own
      taps.
    key: for a normalisation layer that is random; all microbatches have the same.
    microbatches: how many passes the batch is divided into, each with its share of every stream. The backward pass
      computes each of them again, so only one's activations are in memory. The result is that of the whole batch,
      except that BatchNorm uses the statistics of each microbatch.

  Returns:
    The outputs by stream, and the running statistics after the pass.
  """
  if len({image.dtype for image in images.values()}) > 1:  # mixed streams are float, the others still bytes
    images = {stream: model.input.normalize(image) for stream, image in images.items()}
  passes = [{*images}]
  if train and model.batch_norm == 'per_stream':
    streams = dict.fromkeys(name.partition('/')[0] for name in images)
    passes = [{name for name in images if name.partition('/')[0] == stream} for stream in streams]

  def run_all(batch_stats: Any, images: Mapping[str, jax.Array]) -> tuple[Any, dict[str, Outputs]]:
    each = [run(batch_stats, {name: image for name, image in images.items() if name in names}) for names in passes]
    return each[0][0], {name: output for _, outputs in each for name, output in outputs.items()}

  def run(batch_stats: Any, images: Mapping[str, jax.Array]) -> tuple[Any, dict[str, Outputs]]:
    mixture = jnp.concatenate(list(images.values()))
    (outputs, updates) = model.apply(
        {'params': variables['params'], 'batch_stats': batch_stats}, mixture, train=train,
        rngs=None if key is None else {'norm': key}, mutable=['batch_stats', 'intermediates'],
        capture_intermediates=lambda module, _: '/'.join(module.path) in layers)
    if layers:
      kept = flax.traverse_util.flatten_dict(updates['intermediates'], sep='/')
      # A layer that calls that of its parent class, as StochNorm's does, leaves the output of each of these calls. Its
      # own comes last; so does the last one of a layer that is used more than once.
      outputs = outputs._replace(taps={layer: kept[f'{layer}/__call__'][-1] for layer in layers})
    ends = np.cumsum([len(image) for image in images.values()]).tolist()
    rows_of = {stream: slice(end - len(image), end) for (stream, image), end in zip(images.items(), ends)}
    by_stream = {stream: slice_outputs(outputs, rows) for stream, rows in rows_of.items()}
    return updates.get('batch_stats', batch_stats), by_stream

  if microbatches == 1:
    batch_stats, outputs = run_all(variables['batch_stats'], images)
    return {stream: outputs[stream] for stream in images}, batch_stats
  # A scan gives its dicts back with sorted keys.
  split = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), dict(images))
  # On the CPU, XLA's convolutions take eight times as long inside a loop. Unrolled, this saves no memory there.
  unroll = jax.default_backend() == 'cpu'
  batch_stats, outputs = jax.lax.scan(jax.checkpoint(run_all), variables['batch_stats'], split, unroll=unroll)
  outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
  return {stream: outputs[stream] for stream in images}, batch_stats


def slice_outputs(outputs: Outputs, rows: slice) -> Outputs:
  """The outputs of some rows of the batch."""
  return jax.tree.map(lambda x: x[rows], outputs)
