"""The 1000 classes of ImageNet: what a folder of WordNet ids or TFDS's labels are called in reports."""

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
  """The names of classes that are all WordNet ids of ImageNet; any other class names as they are."""
  known = names()
  return tuple(known[name] for name in class_names) if all(name in known for name in class_names) else tuple(class_names)
