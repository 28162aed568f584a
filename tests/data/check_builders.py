"""TFDS's own checks of builders, on ours: they need TensorFlow, so no test runs them. By hand, in an environment of its own:

    pip install tensorflow-cpu dill pytest -r requirements.txt
    python tests/data/check_builders.py

Checks what tests/test_prepare.py does not: that the set reads as tf.data too, that keys are unique over splits, that the
builder opens files through TFDS's own functions. (The checksum of FGVC-Aircraft is not registered: its archive was not at
hand, and its publishers give an MD5 alone.)
"""

import pathlib
import sys
import tempfile

import tensorflow_datasets as tfds

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import test_prepare  # noqa: E402

from ft_jax.data.builders import fgvc_aircraft  # noqa: E402


class FgvcAircraftTest(tfds.testing.DatasetBuilderTestCase):
  """On fifteen images in the published layout."""

  DATASET_CLASS = fgvc_aircraft.FgvcAircraft
  SPLITS = {'train': 5, 'validation': 5, 'test': 5}
  DL_EXTRACT_RESULT = ''
  SKIP_CHECKSUMS = True

  @classmethod
  def setUpClass(cls):
    """Writes the images."""
    cls.folder = tempfile.TemporaryDirectory()
    cls.EXAMPLE_DIR = cls.folder.name
    test_prepare.write_aircraft(pathlib.Path(cls.EXAMPLE_DIR))
    super().setUpClass()

  @classmethod
  def tearDownClass(cls):
    """Removes them."""
    super().tearDownClass()
    cls.folder.cleanup()


if __name__ == '__main__':
  tfds.testing.test_main()
