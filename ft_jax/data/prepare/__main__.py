"""Writes a TFDS set as ArrayRecord, which is read without TensorFlow:

    python -m ft_jax.data.prepare tfds:oxford_iiit_pet --data_dir=/data/tfds
    python -m ft_jax.data.prepare tfds:cars196 --from=/downloads/stanford_cars --data_dir=/data/tfds

The files are downloaded, or taken from a folder that has them as they are published: the archives, or what is in them.
A set that exists already is left as it is; an interrupted run is simply started again. See docs/data.md.
"""

import argparse
import logging
import sys

from ft_jax import progress
from ft_jax.data.prepare import prepare


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(
      'python -m ft_jax.data.prepare', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('name', help='tfds:<name>[/config][:version]')
  parser.add_argument('--data_dir', default='', help="folder of TFDS sets (default: TFDS's own, ~/tensorflow_datasets)")
  parser.add_argument('--from', default='', dest='originals_dir', metavar='FOLDER',
                      help="folder with the set's own files, packed or unpacked; nothing is downloaded then")
  arguments = parser.parse_args()
  progress.show_log()
  logging.getLogger('absl').setLevel(logging.ERROR)  # TFDS warns of each folder that does not exist yet
  try:
    print(f'prepared: {prepare(arguments.name, arguments.data_dir, arguments.originals_dir)}')
  except ValueError as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    sys.exit('interrupted; run the same command again')


if __name__ == '__main__':
  main()
