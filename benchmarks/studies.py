"""The study of checkpoints on arrays alone: logistic regression beside scikit-learn's, spectra of many features, scores
of transferability.

    python benchmarks/studies.py [--only logistic,spectrum,scores] [--rounds 3] [--small]

  logistic 4,000 x 512 features, 101 classes, for a few strengths: ft_jax.logistic.fit as the study calls it against
    scikit-learn's
           LogisticRegression (lbfgs) at equal loss: with the loosest tolerance at which its objective, too, is within
           1e-4 of the lowest. The lowest is that of ours in float64 with a far smaller tolerance, or what was found
           below it. Both begin at zero, get the same float32 array and take turns; the best times are printed, without
           compiling, which ours does once for arrays of a shape.
  spectrum 50,000 x 2,048 features from a memory-mapped file: Gram matrix in slices and spectrum, time and peak resident
  memory, in a
           process of its own; what importing alone takes is printed beside it
  scores   all scores of transferability of 4,000 x 512 features, 101 classes and 200 source classes, and each alone
With --small all sizes are far smaller: a check that it runs.
"""

import argparse
from collections.abc import Callable
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from _measure import best, peak_megabytes, timed, verdict
import numpy as np

STRENGTHS = (1e-3, 1e-4, 1e-5)  # on features of total variance 1, as the study makes them: those that it chooses
EQUAL = 1e-4
TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6, 1e-7)  # scikit-learn's own is 1e-4


class Sizes(NamedTuple):
  """Images, dimensions and classes of the target; source classes; images and dimensions of the spectrum."""
  images: int = 4000
  dimensions: int = 512
  classes: int = 101
  source_classes: int = 200
  many: int = 50_000
  wide: int = 2048


SMALL = Sizes(300, 24, 9, 12, 3000, 64)


# Data.

def target(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
  """Overlapping classes behind a ReLU, the variance of directions falling as in a network's features; total variance
  1."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, sizes.classes, sizes.images)
  directions = rng.normal(size=(sizes.dimensions,) * 2) * np.geomspace(
      1, 0.03, sizes.dimensions)[:, None] / sizes.dimensions ** 0.5
  inner = 0.5 * rng.normal(size=(sizes.classes, sizes.dimensions))[labels] + rng.normal(size=(sizes.images,
                                                                                              sizes.dimensions))
  features = np.maximum(inner @ directions + 0.1, 0)
  features -= features.mean(0)
  return (features / np.sqrt(np.mean(np.sum(features ** 2, 1)))).astype(np.float32), labels


# Logistic regression.

def objective(features: np.ndarray, labels: np.ndarray, weights: np.ndarray, bias: np.ndarray,
              strength: float) -> float:
  """What both minimise, in float64."""
  import scipy.special
  logits = features.astype(np.float64) @ weights.astype(np.float64) + bias
  losses = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]
  return float(losses.mean() + strength / 2 * np.sum(weights.astype(np.float64) ** 2))


def logistic_regression(sizes: Sizes, rounds: int) -> None:
  import jax
  from sklearn import exceptions, linear_model

  from ft_jax import logistic
  features, labels = target(sizes)
  missing = set(range(sizes.classes)) - set(labels.tolist())
  assert not missing, f'scikit-learn has no weights for classes without images: {missing}'

  def ours(strength: float) -> logistic.Classifier:
    return logistic.fit(features, labels, sizes.classes, strength=strength)

  def theirs(strength: float, tolerance: float) -> linear_model.LogisticRegression:
    model = linear_model.LogisticRegression(C=1 / (strength * len(labels)), tol=tolerance, max_iter=5000)
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', exceptions.ConvergenceWarning)  # a tolerance that float32 cannot reach
      return model.fit(features, labels)

  print(f'logistic: {sizes.images:,d} x {sizes.dimensions:,d}, {sizes.classes} classes; above the lowest objective, '
        f'relative')
  print('| strength |  lowest | ours: above | steps | seconds | scikit-learn: above | tolerance | steps | seconds | '
        'ratio |')
  widths = (9, 8, 12, 6, 8, 20, 10, 6, 8, 6)
  print(f'|{"|".join("-" * width + ":" for width in widths)}|', flush=True)
  ratios = []
  for strength in STRENGTHS:
    found = ours(strength)
    reached = objective(features, labels, found.weights, found.bias, strength)
    with jax.enable_x64(True):
      tight = logistic.fit(features.astype(np.float64), labels, sizes.classes, strength=strength, tolerance=1e-7,
                           max_iterations=5000)
    lowest = min(reached, objective(features, labels, tight.weights, tight.bias, strength))
    for tolerance in TOLERANCES:
      peer = theirs(strength, tolerance)
      other = objective(features, labels, peer.coef_.T, peer.intercept_, strength)
      lowest = min(lowest, other)
      if other <= lowest * (1 + EQUAL):
        break
    times = best({'ours': lambda: ours(strength), 'theirs': lambda: theirs(strength, tolerance)}, rounds)  # noqa: B023
    ratios.append(times['ours'] / times['theirs'])
    print(f'| {strength:8.0e} | {lowest:7.4f} | {reached / lowest - 1:11.1e} | {found.iterations:5d} | '
          f'{times["ours"]:7.2f} | '
          f'{other / lowest - 1:19.1e} | {tolerance:9.0e} | {int(np.max(peer.n_iter_)):5d} | {times["theirs"]:7.2f} | '
          f'{ratios[-1]:5.2f} |',
          flush=True)
    for name, value in (('ours', reached), ('scikit-learn', other)):
      if value > lowest * (1 + EQUAL):
        print(f'  {name} did not come within {EQUAL:.0e}: the times are not at equal loss')
  print(f'  {verdict(max(ratios) <= 2, "at most 2 times the time of scikit-learn")}', flush=True)


# Spectrum.

def spectrum_of_many(sizes: Sizes, rounds: int) -> None:
  """The best time of some processes and the largest memory of any."""
  print(f'spectrum: {sizes.many:,d} x {sizes.wide:,d}, float32, from a file of '
        f'{sizes.many * sizes.wide * 4 / 1e6:,.0f} MB')
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'features.npy'
    rows = np.lib.format.open_memmap(path, 'w+', np.float32, (sizes.many, sizes.wide))
    rng, step = np.random.default_rng(0), 4096
    scales = np.geomspace(1, 0.01, sizes.wide, dtype=np.float32)
    for begin in range(0, len(rows), step):
      rows[begin:begin + step] = rng.standard_normal(rows[begin:begin + step].shape, np.float32) * scales + 0.5
    rows.flush()
    del rows
    found = []
    for _ in range(rounds):
      run = subprocess.run([sys.executable, __file__, '--child', str(path)], stdout=subprocess.PIPE, text=True,
                           check=True)
      found.append(json.loads(run.stdout.splitlines()[-1]))
  peak = max(one['peak'] for one in found)
  for name in ('gram', 'spectrum'):
    print(f'  {name:35s} {min(one[name] for one in found):10.2f} s')
  print(f'  {"peak resident memory":35s} {peak:10,.0f} MB   before: {found[0]["before"]:,.0f} MB   '
        + verdict(peak < 2000, 'below 2,000 MB'), flush=True)


def child(path: str) -> dict[str, float]:
  """One process's share: seconds and megabytes."""
  from ft_jax.studies import spectrum
  features = np.load(path, mmap_mode='r')
  before = peak_megabytes()
  gram_seconds, gram = timed(lambda: spectrum.gram(features))
  seconds, _ = timed(lambda: spectrum.spectrum(gram, centred=True))
  return {'gram': gram_seconds, 'spectrum': seconds, 'before': before, 'peak': peak_megabytes()}


# Scores.

def scores_of_target(sizes: Sizes, rounds: int) -> None:
  from ft_jax.studies import transferability
  features, labels = target(sizes)
  theta = np.random.default_rng(1).dirichlet(np.full(sizes.source_classes, 0.1), sizes.images).astype(np.float32)
  print(f'scores: {sizes.images:,d} x {sizes.dimensions:,d}, {sizes.classes} classes, {sizes.source_classes} source '
        f'classes')
  alone = {
      'all': lambda: transferability.scores(features, labels, theta),
      'h_score': lambda: transferability.h_score(features, labels),
      'h_score_regularised': lambda: transferability.h_score(features, labels, regularised=True),
      'leep': lambda: transferability.leep(theta, labels),
      'nce': lambda: transferability.nce(theta.argmax(1), labels),
      'logme': lambda: transferability.logme(features, labels),
      'transrate': lambda: transferability.transrate(features, labels)}
  for name, seconds in best(alone, rounds).items():
    print(f'  {name:35s} {seconds:10.3f} s', flush=True)


QUESTIONS: dict[str, Callable[[Sizes, int], None]] = {
    'logistic': logistic_regression, 'spectrum': spectrum_of_many, 'scores': scores_of_target}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default=','.join(QUESTIONS), help='questions, with commas between them')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--small', action='store_true', help='far smaller sizes')
  parser.add_argument('--child', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    print(json.dumps(child(args.child)))
    return
  only = args.only.split(',')
  if set(only) - set(QUESTIONS):
    parser.error(f'--only {args.only}; known: {", ".join(QUESTIONS)}')
  load = f', load {os.getloadavg()[0]:.1f} before it began' if hasattr(os, 'getloadavg') else ''
  print(f'{os.cpu_count()} cores{load}{"; small sizes: the targets say nothing here" if args.small else ""}')
  for question in only:
    QUESTIONS[question](SMALL if args.small else Sizes(), args.rounds)


if __name__ == '__main__':
  main()
