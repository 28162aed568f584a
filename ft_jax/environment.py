"""What the numbers of a run may depend on beside its config: devices, versions, the commit of this program."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'ott-jax', 'tensorflow-datasets', 'grain', 'numpy',
            'pillow', 'simplejpeg', 'opencv-python-headless')


def environment() -> dict[str, Any]:
  """What results.json says of the machine and the program."""
  devices = jax.devices()
  return {
      'devices': f'{len(devices)} x {devices[0].device_kind}',
      'commit': commit(),
      'versions': {'python': platform.python_version(), **{name: _version(name) for name in PACKAGES}},
      'command': sys.argv,
  }


def _version(package: str) -> str | None:
  """The installed version; None where it is installed under another name, as OpenCV may be."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def commit() -> str | None:
  """The commit of this program, with a + where files differ from it; None where it is not a git checkout.

  Only a repository whose root is this program's is asked: one around it, such as that of a project into whose
  environment it is installed, has another commit, and its settings may name programs that git runs (core.fsmonitor).
  """
  root = pathlib.Path(__file__).parents[1]
  if not (root / '.git').exists():
    return None
  try:
    head, changed = _git(root, 'rev-parse', 'HEAD'), _git(root, 'status', '--porcelain', '--untracked-files=no')
  except (OSError, subprocess.CalledProcessError):
    return None
  return head + ('+' if changed else '')


def _git(root: pathlib.Path, *words: str) -> str:
  # GIT_* may name another repository.
  env = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}
  command = ('git', '-c', 'core.fsmonitor=false', '-C', str(root), *words)
  return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
