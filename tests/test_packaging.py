"""The wheel has both packages, the configs inside of ft_jax, and nothing else."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> zipfile.ZipFile:
  """Built from a copy, as setuptools writes beside its sources."""
  source = tmp_path_factory.mktemp('source')
  ignored = shutil.ignore_patterns('__pycache__', '*.egg-info', 'build')
  for name in ('ft_jax', 'selection', 'configs'):
    shutil.copytree(ROOT / name, source / name, ignore=ignored)
  for name in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE', 'requirements.txt', 'requirements-dev.txt'):
    shutil.copy(ROOT / name, source / name)
  code = 'from setuptools import build_meta; print(build_meta.build_wheel("dist"))'
  built = subprocess.run([sys.executable, '-W', 'error', '-c', code], cwd=source, capture_output=True, text=True,
                         check=False)
  assert not built.returncode, built.stderr
  return zipfile.ZipFile(source / 'dist' / built.stdout.split()[-1])


def test_the_wheel_has_every_file_of_the_packages(wheel):
  files = {path.relative_to(ROOT).as_posix() for name in ('ft_jax', 'selection', 'configs')
           for path in (ROOT / name).rglob('*')
           if path.suffix in ('.py', '.jinja', '.txt')}
  installed = {f'ft_jax/{name}' if name.startswith('configs/') else name for name in files}
  assert {name for name in wheel.namelist() if '.dist-info/' not in name} == installed


def test_nothing_else_lies_at_the_top_level(wheel):
  """A top-level package named configs would shadow those of other projects."""
  top = {name.partition('/')[0] for name in wheel.namelist()}
  assert {name for name in top if not name.endswith('.dist-info')} == {'ft_jax', 'selection'}


def test_the_wheel_has_the_command(wheel):
  entry_points = next(name for name in wheel.namelist() if name.endswith('entry_points.txt'))
  assert 'ft-jax = ft_jax.main:command' in wheel.read(entry_points).decode()


def test_the_command_of_an_installed_package_works_from_any_folder(wheel, tmp_path):
  """It finds configs by name, and those of a user find the others, without the repository."""
  wheel.extractall(tmp_path / 'site')
  mine = tmp_path / 'mine.py'
  mine.write_text(
      'from configs import pets\n\n\ndef get_config():\n  config = pets.get_config()\n  config.job = "nothing"\n'
                  '  return config\n')
  code = (f'import sys; sys.path.insert(0, {str(tmp_path / "site")!r}); sys.argv[0] = "ft-jax"; '
          'from ft_jax.main import command; command()')
  for config, problem in {'nothing': 'there is no file nothing; known configs: aircraft',
                          str(mine): "config.job is 'jump'; known: finetune"}.items():
    done = subprocess.run([sys.executable, '-I', '-c', code, f'--config={config}', '--config.job=jump'], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1 and problem in done.stderr and 'Traceback' not in done.stderr, done.stderr
