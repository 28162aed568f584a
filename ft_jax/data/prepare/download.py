"""Checks before a download of gigabytes: whether the address answers, and whether the disk has room."""

import pathlib
import shutil

from ft_jax.data.prepare.archives import in_bytes


class DownloadFailed(ValueError):
  """An address does not answer, or gives something else than it should."""


def check_address(url: str) -> None:
  """Makes one request. TFDS itself tries an address that does not answer for minutes.

  Raises:
    DownloadFailed: it does not answer, or answers with an error.
  """
  import requests

  try:
    with requests.get(url, stream=True, timeout=20) as response:
      if response.status_code >= 400:
        raise DownloadFailed(f'{url} answers {response.status_code} {response.reason}')
  except requests.RequestException as error:
    raise DownloadFailed(f'{url} does not answer ({type(error).__name__}); is there a network?') from error


def check_room(folder: pathlib.Path, needed: int, what: str) -> None:
  """Raises ValueError unless the disk of `folder` has room for about `needed` bytes."""
  while not folder.exists():
    folder = folder.parent
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise ValueError(f'{what} take about {in_bytes(needed)}, but {folder} has {in_bytes(free)} free; free some space, '
                     'or give another --data_dir')
