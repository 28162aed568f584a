"""Four fake devices on the CPU, and image sets made of the photographs inside scikit-learn."""

import os
import pathlib
import subprocess
import sys

import filelock
import jax
import numpy as np
import PIL.Image
import pytest
import started

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # configs/ is no package that is installed
jax.config.update('jax_num_cpu_devices', 4)
# Here and in the processes that tests start: of short runs of small networks most of the time is the compiler's.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='session', autouse=True)
def _cache_folders(tmp_path_factory, pytestconfig):
  """Label caches of the tests stay away from the user's; no program is compiled twice, in one run of the tests or the
  next.

  Compiled programs lie in pytest's cache (.pytest_cache), or in JAX_COMPILATION_CACHE_DIR where that is set.
  """
  from ft_jax import compiled

  os.environ['XDG_CACHE_HOME'] = str(tmp_path_factory.mktemp('cache'))
  programs = pathlib.Path(os.environ.get('JAX_COMPILATION_CACHE_DIR') or pytestconfig.cache.mkdir('compiled'))
  compiled.remove_incomplete(programs)
  # jax locks the folder only where its size is bounded.
  for name, value in {'compilation_cache_dir': str(programs), 'compilation_cache_max_size': 4 << 30,
                      'persistent_cache_min_compile_time_secs': 0.05}.items():
    os.environ[f'JAX_{name.upper()}'] = str(value)
    jax.config.update(f'jax_{name}', value)


@pytest.fixture(scope='session')
def shared() -> pathlib.Path:
  """The folder of shared images and reference arrays."""
  folder = os.environ.get('FT_JAX_SHARED')
  if not folder:
    pytest.skip('FT_JAX_SHARED is not set: the published reference arrays are not at hand')
  return pathlib.Path(folder)


def write_images(folder: pathlib.Path, per_class: dict[str, int], seed: int = 0) -> None:
  """`<folder>/<class>/<image>.jpg`: crops of a region of a photograph each, of several sizes."""
  from sklearn import datasets

  photos = datasets.load_sample_images().images
  rng = np.random.default_rng(seed)
  for k, (name, count) in enumerate(per_class.items()):
    (folder / name).mkdir(parents=True)
    region = photos[k % 2][(k // 2 % 2) * 200:, (k // 4 % 3) * 200:]
    for i in range(count):
      height, width = rng.integers(60, 120, 2)
      y, x = rng.integers(200 - height), rng.integers(200 - width)
      PIL.Image.fromarray(region[y:y + height, x:x + width]).save(folder / name / f'{i}.jpg', quality=90)


@pytest.fixture(scope='session')
def photos(tmp_path_factory) -> pathlib.Path:
  """A folder set of four classes with train (12 images a class) and test (5)."""
  folder = tmp_path_factory.mktemp('photos')
  write_images(folder / 'train', dict.fromkeys(('blossom', 'roof', 'sky', 'wall'), 12))
  write_images(folder / 'test', dict.fromkeys(('blossom', 'roof', 'sky', 'wall'), 5), seed=1)
  return folder


@pytest.fixture(scope='session')
def pool(tmp_path_factory) -> pathlib.Path:
  """A pre-training folder of six classes without splits, ten images each; none is nearly the same as one of
  `photos`."""
  folder = tmp_path_factory.mktemp('pool')
  write_images(folder, dict.fromkeys(('a', 'b', 'c', 'd', 'e', 'f'), 10), seed=11)
  return folder


def quick_main(*flags: str) -> subprocess.CompletedProcess[str]:
  """main.py on one device, with warnings as errors."""
  # The exception is ml_collections' own, when it reads a config on Python 3.11.
  return started.main(*flags, JAX_PLATFORMS='cpu',
                      PYTHONWARNINGS='error,ignore:the load_module() method is deprecated:DeprecationWarning')


@pytest.fixture(scope='session')
def trained_run(photos, tmp_path_factory, worker_id) -> pathlib.Path:
  """The workdir of a short fine-tuning on `photos`, trained once for all workers of pytest-xdist."""
  base = tmp_path_factory.getbasetemp()
  workdir = (base if worker_id == 'master' else base.parent) / 'trained_run'
  with filelock.FileLock(f'{workdir}.lock'):
    if not (workdir / 'results.json').exists():
      _train(photos, workdir)
  return workdir


def _train(photos: pathlib.Path, workdir: pathlib.Path) -> None:
  run = quick_main(  # plain: the pre-training data need not be there
      '--config=configs/miniature.py:finetune', '--config.source.name=tfds:imagenet2012',
      '--config.selection.method=none',
      f'--config.target.name=folder:{photos}', '--config.model.weights=', '--config.model.width=4',
      '--config.image_size=32',
      '--config.augment.short_side=36', '--config.train.steps=30', '--config.train.batch_size=8',
      '--config.train.learning_rate=0.03',
      '--config.train.eval_every=15', f'--workdir={workdir}')
  assert run.returncode == 0, run.stderr
