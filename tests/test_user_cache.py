"""An unknown user of a container has no home directory: what is only kept to save time is done without."""

import os
import pathlib
import pwd
import subprocess
import sys

import numpy as np
import pytest

from ft_jax import user_cache as user_cache_module
from ft_jax.data import tfds
from ft_jax.data.disk_cache import cached_arrays
from ft_jax.user_cache import home_directory, user_cache
from selection import storage


def nobody(number: int):
  raise KeyError(f'getpwuid(): uid not found: {number}')


@pytest.fixture
def no_home(monkeypatch):
  monkeypatch.delenv('HOME', raising=False)
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)
  monkeypatch.setattr(pwd, 'getpwuid', nobody)
  user_cache_module._warn_once.cache_clear()
  with pytest.raises(RuntimeError, match='Could not determine home directory'):
    pathlib.Path.home()
  yield
  user_cache_module._warn_once.cache_clear()


def test_without_a_home_nothing_is_kept_and_it_is_said_once(no_home, caplog):
  made = []
  for _ in range(2):
    assert cached_arrays('labels', 'key', lambda: made.append('again')
                         or {'labels': np.arange(3)})['labels'].tolist() == [0, 1, 2]
  assert len(made) == 2 and user_cache() is None and home_directory() is None
  assert [record.message for record in caplog.records] == [
      'warning: there is no home directory, so nothing is cached between runs; set XDG_CACHE_HOME to a folder that can '
      'be written to']


def test_a_home_that_is_no_folder(monkeypatch, tmp_path):
  """As /nonexistent, the home of `nobody`."""
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('HOME', str(tmp_path / 'file'))
  monkeypatch.delenv('XDG_CACHE_HOME')
  assert cached_arrays('labels', 'key', lambda: {'labels': np.arange(3)})['labels'].tolist() == [0, 1, 2]


def test_the_folder(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setenv('XDG_CACHE_HOME', 'not/absolute')
  assert user_cache() == tmp_path / '.cache' / 'ft_jax'
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'other'))
  assert user_cache() == tmp_path / 'other' / 'ft_jax'


def test_what_must_be_in_the_home_is_refused(no_home, tmp_path):
  """Libraries would write to a folder named `~` in the folder that the program was started from."""
  for path in ('~', '~/runs/pets'):
    with pytest.raises(ValueError, match='there is no home directory to expand ~'):
      storage.located(path)
  assert os.fspath(storage.located(tmp_path / '~')) == str(tmp_path / '~')
  with pytest.raises(ValueError,
                     match='there is no home directory for ~/tensorflow_datasets; give the folder of TFDS sets'):
    tfds.tfds_builder('mnist', '')


def test_the_hub_gets_a_folder_for_the_time_of_the_process(tmp_path):
  program = f'''
import pwd, sys
sys.path.insert(0, {str(pathlib.Path(__file__).parents[1])!r})
def nobody(number): raise KeyError(number)
pwd.getpwuid = nobody
from ft_jax.models import hub
hub._ensure_home()
from huggingface_hub import constants
print(constants.HF_HUB_CACHE)
'''
  environment = {key: value for key, value in os.environ.items() if key not in ('HOME', 'XDG_CACHE_HOME')
                 and not key.startswith('HF_')}
  run = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, env=environment, capture_output=True, text=True,
                       check=True)
  cache = pathlib.Path(run.stdout.strip())
  assert cache.is_absolute() and not cache.parent.exists() and os.listdir(tmp_path) == []
  assert 'there is no home directory for the cache of huggingface_hub' in run.stderr
