"""A selection prints as a table, survives saving and loading, and is checked against its data set."""

import dataclasses
import json

import numpy as np
import pytest

from selection import Embeddings, plots, select, Selection


@pytest.fixture(scope='module')
def chosen() -> Selection:
  rng = np.random.default_rng(0)
  source = Embeddings(rng.normal(size=(12, 5)), np.arange(12),
                      ['a $^$ name that is much too long for a column of a table', *'bcdefghijkl'],
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
  """The fractions of a class over all target classes sum to one."""
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


@pytest.mark.parametrize('method', ['uot', 'ot', 'least', 'softmax', 'nearest', 'greedy_emd', 'random', 'none'])
def test_converged_is_reported(images, method, tmp_path):
  """True after convergence, None for methods without iterations; also for files of versions without this field."""
  chosen = select(images, images.features[:6], 3, method=method, by='example')
  expected = True if method in ('uot', 'ot', 'least') else None
  chosen.save(tmp_path / 's.json')
  saved = json.loads((tmp_path / 's.json').read_text())
  saved['solver'].pop('converged', None)
  (tmp_path / 'old.json').write_text(json.dumps(saved))
  for selection in (chosen, Selection.load(tmp_path / 's.json'), Selection.load(tmp_path / 'old.json')):
    assert selection.converged is expected and ('converged in' in repr(selection)) == bool(expected)


def test_not_converged_is_reported(chosen, tmp_path):
  """In the first line of the table, in the representation, and after loading."""
  ended = dataclasses.replace(chosen, solver={'iterations': 2000, 'error': 0.0123, 'converged': False})
  ended.save(tmp_path / 's.json')
  for selection in (ended, Selection.load(tmp_path / 's.json')):
    assert selection.converged is False
    for text in (repr(selection), str(selection).splitlines()[0]):
      assert 'source classes, not converged after 2000 iterations (error 0.012)' in text
  (tmp_path / 's.json').write_text((tmp_path / 's.json').read_text().replace('"converged": false', '"converged": "no"'))
  with pytest.raises(ValueError, match='no selection that can be read .solver has an error or converged of'):
    Selection.load(tmp_path / 's.json')


def test_load_raises(chosen, tmp_path):
  path = tmp_path / 'selection.json'
  chosen.save(path)
  with pytest.raises(ValueError, match='made for pool .fingerprint abc., not for this data set .fingerprint def.'):
    Selection.load(path, source_fingerprint='def')
  text = path.read_text()
  unreadable = 'no selection that can be read'
  for damaged, words in ((text[:200], unreadable),
                         (text.replace('"format_version": 2', '"format_version": 7'), 'format version 7'),
                         ('[]', unreadable), (text.replace('"scores"', '"scorpions"'), unreadable),
                         (text.replace('"counts": [100, ', '"counts": ['), 'parts do not fit together: counts')):
    path.write_text(damaged)
    with pytest.raises(ValueError, match=words):
      Selection.load(path)
  with pytest.raises(ValueError, match='no selection that can be read'):
    Selection.load(tmp_path / 'none.json')


def test_explanation_of_the_target_adds_up(chosen):
  """The mass of a target class from chosen units is its coverage, which is 100% if all units are chosen."""
  for parts, covered in zip(chosen.explain_target(4), chosen.coverage()):
    assert sum(part for _, part in parts) == pytest.approx(covered, rel=1e-4) and 0 < covered < 1
  np.testing.assert_allclose(everything(chosen).coverage(), 1, rtol=1e-4)
  lines = chosen.target_table(2).splitlines()
  assert lines[0].split() == ['target', 'covered', 'by'] and len(lines) == 4 and '... and 1 more' in lines[3]


def everything(chosen: Selection) -> Selection:
  """The same problem with all units chosen."""
  rng = np.random.default_rng(0)
  source = Embeddings(rng.normal(size=(12, 5)), np.arange(12), chosen.names, weights=np.arange(12) + 100)
  return select(source, Embeddings(rng.normal(size=(3, 5)), np.arange(3), ['x', 'y', 'z']), 12)


def test_long_names_are_shortened():
  """Class names keep their start, paths their file name."""
  names = ['001.Black_footed_Albatross_of_the_northern_Pacific', 'n01440764/n01440764_10026_and_more.JPEG']
  table = select(Embeddings(np.eye(2, 3), [0, 1], names), np.ones((1, 3)), 2).table()
  assert '001.Black_footed_Albatross_of...' in table and '_10026_and_more.JPEG' in table


def test_compare(chosen):
  whole = everything(chosen)
  found = chosen.compare(whole)
  assert found.shared == chosen.class_names and found.overlap == 1 and found.only_first == ()
  assert found.only_second == tuple(name for name in whole.class_names if name not in chosen.class_names)
  assert str(found).startswith('4 shared (100.0% of the smaller): ') and 'only in the first: none' in str(found)
  clusters = [select(np.random.default_rng(0).normal(size=(90, 3)), np.eye(3), 3, by='cluster', clusters=9, seed=seed)
              for seed in (0, 1)]
  with pytest.raises(ValueError, match='the units are not the same'):  # other clusters with the same names
    clusters[0].compare(clusters[1])
  with pytest.raises(ValueError, match='a selection of 12 classes cannot be compared with one of 5 examples'):
    chosen.compare(select(np.eye(5, 5) + 1, np.eye(3, 5) + 1, 2, by='example'))


@pytest.fixture(scope='module')
def images() -> Embeddings:
  """Forty images of eight classes, with file names as ids."""
  rng = np.random.default_rng(1)
  return Embeddings(rng.normal(size=(40, 5)), np.arange(40) % 8, [f'class {k}' for k in range(8)],
                    [f'{k % 8}/{k}.jpg' for k in range(40)])


@pytest.mark.parametrize('by', ['class', 'cluster', 'example'])
def test_images_of_the_chosen_units(images, by, tmp_path):
  """Ids of the images of each kind of unit; saved in the file; exported sorted, without duplicates."""
  chosen = select(images, images.features[:6], 3, by=by, clusters=9 if by == 'cluster' else None)
  if by == 'class':
    assert sorted(chosen.examples) == sorted(images.ids[np.isin(images.labels, chosen.classes)])
    assert chosen.rows_of(chosen.classes[0]).tolist() == np.flatnonzero(images.labels == chosen.classes[0]).tolist()
  if by == 'example':
    assert chosen.examples.tolist() == images.ids[chosen.units].tolist() == [chosen.name(i) for i in chosen.units]
  assert (chosen.ids == images.ids[chosen.rows]).all()
  assert sum(len(chosen.rows_of(unit)) for unit in chosen.units) == len(chosen.examples)
  chosen.save(tmp_path / 's.json')
  loaded = Selection.load(tmp_path / 's.json', source=images)
  assert loaded.compare(chosen).overlap == chosen.compare(loaded).overlap == 1
  assert loaded.examples.tolist() == chosen.examples.tolist() and loaded.table(beyond=0) == chosen.table(beyond=0)
  assert loaded.export(tmp_path / 'deep' / 'list.txt') == len(chosen.examples)
  assert (tmp_path / 'deep' / 'list.txt').read_text().splitlines() == sorted(chosen.examples.tolist())
  with pytest.raises(ValueError, match='not among the chosen units'):
    chosen.rows_of(chosen.ranking()[-1])


def test_export(chosen, images, tmp_path):
  """From means with a list of files and their classes; by row numbers; and what raises ValueError."""
  files, labels = ['b.jpg', 'a.jpg', 'b.jpg', 'c.jpg'], [chosen.classes[0], chosen.classes[1], chosen.classes[0],
                                                         chosen.ranking()[-1]]
  assert chosen.export(tmp_path / 'list.txt', files, labels) == 2
  assert (tmp_path / 'list.txt').read_text() == 'a.jpg\nb.jpg\n'
  by_row = select(Embeddings(images.features), images.features[:4], 3, by='example')
  by_row.export(tmp_path / 'list.txt', [f'{i:02d}' for i in range(40)])
  assert (tmp_path / 'list.txt').read_text().splitlines() == [f'{i:02d}' for i in sorted(by_row.units)]
  by_row.export(tmp_path / 'list.txt')
  assert (tmp_path / 'list.txt').read_text().splitlines() == [str(i) for i in sorted(by_row.units)]
  for wrong, words in ((lambda: chosen.export(tmp_path / 'new.txt'), 'made from means, so its images are not known'),
                       (lambda: by_row.export(tmp_path / 'new.txt', ['a']),
                        '1 files do not fit: expected one for each of the 40 rows'),
                       (lambda: chosen.export(tmp_path / 'new.txt', files, labels[:2]),
                        'labels need a file for each .2 labels, 4 files'),
                       (lambda: chosen.export(tmp_path / 'new.txt', ['a\nb'] * 4, labels), 'has a line break in it')):
    with pytest.raises(ValueError, match=words):
      wrong()
  assert not (tmp_path / 'new.txt').exists()


def test_load_checks_the_set(chosen, tmp_path):
  chosen.save(tmp_path / 's.json')
  features, labels = np.ones((12, 5)), np.arange(12)
  Selection.load(tmp_path / 's.json', source=Embeddings(features, labels, chosen.names, fingerprint='encoder'))
  for source, words in ((Embeddings(features[:5], labels[:5]), 'made for 12 source classes, and this source has 5'),
                        (Embeddings(features, labels, chosen.names, fingerprint='other'), 'made with another encoder'),
                        (Embeddings(features, labels, [*chosen.names[:-1], 'new']), 'class 11 was l, and is new here')):
    with pytest.raises(ValueError, match=words):
      Selection.load(tmp_path / 's.json', source=source)


def test_a_large_selection_is_saved_small_and_whole(tmp_path):
  """Long arrays are saved as base64: 12,000 of 30,000 examples are the same after loading."""
  rng = np.random.default_rng(0)
  chosen = select(rng.normal(size=(30_000, 4)), (rng.normal(size=(20, 4)), np.arange(20) % 3), 12_000, by='example')
  chosen.save(tmp_path / 's.json')
  loaded = Selection.load(tmp_path / 's.json')
  np.testing.assert_array_equal(loaded.scores, chosen.scores)
  np.testing.assert_array_equal(loaded.units, chosen.units)
  np.testing.assert_array_equal(loaded.plan, chosen.plan)
  assert (tmp_path / 's.json').stat().st_size < 1_000_000
  assert str(loaded) == str(chosen)


def test_plots(chosen, images):
  """Ranking and heat map with names; fractions per target class; an error if there is no plan to draw."""
  figure = chosen.plot()
  ranking, plan = figure.axes[:2]
  assert [text.get_text() for text in plan.get_yticklabels()][1:] == list(chosen.class_names[1:])
  assert sorted(text.get_text() for text in plan.get_xticklabels()) == ['x', 'y', 'z']
  np.testing.assert_allclose(plan.images[0].get_array().sum(1), 100, rtol=1e-5)
  assert figure._repr_png_()[:4] == b'\x89PNG'
  assert len(select(images, images.features[:4], 3, method='greedy_emd').plot().axes) == 1
  assert select(images, images.features[:4], 3, method='none').plot()
  with pytest.raises(ValueError, match='no plan to draw: random does not relate units to single classes'):
    plots.heat_map(select(images, images.features[:4], 3, method='random'))
  large = select(np.random.default_rng(0).normal(size=(3000, 4)), (images.features[:30, :4], np.arange(30)), 1000,
                 by='example')
  assert len(large.plot().axes[1].get_yticklabels()) == 30


def test_ranking_plot(chosen):
  """One bar per class, the chosen ones in their own colour; a curve if there are too many for names."""
  import matplotlib.colors

  axes = plots.ranking(chosen).axes[0]
  colors = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in axes.patches]
  assert colors == [plots.CHOSEN] * 4 + [plots.OTHER] * 8
  assert [bar.get_height() for bar in axes.patches] == sorted(100 * chosen.shares, reverse=True)
  plots.ranking(chosen).draw_without_rendering()  # a name with dollar signs is no formula
  assert not plots.ranking(chosen, most=5).axes[0].patches
