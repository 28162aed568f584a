"""Back-end for the two image sets of the demo, made of data inside scikit-learn: nothing is downloaded.

The pool has handwritten digits of nine writers, those of every second writer dark on light, and patches of two
photographs (one class per region); the target has digits of other writers, dark on light and upside down. Every image
is 8x8, grey and of full contrast, so that neither sharpness nor brightness nor colour gives a class away.
"""

import numpy as np

from ft_jax.data import contents
from ft_jax.data.image_set import digest, ImageSet

# Where the digits of each writer begin (scikit-learn MOOC, "Sample grouping": the writers come one after another).
_WRITERS = (0, 130, 256, 386, 516, 646, 776, 915, 1029, 1157, 1287, 1415, 1545, 1667, 1797)
# The writers of the pool and of each split of the target. Nobody is in two of them.
_POOL, _TRAIN, _VAL, _TEST = range(0, 9), range(9, 11), range(11, 12), range(12, 14)
_TRAIN_PER_CLASS = 8
_PATCHES_PER_REGION, _PATCH, _GRID = 60, 64, (2, 4)


def open_digits(name: str, split: str) -> ImageSet:
  """Opens `pool` (split train) or `target` (train, val, test); see `load`."""
  images, labels, ids, class_names = load(name, split)
  fingerprint = digest(images.tobytes(), labels.tobytes(), *class_names)
  return ImageSet(
      f'digits:{name} {split}', class_names, labels, np.asarray(ids), np.arange(len(labels)),
      read=lambda row: images[row],
      fingerprint=fingerprint,
      contents=np.array([contents.of_array(image) for image in images], contents.HASH),
      legacy_fingerprint=fingerprint)


def load(name: str, split: str) -> tuple[np.ndarray, np.ndarray, list[str], tuple[str, ...]]:
  """Images uint8 `[n, 8, 8]`, labels int32 `[n]`, ids and class names of `pool` (train) or `target` (train, val, test).

  Raises:
    ValueError: another name or split.
  """
  known = {('pool', 'train'): _pool, ('target', 'train'): lambda: _target(_TRAIN, _TRAIN_PER_CLASS),
           ('target', 'val'): lambda: _target(_VAL, None), ('target', 'test'): lambda: _target(_TEST, None)}
  if (name, split) not in known:
    raise ValueError(f'digits:{name} {split}: known are {", ".join(f"digits:{n} {s}" for n, s in known)}')
  return known[name, split]()


def _pool() -> tuple[np.ndarray, np.ndarray, list[str], tuple[str, ...]]:
  images, labels, writers, ids = _digits(_POOL)
  images = np.where((writers % 2 == 1)[:, None, None], 255 - images, images)
  patches, regions, patch_ids, names = _patches()
  return (np.concatenate([images, patches]), np.concatenate([labels, regions + 10]).astype(np.int32), ids + patch_ids,
          tuple(f'digit {i}' for i in range(10)) + names)


def _target(writers: range, per_class: int | None) -> tuple[np.ndarray, np.ndarray, list[str], tuple[str, ...]]:
  images, labels, _, ids = _digits(writers)
  keep = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))
  upside_down = 255 - images[keep][:, ::-1, ::-1]
  return upside_down, labels[keep], [ids[i] for i in keep], tuple(f'upside-down {i}' for i in range(10))


def _digits(writers: range) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
  from sklearn import datasets  # takes a second to import; only the demo needs it

  data = datasets.load_digits()
  rows = np.concatenate([np.arange(_WRITERS[w], _WRITERS[w + 1]) for w in writers])
  images = np.round(data.images[rows] * (255 / 16)).astype(np.uint8)
  writer = np.searchsorted(_WRITERS, rows, side='right') - 1
  return images, data.target[rows].astype(np.int32), writer, [f'digits/{row}' for row in rows]


def _patches() -> tuple[np.ndarray, np.ndarray, list[str], tuple[str, ...]]:
  """Random squares of each region of scikit-learn's two photographs, reduced to 8x8 grey pixels of full contrast."""
  from sklearn import datasets

  rng = np.random.default_rng(0)
  photos = datasets.load_sample_images()
  patches, labels = list[np.ndarray](), list[int]()
  ids, names = list[str](), list[str]()
  for file_name, photo in zip(photos.filenames, photos.images):
    grey = photo.astype(np.float64).mean(-1)
    height, width = grey.shape[0] // _GRID[0], grey.shape[1] // _GRID[1]
    stem = str(file_name).replace('\\', '/').rsplit('/', 1)[-1].split('.')[0]
    for i in range(_GRID[0]):
      for j in range(_GRID[1]):
        for k in range(_PATCHES_PER_REGION):
          y = i * height + rng.integers(height - _PATCH + 1)
          x = j * width + rng.integers(width - _PATCH + 1)
          block = _PATCH // 8
          square = grey[y:y + _PATCH, x:x + _PATCH].reshape(8, block, 8, block).mean((1, 3))
          square = (square - square.min()) / max(np.ptp(square), 1.0)
          patches.append(np.round(255 * square).astype(np.uint8))
          labels.append(len(names))
          ids.append(f'{stem}/{i}{j}/{k}')
        names.append(f'{stem} {i}{j}')
  return np.stack(patches), np.asarray(labels, np.int32), ids, tuple(names)
