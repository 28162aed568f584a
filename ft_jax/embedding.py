"""Features of images by the backbone of some weights, kept in files: what selection and the study of checkpoints work on."""

from collections.abc import Iterator, Mapping
import functools
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict

from ft_jax import parallel, progress
from ft_jax.data.image_set import digest, ImageSet
from ft_jax.data.pipeline import Batch, EvalBatches, TIMEOUT, Transform
from ft_jax.jobs import setup
from ft_jax.models.weights import project
from ft_jax.progress import log
from ft_jax.training import initial_weights
import selection

# Of the products behind features, whatever `model.precision` is in training: what is chosen must not depend on the device.
PRECISION = 'highest'


def embedded(folder: epath.Path | None, network: ConfigDict, variables: Mapping[str, Any], source: ImageSet, transform: Transform,
             batch_size: int, what: str, means: bool = False, timeout: float = TIMEOUT,
             unfinished: epath.Path | None = None, weights: str = '') -> selection.Embeddings:
  """Features of a source, or the means of its classes; made once for these weights, images and preprocessing.

  Args:
    folder: where they are kept; None keeps them nowhere.
    network: the fields of `config.model`.
    variables: of the network without heads, numpy arrays; with MoCo-v2's `projection`, features are those behind it.
    source: the images.
    transform: what they go through.
    batch_size: images at a time, over all devices; rounded up to what they can share.
    what: a name for messages, such as 'target'.
    means: of classes instead of images.
    timeout: seconds that a batch of images may take; 0 for any.
    unfinished: a folder, of this run alone, for what is embedded so far: a killed run goes on from there. See `remove_partial`.
    weights: identifies `variables`; '' takes a fingerprint of their values, which random ones do not have on every machine alike.

  Raises:
    ValueError: features that are not finite.
    Stalled: no images came for `timeout` seconds.
  """
  model = setup.build_model(network, {}, transform.size).clone(precision=PRECISION)
  # The precision is part of it: older versions made features by the default one of the device, and other ones are not to be mixed.
  encoder = digest(weights or initial_weights.weights_fingerprint(variables), network.name, network.dtype, PRECISION,
                   f'{transform.size}/{transform.short_side}')
  path = folder / f'{"class_means" if means else "named_features"}-{digest(encoder, source.fingerprint)}.npz' if folder else None
  if path and parallel.agreed(path.exists):
    parallel.check_shared(folder, 'the folder of embeddings (config.embeddings_dir)')
    return selection.Embeddings.load(path)
  size = -(-batch_size // jax.device_count()) * jax.device_count()
  if folder:
    log.info('embedding %s: %s images', what, f'{len(source):,d}')

  def batches(first: int) -> Iterator[Batch]:
    if first:
      log.info('  %s of them were embedded before', f'{first * size:,d}')
    rest = EvalBatches(source, transform, size, timeout, first)
    return progress.bar(rest, f'embedding {what}', first + len(rest), initial=first)

  def encode(variables: dict[str, Any], images: jax.Array) -> jax.Array:
    features = model.apply(variables, images, train=False).features
    return project(variables['projection'], features) if 'projection' in variables else features

  embeddings = (selection.embed_class_means if means else functools.partial(selection.embed, ids=source.ids))(
      encode, variables, batches, class_names=source.class_names, fingerprint=encoder,
      workdir=unfinished / f'{digest(encoder, source.fingerprint, str(means))}-{size}' if unfinished else None)
  if path and parallel.is_main():
    embeddings.save(path)
  return embeddings


def remove_partial(unfinished: epath.Path) -> None:
  """Removes what `embedded` kept of embeddings that are finished now, or not wanted any more."""
  if parallel.is_main() and unfinished.exists():
    unfinished.rmtree()
  parallel.barrier('unfinished embeddings are removed')  # the next ones are kept in the same place
