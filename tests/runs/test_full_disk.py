"""A full or read-only disk, a folder that vanishes, a permission that is missing: the run ends with one line that says
what happened, what is whole stays whole, and the same command goes on once it is mended.

The disks are small and in memory, in a mount namespace of a process of their own: run as a script, this file is that
  process.
"""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = {'model.width': 4, 'image_size': 16, 'augment.short_side': 16, 'model.weights': '', 'source.name': '',
          'selection.method': 'none',
          'train.steps': 12, 'train.eval_every': 4, 'train.log_every': 2, 'train.batch_size': 16,
          'train.learning_rate_groups': (('.*', 1.0),)}
# Room for no checkpoint of such a run (480 kB), and for one, but not for two.
TINY, SMALL = '300k', '800k'
IN_NAMESPACE = ['unshare', '--user', '--map-root-user', '--mount']


def child(*arguments: str) -> subprocess.CompletedProcess:
  """This file as a script."""
  # The exception is ml_collections' own, when it reads a config on Python 3.11.
  env = {**os.environ, 'XLA_FLAGS': '--xla_backend_optimization_level=0', 'JAX_PLATFORMS': 'cpu',
         'PYTHONPATH': str(ROOT),
         'PYTHONWARNINGS': 'error,ignore:the load_module() method is deprecated:DeprecationWarning'}
  return subprocess.run([*arguments[:-2], sys.executable, __file__, *arguments[-2:]], cwd=ROOT, env=env,
                        capture_output=True, text=True,
                        check=False)


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """What the runs on small disks said and left behind."""
  probe = subprocess.run([*IN_NAMESPACE, 'mount', '-t', 'tmpfs', 'tmpfs', '/mnt'], capture_output=True, text=True,
                         check=False) \
      if shutil.which('unshare') else None
  if probe is None or probe.returncode:
    pytest.skip(f'no mount namespace here ({probe.stderr.strip() if probe else "unshare is not installed"})')
  run = child(*IN_NAMESPACE, 'disks', str(tmp_path_factory.mktemp('disk')))
  assert run.returncode == 0, run.stderr
  return json.loads(run.stdout.splitlines()[-1])


def test_a_full_disk_ends_the_run(found):
  """The first checkpoint is written in the background, so its error comes late, from a thread; every line of metrics
  stays."""
  first = found['full']
  assert first['status'] == 1 and 'Traceback' not in first['printed'] and first['printed'].count('\nerror: ') == 1
  error = first['printed'].splitlines()[-1]
  assert 'PLACE/run/checkpoints/4 cannot be written: the disk is full (' in error and ' are free)' in error
  assert error.endswith('What was written before is unchanged; free some space there, and the same command resumes')
  assert first['steps'] == [] and len(first['lines']) >= 2
  assert first['lines'] == found['undisturbed']['lines'][:len(first['lines'])]


def test_too_little_room_for_a_second_checkpoint(found):
  """It is foreseen; the one before it stays."""
  error, left = found['small']
  assert 'PLACE/run/checkpoints/8 cannot be written: the disk is full (' in error
  assert error.endswith(
      'the newest whole checkpoint is PLACE/run/checkpoints/4; free some space there, and the same command resumes')
  assert left['steps'] == [4] and [line['step'] for line in left['lines']] == [2, 4, 6, 8]


def test_a_disk_that_becomes_read_only(found):
  assert 'run/checkpoints/8 cannot be written: the disk is read-only. ' in found['read-only']
  assert found['read-only'].endswith(
      'newest whole checkpoint is PLACE/run/checkpoints/4; make it writable, and the same command resumes')


def test_a_workdir_that_vanishes(found):
  """It is not created again without its first lines; once it is restored, the run resumes."""
  error, there = found['vanished']
  assert 'cannot be written: its folder does not exist any more. ' in error
  assert 'restore it, and the same command resumes' in error
  assert not there


def test_after_all_this_the_run_is_as_an_undisturbed_one(found):
  """Bit for bit, with each step once."""
  assert found['in the end'] == found['undisturbed'] and len(found['in the end']['lines']) == 6


def test_whatever_is_written_is_whole_or_as_before(found):
  """On a disk without a free byte: each file says that it cannot be written, and holds what it held; nothing is left
  beside it."""
  assert set(found['files']) == {'metrics', 'results', 'selection', 'embeddings', 'journal', 'append'}
  for name, (error, same) in found['files'].items():
    assert 'the disk is full (0 bytes are free)' in error and '\n' not in error and same, name


def test_a_first_folder_that_cannot_be_made(found):
  assert found['first'][0].startswith('PLACE/new/run cannot be written: the disk is read-only. ')
  assert found['first'][1].startswith(
      "workdir 'PLACE/new/run' cannot be created (PLACE/new/run cannot be written: the disk is read-only. ")


def test_without_permission(tmp_path):
  run = child('denied', str(tmp_path))
  assert run.returncode == 0, run.stderr
  errors = json.loads(run.stdout.splitlines()[-1])
  assert errors['new'].startswith('PLACE/closed/run cannot be written: permission denied. ')
  assert errors['metrics'].startswith('PLACE/run/metrics.jsonl cannot be written: permission denied. ')
  assert all(', and ' in error and 'write there' in error for error in errors.values())


def test_a_file_larger_than_is_allowed(tmp_path):
  """Where there is no namespace, this limit of the system still cuts a write short."""
  run = child('limited', str(tmp_path))
  assert run.returncode == 0, run.stderr
  error, size = json.loads(run.stdout.splitlines()[-1])
  assert 'growing cannot be written: files may not become that large (ulimit -f). ' in error and size == 900


# What runs on the small disks.


def mount(place: str, *options: str) -> None:
  subprocess.run(['mount', '-t', 'tmpfs', '-o', ','.join(options), 'tmpfs', place], check=True)


def config():
  from configs import digits

  fields = digits.get_config('finetune')
  fields.update_from_flattened_dict(FIELDS)
  return fields


def left(workdir: pathlib.Path) -> dict:
  """What a run left behind, without what the clock says."""
  steps = sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  results = json.loads((workdir / 'results.json').read_text()) if (workdir / 'results.json').exists() else {}
  return {'steps': steps, 'lines': [{k: v for k, v in line.items() if k not in ('images_per_second', 'waiting_share')}
                                    for line in lines],
          'digest': steps
          and json.loads((workdir / 'checkpoints' / str(steps[-1]) / 'about' / 'metadata').read_text())['digest'],
          'results': {k: v for k, v in results.items() if k not in ('command', 'cost')}}


def said(function, *arguments) -> str:
  try:
    function(*arguments)
  except (OSError, ValueError) as error:
    return str(error)
  return ''


@contextlib.contextmanager
def before_checkpoint(step: int, disaster):
  """Within, something happens just before that checkpoint is saved."""
  from ft_jax.training.checkpoints import Checkpoints

  save = Checkpoints.save

  def disturbed(self, at, *arguments):
    if at == step:
      self.wait()
      disaster()
    return save(self, at, *arguments)

  Checkpoints.save = disturbed
  try:
    yield
  finally:
    Checkpoints.save = save


def disks(place: str) -> dict:
  from ft_jax.jobs import finetune

  work, result = pathlib.Path(place) / 'run', {}
  mount(place, 'size=16m')
  finetune.run(config(), work)
  result['undisturbed'] = left(work)

  mount(place, f'size={TINY}')
  flags = [f'--config.{name}={value}' for name, value in FIELDS.items()]
  run = subprocess.run([sys.executable, 'main.py', '--config=configs/digits.py:finetune', *flags, f'--workdir={work}'],
                       cwd=ROOT, capture_output=True, text=True, check=False)
  result['full'] = {'status': run.returncode, 'printed': run.stderr.replace(place, 'PLACE'), **left(work)}

  subprocess.run(['mount', '-o', f'remount,size={SMALL}', place], check=True)
  result['small'] = said(finetune.run, config(), work).replace(place, 'PLACE'), left(work)
  subprocess.run(['mount', '-o', 'remount,size=16m', place], check=True)

  with before_checkpoint(8, lambda: subprocess.run(['mount', '-o', 'remount,ro', place], check=True)):
    result['read-only'] = said(finetune.run, config(), work).replace(place, 'PLACE')
  subprocess.run(['mount', '-o', 'remount,rw', place], check=True)

  with before_checkpoint(12, lambda: work.rename(work.with_name('elsewhere'))):
    result['vanished'] = said(finetune.run, config(), work).replace(place, 'PLACE'), work.exists()
  work.with_name('elsewhere').rename(work)
  finetune.run(config(), work)
  result['in the end'] = left(work)

  mount(place, 'size=1m')
  result['files'] = files_of(pathlib.Path(place))
  subprocess.run(['mount', '-o', 'remount,ro', place], check=True)
  result['first'] = [error.replace(place, 'PLACE') for error in first_folders(pathlib.Path(place) / 'new' / 'run')]
  return result


def files_of(place: pathlib.Path) -> dict:
  """What each writer says where nothing can be written, and whether all files are as they were."""
  from ft_jax.metrics import MetricsWriter
  from ft_jax.workdir import Workdir, write_results
  from selection import Embeddings, Selection
  from selection.journal import Journal

  fields = {'job': 'finetune', 'seed': 0, 'train': {}}
  work = Workdir(place / 'run', fields)
  writer = MetricsWriter(work, 0)
  embeddings = Embeddings(np.arange(6000, dtype=np.float32).reshape(60, 100))
  chosen = Selection.of_rows(range(300), [f'image {i}' for i in range(900)])
  journal = Journal(place / 'passes', {})
  written = {'metrics': lambda: writer.write(2, {f'metric {i}': i / 7 for i in range(200)}),
             'results': lambda: write_results(work, {'numbers': list(range(2000))}),
             'selection': lambda: chosen.save(work.selection_json),
             'embeddings': lambda: embeddings.save(work.embeddings / 'target.npz'),
             'journal': lambda: journal.save('potentials', values=np.arange(2000)),
             'append': lambda: journal.scores('scores').append(np.arange(2000))}
  for write in written.values():
    write()
  contents = lambda: {str(path): path.read_bytes() for path in place.rglob('*') if path.is_file()
                      and path.name != 'filling'}
  before = contents()
  with contextlib.suppress(OSError), open(place / 'filling', 'wb', buffering=0) as filling:
    while True:
      filling.write(bytes(4096))
  return {name: (said(write), contents() == before) for name, write in written.items()}


def first_folders(folder: pathlib.Path) -> tuple[str, str]:
  from ft_jax.workdir import Workdir
  from selection.journal import Journal

  return said(Workdir, folder, {'job': 'finetune'}), said(Journal, folder, {})


def denied(place: str) -> dict:
  from ft_jax.metrics import MetricsWriter
  from ft_jax.workdir import Workdir

  work = Workdir(pathlib.Path(place) / 'run', {'job': 'finetune', 'seed': 0, 'train': {}})
  writer = MetricsWriter(work, 0)
  (pathlib.Path(place) / 'closed').mkdir(mode=0o500)
  work.metrics_jsonl.write_text('')
  os.chmod(work.metrics_jsonl, 0o400)
  if os.geteuid() == 0:  # who may do everything
    os.chmod(place, 0o755)
    for folder in pathlib.Path(place).parents[:-1]:
      os.chmod(folder, os.stat(folder).st_mode | 0o011)
    os.seteuid(65534)
  errors = {'new': said(Workdir, pathlib.Path(place) / 'closed' / 'run', {'job': 'finetune'}),
            'metrics': said(writer.write, 2, {'loss': 1.0})}
  return {name: error.replace(place, 'PLACE') for name, error in errors.items()}


def limited(place: str) -> tuple[str, int]:
  import resource
  import signal

  from selection import storage

  path = pathlib.Path(place) / 'growing'
  path.write_bytes(bytes(900))
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
  return said(storage.append, path, bytes(200)), path.stat().st_size


if __name__ == '__main__':
  print(json.dumps({'disks': disks, 'denied': denied, 'limited': limited}[sys.argv[1]](sys.argv[2])))
