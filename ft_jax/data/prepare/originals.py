"""The files that a set is published as: downloaded, or found in a folder of the user's, packed or unpacked.

TFDS's builders ask a download manager for addresses and get paths; this one also answers from a folder, and unpacks without
TensorFlow. What a builder makes of the files, labels and splits, stays TFDS's.
"""

from collections.abc import Iterator, Mapping
import contextlib
import lzma
import os
import pathlib
import shutil
import tarfile
import tempfile
from typing import Any, BinaryIO
import urllib.parse
import zipfile
import zlib

from etils import epath
import jax
import tensorflow_datasets as tfds

from ft_jax import progress
from ft_jax.data.image_set import digest

DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError)  # what the unpackers raise; gzip: OSError


class DownloadFailed(ValueError):
  """An address that gives nothing, or something else than it should."""


class Originals(tfds.download.DownloadManager):
  """A download manager that can answer from a folder.

  Args:
    folder: where the user has the files, or None to download them.
    download_dir: where downloads go, and what is unpacked.
    manual_dir: where files lie that nobody can download without an account.
    builder: TFDS's builder, for the sizes and checksums that it knows. No other process may prepare the same set.
  """

  def __init__(self, folder: pathlib.Path | None, download_dir: pathlib.Path, manual_dir: pathlib.Path, builder: Any):
    super().__init__(
        download_dir=download_dir, extract_dir=download_dir / 'extracted' / builder.name, manual_dir=manual_dir,
        manual_dir_instructions=builder.MANUAL_DOWNLOAD_INSTRUCTIONS or '-', url_infos=builder.url_infos, dataset_name=builder.name)
    for stale in (*self._extract_dir.glob('unpacking.*'), *self._extract_dir.glob('given.*')):
      shutil.rmtree(stale)  # of an interrupted run
    self._folder = folder
    self._sizes = {url: int(info.size) for url, info in (builder.url_infos or {}).items()}
    self._file_names = {url: info.filename for url, info in (builder.url_infos or {}).items()}
    self._open = contextlib.ExitStack()  # archives: some builders read their files after they have gone through all names
    self._given = pathlib.Path(tempfile.mkdtemp(prefix='given.', dir=self._extract_dir)) if folder else None

  def close(self) -> None:
    """Closes archives and removes the links to what the user gave."""
    self._open.close()
    if self._given:
      shutil.rmtree(self._given)

  # --- what builders call ---

  def download(self, url_or_urls: Any) -> Any:
    """Paths of addresses, each a string or tfds.download.Resource, in a structure of lists and dicts."""
    if self._folder:
      return jax.tree.map(self._find, url_or_urls)
    self._check_before(jax.tree.leaves(url_or_urls))
    try:
      return super().download(url_or_urls)
    except (OSError, tfds.download.DownloadError, tfds.core.download.download_manager.NonMatchingChecksumError) as error:
      raise DownloadFailed(f'the download failed: {str(error).strip().splitlines()[0]}') from error

  def extract(self, path_or_paths: Any) -> Any:
    """Folders with what is in archives."""
    return jax.tree.map(self._unpack, path_or_paths)

  def download_and_extract(self, url_or_urls: Any) -> Any:
    """Folders with what is in archives, by their addresses."""
    return jax.tree.map(lambda resource, path: self._unpack(_resource(resource, path)), url_or_urls, self.download(url_or_urls))

  def iter_archive(self, resource: Any) -> Iterator[tuple[str, Any]]:
    """The files of an archive, or of a folder with what is in it, each with its path there."""
    resource = _resource(resource)
    if resource.path.is_dir():
      return _iter_folder(pathlib.Path(resource.path))
    archive = pathlib.Path(resource.path)
    return _iter_archive(archive, self._open.enter_context(open(archive, 'rb')), resource.extract_method)

  # --- downloading ---

  def _check_before(self, resources: list[Any]) -> None:
    """Raises unless every address answers and there is room; says how much comes."""
    urls = [resource if isinstance(resource, str) else resource.url for resource in resources]
    missing = [url for url in urls if not self._is_cached(url)]
    for url in missing:
      _check_address(url)
    size = sum(self._sizes.get(url, 0) for url in missing)
    if missing:
      progress.log.info('to download: %s%s', ', '.join(map(self._file_name, missing)), f' ({in_bytes(size)})' if size else '')
    # The archive, what is unpacked of it and the set, each about as large.
    check_room(pathlib.Path(self._download_dir), 3 * size, f'{in_bytes(size)} to download, what is unpacked and the set')

  def _is_cached(self, url: str) -> bool:
    # As TFDS finds a file: by its name in manual_dir, or by its checksum among the downloads.
    resource = tfds.download.Resource(url=url)
    info = self._url_infos.get(url)
    return bool(self._get_manually_downloaded_path(info) or self._get_checksum_dl_result(resource) or self._get_url_dl_result(resource))

  def _file_name(self, url: str) -> str:
    return self._file_names.get(url) or os.path.basename(urllib.parse.urlparse(url).path)

  # --- the user's folder ---

  def _find(self, resource: Any) -> epath.Path:
    """The archive of an address in the user's folder, or a folder with links to what would be in it."""
    url = resource if isinstance(resource, str) else resource.url
    name = self._file_name(url)
    archive = locate(self._folder, name)
    if archive and archive.is_file():
      check_archive(archive, self._sizes.get(url))
      return epath.Path(archive)
    for places in UNPACKED.get(name, ()):
      found = {place: locate(self._folder, wanted) for place, wanted in places.items()}
      if all(found.values()):
        progress.log.info('found: %s', ', '.join(str(path) for path in found.values()))
        return epath.Path(self._link(name, found))
    wanted = [name, *(' and '.join(places.values()) for places in UNPACKED.get(name, ()))]
    raise ValueError(f'{self._folder} and the folders in it hold neither {" nor ".join(wanted)}. There is: {_listed(self._folder)}. '
                     f'{name} is published at {url}')

  def _link(self, name: str, found: Mapping[str, pathlib.Path | None]) -> pathlib.Path:
    """A folder that looks like the unpacked archive and has nothing else in it: builders take all that they find."""
    view = self._given / name
    for place, path in found.items():
      (view / place).parent.mkdir(parents=True, exist_ok=True)
      if not (view / place).is_symlink():
        (view / place).symlink_to(path.absolute(), target_is_directory=path.is_dir())
    return view

  # --- archives ---

  def _unpack(self, resource: Any) -> epath.Path:
    resource = _resource(resource)
    archive, method = pathlib.Path(resource.path), resource.extract_method
    if archive.is_dir() or method == tfds.download.ExtractMethod.NO_EXTRACT:
      return epath.Path(archive)
    stat = archive.stat()
    target = pathlib.Path(self._extract_dir) / f'{archive.name}.{digest(str(archive.resolve()), str(stat.st_size), str(stat.st_mtime_ns))}'
    if not target.exists():
      progress.log.info('unpacking %s', archive.name)
      temporary = pathlib.Path(tempfile.mkdtemp(prefix='unpacking.', dir=self._extract_dir))
      try:
        with (open(archive, 'rb') as packed, _damage_named(archive),
              progress.counter(f'unpacking {archive.name}', None, 'file') as shown):
          for path, stream in _iter_archive(archive, packed, method):
            place = temporary / path
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, 'wb') as out:
              shutil.copyfileobj(stream, out)
            shown.update()
        os.replace(temporary, target)
      finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return epath.Path(target)


def _resource(given: Any, path: epath.PathLike | None = None) -> Any:
  """A tfds.download.Resource of a path, an address or a Resource."""
  resource = given if isinstance(given, tfds.download.Resource) else tfds.download.Resource(path=path or given)
  resource.path = epath.Path(path) if path else resource.path
  return resource


def _check_address(url: str) -> None:
  """One request, before gigabytes are asked for; TFDS itself tries an address that does not answer for minutes."""
  import requests

  try:
    with requests.get(url, stream=True, timeout=20) as response:
      if response.status_code >= 400:
        raise DownloadFailed(f'{url} answers {response.status_code} {response.reason}')
  except requests.RequestException as error:
    raise DownloadFailed(f'{url} does not answer ({type(error).__name__}); is there a network?') from error


def check_room(folder: pathlib.Path, needed: int, what: str) -> None:
  """Raises unless a disk has room for about `needed` bytes."""
  while not folder.exists():
    folder = folder.parent
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise ValueError(f'{what} take about {in_bytes(needed)}, and {folder} has {in_bytes(free)} free; make room, or give another --data_dir')


def locate(folder: pathlib.Path, name: str) -> pathlib.Path | None:
  """A file or folder by its name: `folder` itself, or what lies in it at most two folders deep."""
  if folder.name == name:
    return folder
  return next((path for depth in ('', '*/', '*/*/') for path in sorted(folder.glob(f'{depth}{name}'))), None)


def _listed(folder: pathlib.Path, most: int = 8) -> str:
  names = sorted(entry.name for entry in os.scandir(folder))
  return ', '.join(names[:most]) + (f' and {len(names) - most} others' if len(names) > most else '') if names else 'nothing'


class _File:
  """A file that is opened when it is read: builders may go through all names first."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def read(self) -> bytes:
    """Everything in it."""
    return self._path.read_bytes()


def _iter_folder(folder: pathlib.Path) -> Iterator[tuple[str, _File]]:
  for root, folders, files in os.walk(folder, followlinks=True):
    folders.sort()
    for name in sorted(files):
      path = pathlib.Path(root, name)
      yield path.relative_to(folder).as_posix(), _File(path)


def _iter_archive(archive: pathlib.Path, stream: BinaryIO, method: Any) -> Iterator[tuple[str, BinaryIO]]:
  """TFDS's own reading of archives (which leaves out absolute paths and `..`), on a file that needs no TensorFlow to open."""
  with _damage_named(archive):
    yield from tfds.download.iter_archive(stream, method)


@contextlib.contextmanager
def _damage_named(archive: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except (*DAMAGED, OSError) as error:
    if isinstance(error, OSError) and error.errno is not None:
      raise  # of the disk, not of the archive
    # tarfile goes on with a line for every way of packing.
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(':')
    raise ValueError(f'{archive} is damaged or cut short ({reason}; '
                     f'{archive.stat().st_size:,d} bytes): get it again') from error


def check_archive(archive: pathlib.Path, published: int | None) -> None:
  """Says what was found; a plain tar that is cut short raises, which Python may read to its end without a word."""
  size = archive.stat().st_size
  if not size:
    raise ValueError(f'{archive} is empty (0 bytes): get it again')
  progress.log.info('found: %s (%s)', archive, in_bytes(size))
  if published and size != published:
    progress.log.warning('its %s bytes are not the %s of the published file; it is used as it is', f'{size:,d}', f'{published:,d}')
  with open(archive, 'rb') as stream:
    stream.seek(257)
    plain_tar = stream.read(5) == b'ustar'
  if plain_tar:
    with _damage_named(archive), tarfile.open(archive, 'r:') as tar:
      last = tar.getmembers()[-1]  # headers alone are read
    if size < last.offset_data + last.size + 1024:
      raise ValueError(f'{archive} is cut short: it ends without the two empty blocks of a tar file, at {size:,d} bytes; get it again')


def in_bytes(size: float) -> str:
  """A size for people: `792 MB`, `1.2 GB`."""
  for unit, one in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if size >= one:
      return f'{size / one:.1f} {unit}' if size < 10 * one else f'{size / one:,.0f} {unit}'
  return f'{size:.0f} bytes'


# For each archive what may lie in a folder instead: alternatives, each of (where it would be in the unpacked archive: the name
# to look for).
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
    'Partitions.zip': ({f'{part}_{k:02d}.txt': f'{part}_{k:02d}.txt' for part in ('Training', 'Testing') for k in range(1, 11)},),
}
