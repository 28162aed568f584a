"""Makes names of files and classes, which may be any text, safe for terminals and spreadsheets."""

from collections.abc import Iterable
import csv
import io
import re
from typing import Any

# Escape sequences can clear the screen or forge log lines; marks of direction change the order in which a name is
# shown.
_CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]')
# What makes a cell a formula, after blanks and apostrophes.
_FORMULA = re.compile(r"[\s']*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def visible(text: str) -> str:
  """A text for the terminal: control characters are written as escapes (`\\x1b[2J`), except line breaks and tabs."""
  return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def short(error: BaseException) -> str:
  """The message of an error, in one line of at most 300 characters."""
  return ' '.join(str(error).split())[:300]


def cell(text: str) -> str:
  """A cell of a CSV file: an apostrophe is put before what a spreadsheet would take for a formula.

  `from_cell` removes it again.
  """
  return f"'{text}" if _FORMULA.match(text) else text


def csv_line(values: Iterable[Any]) -> str:
  """A line of a CSV file.

  Python 3.11 does not quote a bare carriage return if lines end with anything else, and cannot read that back.
  """
  text = io.StringIO()
  csv.writer(text, lineterminator='\r\n').writerow(values)
  return text.getvalue()[:-2] + '\n'


def from_cell(text: str) -> str:
  """The text that `cell` was made from."""
  return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def listed(names: Iterable[str], most: int = 4) -> str:
  """The first few names, and how many more there are."""
  names = list(names)
  return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
