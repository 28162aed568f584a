"""Weights from the Hugging Face Hub: the safetensors file of a repository, by huggingface_hub and in its cache."""

import atexit
from collections.abc import Iterable
import functools
import os
import pathlib
import re
import shutil
import tempfile
from typing import NamedTuple

from ft_jax.progress import log
from ft_jax.user_cache import home_directory

# Seconds that the Hub may take to answer what a repository holds. A user's HF_HUB_ETAG_TIMEOUT goes before it.
_TIMEOUT = 5.0
# How a repository calls its weights, the best form first.
WEIGHTS = ('model.safetensors', 'pytorch_model.bin')


class Repo(NamedTuple):
  """A repository, and the branch, tag or commit of it."""
  name: str
  revision: str


class HubFile(NamedTuple):
  """A file of a repository on this disk, and the commit that it is of."""
  path: pathlib.Path
  commit: str


def parse(name: str) -> Repo | None:
  """`timm:<name>[@revision]` or `hf:<owner>/<name>[@revision]` as a repository; None where it is neither.

  Raises:
    ValueError: it begins like one and cannot be one.
  """
  kind, colon, rest = name.partition(':')
  if not colon or kind not in ('timm', 'hf'):
    return None
  path = f'timm/{rest}' if kind == 'timm' else rest
  match = re.fullmatch(r'(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?', path)
  if not match or '..' in rest:
    expected = 'hf:<owner>/<name>[@revision]'
    if kind == 'timm':
      expected = 'timm:<name>[@revision], such as timm:resnet18.tv_in1k'
    raise ValueError(f'model.weights is {name!r}; expected {expected}')
  return Repo(match['repo'], match['revision'] or 'main')


def fetch(repo: Repo, *, endpoint: str | None = None, cache_dir: str | pathlib.Path | None = None) -> HubFile:
  """The safetensors file of a repository: out of the cache where it is there, else downloaded to it.

  A branch that is in the cache is not looked up again: it stays at the commit that was downloaded.

  Args:
    repo: of `parse`.
    endpoint: another Hub's address; None is HF_ENDPOINT or huggingface.co.
    cache_dir: None is huggingface_hub's own, or a temporary folder where there is no home directory for it.

  Raises:
    ValueError: no such repository or revision, no access, no safetensors file in it, no network, or an interrupted
      download.
  """
  _ensure_home()
  import huggingface_hub
  from huggingface_hub import constants

  if (cached := _cached(repo, cache_dir)) is not None:
    return cached
  custom = constants.HF_HUB_ETAG_TIMEOUT != constants.DEFAULT_ETAG_TIMEOUT
  try:
    # One request without retries, so that a machine without a network is told at once.
    info = huggingface_hub.HfApi(endpoint=endpoint).model_info(
        repo.name, revision=repo.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT if custom else _TIMEOUT)
  except Exception as error:  # those of huggingface_hub and of the HTTP library below it, which differs by version
    raise ValueError(_explain(repo, error)) from error
  file_name = _choose(repo, [file.rfilename for file in info.siblings or ()])
  if file_name is None:
    raise ValueError(f'the repository {repo.name} has no .safetensors file at revision {repo.revision}')
  log.info('downloading %s of %s', file_name, repo.name)
  try:
    # By the name of the revision, which the cache then knows.
    path = pathlib.Path(huggingface_hub.hf_hub_download(
        repo.name, file_name, revision=repo.revision, endpoint=endpoint, cache_dir=cache_dir))
  except Exception as error:
    raise ValueError(_explain(repo, error, downloading=True)) from error
  return HubFile(path, path.parents[file_name.count('/')].name)


@functools.cache
def _ensure_home() -> None:
  """Where there is no home directory, huggingface_hub would write to a folder named `~`: it gets one for the time of
  this process.
  """
  if home_directory() or os.environ.get('HF_HOME') or os.environ.get('XDG_CACHE_HOME'):
    return
  os.environ['HF_HOME'] = folder = tempfile.mkdtemp(prefix='huggingface-')  # read when it is imported
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  if not os.environ.get('HF_HUB_CACHE'):
    log.warning('warning: there is no home directory for the cache of huggingface_hub, so weights are downloaded for '
                'this run alone; '
                'set HF_HOME to a folder to keep them')


def _cached(repo: Repo, cache_dir: str | pathlib.Path | None) -> HubFile | None:
  import huggingface_hub
  from huggingface_hub.errors import LocalEntryNotFoundError

  try:
    snapshot = pathlib.Path(huggingface_hub.snapshot_download(
        repo.name, revision=repo.revision, cache_dir=cache_dir, local_files_only=True, allow_patterns='*.safetensors'))
  except LocalEntryNotFoundError:
    return None
  # A cached file may be a link to nothing, where somebody has cleared the cache by hand.
  files = [str(path.relative_to(snapshot)) for path in snapshot.rglob('*.safetensors') if path.exists()]
  try:
    file_name = _choose(repo, files)
  except ValueError:  # the Hub knows what else there is
    return None
  return HubFile(snapshot / file_name, snapshot.name) if file_name is not None else None


def weights_in(files: Iterable[str]) -> str | None:
  """Which of the files of a folder holds its weights, in a repository's layout; None where none of `WEIGHTS` is there.
  """
  files = set(files)
  return next((name for name in WEIGHTS if name in files), None)


def _choose(repo: Repo, files: Iterable[str]) -> str | None:
  """`model.safetensors`, or the only safetensors file; None where there is none."""
  found = sorted(name for name in files if name.endswith('.safetensors'))
  if 'model.safetensors' in found or not found:
    return 'model.safetensors' if found else None
  if len(found) > 1:
    raise ValueError(f'the repository {repo.name} has {len(found)} .safetensors files ({", ".join(found[:3])}, ...) '
                     'and none is '
                     'model.safetensors; download the right one and give its path')
  return found[0]


def _explain(repo: Repo, error: Exception, downloading: bool = False) -> str:
  """One sentence for what went wrong, with what to do."""
  from huggingface_hub import errors

  name, where = repo.name, f'https://huggingface.co/{repo.name}'
  log_in = 'log in with `hf auth login` or set HF_TOKEN'
  status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
  if isinstance(error, errors.OfflineModeIsEnabled):
    return (f'{name}@{repo.revision} is not in the cache of huggingface_hub, and HF_HUB_OFFLINE is set; unset it, or '
            'give a local file')
  if isinstance(error, errors.RevisionNotFoundError):
    return f'the repository {name} has no revision {repo.revision!r}; expected a branch, tag or commit of {where}'
  if isinstance(error, errors.GatedRepoError):
    return f'the repository {name} is open only to those who asked for it: ask at {where}, then {log_in}'
  if isinstance(error, errors.RepositoryNotFoundError):
    untagged = name.startswith('timm/') and '.' not in name
    tagged = '; names of timm have a tag, as in timm:resnet50.tv_in1k' if untagged else ''
    return f'there is no repository {name} at the Hugging Face Hub{tagged}. If it is a private one, {log_in}'
  if status == 401:
    return f'the Hugging Face Hub refuses your token: {log_in} again, or remove it if {name} is public'
  if status == 403:
    return (f'your token of Hugging Face gives no access to {name}; give it the right to read that repository, or '
            f'{log_in} with another')
  if status and not downloading:
    return f'the Hugging Face Hub answers {status} for {name}; try again later, or give a local file'
  reason = f'{type(error).__name__}: {error}'.split('\n')[0]
  if downloading:
    return f'the download of {name} was interrupted ({reason}); nothing of it is kept, try again'
  return (f'{name}@{repo.revision} is not in the cache of huggingface_hub, and there is no connection to the Hugging '
          'Face Hub '
          f'({reason}); run once with a network, or give a local file')
