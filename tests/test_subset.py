"""A selection reads as a table, keeps what it is when saved, and belongs to its data set."""

import dataclasses
import json

import numpy as np
import pytest

from selection import Embeddings, plots, select, Selection


@pytest.fixture(scope='module')
def chosen() -> Selection:
  rng = np.random.default_rng(0)
  source = Embeddings(rng.normal(size=(12, 5)), np.arange(12), ['a $^$ name that is much too long for a column of a table', *'bcdefghijkl'],
                      weights=np.arange(12) + 100, fingerprint='encoder')
  target = Embeddings(rng.normal(size=(3, 5)), np.arange(3), ['x', 'y', 'z'])
  return dataclasses.replace(select(source, target, 4), source={'name': 'pool', 'fingerprint': 'abc'})


def test_table(chosen):
  """Rank, name, share, images and the reason of each chosen class, then the first that were not chosen."""
  lines = str(chosen).splitlines()
  assert lines[0] == f'uot: 4 of 12 source classes, converged in {chosen.solver["iterations"]} iterations'
  assert [line.split()[0] for line in lines[2:6]] == ['1', '2', '3', '4'] and 'not chosen' in lines[6]
  assert [line.split()[1] for line in lines[2:6]] == [name.split()[0] for name in chosen.class_names]
  assert all('%' in line for line in lines[2:6]) and len(lines) == 10
  assert max(map(len, lines)) < 100
  assert '... and 2 more' in chosen.table(2)


def test_explanation_adds_up(chosen):
  """The parts of a class over all target classes are one."""
  for parts in chosen.explain(3):
    assert sum(part for _, part in parts) == pytest.approx(1, abs=1e-6)
    assert [part for _, part in parts] == sorted((part for _, part in parts), reverse=True)


def test_save_and_load(chosen, tmp_path):
  path = tmp_path / 'deep' / 'selection.json'
  chosen.save(path)
  loaded = Selection.load(path, source_fingerprint='abc')
  for field in dataclasses.fields(Selection):
    before, after = getattr(chosen, field.name), getattr(loaded, field.name)
    if isinstance(before, np.ndarray):
      np.testing.assert_allclose(after, before, rtol=1e-6)
      assert after.dtype == before.dtype, field.name
    else:
      assert after == before, field.name
  assert str(loaded) == str(chosen)
  assert json.loads(path.read_text())['format_version'] == 2


def test_load_refuses(chosen, tmp_path):
  path = tmp_path / 'selection.json'
  chosen.save(path)
  with pytest.raises(ValueError, match='made for pool .fingerprint abc., not for this data set .fingerprint def.'):
    Selection.load(path, source_fingerprint='def')
  text = path.read_text()
  unreadable = 'no selection that can be read'
  for damaged, words in ((text[:200], unreadable), (text.replace('"format_version": 2', '"format_version": 7'), 'format version 7'),
                         ('[]', unreadable), (text.replace('"scores"', '"scorpions"'), unreadable),
                         (text.replace('"counts": [100, ', '"counts": ['), 'parts do not fit together: counts')):
    path.write_text(damaged)
    with pytest.raises(ValueError, match=words):
      Selection.load(path)
  with pytest.raises(ValueError, match='no selection that can be read'):
    Selection.load(tmp_path / 'none.json')


def test_ranking_plot(chosen):
  """A bar a class, the chosen ones in the first colour; a curve where there are too many for names."""
  import matplotlib.colors

  axes = plots.ranking(chosen).axes[0]
  colors = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in axes.patches]
  assert colors == [plots.CHOSEN] * 4 + [plots.OTHER] * 8
  assert [bar.get_height() for bar in axes.patches] == sorted(100 * chosen.shares, reverse=True)
  plots.ranking(chosen).draw_without_rendering()  # a name with dollar signs is no formula
  assert not plots.ranking(chosen, most=5).axes[0].patches
