"""What is compiled once is not compiled again, by whichever function comes to the same program; and nothing of it stays."""

import pathlib

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


def test_within_and_after(hits, monkeypatch):
  monkeypatch.setattr(compiled, 'SECONDS', 0.0)
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()
  try:
    with compiled.once():
      folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
      assert [float(jax.jit(lambda x: x * 3 + 1)(2.0)) for _ in range(2)] == [7.0, 7.0] and len(hits) == 1 and list(folder.iterdir())
    assert jax.config.jax_compilation_cache_dir is None and not folder.exists()
    assert float(jax.jit(lambda x: x * 3 + 1)(2.0)) == 7.0 and len(hits) == 1
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
    compilation_cache.reset_cache()


def test_a_folder_of_the_users_is_left_alone():
  before = jax.config.jax_compilation_cache_dir
  with compiled.once():
    assert jax.config.jax_compilation_cache_dir == before
  assert pathlib.Path(before).exists()
