"""How exactly an accelerator multiplies float32 numbers: its own default is TF32 on a recent GPU and bfloat16 on a TPU.
"""

from collections.abc import Iterator
import contextlib

import jax


@contextlib.contextmanager
def default_of(precision: str) -> Iterator[None]:
  """Products and convolutions that are traced inside and do not state a precision have this one, a key of `PRECISIONS`.
  """
  if PRECISIONS[precision] is None:
    yield
  else:
    with jax.default_matmul_precision(precision):
      yield


# What `model.precision` may be; None leaves the choice to the backend. On the CPU all of them are float32.
PRECISIONS: dict[str, jax.lax.Precision | None] = {
    'default': None,
    'high': jax.lax.Precision.HIGH,
    'highest': jax.lax.Precision.HIGHEST,
}
