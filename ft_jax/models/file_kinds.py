"""What a file is, by its bytes and whatever it is called: the kinds that are often found where weights are expected."""

from collections.abc import Collection
import re

# Bytes of the start of a file that are enough to tell its kind.
HEAD_SIZE = 4096
ZIP_MAGIC = b'PK\x03\x04'
# The longest header of a safetensors file that its format allows.
_LONGEST_HEADER = 100_000_000
EXPECTED = "expected a safetensors file or a state dict saved by torch.save, with torchvision's names"
_WEIGHT_ENDINGS = ('.pth', '.pt', '.tar', '.ckpt', '.bin', '.safetensors')
_AGAIN = 'download it again, from the link of the file itself'
# Members of the tar files that torch wrote before version 0.1.10.
_ANCIENT_TORCH = (b'sys_info', b'pickle', b'tensors', b'storages')


def is_safetensors(head: bytes) -> bool:
  """Whether a file begins as safetensors do: the length of a header, and a header in JSON."""
  return len(head) > 8 and head[8:9] == b'{' and 1 < int.from_bytes(head[:8], 'little') <= _LONGEST_HEADER


def is_pickle(head: bytes) -> bool:
  """Whether a file begins as pickles of protocol 2 and later do."""
  return head[:1] == b'\x80' and head[1:2] in b'\x02\x03\x04\x05'


def is_ancient_torch(head: bytes) -> bool:
  """Whether a file is a tar file as torch wrote them before version 0.1.10."""
  return _is_tar(head) and head[:100].rstrip(b'\0').removeprefix(b'./') in _ANCIENT_TORCH


def explain(head: bytes) -> str | None:
  """What a file is that cannot be read as weights, and what to do: the rest of a sentence that begins with its name.

  Args:
    head: its first HEAD_SIZE bytes; b'' of an empty file.

  Returns:
    None for a file of no known kind.
  """
  if not head:
    return 'is empty; copy or download it again'
  if not head.strip(b'\0'):
    return 'begins with zeros alone, as a file does whose download or copy did not finish; copy or download it again'
  for offset, magic, reason in _MAGIC:
    if head[offset:offset + len(magic)] == magic:
      return f'{reason}; {EXPECTED}'
  if _is_tar(head):
    return f'is a tar archive; unpack it (tar -xf) and give the file of weights that is in it; {EXPECTED}'
  if _is_msgpack(head):
    return f'is a msgpack file, such as Flax writes, which is not read; {EXPECTED}, or the workdir of a run'
  if _is_protobuf(head):
    return f'is a protobuf file, such as ONNX or a SavedModel of TensorFlow, which is not read; {EXPECTED}'
  return _explain_text(head)


def explain_zip(names: Collection[str]) -> str | None:
  """Likewise of a zip archive with these members; None for one that torch.save may have written."""
  if any(name.endswith('/constants.pkl') for name in names):
    return 'is a TorchScript program (torch.jit.save), which is not run; save its state_dict() with torch.save'
  if sum(name.endswith('/data.pkl') for name in names) == 1:
    return None
  if names and all(name.endswith('.npy') for name in names):
    return f'is a NumPy archive (.npz), which is not read; {EXPECTED}'
  if any(name.endswith('.weights.h5') for name in names):
    return f'is a Keras model (.keras), which is not read; {EXPECTED}'
  inside = sorted(names)
  if weights := [name for name in inside if name.lower().endswith(_WEIGHT_ENDINGS)]:
    return f'is a zip archive; unpack it and give the file of weights that is in it: {weights[0]!r}'
  held = ', '.join(map(repr, inside[:3])) or 'nothing'
  return f'is a zip file without one data.pkl (it holds {held}); expected what torch.save writes'


def _is_tar(head: bytes) -> bool:
  return head[257:262] == b'ustar'


def _is_msgpack(head: bytes) -> bool:
  """A map whose first key is text, as in every file that Flax writes."""
  # A map of up to 15 entries, or with its size in two or four bytes; text of up to 31 bytes, or with its length in one.
  return bool(re.match(rb'([\x81-\x8f]|\xde..|\xdf....)([\xa1-\xbf]|\xd9.)[\w./-]', head, re.DOTALL))


def _is_protobuf(head: bytes) -> bool:
  """The version of ONNX or of a SavedModel as first field, then a field with a length."""
  return len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 32 and head[2] & 7 == 2 and 1 <= head[2] >> 3 <= 15


def _explain_text(head: bytes) -> str | None:
  """What kind of text this is; None if it is not text."""
  try:
    text = head.decode('utf-8-sig', errors='ignore' if len(head) >= HEAD_SIZE else 'strict').strip()
  except UnicodeDecodeError:
    return None
  if re.search(r'[\x00-\x08\x0e-\x1f]', text):
    return None
  for pattern, reason in _TEXTS:
    if found := re.match(pattern, text, re.IGNORECASE | re.DOTALL):
      told = ' '.join(' '.join(group for group in found.groups() if group).split())
      return reason.format(f' ({told[:60]!r})' if told else '')
  return f'is text, {" ".join(text.split())[:60]!r}, and not weights; {_AGAIN}, or see whether it needs a login'


# (where, bytes, what it is and what to do).
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b'\x1f\x8b', 'is compressed with gzip; unpack it (gunzip, or tar -xzf for a .tar.gz) and give what is in it'),
    (0, b'BZh', 'is compressed with bzip2; unpack it (bunzip2, or tar -xjf for a .tar.bz2) and give what is in it'),
    (0, b'\xfd7zXZ\0', 'is compressed with xz; unpack it (unxz, or tar -xJf for a .tar.xz) and give what is in it'),
    (0, b'\x28\xb5\x2f\xfd', 'is compressed with zstd; unpack it (unzstd) and give what is in it'),
    (0, b'7z\xbc\xaf\x27\x1c', 'is a 7z archive; unpack it and give the file of weights that is in it'),
    (0, b'Rar!', 'is a RAR archive; unpack it and give the file of weights that is in it'),
    (0, b'PK\x05\x06', 'is an empty zip archive; copy or download it again'),
    (0, b'\x89HDF\r\n\x1a\n', 'is an HDF5 file (.h5), such as Keras writes, which is not read'),
    (0, b'\x93NUMPY', 'is a NumPy array (.npy), which is not read'),
    (0, b'GGUF', 'is a GGUF file, which is not read'),
    (4, b'TFL3', 'is a TensorFlow Lite model, which is not read'),
    (0, b'\x89PNG', 'is a PNG image'), (0, b'\xff\xd8\xff', 'is a JPEG image'), (0, b'%PDF', 'is a PDF document'),
)
# (pattern of the start of a text, what it is and what to do); groups of the pattern are shown in place of {}.
_TEXTS: tuple[tuple[str, str], ...] = (
    (r'version https?://(?:git-lfs|hawser)',
     f'is a pointer of Git LFS and not the weights themselves; run `git lfs pull` in its repository, or {_AGAIN}'),
    (r'(?:\.\./)*(?:\.git)?/?annex/objects/',
     'is a pointer of git-annex and not the weights themselves; run `git annex get` on it'),
    (r'<\?xml.*?<Error>(?:.*?<Code>(.*?)</Code>)?',
     f'is an error message of a storage service{{}} and not weights; {_AGAIN}'),
    (r'(?:<\?xml[^>]*>\s*|<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body|script|meta|title)'
     r'(?:.*?<title[^>]*>(.*?)</title>)?',
     f'is a web page{{}} and not weights; {_AGAIN}: some sites ask first (log in, accept terms, confirm a large file)'),
    (r'\{.*?"weight_map"', 'is the index of weights split over several files, which are not read; save them as one '
                           'file'),
    (r'[\[{]', f'is JSON and not weights; {EXPECTED}'),
)
