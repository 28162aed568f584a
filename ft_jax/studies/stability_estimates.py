"""The estimates of job stability: computed one by one, saved as they come, and summarized."""

from collections.abc import Mapping, Sequence
import functools
import json
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from ft_jax import parallel, progress
from ft_jax.methods.base import flat
from ft_jax.models.network import Network
from ft_jax.studies import stability
from ft_jax.workdir import write_text


class Settings(NamedTuple):
  """How much is estimated.

  Attributes:
    sigma: standard deviation of the noise on the weights.
    draws: how many perturbed networks.
    probes: at most so many random vectors for the trace of the Hessian.
    tolerance: of `stability.settled`, with which no further vectors are drawn.
    seed: of noise and vectors.
  """
  sigma: float
  draws: int
  probes: int
  tolerance: float
  seed: int


class Minimum(NamedTuple):
  """A trained network, and the images on which its loss is measured.

  Attributes:
    network: with products of float32 in full precision.
    head: whose cross-entropy is the loss.
    classes: of the head.
    variables: `{'params', 'batch_stats'}`, numpy arrays.
    batches: padded and masked, as `data.pipeline.EvalBatches` makes them.
  """
  network: Network
  head: str
  classes: int
  variables: Mapping[str, Any]
  batches: Sequence[Mapping[str, np.ndarray]]


class Estimates:
  """estimates.json: the losses of perturbed networks and the products of random vectors.

  Attributes:
    loss: of the network itself; None before it is measured.
    draws: the loss of each perturbed network.
    probes: v . H v of each random vector, by parameter.
  """

  def __init__(self, path: epath.Path, made_of: Mapping[str, str]):
    """Loads what the file has of the same network, images and seed.

    Args:
      path: the file.
      made_of: 'network', a fingerprint of all that every estimate depends on, and 'noise', sigma, on which draws depend
        too.
    """
    self._path, self._made_of = path, dict(made_of)
    self.loss: float | None = None
    self.draws: list[float] = []
    self.probes: list[dict[str, float]] = []
    saved = parallel.agreed(self._read)
    before = saved.get('made_of', {})
    if before.get('network') == made_of['network']:
      self.loss = saved['loss']
      self.probes = [dict(zip(saved['parameters'], values)) for values in saved['probes']]
      self.draws = saved['draws'] if before['noise'] == made_of['noise'] else []

  def _read(self) -> dict[str, Any]:
    try:
      return json.loads(self._path.read_text()) if self._path.exists() else {}
    except ValueError:  # of another program, or damaged: all is estimated again
      return {}

  @property
  def totals(self) -> list[float]:
    """v . H v of each random vector."""
    return [sum(probe.values()) for probe in self.probes]

  def write(self) -> None:
    """Writes the file."""
    names = list(self.probes[0]) if self.probes else []
    write_text(self._path, json.dumps({
        'made_of': self._made_of, 'loss': self.loss, 'draws': self.draws, 'parameters': names,
        'probes': [[probe[name] for name in names] for probe in self.probes]}) + '\n')


def measure(minimum: Minimum, settings: Settings, estimates: Estimates) -> None:
  """Adds the estimates that are missing, and writes each as soon as it is there."""
  variables = parallel.replicate(minimum.variables)
  losses = functools.partial(stability.losses_under_noise, minimum.network, minimum.head, variables, minimum.batches,
                             classes=minimum.classes, seed=settings.seed)
  if estimates.loss is None:
    estimates.loss = next(losses(sigma=0.0, numbers=(0,)))
  done = len(estimates.draws)
  if done < settings.draws:
    with progress.counter('perturbed networks', settings.draws, 'network', done) as shown:
      for loss in losses(sigma=settings.sigma, numbers=range(done, settings.draws)):
        estimates.draws.append(loss)
        estimates.write()
        shown.update()
  add_probes(minimum, settings, estimates, variables)
  estimates.write()


def add_probes(minimum: Minimum, settings: Settings, estimates: Estimates, variables: Any) -> None:
  """Adds random vectors until the trace is settled, or there are as many as the settings allow.

  `variables` are those of the minimum, replicated.
  """
  totals = estimates.totals
  if used_probes(totals, settings) < settings.probes and not is_settled(totals, settings):
    done, batches = len(totals), len(minimum.batches)
    total = settings.probes * batches
    with progress.counter('random vectors for the Hessian', total, 'batch', done * batches) as shown:
      products = stability.curvatures(minimum.network, minimum.head, variables, minimum.batches, seed=settings.seed,
                                      numbers=range(done, settings.probes), after_batch=shown.update)
      for product in products:
        estimates.probes.append(product)
        estimates.write()
        totals.append(sum(product.values()))
        shown.set_postfix(trace=f'{np.mean(totals):.4g}', refresh=False)
        if stability.settled(totals, settings.tolerance):
          break


def used_probes(totals: Sequence[float], settings: Settings) -> int:
  """How many of the random vectors count: up to the one at which the trace is settled, and no more than the settings
  allow.
  """
  most = min(len(totals), settings.probes)
  return next((n for n in range(1, most) if stability.settled(totals[:n], settings.tolerance)), most)


def is_settled(totals: Sequence[float], settings: Settings) -> bool:
  """Whether the trace is settled with the vectors that count."""
  return stability.settled(totals[:used_probes(totals, settings)], settings.tolerance)


def summarize(minimum: Minimum, settings: Settings, estimates: Estimates,
              start: Mapping[str, Any] | None) -> dict[str, Any]:
  """What stability.json says of the loss, the noise, the trace, and each stage and parameter.

  Args:
    minimum: that was measured.
    settings: of the measurement; the file may hold more estimates than they ask for.
    estimates: see there.
    start: the parameters that training started with; None where they are not known.
  """
  network = minimum.network
  values = {path: np.asarray(value) for path, value in flat(minimum.variables['params']).items()}
  names = sorted(values, key=functools.partial(stability.order, network))
  noisy = [name for name in names if stability.is_perturbed(network, name)]
  distances = stability.distances(minimum.variables['params'], start) if start is not None else None
  totals = estimates.totals
  probes = estimates.probes[:used_probes(totals, settings)]

  def trace(wanted: Sequence[str]) -> dict[str, float | None] | None:
    return _spread([sum(probe[name] for name in wanted) for probe in probes]) if probes else None

  def row(wanted: Sequence[str]) -> dict[str, Any]:
    size = sum(values[name].size for name in wanted)
    return {'numbers': size, **_distance(distances, wanted), 'trace': trace(wanted)}

  stages: dict[str, list[str]] = {}
  for name in names:
    stages.setdefault(stability.stage_of(network, name), []).append(name)
  of_hessian = None
  if probes:
    of_hessian = {
        'vectors': len(probes), 'settled': is_settled(totals, settings), 'tolerance': settings.tolerance,
        'all': trace(names), 'perturbed': trace(noisy), 'by_vector': totals[:len(probes)]}
  return {
      'loss': estimates.loss,
      'noise': _noise(settings, estimates, trace(noisy)),
      'trace': of_hessian,
      'stages': [{'name': stage, **row(of_stage)} for stage, of_stage in stages.items()],
      'parameters': [{'name': name, 'perturbed': name in noisy, **row([name])} for name in names]}


def _noise(settings: Settings, estimates: Estimates, trace: Mapping[str, Any] | None) -> dict[str, Any] | None:
  """The rise of the loss under noise, and what the trace of the perturbed weights predicts; None without draws."""
  if estimates.loss is None or not estimates.draws[:settings.draws]:
    return None
  rises = [loss - estimates.loss for loss in estimates.draws[:settings.draws]]
  predicted = settings.sigma ** 2 / 2 * trace['mean'] if trace else None
  return {'sigma': settings.sigma, 'differences': rises, **_spread(rises), 'by_trace': predicted}


def _distance(distances: Mapping[str, tuple[float, float]] | None, wanted: Sequence[str]) -> dict[str, float | None]:
  """How far some parameters together are from their start: absolute, the norm of the start, relative to it."""
  if not distances:
    return {'distance': None, 'start': None, 'relative': None}
  distance, start = (float(np.linalg.norm(norms)) for norms in zip(*(distances[name] for name in wanted)))
  return {'distance': distance, 'start': start, 'relative': distance / start if start else None}


def _spread(draws: Sequence[float]) -> dict[str, float | None]:
  return dict(zip(('mean', 'standard_error'), stability.estimate(draws)))

