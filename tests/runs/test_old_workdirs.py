"""A workdir that an older version wrote is opened by every later one: shown again, resumed, used. See
old_workdirs.py."""

import json
import logging
import pathlib
import tarfile

from ml_collections import ConfigDict
import old_workdirs
import pytest
from torch_weights import RESNET

from configs import default
from ft_jax import trained
from ft_jax.jobs import export, finetune, predict, pretrain
from ft_jax.studies import history
from ft_jax.training import fit, initial_weights
import selection

JOBS = {'pretrained': pretrain, 'finished': finetune, 'interrupted': finetune, 'interrupted_random': finetune}


@pytest.fixture
def old(tmp_path, monkeypatch) -> pathlib.Path:
  """A copy of the workdirs and their images, which is the current directory."""
  with tarfile.open(old_workdirs.ARCHIVE) as archive:
    archive.extractall(tmp_path, filter='data')
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize('name', ['pretrained', 'finished'])
def test_a_finished_run_is_shown_again(old, name, monkeypatch):
  monkeypatch.setattr(fit, 'fit', lambda *_, **__: pytest.fail('it was trained again'))
  before = (old / name / 'results.json').read_bytes()
  assert JOBS[name].run(old_workdirs.config(name), name) == json.loads(before)
  assert (old / name / 'results.json').read_bytes() == before and (old / name / 'report.html').exists()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['interrupted', 'interrupted_random'])
def test_an_interrupted_run_resumes_to_its_end(old, name, caplog):
  """On the joint selection that it began with, which is not made again."""
  caplog.set_level(logging.INFO)
  chosen = (old / name / 'selection.json').read_bytes()
  results = JOBS[name].run(old_workdirs.config(name), name)
  assert results['steps'] == 4 and 'resuming from step 2 of 4' in caplog.text
  assert (old / name / 'selection.json').read_bytes() == chosen
  assert results['selection']['images'] == (6 if 'random' in name else 8)
  assert [json.loads(line)['step'] for line in (old / name / 'metrics.jsonl').read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['pretrained', 'finished'])
def test_an_old_run_is_used_by_every_job_that_takes_one(old, name):
  run = trained.load(name)
  assert run.config.augment.short_side == run.transform.size == 32
  assert run.class_names == tuple('abc' if name == 'pretrained' else 'xyz')
  assert initial_weights.load_weights(name, RESNET).about['fingerprint']
  job = ConfigDict(default.get_config().to_dict())
  job.workdir, job.predict.images = name, 'images/target/test'
  assert predict.run(job, f'{name}/predict')['images'] == 6
  architecture = export.run(job, f'{name}/export')['architecture']
  assert architecture == {'name': 'resnet18', 'width': 1, 'stem': '3x3', 'stages': 0}


def test_old_checkpoints_are_those_of_a_study(old):
  found = history.read('pretrained', default.get_config().model)
  assert [kept.step for kept in found.checkpoints] == [4] and found.network.width == 1 and found.source == 'folder:pool'
  assert history.fingerprints(found, 32)


def test_an_old_selection_is_read(old):
  for name, by in (('finished', 'class'), ('interrupted_random', 'example')):
    chosen = selection.Selection.load(old / name / 'selection.json')
    assert chosen.by == by and chosen.method == 'uot' and len(chosen.units) == (2 if by == 'class' else 6)


