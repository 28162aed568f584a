"""Writes a TFDS set as ArrayRecord, which is read without TensorFlow:

    python -m ft_jax.data.prepare tfds:oxford_iiit_pet --data_dir=/data/tfds
"""

import argparse
import sys

from ft_jax.data.sources import missing_package, tfds_builder


def prepare(name: str, data_dir: str = '') -> str:
  """Downloads and writes a set; nothing is done where it is there already.

  Args:
    name: `<name>[/config][:version]`, with or without `tfds:` in front.
    data_dir: where sets lie; '' is TFDS's own place.

  Returns:
    The folder that it lies in.

  Raises:
    ValueError: a set that TFDS does not know, that lies there in another form, or that cannot be made here.
  """
  name = name.removeprefix('tfds:')
  builder = tfds_builder(name, data_dir)
  if builder.is_prepared():
    form = builder.info.file_format.value
    if form != 'array_record':
      raise ValueError(f'{builder.data_dir} holds tfds:{name} as {form}; move that folder away, or give another --data_dir')
    return str(builder.data_dir)
  try:
    builder.download_and_prepare()
  except ImportError as error:
    package = missing_package(error)
    raise ValueError(f'TFDS needs {package} to write tfds:{name}; for this one step: pip install {package} '
                     '(it is not needed to read the set)') from error
  except (OSError, AssertionError) as error:
    raise ValueError(f'tfds:{name} cannot be made: {error}') from error
  return str(builder.data_dir)


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('name', help='tfds:<name>[/config][:version]')
  parser.add_argument('--data_dir', default='', help="where TFDS sets lie (default: TFDS's own, ~/tensorflow_datasets)")
  arguments = parser.parse_args()
  try:
    print(f'prepared: {prepare(arguments.name, arguments.data_dir)}')
  except ValueError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
