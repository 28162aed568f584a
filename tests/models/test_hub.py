"""Weights by name: huggingface_hub's own code against a server on this machine that answers as the Hub does."""

import contextlib
import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

from huggingface_hub import constants
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors
from torch_weights import load_torch, RESNET

from ft_jax.models import hub, torch_pickle
from ft_jax.models.weights import read
from ft_jax.training import initial_weights
from ft_jax.training.finished_runs import load_variables

DATA = pathlib.Path(__file__).parents[1] / 'fixtures'
COMMIT = '0123456789abcdef0123456789abcdef01234567'


class Hub(http.server.BaseHTTPRequestHandler):
  """The three requests that fetching a file makes, and the answers to wrong ones, with the headers that the Hub
  sends."""
  protocol_version = 'HTTP/1.1'
  repos: dict[str, dict[str, bytes]]
  asked: list[str]
  cut: bool

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    self.asked.append(f'{self.command} {self.path}')
    path = self.path.partition('?')[0]
    if path.startswith('/api/models/'):
      repo, _, revision = path.removeprefix('/api/models/').partition('/revision/')
      file = None
    else:
      repo, _, rest = path[1:].partition('/resolve/')
      revision, _, file = rest.partition('/')
    if self.headers.get('Authorization') == 'Bearer hf_expired':
      return self.answer(401, b'{"error": "Invalid credentials"}',
                         {'X-Error-Message': 'Invalid credentials in Authorization header'})
    if repo == 'owner/narrow':
      return self.answer(403, b'{"error": "Forbidden"}', {'X-Error-Message': 'Forbidden'})
    if repo not in self.repos:
      return self.answer(401, b'{}', {'X-Error-Code': 'RepoNotFound', 'X-Error-Message': 'Repository not found'})
    if revision not in ('main', 'v1', COMMIT):
      return self.answer(404, b'{"error": "Invalid rev id"}',
                         {'X-Error-Code': 'RevisionNotFound', 'X-Error-Message': 'Invalid rev id'})
    files = self.repos[repo]
    if file is None:
      return self.answer(200, json.dumps({
          'id': repo, 'sha': COMMIT, 'siblings': [{'rfilename': name} for name in files], 'tags': [],
          'downloads': 0}).encode())
    if repo == 'owner/gated':
      return self.answer(403, b'{"error": "gated"}',
                         {'X-Error-Code': 'GatedRepo', 'X-Error-Message': 'Access is restricted'})
    if self.cut and self.command == 'GET' and any(line.startswith('GET') and 'resolve' in line
                                                  for line in self.asked[:-1]):
      return self.answer(503, b'')
    self.answer(200, files[file], {'X-Repo-Commit': COMMIT, 'ETag': f'"{abs(hash(files[file])):x}"'}, cut=self.cut)

  def answer(self, status, body, headers=None, cut=False):
    self.send_response(status)
    for key, value in {'Content-Type': 'application/json', 'Content-Length': str(len(body)), **(headers or {})}.items():
      self.send_header(key, value)
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(body[:len(body) // 2] if cut else body)
    if cut:
      self.close_connection = True

  def log_message(self, *_):
    pass


@contextlib.contextmanager
def serve(cut=False):
  """The address of a running Hub, and what it has been asked."""
  state = torch_pickle.read(DATA / 'resnet18.pth').tensors
  weights = safetensors.save({key: np.ascontiguousarray(value) for key, value in state.items()})
  handler = type('Handler', (Hub,), {'asked': [], 'cut': cut, 'repos': {
      'timm/resnet18.tiny': {'README.md': b'hello', 'model.safetensors': weights},
      'owner/one': {'other.safetensors': weights}, 'owner/two': {'a.safetensors': weights, 'b.safetensors': weights},
      'owner/none': {'pytorch_model.bin': b'...'}, 'owner/gated': {'model.safetensors': weights}}})
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
      yield f'http://127.0.0.1:{server.server_port}', handler.asked
    finally:
      server.shutdown()
      thread.join()


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch, tmp_path_factory):
  """No token of the user's; and a list that huggingface_hub 2 gets from the real Hub once a day lies there already."""
  monkeypatch.setenv('HF_TOKEN', 'hf_test')
  path = tmp_path_factory.mktemp('hub') / 'harnesses.json'
  path.write_text('{"harnesses": {"none": {}}}')
  monkeypatch.setattr(constants, 'AGENT_HARNESSES_PATH', str(path), raising=False)


def fetch(name, endpoint, folder):
  return hub.fetch(hub.parse(name), endpoint=endpoint, cache_dir=folder)


@pytest.mark.parametrize('name,file_name', [
    ('timm:resnet18.tiny', 'model.safetensors'), ('hf:owner/one@v1', 'other.safetensors'),
    (f'hf:owner/one@{COMMIT}', 'other.safetensors')])
def test_a_file_is_downloaded_once_and_its_commit_known(tmp_path, name, file_name):
  """The second time it comes out of the cache, with the server gone."""
  with serve() as (endpoint, asked):
    path, commit = fetch(name, endpoint, tmp_path)
    assert path.name == file_name and commit == COMMIT and path.is_relative_to(tmp_path)
    count = len(asked)
    assert sum(line.startswith('GET') and 'resolve' in line for line in asked) == 1
    assert fetch(name, endpoint, tmp_path) == (path, commit) and len(asked) == count, 'asked again'
  assert fetch(name, endpoint, tmp_path) == (path, commit)
  loaded, expected = read(path, RESNET).variables, load_torch(DATA / 'resnet18.pth')
  np.testing.assert_array_equal(loaded['params']['layer4']['1']['conv2']['kernel'],
                                expected['params']['layer4']['1']['conv2']['kernel'])


@pytest.mark.parametrize('name,token,words', [
    ('timm:resnet18.tiny', 'hf_expired', 'refuses your token: log in with `hf auth login` or set HF_TOKEN again'),
    ('timm:resnet18', 'hf_test',
     r'no repository timm/resnet18 at .*names of timm have a tag, as in timm:resnet50.tv_in1k'),
    ('hf:owner/nothing', 'hf_test', 'there is no repository owner/nothing .*private'),
    ('hf:owner/narrow', 'hf_test', 'your token of Hugging Face gives no access to owner/narrow'),
    ('timm:resnet18.tiny@v9', 'hf_test', "timm/resnet18.tiny has no revision 'v9'"),
    ('hf:owner/gated', 'hf_test', 'owner/gated is open only to those who asked for it: ask at https'),
    ('hf:owner/none', 'hf_test', 'owner/none has no .safetensors file at revision main'),
    ('hf:owner/two', 'hf_test', r'owner/two has 2 .safetensors files \(a.safetensors, b.safetensors')])
def test_what_the_hub_refuses_is_one_clear_error(tmp_path, monkeypatch, name, token, words):
  monkeypatch.setenv('HF_TOKEN', token)
  with serve() as (endpoint, asked), pytest.raises(ValueError, match=words) as error:
    fetch(name, endpoint, tmp_path)
  assert '\n' not in str(error.value) and len(asked) <= 2, 'it tried again'


def test_an_interrupted_download_leaves_nothing(tmp_path):
  """The connection breaks in the middle, and cannot be taken up again."""
  with serve(cut=True) as (endpoint, _), pytest.raises(
      ValueError, match='download of timm/resnet18.tiny was interrupted .* try again'):
    fetch('timm:resnet18.tiny', endpoint, tmp_path)
  assert not [path for path in tmp_path.rglob('*') if path.is_file() and path.stat().st_size > 1000]
  with serve() as (endpoint, _):
    assert fetch('timm:resnet18.tiny', endpoint, tmp_path).commit == COMMIT


def test_without_a_network_it_says_so_at_once(tmp_path, monkeypatch):
  """huggingface_hub alone tries six times, with 23 seconds of sleep between them."""
  slept = []
  monkeypatch.setattr(time, 'sleep', slept.append)
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))  # and nobody listens
    with pytest.raises(ValueError,
                       match='timm/resnet18.tiny@main is not in the cache .* no connection .* give a local file'):
      fetch('timm:resnet18.tiny', f'http://127.0.0.1:{taken.getsockname()[1]}', tmp_path)
  assert not slept
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  with pytest.raises(ValueError, match='HF_HUB_OFFLINE is set'):
    fetch('timm:resnet18.tiny', 'http://127.0.0.1:9', tmp_path)


@pytest.mark.slow
def test_a_fine_tuning_by_name(photos, tmp_path):
  """The whole job: weights by name, BatchNorm frozen; results.json knows commit and fingerprint, the checkpoint has the
  same bits."""
  with serve() as (endpoint, _):
    environment = {**os.environ, 'HF_ENDPOINT': endpoint, 'HF_HOME': str(tmp_path / 'home'),
                   'HF_HUB_DISABLE_TELEMETRY': '1',
                   'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
    run = subprocess.run([
        sys.executable, 'main.py', '--config=configs/miniature.py:finetune', '--config.source.name=',
        f'--config.target.name=folder:{photos}', '--config.model.weights=hf:owner/one@v1', '--config.model.width=4',
        '--config.model.batch_norm=frozen', '--config.image_size=32', '--config.augment.short_side=36',
        '--config.selection.method=none', '--config.train.steps=3', '--config.train.batch_size=4',
        '--config.train.weight_decay=0.1',
        f'--workdir={tmp_path / "run"}'], cwd=DATA.parents[1], env=environment, capture_output=True, text=True,
                         check=False)
  assert run.returncode == 0, run.stderr
  assert f'weights: hf:owner/one@v1 at {COMMIT}: 100 tensors used; dropped: bn1.num_batches_tracked' in run.stderr
  results = json.loads((tmp_path / 'run' / 'results.json').read_text())
  before = initial_weights.load_weights(str(DATA / 'resnet18.pth'), RESNET)
  assert results['weights'] == {'name': 'hf:owner/one@v1', 'revision': COMMIT,
                                'fingerprint': before.about['fingerprint']}
  assert results['batch_norm'] == 'frozen: statistics, scales and biases of the weights'
  after = load_variables(tmp_path / 'run', 3)
  jax.tree.map(np.testing.assert_array_equal, after['batch_stats'], before.variables['batch_stats'])
  for name in ('scale', 'bias'):
    np.testing.assert_array_equal(after['params']['layer3']['0']['bn2'][name],
                                  before.variables['params']['layer3']['0']['bn2'][name])
  assert (after['params']['conv1']['kernel'] != before.variables['params']['conv1']['kernel']).any()


@pytest.mark.parametrize('name,repo,revision', [
    ('timm:resnet18.tv_in1k', 'timm/resnet18.tv_in1k', 'main'),
    ('timm:resnet18.a1_in1k@abc12', 'timm/resnet18.a1_in1k', 'abc12'),
    ('hf:some-one/net_1@refs/pr/2', 'some-one/net_1', 'refs/pr/2')])
def test_names(name, repo, revision):
  assert hub.parse(name) == (repo, revision)


def test_other_names():
  assert hub.parse('runs/timm') is None and hub.parse('C:/weights.pth') is None and hub.parse('gs://bucket/run') is None
  for name in ('timm:', 'timm:a/b', 'hf:resnet', 'hf:a/b/c', 'hf:a/b@', 'hf:../b', 'timm:resnet18@../../x'):
    with pytest.raises(ValueError, match='expected (timm:<name>|hf:<owner>/<name>)'):
      hub.parse(name)
