"""Google Cloud Storage as its clients see it, in memory: the part of its JSON API that gcsfs, google-cloud-storage and
tensorstore use.

An object is there when its upload has ended, and not before. Nothing can be added to an object, and nothing renamed:
requests that copy on the server, of which a rename would be made, are refused and counted.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import http.server
import json
import re
import sys
import threading
import urllib.parse


@dataclasses.dataclass
class Bucket:
  """What is stored, and what was asked for.

  Attributes:
    objects: (contents, generation) by name.
    url: of the server.
    refused: requests that were answered with an error because there is no such operation.
    denied: what names begin with that nobody may write.
    stored: is told the name of each object that was stored.
  """
  objects: dict[str, tuple[bytes, int]] = dataclasses.field(default_factory=dict)
  url: str = ''
  refused: list[str] = dataclasses.field(default_factory=list)
  denied: str | None = None
  stored: Callable[[str], None] = lambda name: None
  uploads: dict[str, tuple[str, bytearray]] = dataclasses.field(default_factory=dict)
  generations: int = 0
  lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)

  def names(self, prefix: str = '') -> list[str]:
    """Names of objects, in order."""
    with self.lock:
      return sorted(name for name in self.objects if name.startswith(prefix))

  def read(self, name: str) -> bytes:
    """What an object holds."""
    return self.objects[name][0]

  @property
  def environment(self) -> dict[str, str]:
    """Variables that send the clients of another process here."""
    # The last: gcsfs asks another service, which is not here, what kind of bucket this is.
    return {'STORAGE_EMULATOR_HOST': self.url, 'TENSORSTORE_GCS_HTTP_URL': self.url,
            'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
  """A server with one bucket, `bucket`."""
  bucket = Bucket()
  server = _Server(('127.0.0.1', 0), type('Handler', (_Handler,), {'bucket': bucket}))
  bucket.url = f'http://127.0.0.1:{server.server_port}'
  thread = threading.Thread(target=server.serve_forever, args=(0.02,))
  thread.start()
  try:
    yield bucket
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True

  def handle_error(self, request, client_address) -> None:
    """Says nothing of clients that have gone: some were killed."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
  """One connection."""
  bucket: Bucket
  protocol_version = 'HTTP/1.1'
  # Headers and contents in one packet: sent apart, the second waits 40 ms for the client to confirm the first.
  wbufsize = -1
  disable_nagle_algorithm = True

  def log_message(self, *args) -> None:
    """Nothing."""

  def _handle(self) -> None:
    path, _, query = self.path.partition('?')
    self.query = dict(urllib.parse.parse_qsl(query))
    self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    with self.bucket.lock:
      status, headers, data = self._answer(self.command, path)
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

  def _answer(self, command: str, path: str) -> tuple[int, dict[str, str], bytes]:
    if path == '/batch/storage/v1':
      return self._batch()
    if upload := re.fullmatch(r'/(?:resumable/)?upload/storage/v1/b/bucket/o', path):
      del upload
      return self._upload(command)
    if found := re.fullmatch(r'(?:/download)?/storage/v1/b/bucket/o/([^/]+)', path):
      return self._object(command, urllib.parse.unquote(found[1]))
    if path == '/storage/v1/b/bucket/o' and command == 'GET':
      return self._list()
    if path == '/storage/v1/b/bucket' and command == 'GET':
      return _json({'kind': 'storage#bucket', 'name': 'bucket', 'id': 'bucket', 'storageClass': 'STANDARD',
                    'location': 'US'})
    if not path.startswith('/storage/v1/b/bucket'):
      return _error(404, 'The specified bucket does not exist.')
    self.bucket.refused.append(f'{command} {self.path}')
    return _error(501, 'there is no such operation')

  def _object(self, command: str, name: str) -> tuple[int, dict[str, str], bytes]:
    if name not in self.bucket.objects:
      return _error(404, f'No such object: bucket/{name}')
    data, generation = self.bucket.objects[name]
    if command == 'DELETE':
      if not self._allowed(name):
        return _error(412, 'conditionNotMet')
      del self.bucket.objects[name]
      return 204, {}, b''
    if command != 'GET':
      return _error(501, 'there is no such operation')
    if self.query.get('alt') != 'media':
      return _json(self._about(name))
    headers = {'x-goog-generation': str(generation), 'Content-Type': 'application/octet-stream',
               'ETag': f'"{generation}"'}
    if self.query.get('ifGenerationNotMatch') == str(generation):
      return 304, headers, b''
    if not (span := re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range') or '')):
      return 200, headers, data
    begin = int(span[1]) if span[1] else len(data) - int(span[2])
    end = min(int(span[2]) + 1 if span[1] and span[2] else len(data), len(data))
    if begin >= len(data):
      return 416, {'Content-Range': f'bytes */{len(data)}'}, b''
    return 206, {**headers, 'Content-Range': f'bytes {begin}-{end - 1}/{len(data)}'}, data[begin:end]

  def _list(self) -> tuple[int, dict[str, str], bytes]:
    prefix, delimiter = self.query.get('prefix', ''), self.query.get('delimiter')
    items, prefixes = [], []
    for name in self.bucket.names(prefix):
      if not self.query.get('startOffset', '') <= name or 'endOffset' in self.query and name >= self.query['endOffset']:
        continue
      rest = name[len(prefix):]
      if delimiter and delimiter in rest:
        folder = prefix + rest.partition(delimiter)[0] + delimiter
        prefixes += [folder] if folder not in prefixes else []
      else:
        items.append(self._about(name))
    return _json({'kind': 'storage#objects', 'items': items, 'prefixes': prefixes})

  def _upload(self, command: str) -> tuple[int, dict[str, str], bytes]:
    kind = self.query.get('uploadType')
    if 'upload_id' in self.query:
      return self._continue(self.query['upload_id'])
    if kind == 'media':
      return self._store(self.query['name'], self.body)
    if kind == 'multipart':
      boundary = re.search(r'boundary="?([^";]+)', self.headers['Content-Type'])[1].encode()
      about, data = (part.partition(b'\r\n\r\n' if b'\r\n\r\n' in part else b'\n\n')[2]
                     for part in self.body.split(b'--' + boundary)[1:3])
      return self._store(json.loads(about)['name'], data.removesuffix(b'\n').removesuffix(b'\r'))
    if kind == 'resumable' and command == 'POST':
      name = self.query.get('name') or json.loads(self.body)['name']
      self.bucket.generations += 1
      number = str(self.bucket.generations)
      self.bucket.uploads[number] = name, bytearray()
      return 200, {
          'Location': f'{self.bucket.url}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id={number}'}, b''
    return _error(501, 'there is no such upload')

  def _continue(self, number: str) -> tuple[int, dict[str, str], bytes]:
    name, data = self.bucket.uploads[number]
    data += self.body
    if not self.headers.get('Content-Range', '').endswith('*'):
      del self.bucket.uploads[number]
      return self._store(name, bytes(data))
    return 308, {'Range': f'bytes=0-{len(data) - 1}'} if data else {}, b''

  def _store(self, name: str, data: bytes) -> tuple[int, dict[str, str], bytes]:
    if self.bucket.denied is not None and name.startswith(self.bucket.denied):
      return _error(403, 'someone does not have storage.objects.create access to the Google Cloud Storage object.')
    if not self._allowed(name):
      return _error(412, 'conditionNotMet')
    self.bucket.generations += 1
    self.bucket.objects[name] = data, self.bucket.generations
    self.bucket.stored(name)
    return _json(self._about(name))

  def _allowed(self, name: str) -> bool:
    wanted = self.query.get('ifGenerationMatch')
    return wanted is None or int(wanted) == self.bucket.objects.get(name, (b'', 0))[1]

  def _batch(self) -> tuple[int, dict[str, str], bytes]:
    """Many requests to remove objects in one, as gcsfs sends them."""
    boundary = re.search(r'boundary="?([^";]+)', self.headers['Content-Type'])[1]
    answers = []
    for request in re.findall(r'DELETE \S*?/storage/v1/b/bucket/o/(\S+)', self.body.decode()):
      status, _, _ = self._object('DELETE', urllib.parse.unquote(request.partition('?')[0]))
      answers.append(f'--{boundary}\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} '
                     f'{"OK" if status == 204 else "Not Found"}\r\n'
                     'Content-Type: application/json\r\n\r\n\r\n')
    return 200, {'Content-Type': f'multipart/mixed; boundary={boundary}'}, (''.join(answers) +
                                                                            f'--{boundary}--\r\n').encode()

  def _about(self, name: str) -> dict[str, str]:
    data, generation = self.bucket.objects[name]
    time = '2024-01-01T00:00:00.000Z'
    return {'kind': 'storage#object', 'id': f'bucket/{name}/{generation}', 'name': name, 'bucket': 'bucket',
            'size': str(len(data)),
            'generation': str(generation), 'metageneration': '1', 'timeCreated': time, 'updated': time,
            'etag': str(generation)}


def _json(value: dict) -> tuple[int, dict[str, str], bytes]:
  return 200, {'Content-Type': 'application/json'}, json.dumps(value).encode()


def _error(status: int, message: str) -> tuple[int, dict[str, str], bytes]:
  return status, {'Content-Type': 'application/json'}, json.dumps(
      {'error': {'code': status, 'message': message, 'errors': [{'message': message, 'reason': 'notFound'}]}}).encode()
