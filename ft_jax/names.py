"""Names of files and classes may be anything that a file system has; here they are made harmless for terminals and spreadsheets."""

from collections.abc import Iterable
import csv
import io
import re
from typing import Any

# Escape sequences clear the screen or write lines that were never logged; marks of direction show a name in another order than it has.
_OBEYED = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]')
# What makes a cell a formula, behind blanks and the mark that takes that away.
_FORMULA = re.compile(r"[\s']*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def visible(text: str) -> str:
  """A text for the terminal: what a terminal would obey is spelt out, as `\\x1b[2J`; line breaks and tabs stay."""
  return _OBEYED.sub(lambda found: repr(found[0])[1:-1], text)


def short(error: BaseException) -> str:
  """What an error says, in one line of 300 letters at most."""
  return ' '.join(str(error).split())[:300]


def cell(text: str) -> str:
  """A text for a CSV file that no spreadsheet takes for a formula: such a one begins with an apostrophe. `from_cell` takes it away."""
  return f"'{text}" if _FORMULA.match(text) else text


def csv_line(values: Iterable[Any]) -> str:
  """A line of a CSV file; Python 3.11 leaves a bare carriage return unquoted where lines end otherwise, and cannot read that again."""
  text = io.StringIO()
  csv.writer(text, lineterminator='\r\n').writerow(values)
  return text.getvalue()[:-2] + '\n'


def from_cell(text: str) -> str:
  """What `cell` was given."""
  return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def listed(names: Iterable[str], most: int = 4) -> str:
  """The first few names, and how many more there are."""
  names = list(names)
  return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
