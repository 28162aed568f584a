"""Whole runs by the command line give what they gave: the record in tests/fixtures/record.json, which tests/record.py
wrote."""

import json

import numpy as np
import pytest
import record

pytestmark = pytest.mark.slow

# The record was compared with itself made for AVX2 and for SSE4.2 instead of AVX-512, and on Python 3.13 with jax 0.12:
# losses differed by 5e-6 at most, scores by 2e-6, arrays by 6e-3 of their norm. (Those are biases of BatchNorm, which
# begin at zero: it is 6e-3 of the way that they went. All others differed by 6e-6.)
LOSSES, SCORES, ARRAYS = 5e-5, 2e-5, 3e-2


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  return record.record(tmp_path_factory.mktemp('record'))


@pytest.mark.parametrize('name', list(record.RUNS))
def test_a_run_gives_what_it_gave(found, name):
  """The losses of every step, the selection and the network: whatever is rebuilt inside, no result changes."""
  expected, now = json.loads(record.FILE.read_text())[name], found[name]
  np.testing.assert_allclose(now['losses'], expected['losses'], rtol=LOSSES)
  assert now.get('units') == expected.get('units')
  np.testing.assert_allclose(now.get('scores', []), expected.get('scores', []), rtol=SCORES)
  assert set(now['variables']) == set(expected['variables'])
  for path, (norm, product) in expected['variables'].items():
    np.testing.assert_allclose(now['variables'][path], (norm, product), rtol=0, atol=ARRAYS * norm + 1e-12,
                               err_msg=path)
