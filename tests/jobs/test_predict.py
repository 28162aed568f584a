"""Predictions are the run's own: the same accuracy on its test images, each image exactly once, and files that say what
was seen."""

import csv
import io
import json
import os
import pathlib
import shutil

from conftest import quick_main, write_images
from etils import epath
import jax
import numpy as np
import PIL.Image
import pytest

from configs import miniature
from configs import predict as predict_config
from ft_jax import trained, workdir
from ft_jax.data import open_set
from ft_jax.data.image_set import Example, split_off_val
from ft_jax.data.path_list import open_paths
from ft_jax.jobs import finetune, predict
from ft_jax.pages import contact_sheet, page, report


def rows(path: pathlib.Path) -> list[dict[str, str]]:
  with path.open(newline='', encoding='utf-8') as stream:
    return list(csv.DictReader(stream))


def config_of(workdir, images, **fields):
  config = predict_config.get_config()
  config.workdir, config.predict.images = str(workdir), str(images)
  config.update(fields)
  return config


def test_the_runs_own_test_images(trained_run, photos):
  """The command writes into the run's folder; its table gives the accuracy and the confusions that results.json has."""
  run = quick_main('--config=configs/predict.py', f'--config.workdir={trained_run}',
                   f'--config.predict.images={photos / "test"}',
                   '--config.predict.top=4')
  assert run.returncode == 0, run.stderr
  test = json.loads((trained_run / 'results.json').read_text())['test']
  table = rows(trained_run / 'predict' / 'predictions.csv')
  assert [row['file'] for row in table] == [f'{name}/{i}.jpg' for name in ('blossom', 'roof', 'sky', 'wall')
                                            for i in range(5)]
  names = [row['name'] for row in test['per_class']]
  confusion = np.zeros((4, 4), int)
  for row in table:
    assert row['true_class'] == row['file'].partition('/')[0]
    assert sorted(row[f'class_{k}'] for k in range(1, 5)) == sorted(names)
    probabilities = [float(row[f'probability_{k}']) for k in range(1, 5)]
    assert probabilities == sorted(probabilities, reverse=True) and abs(sum(probabilities) - 1) < 1e-5
    confusion[names.index(row['true_class']), names.index(row['class_1'])] += 1
  assert np.trace(confusion) / 20 == test['top1']
  assert [[int(t), int(p), int(confusion[t, p])] for t, p in np.argwhere(confusion)] == test['confusion']
  assert f'top-1 {test["top1"]:.1%} of the 20 images' in run.stderr
  with PIL.Image.open(trained_run / 'predict' / 'contact_sheet.png') as sheet:
    assert sheet.format == 'PNG' and sheet.width > 1000


@pytest.fixture(scope='module')
def mixed(photos, tmp_path_factory) -> pathlib.Path:
  """A folder with names that are hard to write, at several depths, and things that are no images."""
  folder = tmp_path_factory.mktemp('mixed')
  (folder / 'b').mkdir()
  for i, name in enumerate(('ä, "x".JPG', 'b/2.jpg', 'b/10.jpg', '.hidden.jpg', 'c\nd.jpg')):
    shutil.copy(photos / 'test' / 'sky' / f'{i % 5}.jpg', folder / name)
  (folder / 'notes.txt').write_text('no image')
  return folder


def test_each_image_once_whatever_the_batch(trained_run, mixed, tmp_path):
  """Four devices, five images: padding is nobody's prediction, and every row is what the network says of that file."""
  predict.run(config_of(trained_run, mixed), tmp_path)
  table = rows(tmp_path / 'predictions.csv')
  assert [row['file'] for row in table] == ['b/10.jpg', 'b/2.jpg', 'c\nd.jpg', 'ä, "x".JPG']
  assert list(table[0]) == ['file', 'class_1', 'probability_1', 'class_2', 'probability_2', 'class_3', 'probability_3']
  run = trained.load(str(trained_run))
  images = np.stack([run.transform.evaluate(Example((mixed / row['file']).read_bytes(), 0, '')) for row in table])
  apply = jax.jit(run.model.apply, compiler_options={'xla_backend_optimization_level': 0})
  expected = jax.nn.softmax(apply(run.variables, images).logits['target'])
  for row, probabilities in zip(table, np.asarray(expected)):
    order = np.argsort(-probabilities)[:3]
    assert [row[f'class_{k}'] for k in (1, 2, 3)] == [run.class_names[k] for k in order]
    np.testing.assert_allclose([float(row[f'probability_{k}']) for k in (1, 2, 3)], probabilities[order], atol=1e-5)


def test_unreadable_images(trained_run, mixed, tmp_path):
  """Refused by name, with nothing written; or left out, with the reason in the table; what was there before is
  replaced."""
  shutil.copytree(mixed, tmp_path / 'images')
  broken = tmp_path / 'images' / 'b' / '2.jpg'
  broken.write_bytes(broken.read_bytes()[:200])
  out = tmp_path / 'out'
  with pytest.raises(ValueError, match='b/2.jpg cannot be read as an image'):
    predict.run(config_of(trained_run, tmp_path / 'images'), out)
  assert not list(out.iterdir())
  result = predict.run(config_of(trained_run, tmp_path / 'images', data={'on_error': 'skip'}), out)
  assert (result['images'], result['unreadable']) == (3, 1)
  table = {row['file']: row for row in rows(out / 'predictions.csv')}
  assert table['b/2.jpg']['class_1'] == table['b/2.jpg']['probability_1'] == ''
  assert 'cannot be read as an image' in table['b/2.jpg']['problem']
  assert all(row['class_1'] and not row['problem'] for name, row in table.items() if name != 'b/2.jpg')
  # A list, in its own order, of a file that is not there, and one that is broken.
  (tmp_path / 'images' / 'list.txt').write_text('gone.jpg\n\nb/2.jpg\n')
  with pytest.raises(ValueError, match='there is no file .*gone.jpg.*on_error=skip'):
    predict.run(config_of(trained_run, tmp_path / 'images' / 'list.txt'), out)
  assert len(rows(out / 'predictions.csv')) == 4
  predict.run(config_of(trained_run, tmp_path / 'images' / 'list.txt', data={'on_error': 'skip'}), out)
  assert [(row['file'], row['class_1']) for row in rows(out / 'predictions.csv')] == [('gone.jpg', ''), ('b/2.jpg', '')]
  assert not (out / 'contact_sheet.png').exists()


@pytest.fixture
def photo(photos) -> bytes:
  return (photos / 'test' / 'sky' / '0.jpg').read_bytes()


def test_a_name_that_is_not_utf8(trained_run, photo, tmp_path):
  """The table has the bytes of the name, so that the file can be found; a picture is drawn all the same."""
  (tmp_path / 'images').mkdir()
  (tmp_path / 'images' / os.fsdecode(b'caf\xe9.jpg')).write_bytes(photo)
  predict.run(config_of(trained_run, tmp_path / 'images'), tmp_path)
  assert (tmp_path / 'predictions.csv').read_bytes().split(b'\n')[1].startswith(b'caf\xe9.jpg,')
  with PIL.Image.open(tmp_path / 'contact_sheet.png') as sheet:
    sheet.load()


def test_training_images_whose_names_are_not_utf8(photo, tmp_path):
  """They open, their fingerprint tells names apart, and what is written of them is UTF-8."""
  fingerprints = set()
  for name in (b'caf\xe9', b'caf\xe8'):
    folder = tmp_path / name.hex() / os.fsdecode(name)
    folder.mkdir(parents=True)
    for k in range(2):
      (folder / os.fsdecode(name + b'%d.jpg' % k)).write_bytes(photo)
    source = open_set(f'folder:{folder.parent}', 'train')
    assert os.fsencode(source[0].id) == name + b'/' + name + b'0.jpg' and source[0].image == photo
    fingerprints |= {source.fingerprint, *(part.fingerprint for part in split_off_val(source, 0.5, 0))}
  assert len(fingerprints) == 6
  workdir.write_text(epath.Path(tmp_path / 'page.html'), f'<p>{source.ids[0]}</p>')
  assert (tmp_path / 'page.html').read_text(encoding='utf-8') == r'<p>caf\udce8/caf\udce80.jpg</p>'
  assert '<svg' in page.svg(report.per_class([{'name': source.class_names[0], 'images': 2, 'right': 1}]))


def test_a_list_with_a_mark_and_an_image_twice(trained_run, photo, tmp_path, caplog):
  """Windows' editors begin a file with a mark; each line has its row, in the order of the list; an image is predicted
  once."""
  for name in ('a.jpg', 'b.jpg'):
    (tmp_path / name).write_bytes(photo)
  (tmp_path / 'list.txt').write_bytes(b'\xef\xbb\xbfb.jpg\r\na.jpg\r\nb.jpg\r\n')
  files = open_paths(str(tmp_path / 'list.txt'))
  assert files.names == ['b.jpg', 'a.jpg', 'b.jpg'] and files.images.ids.tolist() == ['b.jpg', 'a.jpg']
  assert not files.problems
  predict.run(config_of(trained_run, tmp_path / 'list.txt'), tmp_path / 'out')
  table = rows(tmp_path / 'out' / 'predictions.csv')
  assert [row['file'] for row in table] == files.names and table[0] == table[2] and table[0]['class_1']
  with caplog.at_level('INFO', 'ft_jax'):
    (tmp_path / 'list.txt').write_text('a.jpg')
    predict.run(config_of(trained_run, tmp_path / 'list.txt'), tmp_path / 'out')
  assert 'predicting 1 image of' in caplog.text and '1 images' not in caplog.text


def test_links_in_a_folder(trained_run, photo, tmp_path):
  """Linked folders are gone through, but not in circles; a link to nothing is no matter of a list."""
  for name in ('images/a', 'elsewhere'):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / '1.jpg').write_bytes(photo)
  for link, to in (('a/up', '..'), ('a/self', 'self'), ('b', '../elsewhere'), ('c', 'a')):
    (tmp_path / 'images' / link).symlink_to(to)
  assert open_paths(str(tmp_path / 'images')).names == ['a/1.jpg', 'b/1.jpg', 'c/1.jpg']
  (tmp_path / 'images' / 'gone.jpg').symlink_to('nothing.jpg')
  with pytest.raises(ValueError,
                     match='gone.jpg is a link to a file that does not exist; fix or remove it, or leave') as raised:
    predict.run(config_of(trained_run, tmp_path / 'images'), tmp_path / 'out')
  assert 'list' not in str(raised.value)


def test_what_is_not_predicted_is_told(mixed, photo, tmp_path, caplog):
  """In one line, with one of each kind; a file that is named is an image by its content, whatever its name ends in."""
  shutil.copytree(mixed, tmp_path / 'images.jpg')
  (tmp_path / 'images.jpg' / 'b' / 'x.heic').write_bytes(b'heic')
  (tmp_path / 'images.jpg' / 'gone.jpg').symlink_to('nothing.jpg')
  for _ in range(2):
    found = open_paths(str(tmp_path / 'images.jpg'))
    assert len(found.names) == 5 and list(found.problems) == ['gone.jpg']
  line, = [record.getMessage() for record in caplog.records]
  assert '3 files or folders are not used: 1 .heic, b/x.heic (a format that is not read' in line
  assert '1 .txt, notes.txt' in line
  (tmp_path / 'photo').write_bytes(photo)
  assert open_paths(str(tmp_path / 'photo')).names == [str(tmp_path / 'photo')]


def test_folders_that_name_classes():
  """Also by the WordNet ids of ImageNet, where the network knows them under their names; and all of them or none."""
  names = ('tench', 'goldfish', 'n01440764')
  assert predict._true_classes(['x/goldfish/1.jpg', 'tench/2.jpg'], names) == [1, 0]
  assert predict._true_classes(['n01443537/a.JPEG', 'goldfish/1.jpg', 'n01440764/a.JPEG'], names[:2]) == [1, 1, 0]
  assert predict._true_classes(['n01440764/a.JPEG'], names) == [2]  # a class of that very name
  assert predict._true_classes(['n01443537/a.JPEG', 'n01484850/a.JPEG'], names) is None


@pytest.mark.parametrize('images,words', [
    ('', 'config.predict.images is empty'), ('no/such', 'there is no file or folder'),
    ('no/such.jpg', 'there is no file'),
    ('{folder}/empty', 'no image in'), ('{folder}/empty.txt', 'is empty'),
    ('{folder}/binary', 'neither text, one path per line, nor'),
    ('{folder}/other', r'no image in .*; it holds 1 .heic, x.heic \(a format that is not read'),
    ('{folder}/other/x.heic', 'has a format that is not read; save it as .jpg')])
def test_wrong_images(tmp_path, images, words):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'empty.txt').write_text('\n')
  (tmp_path / 'other').mkdir()
  for name in ('binary', 'other/x.heic'):
    (tmp_path / name).write_bytes(b'\xff\xd8\xff\xe0')
  with pytest.raises(ValueError, match=words):
    open_paths(images.format(folder=tmp_path))


def test_wrong_settings(trained_run, mixed, tmp_path):
  for fields, words in (({'predict': {'top': 5}}, 'top is 5; expected 1 to 4'),
                        ({'data': {'on_error': 'ignore'}}, 'known: raise, skip'),
                        ({'data': {'timeout': -1.0}},
                         'data.timeout is -1.0; expected a number from 0 to .* .seconds.; 0 waits for ever')):
    with pytest.raises(ValueError, match=words):
      predict.run(config_of(trained_run, mixed, **fields), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_two_classes_give_two_columns_unless_three_are_asked_for(tmp_path):
  workdir = tmp_path / 'two'
  for split, count in (('train', 8), ('test', 2)):
    write_images(tmp_path / 'images' / split, dict.fromkeys(('cat', 'dog'), count), seed=count)
  config = miniature.get_config('finetune')
  config.target.name, config.selection.method, config.source.name = f'folder:{tmp_path / "images"}', 'none', ''
  config.model.weights, config.model.width, config.image_size, config.augment.short_side = '', 4, 32, 36
  config.train.steps, config.train.batch_size, config.train.eval_every = 2, 8, 2
  finetune.run(config, workdir)
  predict.run(config_of(workdir, tmp_path / 'images' / 'test'), tmp_path / 'out')
  assert list(rows(tmp_path / 'out' / 'predictions.csv')[0])[-3:] == ['class_2', 'probability_2', 'true_class']
  with pytest.raises(ValueError, match='top is 3; expected 1 to 2'):
    predict.run(config_of(workdir, tmp_path / 'images', predict={'top': 3}), tmp_path / 'out')


def test_contact_sheet_takes_any_shape_and_name():
  """One pixel wide, one pixel high, names longer than their room, alphabets, no name at all."""
  shapes, names = ((1, 300), (300, 1), (8, 8), (500, 400)), ('x' * 200, 'é Ж 字', '', 'two\nlines')
  tiles = [contact_sheet.Tile(np.full((*shape, 3), 90, np.uint8), name, p, name, true)
           for shape, name, p, true in zip(shapes, names, (0.0, 0.5, 1.0, 0.01), ('', 'y' * 200, 'z', ''))]
  for count in (1, 4, 23):
    with PIL.Image.open(io.BytesIO(contact_sheet.draw((tiles * 6)[:count], 'title ' * 60,
                                                      'words ' * 200 + '\nmore'))) as sheet:
      assert sheet.mode == 'RGB' and sheet.width >= 700 and sheet.height >= 400
