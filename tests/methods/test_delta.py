"""DELTA: the term is the formula in both forms; attention is what zeroed filters cost; with Co-Tuning and LwF the
teacher runs once.
"""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import method_case
import numpy as np
import pytest
from scipy import special

from ft_jax import methods
from ft_jax.logistic import Classifier
from ft_jax.methods import delta
from ft_jax.methods.base import StepContext, teacher_variables
from ft_jax.methods.co_tuning import CoTuning
from ft_jax.methods.delta import Delta
from ft_jax.methods.lwf import LwF
from ft_jax.models import build
from ft_jax.models.resnet import Outputs
from ft_jax.training import forward
from ft_jax.training import step as step_module

LAYERS = ('layer1/0/conv2', 'layer4/0/bn2')


def term(method, taps, teacher, weights, heads):
  """The formula, in float64, filter by filter."""
  total = 0.0
  for layer, maps in taps.items():
    b, h, w, c = maps.shape
    for i in range(b):
      for k in range(c):
        distance = np.sum((maps[i, :, :, k] - teacher[layer][i, :, :, k]) ** 2)
        total += (c * weights[layer][k] * distance / (h * w) if method.form == 'attention' else distance) / b
  return method.weight * 0.5 * total + method.head_weight * 0.5 * sum(np.sum(value ** 2) for value in heads.values())


@pytest.mark.parametrize('form', ['attention', 'feature_map'])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), weight=st.floats(0.1, 2.0), head_weight=st.floats(0.0, 1.0))
def test_term_and_gradient(form, seed, weight, head_weight):
  """Of the pre-trained head nothing is taken."""
  rng = np.random.default_rng(seed)
  method = Delta(weight, head_weight, form, LAYERS)
  taps, teacher = ({layer: rng.normal(size=(3, *shape)) for layer, shape in zip(LAYERS, ((4, 2, 5), (1, 1, 7)))}
                   for _ in range(2))
  weights = {layer: rng.dirichlet(np.ones(taps[layer].shape[-1])) for layer in LAYERS}
  fresh, kept = {'kernel': rng.normal(size=(7, 2)), 'bias': rng.normal(size=2)}, {'bias': rng.normal(size=4)}
  params = {'layer1': rng.normal(size=3), 'heads': {'target': fresh, 'pretrained': kept},
            'methods': {'other': rng.normal(size=3)}}
  start = {'params': {'layer1': rng.normal(size=3), 'heads': {'pretrained': kept}}}
  state = {'attention': {layer.replace('/', '.'): value
                         for layer, value in weights.items()}} if form == 'attention' else {}

  def loss(taps, params):
    context = StepContext(None, params, {}, start, Outputs(None, {}, teacher), {'target': Outputs(None, {}, taps)}, {},
                       *[None] * 5)
    return method.loss(context, state).loss

  with jax.enable_x64(True):
    value, (of_taps, of_params) = jax.device_get(jax.value_and_grad(loss, (0, 1))(taps, params))
  np.testing.assert_allclose(value, term(method, taps, teacher, weights, fresh), rtol=1e-5)
  np.testing.assert_allclose(of_params['heads']['target']['kernel'], head_weight * fresh['kernel'], rtol=1e-6,
                             atol=1e-12)
  assert not any(np.any(part) for part in (of_params['layer1'], of_params['heads']['pretrained']['bias'],
                                           of_params['methods']['other']))
  step = {layer: 1e-3 * rng.normal(size=maps.shape) for layer, maps in taps.items()}
  moved = ({layer: taps[layer] + sign * step[layer] for layer in LAYERS} for sign in (1, -1))
  more, less = (term(method, maps, teacher, weights, fresh) for maps in moved)
  np.testing.assert_allclose(sum(np.sum(of_taps[layer] * 2 * step[layer]) for layer in LAYERS), more - less, rtol=1e-3,
                             atol=1e-6)


def test_rises_of_the_loss_are_those_of_zeroed_filters(monkeypatch):
  """Each filter's weights set to zero, as the published code does it, on one image after the other; in groups of images
  and filters.
  """
  monkeypatch.setattr(delta, '_IMAGES', 2)
  monkeypatch.setattr(delta, '_ELEMENTS', 4 * 4 * 4 * 2 * 3)
  model = method_case.network({})
  variables = teacher_variables(method_case.start_of(model))
  variables['params'].pop('heads')
  rng = np.random.default_rng(0)
  classifier = Classifier(0.3 * rng.normal(size=(32, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32), 0.0,
                          1, True)
  examples = method_case.images(10, 4)
  layers = ('layer1/0/conv2', 'layer4/0/conv2')
  batches = method_case.context(model, {}, examples).batches('train')
  found = delta.loss_rises(model, variables, classifier, batches, 10, layers)
  features = jax.jit(lambda variables: model.apply(variables, examples['input']).features,
                     compiler_options=method_case.QUICK)

  def loss(variables):
    logits = np.asarray(features(variables), np.float64) @ classifier.weights + classifier.bias
    return -special.log_softmax(logits, 1)[np.arange(10), examples['label']].mean()

  whole = loss(variables)
  for layer in layers:
    stage, block, name = layer.split('/')
    rises = []
    for k in range(variables['params'][stage][block][name]['kernel'].shape[-1]):
      cut = jax.tree.map(np.copy, variables)
      cut['params'][stage][block][name]['kernel'][..., k] = 0.0
      rises.append(loss(cut) - whole)
    assert np.std(rises) > 1e-3
    np.testing.assert_allclose(found[layer], rises, rtol=1e-3, atol=1e-5)
    z = (np.array(rises) - np.mean(rises)) / np.std(rises)
    np.testing.assert_allclose(delta.attention(found[layer]), special.softmax(z / 5), rtol=1e-3)
  np.testing.assert_array_equal(delta.attention(np.ones(4)), np.full(4, 0.25, np.float32))


@pytest.mark.slow
def test_together_with_one_teacher(monkeypatch):
  """From where they start, features and answers are the teacher's: what is left are the heads, and the relation of
  classes. Same whatever the split; the network runs twice in a step, once as the teacher.
  """
  passes = []

  def counted(*args, **kwargs):
    passes.append(kwargs.get('train', True))
    return forward.forward(*args, **kwargs)

  monkeypatch.setattr(step_module, 'forward', counted)
  active = {'delta': Delta(0.48, attention_images=10, layers=('layer3/0/conv2',)), 'co_tuning': CoTuning(2.3),
            'lwf': LwF(4.0)}
  start = method_case.start_of(method_case.network())
  state, _ = method_case.run(active, start=start, steps=0)  # set up once
  _, history = method_case.run(active, state=state)
  method_case.assert_same_whatever_the_split(active, state=state)
  assert passes and passes == [False, True] * (len(passes) // 2)  # of each step that was compiled
  assert abs(history[0]['loss_lwf']) < 1e-5  # zero but for rounding, on either side
  heads = state.params['heads']
  decay = 0.005 * sum(np.sum(value ** 2) for name in ('target', 'source') for value in heads[name].values())
  np.testing.assert_allclose(history[0]['loss_delta'], decay, rtol=1e-4)
  relation = state.methods['co_tuning']['relation']
  given = method_case.batch()['target']
  logits = method_case.context(method_case.network(), start).teacher_outputs('train')['logits']
  np.testing.assert_allclose(
      history[0]['loss_co_tuning'], -2.3 * np.mean(np.sum(relation[given['label']] * special.log_softmax(logits, 1),
                                                          1)),
      rtol=1e-4)
  attention = state.methods['delta']['attention']
  assert list(attention) == ['layer3.0.conv2'] and np.ptp(attention['layer3.0.conv2']) > 0.01
  np.testing.assert_allclose(attention['layer3.0.conv2'].sum(), 1.0, rtol=1e-6)


def test_layers_of_each_network():
  assert build('resnet50', {}).stage_layers == (
      'layer1/2/conv3', 'layer2/3/conv3', 'layer3/5/conv3', 'layer4/2/conv3')  # as in the published code
  assert build('resnet18', {}).stage_layers[3] == 'layer4/1/conv2'


@pytest.mark.parametrize('fields,message', [
    (dict(form='maps'), r"delta.form is 'maps'; known: attention, feature_map"),
    (dict(head_weight=-1.0), r'delta.head_weight is -1.0; expected a number from 0'),
    (dict(attention_images=0), r'delta.attention_images is 0; expected a number of images from 1'),
    (dict(layers=('layer4/3/conv2',)),
     r"delta.layers has 'layer4/3/conv2', which the network lacks; known there: layer4/0$"),
    (dict(layers=('layer1', 'layer5')),
     r"has 'layer5', which .* lacks; known there: bn1, conv1, layer1, layer2, layer3, layer4$"),
    (dict(layers=('layer4/0/conv2/kernel',)), r'known there: layer4/0/conv2$'),
    (dict(layers='layer4'), r"delta.layers is 'layer4'; expected a tuple of paths")])
def test_bad_settings(fields, message):
  context = method_case.context(method_case.network())
  with pytest.raises(ValueError, match=message):
    methods.check({'delta': Delta(0.48, **fields)}, context)
  methods.check({'delta': Delta(0.48, layers=('layer1', 'layer4/0/conv2'))}, context)
