"""The demo's sets."""

import numpy as np

from ft_jax.data import open_set


def test_digits():
  """No writer is in two sets; the pool has 26 classes, the target eight training images per class."""
  pool, train, val, test = (open_set(*args) for args in (
      ('digits:pool', 'train'), ('digits:target', 'train'), ('digits:target', 'val'), ('digits:target', 'test')))
  assert len(pool.class_names) == 26 and (np.bincount(pool.labels) >= 60).all()
  assert np.bincount(train.labels).tolist() == [8] * 10
  ids = [i for source in (pool, train, val, test) for i in source.ids]
  assert len(ids) == len(set(ids))
  assert pool[0].image.shape == (8, 8)
