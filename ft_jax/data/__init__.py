"""Image sets of any kind: `open_set('folder:photos', 'train')`, `ImageSet.from_arrays(images, labels)`.

A back-end is one file that makes an ImageSet, and one row of BACKENDS. It is imported when a set of its kind is opened,
so that importing this package needs neither TFDS nor grain.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import os

from ft_jax.data.image_set import Example, ImageSet

__all__ = ['BACKENDS', 'Example', 'ImageSet', 'open_set', 'opened_once']

# The sets that were opened, by name, split and data_dir; None outside of `opened_once`.
_OPENED: contextvars.ContextVar[dict[tuple[str, str, str], ImageSet] | None] = contextvars.ContextVar(
    'opened', default=None)


@contextlib.contextmanager
def opened_once() -> Iterator[None]:
  """Within it, `open_set` opens each split once: to list a large folder takes as long as a short training."""
  token = _OPENED.set({})
  try:
    yield
  finally:
    _OPENED.reset(token)


def open_set(name: str, split: str, data_dir: str = '', quiet: bool = False) -> ImageSet:
  """Opens one split of an image set.

  Args:
    name: `folder:<path>`, `tfds:<name>[/config][:version]`, or `digits:pool` and `digits:target` (those of the demo). A
      folder of images without class folders is a set of one class, UNLABELLED, which can be the pool that is selected
      from.
    split: such as `train`, `train[:90%]` or `train+val`. A slice of a `tfds:` set is TFDS's own, of the whole split; a
      slice of a `folder:` is taken of each class separately.
    data_dir: the folder of prepared TFDS sets, and where the path of a relative `folder:` starts.
    quiet: do not log which files of a folder are not used; `ImageSet.unused` has them for the caller to log.

  Raises:
    ValueError: the name, split or folder does not exist or has no images; the message says which exist.
  """
  backend, _, rest = name.partition(':')
  if backend not in BACKENDS or not rest:
    hint = f'; did you mean {f"folder:{name}"!r}?' if os.path.isdir(os.path.expanduser(name)) else ''
    raise ValueError(f'data set {name!r}: expected {", ".join(f"{kind}:..." for kind in BACKENDS)}{hint}')
  known = _OPENED.get()
  opened = known.get((name, split, data_dir)) if known is not None else None
  if opened is None:
    opened = BACKENDS[backend](rest, split, data_dir)
  if known is not None:
    known[name, split, data_dir] = opened
  if not quiet and opened.unused is not None:
    from ft_jax.data.unused_files import log_unused
    log_unused(name, [opened.unused])
  return opened


def _tfds(name: str, split: str, data_dir: str) -> ImageSet:
  from ft_jax.data import tfds
  return tfds.open_tfds(name, split, data_dir)


def _folder(path: str, split: str, data_dir: str) -> ImageSet:
  from ft_jax.data import folders
  return folders.open_folder(path, split, data_dir)


def _digits(name: str, split: str, data_dir: str) -> ImageSet:
  del data_dir
  from ft_jax.data import digits
  return digits.open_digits(name, split)


# By the prefix of a set's name; each function takes what follows the colon, the split, and data_dir.
BACKENDS: dict[str, Callable[[str, str, str], ImageSet]] = {
    'tfds': _tfds,
    'folder': _folder,
    'digits': _digits,
}
