"""Sharing a batch over devices."""

import pathlib

import jax
import numpy as np
import pytest

from ft_jax import parallel


@pytest.mark.parametrize('size,words', [(6, 'use 4 or 8'), (3, 'use 4'), (0, 'use 4')])
def test_uneven_batch_is_refused_with_what_would_do(size, words):
  with pytest.raises(ValueError, match=f'batch is {size}, which 4 devices cannot share evenly; {words}'):
    parallel.check_batch(size, 'batch')


def test_shard_and_replicate_round_trip():
  batch = {'input': np.arange(24).reshape(8, 3)}
  assert parallel.shard(batch)['input'].shape == (4, 2, 3)
  tree = {'a': np.float32(3), 'b': np.arange(5, dtype=np.float32)}
  copies = parallel.replicate(tree)
  assert copies['b'].shape == (4, 5)
  back = parallel.unreplicate(copies)
  assert back['a'].shape == () and back['a'] == 3 and (back['b'] == tree['b']).all()


def test_results_are_read_while_the_next_one_is_made():
  """In order, every one once, two at most in memory; an error of a later batch comes through."""
  orders = ([], ['made 0', 'read 0'], ['made 0', 'made 1', 'read 0', 'read 1'],
            ['made 0', 'made 1', 'read 0', 'made 2', 'read 1', 'read 2'])
  for count, order in enumerate(orders):
    events = []
    results = (events.append(f'made {k}') or k for k in range(count))
    assert list(parallel.read_late(results, lambda k, events=events: events.append(f'read {k}')
                                   or k)) == list(range(count))
    assert events == order
  with pytest.raises(ZeroDivisionError):
    list(parallel.read_late((1 // k for k in (1, 1, 0)), lambda k: k))


def test_jax_pmap_is_called_in_one_file():
  """The day that it goes, one file changes. `selection` has a mesh of its own, and no pmap."""
  root = pathlib.Path(parallel.__file__).parents[1]
  calling = {path.name for package in ('ft_jax', 'selection') for path in (root / package).rglob('*.py')
             if 'jax.pmap(' in path.read_text()}
  assert calling == {'parallel.py'}


def test_a_step_is_compiled_once():
  """The first state and those that a pmapped step returns have one layout: with two, the step would be compiled
  twice."""
  step = parallel.pmap(lambda state: jax.tree.map(lambda x: x + 1, state), donate=True)
  source = {'a': np.ones(3, np.float32)}
  first = parallel.replicate(source)
  layout = first['a'].sharding
  second = step(first)
  assert second['a'].sharding == layout and second['a'].aval == parallel.replicate(source)['a'].aval
  assert source['a'].tolist() == [1, 1, 1]  # what was copied is not what was donated
