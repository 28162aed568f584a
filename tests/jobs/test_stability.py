"""The measures of a minimum: products with the Hessian are exact, the trace and its error follow, a run's own start is
found."""

import csv
import functools
import json

from conftest import quick_main
from etils import epath
import flax
import jax
import jax.numpy as jnp
import method_case
import numpy as np
import optax
import pytest

from configs import stability as stability_config
from ft_jax import parallel, trained
from ft_jax.jobs import stability as job
from ft_jax.methods.base import flat
from ft_jax.models import build, resnet
from ft_jax.pages import page
from ft_jax.pages import stability as stability_page
from ft_jax.studies import stability
from ft_jax.studies.stability_estimates import add_probes, Estimates, Minimum, Settings
from ft_jax.training import initial_weights
from ft_jax.training.checkpoints import Checkpoints
from ft_jax.training.finished_runs import load_start


def test_noise_and_trace_are_those_of_the_hessian():
  """A small network in float64, six images over four devices in padded batches: against the whole Hessian, by another
  convolution."""
  with jax.enable_x64(True):
    model = resnet.ResNet((1, 1), resnet.BasicBlock, heads={'target': 3}, width=2, stem='3x3', dtype=jnp.float64)
    variables = jax.tree.map(lambda x: np.asarray(x, np.float64), method_case.variables(model))
    examples = method_case.images(6, 3)
    images, labels = examples['input'][:, :8, :8] / 64.0 - 2.0, examples['label']  # float64, taken as normalised
    padded = {'input': np.concatenate([images, images[:2]]), 'label': np.append(labels, [0, 0]).astype(np.int32),
              'row': np.arange(8), 'mask': np.arange(8) < 6}
    batches = [{key: value[i:i + 4] for key, value in padded.items()} for i in (0, 4)]
    made = list(stability.curvatures(model, 'target', parallel.replicate(variables), batches, seed=3,
                                     numbers=range(24)))

    leaves = flat(variables['params'])
    sizes = np.cumsum([0, *(leaf.size for leaf in leaves.values())])
    parts = {path: slice(a, b) for path, a, b in zip(leaves, sizes, sizes[1:])}

    def loss(vector):
      params = {path: vector[parts[path]].reshape(leaf.shape) for path, leaf in leaves.items()}
      tree = flax.traverse_util.unflatten_dict(params, sep='/')
      logits = model.clone(portable=True).apply({**variables, 'params': tree}, images).logits['target']
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    weights = np.concatenate([leaf.ravel() for leaf in leaves.values()])
    whole = jax.jit(lambda w: (loss(w), jax.grad(loss)(w), jax.hessian(loss)(w)), compiler_options=method_case.QUICK)
    value, gradient, hessian = map(np.asarray, whole(weights))
    sigma, noisy = 1e-3, np.concatenate([np.full(leaf.size, stability.is_perturbed(model, path))
                                         for path, leaf in leaves.items()])
    under = lambda sigma, numbers: np.array(list(stability.losses_under_noise(
        model, 'target', parallel.replicate(variables), batches, classes=3, sigma=sigma, seed=0, numbers=numbers)))
    rises = under(sigma, range(100)) - value
    np.testing.assert_allclose(under(0.0, [5]), value, rtol=1e-12)
    # To second order a rise has mean sigma^2 / 2 * trace and standard deviation sigma * |gradient|, of the weights that
    # have noise.
    deviation = sigma * np.linalg.norm(gradient[noisy])
    assert rises.std() == pytest.approx(deviation, rel=0.25)
    assert abs(rises.mean() - sigma ** 2 / 2 * np.trace(hessian[noisy][:, noisy])) < 4 * deviation / 10
    drawn = flat(stability._drawn(jax.random.normal, variables['params'], jax.random.fold_in(jax.random.key(0), 7)))
    numbers = np.concatenate([np.ravel(drawn[path]) for path in leaves])
    assert abs(numbers.mean()) < 4 / len(numbers) ** 0.5 and numbers.std() == pytest.approx(1, rel=0.15)
    moved = weights + sigma * noisy * numbers
    shifted = float(whole(moved)[0])
    np.testing.assert_allclose(under(sigma, [7])[0] - value, shifted - value, rtol=1e-6)
    np.testing.assert_allclose(rises[7], shifted - value, rtol=1e-6)
    for number, products in enumerate(made):
      v = flat(stability.signs(variables['params'], jax.random.fold_in(jax.random.key(3), number)))
      v = np.concatenate([np.asarray(v[path]).ravel() for path in leaves])
      assert set(np.unique(v)) == {-1.0, 1.0}
      expected = {path: v[part] @ (hessian @ v)[part] for path, part in parts.items()}
      for path in leaves:
        np.testing.assert_allclose(products[path], expected[path], rtol=1e-9, atol=1e-9, err_msg=path)
  # What the estimates scatter by is known: twice the squares beside the diagonal.
  error = (2 * (np.sum(hessian ** 2) - np.sum(np.diag(hessian) ** 2)) / len(made)) ** 0.5
  total = stability.estimate([sum(products.values()) for products in made])
  assert abs(total.mean - np.trace(hessian)) < 4 * error and 0.6 * error < total.error < 1.6 * error
  for path, part in parts.items():
    mean, se = stability.estimate([products[path] for products in made])
    assert abs(mean - np.trace(hessian[part, part])) <= 5 * se + 1e-12, path


def test_when_the_trace_is_settled():
  """Not before ten vectors; then when the last one moved the mean by less than the tolerance."""
  assert not stability.settled([5.0] * 9, 1e-3) and stability.settled([5.0] * 10, 1e-3)
  assert not stability.settled([5.0] * 9 + [5.06], 1e-3) and stability.settled([5.0] * 9 + [5.04], 1e-3)
  assert not stability.settled([5.0] * 20, 0.0)  # all that are asked for
  assert stability.estimate([1.0, 2.0, 6.0]) == pytest.approx((3.0, (7 / 3) ** 0.5))
  assert stability.estimate([2.0]) == (2.0, None)


def test_which_weights_have_noise():
  """As published: convolutions by their name and the head's weight; in the order in which images pass them."""
  model = build('resnet50', {'target': 2})
  shapes = flat(jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8))['params'])
  names = sorted(shapes, key=functools.partial(stability.order, model))
  noisy = [name for name in names if stability.is_perturbed(model, name)]
  assert len(noisy) == 1 + 3 * 16 + 1 and not any('downsample' in name or 'bn' in name for name in noisy)
  assert names[:4] == ['conv1/kernel', 'bn1/bias', 'bn1/scale', 'layer1/0/conv1/kernel']
  assert noisy[-1] == 'heads/target/kernel'
  assert [name for name in names if name.startswith('layer1/0/') and name.endswith('kernel')] == [
      f'layer1/0/{name}/kernel' for name in ('conv1', 'conv2', 'conv3', 'downsample/0')]


def test_distances():
  rng = np.random.default_rng(0)
  start = {'conv1': {'kernel': rng.normal(size=(3, 3, 2, 4))}}
  params = {'conv1': {'kernel': start['conv1']['kernel'] + 0.5}, 'heads': {'target': {'kernel': np.full((2, 2), 3.0)}}}
  found = stability.distances(params, start)
  assert found['conv1/kernel'] == pytest.approx((0.5 * 72 ** 0.5, np.sum(start['conv1']['kernel'] ** 2) ** 0.5))
  assert found['heads/target/kernel'] == (6.0, 0.0)


@pytest.mark.slow
def test_job(trained_run, tmp_path):
  """The command on a finished run: numbers that belong together, a page and a table; what is there already is not
  measured again."""
  flags = ('--config=configs/stability.py', f'--config.workdir={trained_run}', '--config.stability.images=15',
           f'--workdir={tmp_path}')
  first = quick_main(*flags, '--config.stability.draws=3', '--config.stability.probes=2')
  assert first.returncode == 0, first.stderr
  for words in ('no distances from the start: the run began with random weights',
                'the rise of the loss under noise of 0.001 (3 perturbed networks)'):
    assert words in first.stderr
  results = json.loads((tmp_path / 'stability.json').read_text())
  assert (results['split'], results['images'], results['trace']['vectors'], results['trace']['settled']) == ('test', 15,
                                                                                                             2, False)
  rows = {row['name']: row for row in results['parameters']}
  assert len(rows) == 62 and sum(row['perturbed'] for row in rows.values()) == 18
  assert sum(row['trace']['mean'] for row in rows.values()) == pytest.approx(results['trace']['all']['mean'])
  assert sum(row['trace']['mean'] for row in rows.values()
             if row['perturbed']) == pytest.approx(results['trace']['perturbed']['mean'])
  assert sum(row['trace']['mean'] for row in results['stages']) == pytest.approx(results['trace']['all']['mean'])
  assert sum(row['numbers'] for row in results['stages']) == sum(row['numbers'] for row in rows.values())
  assert results['noise']['mean'] == pytest.approx(np.mean(results['noise']['differences']))
  assert len(results['noise']['differences']) == 3
  assert results['noise']['by_trace'] == pytest.approx(5e-7 * results['trace']['perturbed']['mean'])
  with (tmp_path / 'stability.csv').open(newline='') as stream:
    table = list(csv.DictReader(stream))
  assert [row['parameter'] for row in table] == list(rows) and table[0]['distance'] == ''
  assert float(table[0]['trace']) == pytest.approx(rows['conv1/kernel']['trace']['mean'], rel=1e-6)
  page = (tmp_path / 'stability.html').read_text()
  assert 'uses the test images again' in page and 'Not measured: the run began with random weights' in page
  # One of each was made before the job was stopped: the rest comes out the same.
  kept = json.loads((tmp_path / 'estimates.json').read_text())
  (tmp_path / 'estimates.json').write_text(json.dumps({**kept, 'draws': kept['draws'][:1],
                                                       'probes': kept['probes'][:1]}))
  config = stability_config.get_config()
  config.workdir, config.stability.images, config.stability.draws, config.stability.probes = str(trained_run), 15, 1, 1
  fewer = job.run(config, tmp_path)  # nothing of it needs the network
  assert fewer['noise']['differences'] == results['noise']['differences'][:1]
  assert fewer['trace']['by_vector'] == results['trace']['by_vector'][:1]
  assert fewer['noise']['standard_error'] is None and fewer['loss'] == results['loss']


def test_a_stopped_job_goes_on(tmp_path, monkeypatch):
  """Vectors that are there are not made again, a settled trace asks for none, and another network or sigma begins
  anew."""
  made = []

  def curvatures(*args, numbers, **kwargs):
    for number in numbers:
      made.append(number)
      yield {'a': 100.0 + number % 2, 'b': 1.0}

  monkeypatch.setattr(stability, 'curvatures', curvatures)
  settings = Settings(sigma=0.1, draws=1, probes=4, tolerance=1e-3, seed=0)
  path = epath.Path(tmp_path / 'estimates.json')

  def probe(**made_of):
    estimates = Estimates(path, {'network': 'n', 'noise': '0.1', **made_of})
    estimates.loss, estimates.draws = estimates.loss or 1.0, estimates.draws or [2.0]
    add_probes(Minimum(None, 'target', 2, {}, [{}]), settings, estimates, None)
    estimates.write()
    return estimates

  assert len(probe().probes) == 4 and made == [0, 1, 2, 3]
  settings = settings._replace(probes=50)
  assert len(probe().probes) == 10 and made == list(range(10))  # settled
  assert len(probe().probes) == 10 and len(made) == 10
  assert Estimates(path, {'network': 'n', 'noise': '0.1'}).draws == [2.0]
  assert Estimates(path, {'network': 'n', 'noise': '0.2'}).draws == [] != Estimates(path, {'network': 'n',
                                                                                           'noise': '0.2'}).probes
  assert Estimates(path, {'network': 'other', 'noise': '0.1'}).probes == []
  path.write_text('{"half')
  assert Estimates(path, {'network': 'n', 'noise': '0.1'}).probes == []


def test_where_a_run_began(trained_run, tmp_path):
  """The checkpoint's own start, else the weights of the config if they are still the same ones; otherwise the reason is
  said."""
  run = trained.load(str(trained_run))

  def began(weights, fingerprint=None):
    config = run.config.copy_and_resolve_references()
    config.model.weights = weights
    return job.find_start(run._replace(config=config, results={**run.results, 'weights': {'fingerprint': fingerprint}}))

  assert began('').params is None and 'random weights' in began('').about
  assert 'not at hand: model.weights: there is no file or folder /no/such' in began('/no/such').about
  assert 'not at hand' in began('pretrain').about and 'trained_run/pretrain' in began('pretrain').about
  assert 'other weights now' in began(str(trained_run), 'of old').about
  start = began(str(trained_run), initial_weights.weights_fingerprint(run.variables))
  assert start.about == str(trained_run)
  assert all(distance == 0 for path, (distance, _) in stability.distances(run.variables['params'], start.params).items()
             if not path.startswith('heads/'))
  state = {'params': {'w': np.ones(2)}, 'batch_stats': {'m': np.zeros(2)}, 'start': {'params': {'w': np.full(2, 7.0)}}}
  for folder, saved in (('with', state), ('without', {**state, 'start': {}})):
    checkpoints = Checkpoints(tmp_path / folder)
    checkpoints.save(3, saved, {'score': 0.5, 'loss': 1.0})
    checkpoints.close()
  assert load_start(tmp_path / 'with')['params']['w'].tolist() == [7.0, 7.0]
  assert load_start(tmp_path / 'without') is None


@pytest.mark.parametrize('field,value,words', [
    ('sigma', 0.0, 'expected a number above 0'), ('sigma', float('nan'), 'expected a number above 0'),
    ('draws', -1, 'expected a whole number'), ('probes', -1, 'expected a whole number from 0 .*; 0 leaves that out'),
    ('images', -5, 'expected a whole number from 0 .*; 0 is all'), ('tolerance', -1.0, 'expected')])
def test_wrong_settings(field, value, words):
  config = stability_config.get_config()
  config.stability[field] = value
  with pytest.raises(ValueError, match=f'config.stability.{field} is {value}; {words}'):
    job.check(config)


def test_images_that_changed_or_do_not_fit(trained_run, monkeypatch):
  config = stability_config.get_config()
  run = trained.load(str(trained_run))
  with pytest.raises(ValueError, match='has other classes than the run in .*; bring its images back'):
    job.open_images(config, run._replace(class_names=('cat', 'dog')))
  monkeypatch.setattr(job, 'free_memory', lambda: 1000)
  with pytest.raises(ValueError, match='config.stability.images: the crops of 20 images take .* take fewer'):
    job.read_crops(job.open_images(config, run)[1], run)
  # Drawn over all classes, by seed.
  config.stability.images = 12
  one, other = job.open_images(config, run)[1], job.open_images(
      stability_config.get_config().copy_and_resolve_references(), run)[1]
  assert len(one) == 12 and len(other) == 20 and len(set(one.labels.tolist())) == 4


def test_pictures_of_the_page():
  assert page.format_with_error({'mean': 0.00123456, 'standard_error': 0.000042}) == '0.001235 ± 0.000042'
  assert page.format_with_error({'mean': 1234.5, 'standard_error': 41.0}) == '1,234 ± 41'
  assert page.format_with_error({'mean': 1.5, 'standard_error': None}) == '1.5'
  picture = stability_page.vectors({'by_vector': [1.0, 3.0, 5.0]})
  assert picture.axes[0].lines[1].get_ydata().tolist() == [1.0, 2.0, 3.0]
