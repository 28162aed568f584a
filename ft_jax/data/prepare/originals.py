"""The files that a set is published as: downloaded, or found in a folder of the user's, packed or unpacked.

TFDS's builders ask a download manager for addresses and get paths; this one can also answer from a folder, and unpacks
without TensorFlow. What a builder makes of the files, their labels and splits, is up to TFDS.
"""

from collections.abc import Iterator, Mapping
import contextlib
import os
import pathlib
import shutil
import tempfile
from typing import Any
import urllib.parse

from etils import epath
import jax
import tensorflow_datasets as tfds

from ft_jax import progress
from ft_jax.data.image_set import digest
from ft_jax.data.prepare.archives import check_archive, in_bytes, iter_archive, iter_folder, naming_damage
from ft_jax.data.prepare.download import check_address, check_room, DownloadFailed


class Originals(tfds.download.DownloadManager):
  """A download manager that can answer from a folder.

  Args:
    folder: where the user has the files; None to download them.
    download_dir: for downloads, and what is unpacked.
    manual_dir: for files that cannot be downloaded without an account.
    builder: TFDS's builder, for the sizes and checksums that it knows. No other process may prepare the same set.
  """

  def __init__(self, folder: pathlib.Path | None, download_dir: pathlib.Path, manual_dir: pathlib.Path, builder: Any):
    super().__init__(
        download_dir=download_dir, extract_dir=download_dir / 'extracted' / builder.name, manual_dir=manual_dir,
        manual_dir_instructions=builder.MANUAL_DOWNLOAD_INSTRUCTIONS or '-', url_infos=builder.url_infos,
        dataset_name=builder.name)
    for stale in (*self._extract_dir.glob('unpacking.*'), *self._extract_dir.glob('given.*')):
      shutil.rmtree(stale)  # of an interrupted run
    self._folder = folder
    self._sizes = {url: int(info.size) for url, info in (builder.url_infos or {}).items()}
    self._file_names = {url: info.filename for url, info in (builder.url_infos or {}).items()}
    # Archives stay open: some builders read their files after they have gone through all names.
    self._open_archives = contextlib.ExitStack()
    self._links = pathlib.Path(tempfile.mkdtemp(prefix='given.', dir=self._extract_dir))

  def close(self) -> None:
    """Closes archives and removes the links to the user's files."""
    self._open_archives.close()
    shutil.rmtree(self._links)

  # --- what builders call ---

  def download(self, url_or_urls: Any) -> Any:
    """Paths of addresses, each a string or tfds.download.Resource, in a structure of lists and dicts."""
    if self._folder:
      folder = self._folder
      return jax.tree.map(lambda resource: self._find(resource, folder), url_or_urls)
    self._check_before_download(jax.tree.leaves(url_or_urls))
    try:
      return super().download(url_or_urls)
    except (OSError, tfds.download.DownloadError,
            tfds.core.download.download_manager.NonMatchingChecksumError) as error:
      raise DownloadFailed(f'the download failed: {str(error).strip().splitlines()[0]}') from error

  def extract(self, path_or_paths: Any) -> Any:
    """Folders with the files of archives."""
    return jax.tree.map(self._unpack, path_or_paths)

  def download_and_extract(self, url_or_urls: Any) -> Any:
    """Folders with the files of archives, by their addresses."""
    unpack = lambda resource, path: self._unpack(_resource(resource, path))
    return jax.tree.map(unpack, url_or_urls, self.download(url_or_urls))

  def iter_archive(self, resource: Any) -> Iterator[tuple[str, Any]]:
    """The files of an archive, or of a folder with what is in it, each with its path there."""
    resource = _resource(resource)
    if resource.path.is_dir():
      return iter_folder(pathlib.Path(resource.path))
    archive = pathlib.Path(resource.path)
    return iter_archive(archive, self._open_archives.enter_context(open(archive, 'rb')), resource.extract_method)

  # --- downloading ---

  def _check_before_download(self, resources: list[Any]) -> None:
    """Raises unless every address answers and there is room; logs how much will be downloaded."""
    urls = [resource if isinstance(resource, str) else resource.url for resource in resources]
    missing = [url for url in urls if not self._is_downloaded(url)]
    for url in missing:
      check_address(url)
    size = sum(self._sizes.get(url, 0) for url in missing)
    if missing:
      names = ', '.join(map(self._file_name, missing))
      progress.log.info('to download: %s%s', names, f' ({in_bytes(size)})' if size else '')
    # The archive, its unpacked files and the set, each about as large.
    check_room(pathlib.Path(self._download_dir), 3 * size,
               f'{in_bytes(size)} to download, the unpacked files and the set')

  def _is_downloaded(self, url: str) -> bool:
    # As TFDS finds a file: by its name in manual_dir, or by its checksum among the downloads.
    resource = tfds.download.Resource(url=url)
    info = self._url_infos.get(url)
    return bool(self._get_manually_downloaded_path(info) or self._get_checksum_dl_result(resource)
                or self._get_url_dl_result(resource))

  def _file_name(self, url: str) -> str:
    return self._file_names.get(url) or os.path.basename(urllib.parse.urlparse(url).path)

  # --- the user's folder ---

  def _find(self, resource: Any, folder: pathlib.Path) -> epath.Path:
    """The archive of an address in the user's folder, or a folder with links to what would be in it."""
    url = resource if isinstance(resource, str) else resource.url
    name = self._file_name(url)
    archive = locate(folder, name)
    if archive and archive.is_file():
      check_archive(archive, self._sizes.get(url))
      return epath.Path(archive)
    alternatives = UNPACKED.get(name, ())
    for places in alternatives:
      paths = {place: path for place, wanted in places.items() if (path := locate(folder, wanted))}
      if len(paths) == len(places):
        progress.log.info('found: %s', ', '.join(map(str, paths.values())))
        return epath.Path(self._link(name, paths))
    wanted = ' nor '.join([name, *(' and '.join(places.values()) for places in alternatives)])
    raise ValueError(f'{folder} and the folders in it have neither {wanted}. There is: {_names_in(folder)}. '
                     f'{name} is published at {url}')

  def _link(self, name: str, paths: Mapping[str, pathlib.Path]) -> pathlib.Path:
    """A folder that looks like the unpacked archive, with nothing else in it: builders use all files that they find."""
    root = self._links / name
    for place, path in paths.items():
      (root / place).parent.mkdir(parents=True, exist_ok=True)
      if not (root / place).is_symlink():
        (root / place).symlink_to(path.absolute(), target_is_directory=path.is_dir())
    return root

  # --- archives ---

  def _unpack(self, resource: Any) -> epath.Path:
    resource = _resource(resource)
    archive, method = pathlib.Path(resource.path), resource.extract_method
    if archive.is_dir() or method == tfds.download.ExtractMethod.NO_EXTRACT:
      return epath.Path(archive)
    stat = archive.stat()
    key = digest(str(archive.resolve()), str(stat.st_size), str(stat.st_mtime_ns))
    target = pathlib.Path(self._extract_dir) / f'{archive.name}.{key}'
    if not target.exists():
      progress.log.info('unpacking %s', archive.name)
      temporary = pathlib.Path(tempfile.mkdtemp(prefix='unpacking.', dir=self._extract_dir))
      try:
        _unpack_to(archive, method, temporary)
        os.replace(temporary, target)
      finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return epath.Path(target)


def _unpack_to(archive: pathlib.Path, method: Any, folder: pathlib.Path) -> None:
  with (open(archive, 'rb') as packed, naming_damage(archive),
        progress.counter(f'unpacking {archive.name}', None, 'file') as shown):
    for path, stream in iter_archive(archive, packed, method):
      (folder / path).parent.mkdir(parents=True, exist_ok=True)
      with open(folder / path, 'wb') as out:
        shutil.copyfileobj(stream, out)
      shown.update()


def _resource(given: Any, path: epath.PathLike | None = None) -> Any:
  """A tfds.download.Resource of a path, an address or a Resource."""
  resource = given if isinstance(given, tfds.download.Resource) else tfds.download.Resource(path=path or given)
  resource.path = epath.Path(path) if path else resource.path
  return resource


def locate(folder: pathlib.Path, name: str) -> pathlib.Path | None:
  """A file or folder by its name: `folder` itself, or something in it, at most two folders deep."""
  if folder.name == name:
    return folder
  return next((path for depth in ('', '*/', '*/*/') for path in sorted(folder.glob(f'{depth}{name}'))), None)


def _names_in(folder: pathlib.Path, most: int = 8) -> str:
  names = sorted(entry.name for entry in os.scandir(folder))
  more = f' and {len(names) - most} others' if len(names) > most else ''
  return ', '.join(names[:most]) + more if names else 'nothing'


# What may be in a folder instead of an archive: alternatives, each with the names to look for, by where they would be
# in the unpacked archive.
UNPACKED: dict[str, tuple[dict[str, str], ...]] = {
    # Oxford-IIIT Pets
    'images.tar.gz': ({'images': 'images'},),
    'annotations.tar.gz': ({'annotations': 'annotations'},),
    # CUB-200-2011
    'CUB_200_2011.tgz': ({'CUB_200_2011': 'CUB_200_2011'},),
    'segmentations.tgz': ({'segmentations': 'segmentations'},),
    # Stanford Cars
    'cars_train.tgz': ({'cars_train': 'cars_train'},),
    'cars_test.tgz': ({'cars_test': 'cars_test'},),
    'car_devkit.tgz': ({'devkit/cars_train_annos.mat': 'cars_train_annos.mat'},),
    # FGVC-Aircraft
    'fgvc-aircraft-2013b.tar.gz': ({'fgvc-aircraft-2013b': 'fgvc-aircraft-2013b'},),
    # Stanford Dogs
    'images.tar': ({'Images': 'Images'},),
    'lists.tar': ({'train_list.mat': 'train_list.mat', 'test_list.mat': 'test_list.mat'},),
    'annotation.tar': ({'Annotation': 'Annotation'},),
    # Caltech-101: an archive in an archive
    'caltech-101.zip': (
        {'caltech-101/101_ObjectCategories.tar.gz': '101_ObjectCategories.tar.gz'},
        {'caltech-101/101_ObjectCategories.tar.gz/101_ObjectCategories': '101_ObjectCategories'}),
    # Describable Textures
    'dtd-r1.0.1.tar.gz': ({'dtd/images': 'images', 'dtd/labels': 'labels'},),
    # SUN397
    'SUN397.tar.gz': ({'SUN397': 'SUN397'},),
    'Partitions.zip': ({f'{part}_{k:02d}.txt': f'{part}_{k:02d}.txt' for part in ('Training', 'Testing')
                        for k in range(1, 11)},),
}
