"""Sharing a batch over devices."""

import numpy as np
import pytest

from ft_jax import parallel


@pytest.mark.parametrize('size,words', [(6, 'use 4 or 8'), (3, 'use 4'), (0, 'use 4')])
def test_uneven_batch_is_refused_with_what_would_do(size, words):
  with pytest.raises(ValueError, match=f'batch is {size}, which 4 devices cannot share evenly; {words}'):
    parallel.check_batch(size, 'batch')


def test_shard_and_replicate_round_trip():
  batch = {'image': np.arange(24).reshape(8, 3)}
  assert parallel.shard(batch)['image'].shape == (4, 2, 3)
  tree = {'a': np.float32(3), 'b': np.arange(5, dtype=np.float32)}
  copies = parallel.replicate(tree)
  assert copies['b'].shape == (4, 5)
  back = parallel.unreplicate(copies)
  assert back['a'].shape == () and back['a'] == 3 and (back['b'] == tree['b']).all()
