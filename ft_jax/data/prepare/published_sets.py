"""The sets of the paper as they are published: the number of their images, their files, and dead links."""

from typing import NamedTuple

IMAGENET_FILES = {'ILSVRC2012_img_train.tar': 147_897_477_120, 'ILSVRC2012_img_val.tar': 6_744_924_160}  # bytes


class PublishedSet(NamedTuple):
  """What is known of a published set.

  Attributes:
    images: the number of its images in all splits; several numbers if its configs differ, none if it is not known.
    files: the files to get by hand, and from where.
    dead: why its public link is not expected to work; '' if it is.
  """
  images: tuple[int, ...]
  files: str
  dead: str = ''


def files_of(set_name: str) -> str:
  """The files that a set is published as, for messages."""
  return SETS[set_name].files if set_name in SETS else 'the archives under their published names'


def how_to_get_by_hand(set_name: str, name: str) -> str:
  """What to do if a set cannot be downloaded; `name` may have a config and a version."""
  known = SETS.get(set_name)
  dead = f'Known: {known.dead}. ' if known and known.dead else ''
  return (f'{dead}If you have or get the files elsewhere ({files_of(set_name)}), packed or unpacked, give '
          'their folder:\n'
          f'  python -m ft_jax.data.prepare tfds:{name} --from=FOLDER --data_dir=...')


# By their TFDS names; the numbers of images are those of TFDS 4.9. docs/data.md has the rest.
SETS: dict[str, PublishedSet] = {
    'oxford_iiit_pet': PublishedSet(
        (7_349,), 'images.tar.gz and annotations.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/pets/'),
    'caltech_birds2011': PublishedSet(
        (11_788,), 'CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 and segmentations.tgz '
        'from https://data.caltech.edu/records/w9d68-gec53'),
    'cars196': PublishedSet(
        (16_185,), 'cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat',
        'the pages of Stanford Cars answer 404 since 2023'),
    'fgvc_aircraft': PublishedSet(
        (10_000,), 'fgvc-aircraft-2013b.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/'),
    'stanford_dogs': PublishedSet(
        (20_580,), 'images.tar, annotation.tar and lists.tar from http://vision.stanford.edu/aditya86/ImageNetDogs/'),
    'caltech101': PublishedSet((), 'caltech-101.zip from https://data.caltech.edu/records/mzrjq-6wc02'),
    'dtd': PublishedSet((5_640,), 'dtd-r1.0.1.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/dtd/'),
    'sun397': PublishedSet((108_753, 108_752, 39_700), 'SUN397.tar.gz and Partitions.zip',
                           'the archive of SUN397 in Princeton answers 404 since 2025'),
    'imagenet2012': PublishedSet((1_331_167, 1_431_167), ' and '.join(IMAGENET_FILES) + ' from https://image-net.org'),
}
