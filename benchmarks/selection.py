"""Selection: speed, memory and scale against POT and bare matrix products, and the accuracy of fits to a sample.

    pip install pot && python benchmarks/selection.py [--only class,example,stream,growth,scoring,distance]
        [--gpu] [--small]
    python benchmarks/selection.py --only fitted --embeddings SOURCE.npz TARGET.npz
        (files written by selection.Embeddings.save)

Each benchmark runs in its own process and alternates between the candidates; the best times are printed with their
targets:
  class    1,000 x 200: our solver and all of selection.select against POT
  example  50,000 x 2,000: time, peak resident memory and shares of selection.select against POT, one process per run
  stream   200,000 x 2,000 from a memory-mapped file, with a kernel that is not stored: peak resident memory, time,
           iterations
  growth   time of an iteration against the size of the pool, and the exponent of their relation
  scoring  rows per second scored with fitted potentials, against a bare matrix product of that size
  distance 57,000 images of 200 classes, 3,700 of 37: Gaussians and their Bures distances, OTDD, domain similarity;
           seconds, each once
  gpu      1,281,167 x 3,680 at d = 512 and 2,048, against the lower bounds from memory bandwidth and arithmetic; runs
           on a GPU or TPU, or with --gpu; d = 2,048 needs 12 GB of host memory, and 19 GB of device memory for the
           kernel, which is stored only if that is less than half of what JAX reserves
  fitted   the choice of select(..., sample=s) against the exact solution, by s
Ours in float32, POT in float64. --small runs far smaller sizes, to check that the benchmarks run.
"""

import argparse
from collections.abc import Callable
import concurrent.futures
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from _measure import best, peak_megabytes, timed, verdict
import numpy as np

# Otherwise POT imports every array library that is installed.
os.environ.update({f'POT_BACKEND_DISABLE_{name}': '1' for name in ('PYTORCH', 'TENSORFLOW', 'JAX', 'CUPY')})

# Rows of the source, rows of the target, dimensions; for growth, those of the largest pool.
SIZES = {'class': (1000, 200, 512), 'example': (50_000, 2000, 512), 'stream': (200_000, 2000, 512),
         'scoring': (100_000, 2000, 512), 'growth': (200_000, 1000, 128), 'distance': (57_000, 3700, 512),
         'gpu': (1_281_167, 3680, 512), 'gpu wide': (1_281_167, 3680, 2048)}
SMALL = {'class': (200, 50, 64), 'example': (5000, 1000, 64), 'stream': (20_000, 500, 64), 'scoring': (20_000, 500, 64),
         'growth': (20_000, 250, 32), 'distance': (4000, 370, 64), 'gpu': (20_000, 500, 64),
         'gpu wide': (20_000, 500, 256)}
SAMPLES = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
EPSILON, RHOS = 0.1, {'rho_source': 0.1, 'rho_target': 10.0}
CHUNK = 4096


# Data and output.

def features(n: int, m: int, d: int, path: pathlib.Path | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Source and target from 300 clusters: 200 in the source, 100 in the target, 50 of these in both.

  `path`: a file to which the source is memory-mapped.
  """
  centres = np.random.default_rng(0).standard_normal((300, d), np.float32)
  source = np.empty((n, d), np.float32) if path is None else np.lib.format.open_memmap(path, 'w+', np.float32, (n, d))
  return _filled(source, centres[:200], 1), _filled(np.empty((m, d), np.float32), centres[150:250], 2)


def _filled(rows: np.ndarray, centres: np.ndarray, seed: int) -> np.ndarray:
  """Rows around random centres, on all cores; in chunks, so that the peak memory is not that of making the data."""
  def fill(start: int) -> None:
    rng, part = np.random.default_rng([seed, start]), rows[start:start + CHUNK]
    noise = rng.standard_normal(part.shape, np.float32)
    noise *= 0.8
    noise += 1
    np.add(noise, centres[rng.integers(0, len(centres), len(part))], out=part)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(fill, range(0, len(rows), CHUNK)))
  return rows


def show(what: str, value: str, *notes: str) -> None:
  print(f'  {what:50s} {value:>16s}' + ''.join(f'   {note}' for note in notes), flush=True)


# The candidates.

def choose(source: Any, target: Any, size: int, **options: Any) -> Any:
  import selection
  return selection.select(source, target, size, by='example', progress=False, **options)


def costs_of(source: np.ndarray, target: np.ndarray, **settings: Any) -> Any:
  from selection import blocks
  from selection.pools import ArrayRows
  return blocks.Blocks(ArrayRows(source), target, blocks.cosine, settings=blocks.Settings(**settings))


def masses(source: np.ndarray, target: np.ndarray) -> np.ndarray:
  """The mass of each row from features, without the rest of `select`."""
  from selection import transport
  return transport.mass(*transport.solve(costs_of(source, target), epsilon=EPSILON, **RHOS))


def masses_of_costs(cost: np.ndarray) -> np.ndarray:
  """The same from the cost matrix."""
  from selection import blocks, transport
  from selection.pools import ArrayRows
  costs = blocks.Blocks(ArrayRows(cost, check=False), None, blocks.given)
  return transport.mass(*transport.solve(costs, epsilon=EPSILON, **RHOS))


def pot_cost(source: np.ndarray, target: np.ndarray) -> np.ndarray:
  """1 - cos as one matrix product: ot.dist(metric='cosine') takes far longer."""
  units = [rows / np.linalg.norm(rows, axis=1, keepdims=True)
           for rows in (source.astype(np.float64), target.astype(np.float64))]
  cost = units[0] @ units[1].T
  return np.subtract(1, cost, out=cost)


def pot_plan(cost: np.ndarray) -> np.ndarray:
  import ot
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'If reg_type = entropy')  # that the prior is one, which is intended here
    return ot.unbalanced.sinkhorn_knopp_unbalanced(np.ones(len(cost)), np.ones(cost.shape[1]), cost, EPSILON,
                                                   tuple(RHOS.values()), reg_type='entropy', stopThr=1e-6)


def pot_shares(source: np.ndarray, target: np.ndarray) -> np.ndarray:
  shares = pot_plan(pot_cost(source, target)).sum(1)
  return shares / shares.sum()


# The benchmarks. Each runs in its own process.

def class_level(sizes: tuple[int, int, int], rounds: int) -> None:
  import selection
  means, target = features(*sizes)
  source, classes = (selection.Embeddings(rows, np.arange(len(rows))) for rows in (means, target))
  cost = pot_cost(means, target)
  seconds = best({'solve': lambda: masses(means, target), 'pot': lambda: pot_shares(means, target),
                  'solve alone': lambda: masses_of_costs(cost), 'pot alone': lambda: pot_plan(cost),
                  'select': lambda: selection.select(source, classes, len(means) // 10, progress=False)}, 5 * rounds)
  ours = selection.select(source, classes, len(means) // 10, progress=False)
  form = lambda name: f'{1000 * seconds[name]:.2f} ms'
  show('ours, from features to masses', form('solve'), verdict(seconds['solve'] < 0.02, 'under 20 ms'))
  show('ours, all of selection.select', form('select'), verdict(seconds['select'] < 0.02, 'under 20 ms'))
  show('POT, from features to shares', form('pot'))
  show('ours, from the cost matrix', form('solve alone'))
  show('POT, from the cost matrix', form('pot alone'))
  for end, what in (('', 'ours / POT, from features'), (' alone', 'ours / POT, from the cost matrix')):
    ratio = seconds[f'solve{end}'] / seconds[f'pot{end}']
    show(what, f'{ratio:.2f}', verdict(ratio <= 1.5, 'at most 1.5'))
  show('largest relative difference of the shares', f'{difference(ours.shares, pot_shares(means, target)):.1e}')


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
  return float(np.abs(ours / theirs - 1).max())


def example_level(sizes: tuple[int, int, int], rounds: int) -> None:
  with tempfile.TemporaryDirectory() as folder:
    runs: dict[str, list[dict[str, float]]] = {'ours': [], 'POT': []}
    for _ in range(rounds):
      for name, results in runs.items():
        results.append(child(f'example {name}', sizes, pathlib.Path(folder) / f'{name}.npy'))
    apart = difference(*(np.load(pathlib.Path(folder) / f'{name}.npy') for name in runs))
  pick = lambda key: max if key == 'peak' else min
  found = {name: {key: pick(key)(run[key] for run in results) for key in results[0]} for name, results in runs.items()}
  ours, pot = found['ours'], found['POT']
  show('ours, all of selection.select', f'{ours["seconds"]:.2f} s', f'first call {ours["first"]:.2f} s',
       f'{ours["iterations"]} iterations')
  show('POT, from features to shares', f'{pot["seconds"]:.2f} s', f'of which its cost matrix {pot["cost"]:.2f} s')
  show('ours, from the cost matrix', f'{ours["alone"]:.2f} s')
  show('POT, from the cost matrix', f'{pot["alone"]:.2f} s')
  ratio, first, alone = pot['seconds'] / ours['seconds'], pot['seconds'] / ours['first'], pot['alone'] / ours['alone']
  show('POT / ours, from features', f'{ratio:.1f}', verdict(ratio >= 10, 'at least 10'),
       f'({first:.1f} against our first call)')
  show('POT / ours, from the cost matrix', f'{alone:.1f}', verdict(alone >= 10, 'at least 10'))
  for name, run in found.items():
    show(f'{name}, peak resident memory', f'{run["peak"]:,.0f} MB', f'before it {run["before"]:,.0f} MB')
  show('ours / POT, peak resident memory', f'{ours["peak"] / pot["peak"]:.2f}',
       verdict(3 * ours['peak'] <= pot['peak'], 'at most a third'))
  show('largest relative difference of the shares', f'{apart:.1e}')


def example_ours(sizes: tuple[int, int, int], path: pathlib.Path) -> dict[str, float]:
  import jax

  import selection  # noqa: F401
  source, target = features(*sizes)
  jax.devices()
  before = peak_megabytes()
  first, chosen = timed(lambda: choose(source, target, sizes[0] // 10))
  seconds = min(timed(lambda: choose(source, target, sizes[0] // 10))[0] for _ in range(2))
  np.save(path, chosen.shares)
  peak = peak_megabytes()
  cost = pot_cost(source, target).astype(np.float32)
  alone = min(timed(lambda: masses_of_costs(cost))[0] for _ in range(3))
  return {'seconds': seconds, 'first': first, 'alone': alone, 'iterations': chosen.solver['iterations'], 'peak': peak,
          'before': before}


def example_pot(sizes: tuple[int, int, int], path: pathlib.Path) -> dict[str, float]:
  import ot  # noqa: F401
  source, target = features(*sizes)
  before = peak_megabytes()
  seconds, shares = timed(lambda: pot_shares(source, target))
  peak = peak_megabytes()
  np.save(path, shares)
  seconds_of_cost, cost = timed(lambda: pot_cost(source, target))
  return {'seconds': seconds, 'cost': seconds_of_cost, 'alone': timed(lambda: pot_plan(cost).sum(1))[0], 'peak': peak,
          'before': before}


def streamed(sizes: tuple[int, int, int], rounds: int) -> None:
  del rounds
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'source.npy'
    np.save(pathlib.Path(folder) / 'target.npy', features(*sizes, path)[1])
    result = child('stream ours', sizes, path)
  show('file, and kernel in float32', f'{4 * sizes[0] * sizes[2] / 1e6:,.0f} MB',
       f'{4 * sizes[0] * sizes[1] / 1e6:,.0f} MB',
       'not stored' if not result['stored'] else 'STORED: nothing is streamed')
  show('selection.select', f'{result["seconds"]:.1f} s',
       f'{result["iterations"]} iterations and one more pass, including compilation')
  show('peak resident memory', f'{result["peak"]:,.0f} MB', verdict(result['peak'] < 1500, 'under 1,500 MB'),
       f'before it {result["before"]:,.0f} MB; pages of the file count')


def stream_ours(sizes: tuple[int, int, int], path: pathlib.Path) -> dict[str, float]:
  import jax

  target = np.load(path.with_name('target.npy'))
  memory = None if sizes == SIZES['stream'] else 0  # the full-size kernel is too large to be stored by default
  kernel = costs_of(np.load(path, mmap_mode='r'), target, memory=memory).kernel(EPSILON)
  jax.devices()
  before = peak_megabytes()
  seconds, chosen = timed(lambda: choose(str(path), target, sizes[0] // 10, memory=memory))
  peak = peak_megabytes()
  stored = 4 * kernel.n * kernel.m <= kernel._memory()
  return {'seconds': seconds, 'iterations': chosen.solver['iterations'], 'peak': peak, 'before': before,
          'stored': stored}


def growth(sizes: tuple[int, int, int], rounds: int) -> None:
  from selection import transport
  taus = transport._taus(EPSILON, **RHOS)
  source, target = features(*sizes)
  rows = [sizes[0] >> k for k in (4, 3, 2, 1, 0)]
  kernels = {n: costs_of(source[:n], target, memory=0).kernel(EPSILON) for n in rows}
  seconds = best({str(n): lambda n=n: transport._iterate(kernels[n], np.zeros(sizes[1]), *taus) for n in rows}, rounds)
  for n in rows:
    show(f'one iteration over {n:,d} rows', f'{1000 * seconds[str(n)]:.1f} ms', f'{n / seconds[str(n)]:,.0f} rows/s')
  exponent = np.polyfit(np.log(rows), np.log([seconds[str(n)] for n in rows]), 1)[0]
  show('exponent', f'{exponent:.2f}', verdict(exponent <= 1.1, 'at most 1.1'))


def scoring(sizes: tuple[int, int, int], rounds: int) -> None:
  import jax
  import jax.numpy as jnp

  from selection import transport
  source, target = features(*sizes)
  costs = costs_of(source, target)
  kernel = costs.kernel(EPSILON)
  potentials = transport.solve(costs_of(source[:sizes[1]], target), epsilon=EPSILON, **RHOS)[1]
  block = kernel._block(len(source))
  whole = len(source) // block * block
  rows, right = jnp.asarray(source[:whole]), jnp.asarray(target)
  product = lambda left: jnp.matmul(left, right.T, precision=jax.lax.Precision.HIGHEST)
  # The barrier keeps XLA from computing only the one entry of the product that is returned.
  in_blocks = jax.jit(lambda rows: jax.lax.map(lambda part: jax.lax.optimization_barrier(product(part))[0, 0],
                                               rows.reshape(-1, block, rows.shape[1])))
  at_once = jax.jit(product)
  seconds = best({'ours': lambda: transport.mass(kernel, potentials),
                  'blocks': lambda: in_blocks(rows).block_until_ready(),
                  'whole': lambda: at_once(rows).block_until_ready()}, rounds)
  rates = {name: (len(source) if name == 'ours' else whole) / value for name, value in seconds.items()}
  show('ours, from features to masses', f'{rates["ours"]:,.0f} rows/s')
  for name, what in (('blocks', f'bare product in blocks of {block:,d}'), ('whole', 'bare product, whole')):
    share = rates['ours'] / rates[name]
    show(what, f'{rates[name]:,.0f} rows/s', f'ours reaches {share:.0%}', verdict(share >= 0.8, 'at least 80%'))


def distances(sizes: tuple[int, int, int], rounds: int) -> None:
  del rounds
  import selection
  from selection.gaussians import bures, gaussians
  source, target = (selection.Embeddings(rows, np.arange(len(rows)) % classes)
                    for rows, classes in zip(features(*sizes), (200, 37)))
  fitted = [timed(lambda side=side: gaussians(side, progress=False)) for side in (source, target)]
  show('Gaussians of the classes', f'{sum(seconds for seconds, _ in fitted):.2f} s')
  show('bures, all pairs of classes',
       f'{timed(lambda: bures(*(gaussian for _, gaussian in fitted), progress=False))[0]:.1f} s')
  for covariance in ('full', 'diagonal'):
    otdd = functools.partial(selection.otdd, source, target, covariance=covariance, progress=False)
    seconds, _ = timed(otdd)
    note = 'including compilation' if covariance == 'full' else ''
    show(f'otdd, {covariance} covariances', f'{seconds:.1f} s', note)
  show('domain_similarity', f'{timed(lambda: selection.domain_similarity(source, target, min_images=1))[0]:.2f} s')


def on_gpu(sizes: tuple[int, int, int], rounds: int) -> None:
  import jax
  n, m, d = sizes
  source, target = features(n, m, d)
  device = jax.local_devices()[0]
  first, chosen = timed(lambda: choose(source, target, n // 100))
  seconds = timed(lambda: choose(source, target, n // 100))[0]
  peak = (device.memory_stats() or {}).get('peak_bytes_in_use')
  show(f'selection.select on {jax.device_count()} x {device.device_kind}', f'{seconds:.2f} s',
       f'first call {first:.2f} s', f'{chosen.solver["iterations"]} iterations')
  show('peak of the device memory', 'not known' if peak is None else f'{peak / 1e9:.1f} GB',
       f'kernel {4 * n * m / 1e9:.2f} GB')
  show('peak resident memory of the host', f'{peak_megabytes():,.0f} MB', f'features {4 * n * d / 1e6:,.0f} MB')

  small = n < SIZES['gpu'][0]
  bandwidth, rate = _bandwidth(small), _arithmetic(small)
  memory_floor, work_floor, copy_floor = 4 * n * m / bandwidth, 2 * n * m * d / rate, 4 * n * d / _transfer(small)
  kernel_seconds, each, iterations = _kernel_and_iterations(costs_of(source, target), rounds)
  show('kernel, from features on the host', f'{kernel_seconds:.3f} s',
       f'its product alone {work_floor:.3f} s at {rate / 1e12:.2f} TFLOP/s',
       f'features to the device alone {copy_floor:.3f} s')
  if each is None:
    show('iterations', 'not measured', 'the kernel does not fit into half of the memory, so it is not stored')
    return
  show(f'{iterations} iterations over the stored kernel', f'{1000 * iterations * each:.1f} ms',
       f'{1000 * each:.2f} ms each', f'kernel read once {1000 * memory_floor:.2f} ms at {bandwidth / 1e9:,.0f} GB/s')
  larger = max(memory_floor * iterations, work_floor)
  for what, ratio in (('one iteration / kernel read once', each / memory_floor),
                      ('iterations / the larger floor', iterations * each / larger),
                      ('kernel and iterations / the larger floor', (kernel_seconds + iterations * each) / larger)):
    show(what, f'{ratio:.1f}', verdict(ratio <= 3, 'at most 3'))


def _kernel_and_iterations(costs: Any, rounds: int) -> tuple[float, float | None, int]:
  """Seconds for the kernel; if it can be stored also seconds per iteration, and the number of iterations."""
  import jax

  from selection import transport
  taus, seconds, kernel = transport._taus(EPSILON, **RHOS), 0.0, costs
  for _ in range(2):  # the first one compiles, and is freed before the second one starts
    kernel = costs.kernel(EPSILON)
    seconds = timed(lambda kernel=kernel: jax.block_until_ready([part[1] for part in kernel.store()._stored or ()]))[0]
  if not kernel.is_stored:
    return seconds, None, 0
  solve = lambda: transport._solve_stored(kernel, *taus, 1e-6, 2000)
  iterations = solve().iterations
  return seconds, best({'solve': solve}, rounds)['solve'] / iterations, iterations


def _bandwidth(small: bool) -> float:
  """Bytes per second at which a sum reads the device's memory."""
  import jax
  import jax.numpy as jnp
  array = jnp.ones((1 << (24 if small else 30),), jnp.float32)
  total = jax.jit(jnp.sum)
  return array.nbytes / best({'sum': lambda: total(array).block_until_ready()}, 5)['sum']


def _arithmetic(small: bool) -> float:
  """Operations per second of a large matrix product in float32."""
  import jax
  import jax.numpy as jnp
  size = 1024 if small else 8192
  array = jnp.ones((size, size), jnp.float32)
  product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
  return 2 * size**3 / best({'product': lambda: product(array).block_until_ready()}, 5)['product']


def _transfer(small: bool) -> float:
  """Bytes per second from the host to the device, in chunks as large as those of a pass."""
  import jax
  array = np.ones(1 << (20 if small else 26), np.float32)
  return array.nbytes / best({'copy': lambda: jax.device_put(array).block_until_ready()}, 5)['copy']


def fitted(paths: tuple[str, str], small: bool) -> None:
  import selection
  source, target = (selection.Embeddings.load(path) for path in paths)
  size = max(1, len(source) // 10)
  choose(source, target, size)  # compiles; for each sample size the first draw includes compilation
  seconds, exact = timed(lambda: choose(source, target, size))
  print(f'  {len(source):,d} x {len(target):,d}, d = {source.features.shape[1]}; the best {size:,d} rows; three draws '
        'of each sample; errors are relative, of the shares of all rows')
  print('| sample | same rows, mean |  least | largest error | median error | seconds |')
  print('|-------:|----------------:|-------:|--------------:|-------------:|--------:|')
  for sample in [s // 20 if small else s for s in SAMPLES]:
    if sample > len(source):
      break
    runs = [timed(functools.partial(choose, source, target, size, sample=sample, seed=seed)) for seed in range(3)]
    same = [len(np.intersect1d(chosen.units, exact.units)) / size for _, chosen in runs]
    errors = [np.abs(chosen.shares / exact.shares - 1) for _, chosen in runs]
    print(f'| {sample:6,d} | {np.mean(same):15.1%} | {min(same):6.1%} | {np.max(errors):13.2%} | '
          f'{np.median(errors):12.3%} | {np.median([run[0] for run in runs]):7.2f} |', flush=True)
  print(f'| {"all":>6s} | {1:15.1%} | {1:6.1%} | {0:13.2%} | {0:12.3%} | {seconds:7.2f} |')


# Processes.

def child(question: str, sizes: tuple[int, int, int], path: pathlib.Path) -> dict[str, float]:
  """The results of a benchmark part in its own process."""
  done = subprocess.run([sys.executable, __file__, '--child', question, '--sizes', *map(str, sizes),
                         '--path', str(path)], stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def ask(question: str, sizes: tuple[int, int, int], rounds: int) -> None:
  print(f'{question}: ' + ' x '.join(f'{size:,d}' for size in sizes[:2]) + f', d = {sizes[2]:,d}', flush=True)
  subprocess.run([sys.executable, __file__, '--child', question, '--sizes', *map(str, sizes), '--rounds', str(rounds)],
                 check=True)


def default_backend() -> str:
  """JAX's backend, found out in another process: a process that initialises it holds the device's memory."""
  done = subprocess.run([sys.executable, '-c', 'import jax; print(jax.default_backend())'], stdout=subprocess.PIPE,
                        text=True, check=True)
  return done.stdout.split()[-1]


QUESTIONS: dict[str, Callable[[tuple[int, int, int], int], None]] = {
    'class': class_level, 'example': example_level, 'stream': streamed, 'growth': growth, 'scoring': scoring,
    'distance': distances, 'gpu': on_gpu, 'gpu wide': on_gpu}
PARTS: dict[str, Callable[[tuple[int, int, int], pathlib.Path], dict[str, float]]] = {
    'example ours': example_ours, 'example POT': example_pot, 'stream ours': stream_ours}


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='', help='comma-separated benchmarks')
  parser.add_argument('--gpu', action='store_true', help='run "gpu" without a GPU or TPU as well')
  parser.add_argument('--small', action='store_true', help='far smaller sizes')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--embeddings', nargs=2, metavar=('SOURCE', 'TARGET'), help='files for "fitted"')
  for hidden, options in (('child', {}), ('sizes', {'type': int, 'nargs': 3}), ('path', {'type': pathlib.Path})):
    parser.add_argument(f'--{hidden}', help=argparse.SUPPRESS, **options)
  a = parser.parse_args()
  known = ('class', 'example', 'stream', 'growth', 'scoring', 'distance', 'gpu', 'fitted')
  a.only = a.only.split(',') if a.only else []
  if set(a.only) - set(known):
    parser.error(f'--only {",".join(a.only)}; known: {", ".join(known)}')
  if 'fitted' in a.only and not a.embeddings:
    parser.error('"fitted" needs --embeddings SOURCE.npz TARGET.npz, files that selection.Embeddings.save wrote')
  return a


def main() -> None:
  a = parsed()
  if a.child in PARTS:
    print(json.dumps(PARTS[a.child](tuple(a.sizes), a.path)))
    return
  if a.child:
    QUESTIONS[a.child](tuple(a.sizes), a.rounds)
    return
  only = a.only or ['class', 'example', 'stream', 'growth', 'scoring', 'distance'] + ['fitted'] * bool(a.embeddings)
  if 'gpu' not in only and (a.gpu or not a.only and default_backend() != 'cpu'):
    only.append('gpu')
  if {'class', 'example'} & set(only) and importlib.util.find_spec('ot') is None:
    sys.exit('class and example compare with POT: pip install pot, or leave them out with --only')
  print(f'{os.cpu_count()} cores' + (', small sizes: the targets do not apply' if a.small else ''))
  for question in [q for q in QUESTIONS if q.split()[0] in only]:
    ask(question, (SMALL if a.small else SIZES)[question], a.rounds)
  if 'fitted' in only:
    print('fitted')
    fitted(a.embeddings, a.small)


if __name__ == '__main__':
  main()
