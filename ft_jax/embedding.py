"""Features of images by a pre-trained backbone, cached in files: what selection and the study of checkpoints use."""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from ft_jax import parallel, progress
from ft_jax.data.image_set import digest, ImageSet
from ft_jax.data.pipeline import Batch, EvalBatches, TIMEOUT, Transform
from ft_jax.models.network import Network
from ft_jax.models.weights import project
from ft_jax.progress import log
from ft_jax.training import initial_weights
import selection

# Of the products behind features, whatever `model.precision` is in training: what is chosen must not depend on the
# device.
PRECISION = 'highest'


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
  """A network without heads, and how images go through it.

  Attributes:
    name: of the network, as `config.model.name`.
    network: see there.
    variables: of the network, numpy arrays; with MoCo-v2's `projection`, features are the output of that.
    transform: what images go through.
    batch_size: images at a time, over all devices; rounded up to what they can share.
    timeout: seconds that a batch of images may take; 0 for any.
    folder: where embeddings are cached; None caches them nowhere.
    unfinished: a folder, of this run alone, for what is embedded so far: a killed run resumes there; see
      `remove_partial`.
    weights: identifies `variables`; '' takes a fingerprint of their values, which random ones do not have on every
      machine.
  """
  name: str
  network: Network
  variables: Mapping[str, Any]
  transform: Transform
  batch_size: int
  timeout: float = TIMEOUT
  folder: epath.Path | None = None
  unfinished: epath.Path | None = None
  weights: str = ''

  @functools.cached_property
  def fingerprint(self) -> str:
    """Of the weights, the network and the preprocessing."""
    # The precision is part of it: older versions embedded with the default one of the device, and these are not to be
    # mixed.
    return digest(self.weights or initial_weights.weights_fingerprint(self.variables), self.name,
                  jnp.dtype(self.network.dtype).name, PRECISION, f'{self.transform.size}/{self.transform.short_side}')

  def embed(self, images: ImageSet, what: str, means: bool = False) -> selection.Embeddings:
    """The features of images, or the means of their classes; computed once for these weights, images and preprocessing.

    Args:
      images: see there.
      what: a name for messages, such as 'target'.
      means: of classes instead of images.

    Raises:
      ValueError: features that are not finite.
      Stalled: no images came for `timeout` seconds.
    """
    kind = 'class_means' if means else 'named_features'
    path = self.folder / f'{kind}-{digest(self.fingerprint, images.fingerprint)}.npz' if self.folder else None
    if path and parallel.agreed(path.exists):
      parallel.check_shared(self.folder, 'the folder of embeddings (config.embeddings_dir)')
      return selection.Embeddings.load(path)
    size = -(-self.batch_size // jax.device_count()) * jax.device_count()
    if self.folder:
      log.info('embedding %s: %s images', what, f'{len(images):,d}')

    def batches(first: int) -> Iterator[Batch]:
      if first:
        log.info('  %s of them were embedded before', f'{first * size:,d}')
      rest = EvalBatches(images, self.transform, size, self.timeout, first)
      return progress.bar(rest, f'embedding {what}', first + len(rest), initial=first)

    part = f'{digest(self.fingerprint, images.fingerprint, str(means))}-{size}'
    embed = selection.embed_class_means if means else functools.partial(selection.embed, ids=images.ids.tolist())
    embeddings = embed(self._encode, self.variables, batches, class_names=images.class_names,
                       fingerprint=self.fingerprint, workdir=self.unfinished / part if self.unfinished else None)
    if path and parallel.is_main():
      embeddings.save(path)
    return embeddings

  def _encode(self, variables: dict[str, Any], images: jax.Array) -> jax.Array:
    outputs: Any = self.network.clone(precision=PRECISION).apply(variables, images, train=False)
    return project(variables['projection'], outputs.features) if 'projection' in variables else outputs.features


def remove_partial(unfinished: epath.Path) -> None:
  """Removes what an encoder has saved of embeddings that are finished now, or not needed any more."""
  if parallel.is_main() and unfinished.exists():
    unfinished.rmtree()
  parallel.barrier('unfinished embeddings are removed')  # the next ones are kept in the same place
