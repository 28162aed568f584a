"""What torch computes, recorded beside this file for test_resnet.py and test_train.py; the architecture is torchvision's.

    pip install torch safetensors && python tests/data/make_torch_resnet.py

resnet18.pth, resnet50.safetensors: state dicts of narrow networks (width 4), random weights and statistics.
resnet_outputs.npz: their features, taps and logits in eval mode.
resnet_training.npz: narrower ones (width 2) of all four networks, the weights rounded to float16: outputs in eval and in training
mode, running statistics after one forward pass, the gradient of the cross-entropy of every parameter, and for ResNet-18 all
parameters after `STEPS` steps of torch.optim.SGD; computed in float64, written as float32. The tensors of a kind are one vector
(see `flat`): a thousand small arrays would take more room for their headers than for themselves.
"""

import pathlib

import numpy as np
import safetensors.torch
import torch
from torch import nn

HERE = pathlib.Path(__file__).parent
WIDTH, CLASSES, SIZE = 4, 7, 64
# test_train.py has these too.
BATCH, STEPS, SGD = 8, 2, {'lr': 0.05, 'momentum': 0.9, 'nesterov': True, 'weight_decay': 0.02}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def downsample(cin: int, cout: int, stride: int) -> nn.Sequential | None:
  if stride == 1 and cin == cout:
    return None
  return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


class Basic(nn.Module):
  expansion = 1

  def __init__(self, cin: int, planes: int, stride: int):
    super().__init__()
    self.conv1, self.bn1 = nn.Conv2d(cin, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
    self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
    self.downsample = downsample(cin, planes, stride)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
    return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
  expansion = 4

  def __init__(self, cin: int, planes: int, stride: int):
    super().__init__()
    self.conv1, self.bn1 = nn.Conv2d(cin, planes, 1, bias=False), nn.BatchNorm2d(planes)
    self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
    self.conv3, self.bn3 = nn.Conv2d(planes, planes * 4, 1, bias=False), nn.BatchNorm2d(planes * 4)
    self.downsample = downsample(cin, planes * 4, stride)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = torch.relu(self.bn1(self.conv1(x)))
    y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
    return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):

  def __init__(self, name: str, width: int = WIDTH, classes: int = CLASSES):
    super().__init__()
    block, depths = NETWORKS[name]
    self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
    self.maxpool = nn.MaxPool2d(3, 2, 1)
    cin = width
    for i, depth in enumerate(depths):
      planes = width * 2**i
      blocks = []
      for j in range(depth):
        blocks.append(block(cin, planes, 2 if i > 0 and j == 0 else 1))
        cin = planes * block.expansion
      setattr(self, f'layer{i + 1}', nn.Sequential(*blocks))
    self.fc = nn.Linear(cin, classes)

  def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
    out = {}
    x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
    for i in range(1, 5):
      x = out[f'layer{i}'] = getattr(self, f'layer{i}')(x)
    out['features'] = x.mean((2, 3))
    out['logits'] = self.fc(out['features'])
    return out


def randomize(model: nn.Module) -> None:
  """Weights of a scale that keeps activations near one, and statistics that are not 0 and 1."""
  for module in model.modules():
    if isinstance(module, nn.Conv2d):
      nn.init.kaiming_normal_(module.weight, mode='fan_in')
    if isinstance(module, nn.BatchNorm2d):
      nn.init.uniform_(module.weight, 0.5, 1.5)
      nn.init.normal_(module.bias, 0, 0.2)
      nn.init.normal_(module.running_mean, 0, 0.2)
      nn.init.uniform_(module.running_var, 0.5, 1.5)


def settle(model: nn.Module, images: torch.Tensor) -> None:
  """Makes random weights behave like trained ones: each block adds little to its input, running statistics are those of a batch.

  Otherwise a deep network is chaotic: rounding grows with every block, and outputs without bounds.
  """
  for module in model.modules():
    if isinstance(module, (Basic, Bottleneck)):
      (module.bn2 if isinstance(module, Basic) else module.bn3).weight.data.mul_(0.2)
  norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
  for norm in norms:
    norm.momentum = 1.0
  with torch.no_grad():
    model.train()(images)
  for norm in norms:
    norm.momentum = 0.1
    norm.num_batches_tracked.zero_()


def normalized(images: np.ndarray) -> torch.Tensor:
  """uint8 `[b, h, w, 3]` to `[b, 3, h, w]` of the default precision, as torchvision's ToTensor and Normalize do it."""
  mean, std = torch.tensor(MEAN), torch.tensor(STD)
  return ((torch.from_numpy(images).to(mean.dtype) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def as_array(value: torch.Tensor) -> np.ndarray:
  """A copy; images with their channels last."""
  return (value.permute(0, 2, 3, 1) if value.ndim == 4 else value).detach().float().numpy().copy()


def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
  """All values in one vector, by name."""
  return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)]).float().numpy()


def record_outputs() -> None:
  arrays = {}
  images = torch.randn(2, 3, SIZE, SIZE)
  arrays['images'] = images.permute(0, 2, 3, 1).numpy()
  for name in ('resnet18', 'resnet50'):
    model = ResNet(name)
    randomize(model)
    if name == 'resnet18':
      torch.save(model.state_dict(), HERE / f'{name}.pth')
    else:
      safetensors.torch.save_file(model.state_dict(), HERE / f'{name}.safetensors')
    model.eval()
    with torch.no_grad():
      arrays |= {f'{name}/{key}': as_array(value) for key, value in model(images).items()}
  np.savez_compressed(HERE / 'resnet_outputs.npz', **arrays)


def record_training() -> None:
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
  labels = rng.integers(0, CLASSES, BATCH)
  x, y = normalized(images), torch.from_numpy(labels)
  arrays = {'images': images, 'labels': labels.astype(np.int32)}
  for name in NETWORKS:
    model = ResNet(name, width=2)
    randomize(model)
    settle(model, normalized(rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)))
    with torch.no_grad():
      for value in [*model.parameters(), *model.buffers()]:
        value.copy_(value.half())
    weights = {key: value for key, value in model.state_dict().items() if not key.endswith('num_batches_tracked')}
    arrays[f'{name}/weights'] = flat(weights).astype(np.float16)
    with torch.no_grad():
      # Two images are enough where each goes its own way.
      arrays |= {f'{name}/eval/{key}': as_array(value) for key, value in model.eval()(x[:2]).items()}
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    for step in range(STEPS if name == 'resnet18' else 1):
      optimizer.zero_grad()
      outputs = model.train()(x)
      nn.functional.cross_entropy(outputs['logits'], y).backward()
      if step == 0:
        arrays |= {f'{name}/train/{key}': as_array(outputs[key]) for key in ('features', 'logits')}
        arrays[f'{name}/statistics'] = flat({key: value for key, value in model.named_buffers() if 'running' in key})
        arrays[f'{name}/gradients'] = flat({key: value.grad for key, value in model.named_parameters()})
      optimizer.step()
    if name == 'resnet18':
      arrays[f'{name}/after'] = flat(dict(model.named_parameters()))
  np.savez_compressed(HERE / 'resnet_training.npz', **arrays)


NETWORKS = {'resnet18': (Basic, (2, 2, 2, 2)), 'resnet34': (Basic, (3, 4, 6, 3)), 'resnet50': (Bottleneck, (3, 4, 6, 3)),
            'resnet101': (Bottleneck, (3, 4, 23, 3))}


if __name__ == '__main__':
  torch.manual_seed(0)
  record_outputs()
  torch.manual_seed(1)
  # So that what is compared later is one rounding and not two.
  torch.set_default_dtype(torch.float64)
  record_training()
