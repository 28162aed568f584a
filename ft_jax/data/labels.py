"""Labels that a Python user gives with images: checked, and turned into numbers of classes."""

from collections.abc import Iterable, Sequence

import numpy as np

from ft_jax.data.image_set import Labels, UNLABELLED


def as_class_labels(labels: Labels | None, class_names: Sequence[str] | None,
                    count: int) -> tuple[np.ndarray, tuple[str, ...]]:
  """The labels of `count` images as int32 `[count]`, and the names of the classes.

  Args:
    labels: numbers of classes (0 is the first) or names of classes, one per image. None: all images are of the class
      UNLABELLED.
    class_names: the names in the order of the numbers. None: the names in `labels`, sorted, or '0', '1', ... up to the
      largest number.
    count: how many images there are.

  Raises:
    ValueError: the labels do not fit the images or the class names.
  """
  names = None if class_names is None else _check_names(class_names)
  if labels is None:
    if names is not None and len(names) != 1:
      raise ValueError(f'class_names has {len(names)} names, but there are no labels; give labels, one per image')
    return np.zeros(count, np.int32), names or (UNLABELLED,)
  if isinstance(labels, str):
    raise ValueError(f'labels is the string {labels!r}; expected one label per image, {count:,d} in all')
  values = _as_array(labels)
  if values.ndim == 2:
    raise ValueError(f'labels has shape {values.shape}; expected one class per image, [{count}]. '
                     'If the rows are one-hot, give labels.argmax(1)')
  if values.shape != (count,):
    raise ValueError(f'labels has shape {values.shape}, but there are {count:,d} images; expected one label '
                     f'per image, [{count}]')
  if values.dtype.kind in 'US':
    return _numbers_of_names(values.astype(str), names)
  if values.dtype.kind not in 'iu':
    raise ValueError(f'labels has dtype {values.dtype}; expected integers, 0 for the first class, or the names '
                     'of classes')
  if values.min() < 0:
    i = int(values.argmin())
    raise ValueError(f'labels[{i}] is {values[i]}; expected numbers of 0 or more. Leave out images without a label')
  if names is None:
    return values.astype(np.int32), tuple(str(k) for k in range(int(values.max()) + 1))
  if values.max() >= len(names):
    i = int(values.argmax())
    raise ValueError(f'labels[{i}] is {values[i]}, but class_names has {len(names)} names; expected labels from 0 to '
                     f'{len(names) - 1}')
  return values.astype(np.int32), names


def _check_names(class_names: Sequence[str]) -> tuple[str, ...]:
  if isinstance(class_names, str):
    raise ValueError(f'class_names is the string {class_names!r}; expected a list of names')
  if not isinstance(class_names, Iterable):
    raise ValueError(f'class_names is {class_names!r}; expected a list of names')
  names = tuple(str(name) if isinstance(name, np.str_) else name for name in class_names)
  wrong = next((name for name in names if not isinstance(name, str) or not name), None)
  if wrong is not None:
    raise ValueError(f'class_names contains {wrong!r}; expected non-empty strings')
  if not names:
    raise ValueError('class_names is empty; expected one name per class')
  repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
  if repeated is not None:
    raise ValueError(f'class_names contains {repeated!r} twice; expected one name per class')
  return names


def _as_array(labels: Labels) -> np.ndarray:
  try:
    values = np.asarray(labels)
  except ValueError as error:  # rows of different lengths
    raise ValueError('labels has entries of different lengths; expected one number or name of a class per '
                     'image') from error
  if values.dtype.kind == 'O' and values.ndim == 1 and all(isinstance(value, str) for value in values.tolist()):
    return values.astype(str)  # a pandas column of strings
  became_strings = not isinstance(labels, np.ndarray) and values.dtype.kind in 'US'
  if became_strings and not all(isinstance(value, str) for value in labels):
    raise ValueError('labels mixes strings with other values; expected either the numbers of classes or their names')
  return values


def _numbers_of_names(values: np.ndarray, names: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
  empty = np.flatnonzero(values == '')
  if len(empty):
    raise ValueError(f'labels[{empty[0]}] is empty; expected the name of a class')
  known = names or tuple(np.unique(values).tolist())
  numbers = {name: k for k, name in enumerate(known)}
  unknown = next((i for i, value in enumerate(values.tolist()) if value not in numbers), None)
  if unknown is not None:
    more = ', ...' if len(known) > 5 else ''
    raise ValueError(f'labels[{unknown}] is {str(values[unknown])!r}, which class_names does not have; it has '
                     f'{len(known)}: {", ".join(known[:5])}{more}')
  return np.array([numbers[value] for value in values.tolist()], np.int32), known
