"""Names of the 1000 ImageNet classes, for reports: folders are named by WordNet ids, and so are TFDS's labels."""

from collections.abc import Sequence
import functools
import pathlib

NAMES_FILE = pathlib.Path(__file__).parent / 'imagenet_names.txt'


@functools.cache
def names() -> dict[str, str]:
  """The name of each WordNet id (`n02124075` -> `Egyptian cat`), unique, in the order of ImageNet's labels."""
  lines = NAMES_FILE.read_text(encoding='utf-8').splitlines()
  pairs = (line.split(' ', 1) for line in lines if not line.startswith('#'))
  return {wnid: name for wnid, name in pairs}


def human_names(class_names: Sequence[str]) -> tuple[str, ...]:
  """English names if all class names are WordNet ids of ImageNet; otherwise the class names as they are."""
  known = names()
  if not all(name in known for name in class_names):
    return tuple(class_names)
  return tuple(known[name] for name in class_names)
