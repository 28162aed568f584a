"""What tests of weights share: reading a file of torch as the variables of a ResNet."""

import os
from typing import Any

from ft_jax.models import build
from ft_jax.models.weights import read

# For the names of its tensors, which do not depend on its size.
RESNET = build('resnet18', {})


def load_torch(path: str | os.PathLike[str]) -> dict[str, Any]:
  """The variables in a file."""
  return read(path, RESNET).variables
