"""Names of classes: what differs between the classes of two splits, and names that look the same."""

from collections.abc import Iterable, Sequence
import unicodedata


def class_difference(one: str, one_names: Sequence[str], other: str, other_names: Sequence[str], most: int = 5) -> str:
  """Which classes only one of two splits has, for messages: `only in train: cat, dog; only in test: emu`.

  Args:
    one, other: names of the splits.
    one_names, other_names: names of their classes.
    most: how many names are written out for each split.
  """
  only_one, only_other = set(one_names) - set(other_names), set(other_names) - set(one_names)
  pairs = look_alike(only_one, only_other)
  parts = [f'{a} in {one} is {b} in {other}; give the folder one name' for a, b in pairs.values()][:1]
  for split, names in ((one, only_one - {a for a, _ in pairs}), (other, only_other - {b for _, b in pairs})):
    if names:
      more = f' and {len(names) - most} others' if len(names) > most else ''
      parts.append(f'only in {split}: {", ".join(sorted(names)[:most])}{more}')
  return '; '.join(parts) or 'the same classes in another order'


def look_alike(some: Iterable[str], others: Iterable[str]) -> dict[tuple[str, str], tuple[str, str]]:
  """Pairs of different names that look the same or differ in capitals only, with spellings that tell them apart."""
  known = {normalized(name).casefold(): name for name in some}
  pairs = ((known.get(normalized(other).casefold(), other), other) for other in sorted(others))
  return {(one, other): spelled_apart(one, other) for one, other in pairs if one != other}


def normalized(name: str) -> str:
  """A name without invisible differences: extra blanks, and how accents are encoded (macOS splits them off)."""
  return ' '.join(unicodedata.normalize('NFC', name).split())


def spelled_apart(one: str, other: str) -> tuple[str, str]:
  """Two names for a message in which they must look different: escaped if they would look the same."""
  look_the_same = unicodedata.normalize('NFC', one) == unicodedata.normalize('NFC', other)
  return (ascii(one), ascii(other)) if look_the_same else (repr(one), repr(other))
