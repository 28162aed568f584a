"""float32 is float32 where a choice is made, on every device; in training it is what `model.precision` says. Read off
the programs.

The CPU computes in float32 in any case, and refuses TF32: a product that does not state its own precision fails under
  it.
"""

import re

import jax
import jax.numpy as jnp
import method_case
import numpy as np
import optax
import pytest

from configs import default
from ft_jax import logistic, models
from ft_jax.data import open_set
from ft_jax.data.pipeline import Transform
from ft_jax.embedding import Encoder
from ft_jax.methods import delta
from ft_jax.methods.base import teacher_variables
from ft_jax.methods.bi_tuning import BiTuning
from ft_jax.methods.co_tuning import CoTuning
from ft_jax.methods.delta import Delta
from ft_jax.methods.lwf import LwF
from ft_jax.models import build, precision, resnet
from ft_jax.studies import probe, stability
from ft_jax.training import initial_weights
from ft_jax.training.step import create_state, make_step, parallel
import selection
from selection import embeddings

TF32 = 'TF32_TF32_F32'


def precisions(lowered) -> list[str]:
  """Of each product and convolution of a program, on both sides."""
  found = []
  for line in lowered.as_text().splitlines():
    if 'stablehlo.dot_general' in line or 'stablehlo.convolution' in line:
      sides = re.search(r'precision(?:_config)? = \[([^\]]*)\]', line)
      found += re.findall(r'DEFAULT|HIGHEST|HIGH', sides[1] if sides else 'DEFAULT, DEFAULT')
  return found


@pytest.mark.parametrize('portable', [False, True])
@pytest.mark.parametrize('asked,stated', [('default', 'DEFAULT'), ('high', 'HIGH'), ('highest', 'HIGHEST')])
def test_a_step_has_the_precision_of_the_config(asked, stated, portable):
  """Every convolution in each of its forms, and every head, forwards and backwards, of the network alone."""
  model = method_case.network(precision=asked, portable=portable)
  step = make_step(model, optax.sgd(0.1), {'target': 1.0, 'source': 0.5})
  state = jax.eval_shape(lambda: create_state(method_case.variables(model), optax.sgd(0.1)))
  batch = {name: {key: part[key][None] for key in ('input', 'label', 'row')}
           for name, part in method_case.batch().items()}
  found = precisions(jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name=parallel.AXIS)).lower(state, batch))
  assert len(found) > 2 * 3 * 12 and set(found) == {stated}  # twelve convolutions, and two heads


def test_methods_compute_with_it_too():
  """Their own products, beside those that are exact in any case."""
  active = {'delta': Delta(0.48, form='feature_map'), 'co_tuning': CoTuning(2.3), 'lwf': LwF(4.0),
            'bi_tuning': BiTuning(1.0)}
  model = method_case.network({'target': 4, 'source': 6, 'pretrained': 8}, precision='high')
  start = method_case.start_of(model)
  context = method_case.context(model, start)
  states = {name: {'relation': np.full((4, 8), 0.125, np.float32)} if name == 'co_tuning' else method.setup(context)
            for name, method in active.items() if name != 'delta'} | {'delta': {}}
  variables = method_case.variables(model)
  variables['params'] |= {'methods': {'bi_tuning': active['bi_tuning'].params(context)}}
  step = make_step(model, optax.sgd(0.1), {'target': 1.0, 'source': 0.5}, methods=active)
  state = create_state(variables, optax.sgd(0.1), start=start, methods=states)
  batch = jax.tree.map(lambda x: x[None], method_case.batch())
  found = precisions(jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name=parallel.AXIS)).lower(state, batch))
  assert set(found) == {'HIGH', 'HIGHEST'} and found.count('HIGH') > 5 * found.count('HIGHEST')


def test_on_the_cpu_it_changes_no_bit():
  """Neither features nor logits nor any gradient."""
  images, labels = (method_case.images(8, 4)[key] for key in ('input', 'label'))

  def all_of(asked):
    model = resnet.ResNet((1, 1), resnet.BasicBlock, heads={'target': 4}, width=4, stem='3x3', precision=asked)
    variables = method_case.variables(model)

    def loss(params):
      outputs = model.apply({**variables, 'params': params}, images, train=True, mutable=['batch_stats'])[0]
      return optax.softmax_cross_entropy_with_integer_labels(outputs.logits['target'], labels).mean(), outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])

  jax.tree.map(np.testing.assert_array_equal, all_of('default'), all_of('highest'))


@pytest.mark.parametrize('asked', ['default', 'high'])
@pytest.mark.parametrize('projection', [False, True])
def test_embeddings_have_the_highest(asked, projection, photos, monkeypatch):
  """The whole program that makes features, whatever the config says of training; with MoCo-v2's projection too."""
  network = default.get_config().model
  network.name, network.width, network.precision = 'resnet18', 4, asked
  variables = initial_weights.init_variables(models.from_config(network, {}, 32), 0, None)
  if projection:
    variables['projection'] = {layer: {'kernel': np.eye(32, dtype=np.float32), 'bias': np.zeros(32, np.float32)}
                               for layer in '02'}
  found, jit = [], jax.jit

  def recorded(function, **kwargs):
    compiled = jit(function, **kwargs)

    def run(*args):
      found.extend(precisions(compiled.lower(*args)))
      return compiled(*args)

    return run

  monkeypatch.setattr(embeddings.jax, 'jit', recorded)
  source = open_set(f'folder:{photos}', 'test').subset(range(8))
  encoder = lambda: Encoder(network.name, models.from_config(network, {}, 32), variables, Transform(32, short_side=32),
                            8)
  made = encoder().embed(source, 'test')
  assert len(found) >= 2 * (20 + 2 * projection) and set(found) == {'HIGHEST'}
  monkeypatch.undo()
  # Another encoder than that of older versions, which did not state it, and the same one whatever the training's
  # precision is.
  network.precision = 'highest'
  assert made.fingerprint == encoder().embed(source, 'test').fingerprint


def test_an_encoder_of_ones_own_has_the_highest():
  """As one of a notebook, whose network says nothing of precision."""
  batches = [{'input': np.ones((4, 2, 2, 3), np.uint8)}]
  encode = lambda variables, images: images.reshape(len(images), -1).astype(jnp.float32) @ variables
  with jax.default_matmul_precision(TF32):
    assert selection.embed(encode, np.ones((12, 3), np.float32), batches).features.tolist() == [[12.0] * 3] * 4


@pytest.mark.parametrize('method', list(selection.STRATEGIES))
@pytest.mark.parametrize('by', ['class', 'cluster', 'example'])
def test_selection_states_its_precision(method, by):
  """Every product of every strategy, with a stored kernel and streamed."""
  rng = np.random.default_rng(0)
  source = selection.Embeddings(rng.normal(size=(60, 5)), np.arange(60) % 8)
  target = selection.Embeddings(rng.normal(size=(9, 5)), np.arange(9) % 3)
  select = lambda memory=None: selection.select(
      source, target, 3, by=by, method=method, clusters=6 if by == 'cluster' else None, memory=memory)
  expected = select()
  with jax.default_matmul_precision(TF32):
    np.testing.assert_array_equal(select().scores, expected.scores)
    np.testing.assert_allclose(select(memory=0).scores, expected.scores, rtol=1e-4)


def test_distances_and_clusters_state_it():
  rng = np.random.default_rng(0)
  sets = [selection.Embeddings(rng.normal(size=(12, 4)), np.arange(12) % 2) for _ in range(2)]
  with jax.default_matmul_precision(TF32):
    assert np.isfinite(selection.otdd(*sets)) and np.isfinite(selection.domain_similarity(*sets, min_images=2))


def test_studies_and_methods_state_it():
  """Nearest neighbours, the logistic regression, what the teacher says before training, channel attention, and the
  Hessian."""
  rng = np.random.default_rng(0)
  features, labels = rng.normal(size=(24, 5)).astype(np.float32), np.arange(24) % 3
  model = method_case.network()
  start = method_case.start_of(model)
  params = method_case.variables(model)['params']
  exact = model.clone(precision='highest')
  images = method_case.images(4, 4)

  def loss(params):
    logits = exact.apply({'params': params, 'batch_stats': start['batch_stats']}, images['input']).logits['target']
    return optax.softmax_cross_entropy_with_integer_labels(logits, images['label']).mean()

  with jax.default_matmul_precision(TF32):
    part = probe.Labelled(features, labels)
    assert probe.neighbours(part, part, features, 3).test.shape == (24,)
    classifier = logistic.fit(features, labels, 3, strength=0.1)
    assert classifier.converged
    context = method_case.context(model, start)
    assert context.teacher_outputs('train')['logits'].shape == (method_case.BATCH, 8)
    found = delta.loss_rises(context.teacher, teacher_variables(start), classifier._replace(
        weights=np.ones((32, 4), np.float32), bias=np.zeros(4, np.float32)), context.batches('train'),
                             method_case.BATCH, ('layer4/0/conv2',))
    assert np.isfinite(found['layer4/0/conv2']).all()
    assert set(precisions(jax.jit(lambda params: stability.curvature(loss, params,
                                                                     jax.random.key(0))).lower(params))) == {'HIGHEST'}


def test_an_unknown_precision_is_refused():
  with pytest.raises(ValueError, match="model.precision is 'tf32'; known: default, high, highest"):
    build('resnet18', {}, precision='tf32')
  assert list(precision.PRECISIONS) == ['default', 'high', 'highest']
