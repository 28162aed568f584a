"""FGVC-Aircraft (Maji et al., arXiv 1306.5151): 10,000 photographs of 100 aircraft variants, as a TFDS set.

Prepared like any other (python -m ft_jax.data.prepare tfds:fgvc_aircraft); TFDS knows it once this module is imported.
"""

from collections.abc import Iterator
from typing import Any

from etils import epath
import tensorflow_datasets as tfds

URL = 'https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz'

DESCRIPTION = """\
10,000 images of aircraft, 100 of each of 100 model variants, with the official train, validation and test lists of
variants. The files are stored as they are: the lowest 20 pixels of each image are a banner with its copyright."""

CITATION = """\
@techreport{maji13fine-grained,
  title = {Fine-Grained Visual Classification of Aircraft},
  author = {S. Maji and J. Kannala and E. Rahtu and M. Blaschko and A. Vedaldi},
  year = {2013},
  archivePrefix = {arXiv},
  eprint = {1306.5151},
}"""


_Examples = Iterator[tuple[str, dict[str, Any]]]


class FgvcAircraft(tfds.core.GeneratorBasedBuilder):
  """Images, variants as labels, and file names; written without TensorFlow."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'The archive 2013b, variant labels.'}
  pkg_dir_path = epath.Path(__file__).parent  # where TFDS looks for checksums

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self, description=DESCRIPTION, citation=CITATION, supervised_keys=('image', 'label'),
        homepage='https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/',
        features=tfds.features.FeaturesDict({
            'image': tfds.features.Image(encoding_format='jpeg'),
            'label': tfds.features.ClassLabel(num_classes=100),
            'file_name': tfds.features.Text(),  # such as 0034309.jpg
        }))

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, _Examples]:
    data = dl_manager.download_and_extract(URL) / 'fgvc-aircraft-2013b' / 'data'
    # The names come with the archive, in the order of their labels; TFDS stores them with the set.
    variants = (data / 'variants.txt').read_text().strip().splitlines()
    self.info.features['label'].names = [line.strip() for line in variants]
    return {split: self._generate_examples(data, f'images_variant_{part}.txt')
            for split, part in (('train', 'train'), ('validation', 'val'), ('test', 'test'))}

  def _generate_examples(self, data: epath.Path, images_file: str) -> _Examples:
    for line in (data / images_file).read_text().splitlines():
      number, variant = line.split(' ', 1)
      name = f'{number}.jpg'
      yield name, {'image': data / 'images' / name, 'label': variant.strip(), 'file_name': name}
