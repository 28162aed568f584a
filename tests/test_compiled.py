"""What is compiled once is not compiled again, by whichever function comes to the same program, in this start or the
next."""

import os
import pathlib
import warnings

from conftest import quick_main
import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

from ft_jax import compiled


@pytest.fixture
def hits():
  """A list that grows by one where a compiled program is found."""
  found = []
  listener = lambda event, **kwargs: found.append(event) if event == '/jax/compilation_cache/cache_hits' else None
  jax.monitoring.register_event_listener(listener)
  yield found
  jax.monitoring.unregister_event_listener(listener)


@pytest.fixture
def no_cache(monkeypatch):
  """jax as it is where nobody told it of a folder."""
  monkeypatch.setattr(compiled, 'SECONDS', 0.0)
  options = ('jax_compilation_cache_dir', 'jax_compilation_cache_max_size',
             'jax_persistent_cache_min_compile_time_secs')
  before = {name: getattr(jax.config, name) for name in options}
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()
  with warnings.catch_warnings():
    yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def test_within_and_after(hits, no_cache):
  with compiled.once():
    folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
    assert [float(jax.jit(lambda x: x * 3 + 1)(2.0)) for _ in range(2)] == [7.0, 7.0] and len(hits) == 1
    assert list(folder.iterdir())
  assert jax.config.jax_compilation_cache_dir is None and not folder.exists()
  assert float(jax.jit(lambda x: x * 3 + 1)(2.0)) == 7.0 and len(hits) == 1


def test_kept_for_the_next_start(hits, no_cache, tmp_path, monkeypatch, caplog):
  """In the user's cache folder, told once; what a killed process left half written is removed and made again."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(compiled.log, 'propagate', True)
  caplog.set_level('INFO')

  def start():
    jax.config.update('jax_compilation_cache_dir', None)
    jax.clear_caches()
    compiled.keep('auto')
    return float(jax.jit(lambda x: x * 5 + 2)(2.0)), len(hits)

  assert start() == (12.0, 0) and start() == (12.0, 1)
  folder = tmp_path / 'ft_jax' / 'compiled'
  assert caplog.text.count(f'compiled programs are kept in {folder}') == 1
  for program in folder.glob('*-cache'):
    program.write_bytes(program.read_bytes()[:9])
    program.with_name(program.name.removesuffix('-cache') + '-atime').unlink()
  assert start() == (12.0, 1) and start() == (12.0, 2)


def test_a_damaged_program_is_compiled_again(hits, no_cache, tmp_path):
  compiled.keep(str(tmp_path))
  assert float(jax.jit(lambda x: x * 7)(2.0)) == 14.0
  for program in tmp_path.glob('*-cache'):
    program.write_bytes(program.read_bytes()[:9])
  jax.clear_caches()
  assert float(jax.jit(lambda x: x * 7)(2.0)) == 14.0 and not hits


def test_no_folder_no_lock_or_one_that_others_write_to(no_cache, tmp_path, monkeypatch, caplog):
  """What lies there is run, so nobody else may write to it."""
  monkeypatch.setattr(compiled.log, 'propagate', True)
  compiled.keep('')
  with pytest.raises(
      ValueError, match="config.compile_cache is 'gs://bucket/compiled'; expected a folder on a disk, 'auto', or ''"):
    compiled.keep('gs://bucket/compiled')
  (tmp_path / 'open').mkdir()
  (tmp_path / 'open').chmod(0o777)
  compiled.keep(str(tmp_path / 'open'))
  (tmp_path / 'file').touch()
  compiled.keep(str(tmp_path / 'file'))
  assert caplog.text.count('compiled programs cannot be kept in') == 2 and 'others may write to it' in caplog.text
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setattr(pathlib.Path, 'home', lambda: (_ for _ in ()).throw(RuntimeError('no home')))
  compiled.keep('auto')
  monkeypatch.delenv('HOME', raising=False)
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)  # as where the system does not know the user
  with pytest.raises(ValueError, match='there is no home directory to expand ~'):
    compiled.keep('~/compiled')
  assert jax.config.jax_compilation_cache_dir is None


def test_main_keeps_them_before_the_job_begins(tmp_path, monkeypatch):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  for setting, there in (('', False), ('auto', True)):
    run = quick_main('--config=configs/default.py', f'--config.compile_cache={setting}',
                     f'--workdir={tmp_path / "run"}')
    assert run.returncode == 1 and 'config.target.name is empty' in run.stderr
    assert (tmp_path / 'ft_jax' / 'compiled').exists() == there


def test_a_folder_of_the_users_is_left_alone():
  before = jax.config.jax_compilation_cache_dir
  with compiled.once():
    assert jax.config.jax_compilation_cache_dir == before
  assert pathlib.Path(before).exists()
