"""The best scores in order, and the plural names of the units."""

import numpy as np

NOUNS = {'class': 'classes', 'cluster': 'clusters', 'example': 'examples'}


def best(scores: np.ndarray, ascending: bool, size: int) -> np.ndarray:
  """Indices of the `size` best scores (of all if there are fewer), best first, ties by index: int `[size]`."""
  order = scores if ascending else -scores
  if not 0 < size < len(order):
    return np.argsort(order, kind='stable')[:size]
  limit = np.partition(order, size - 1)[size - 1]  # linear in n, so only the best ones have to be sorted
  below = np.flatnonzero(order < limit)
  candidates = np.concatenate([below, np.flatnonzero(order == limit)[:size - len(below)]])
  return candidates[np.argsort(order[candidates], kind='stable')]
