"""Writes resnet18.pth, resnet50.safetensors and resnet_outputs.npz beside itself: what torch computes, for test_resnet.py.

    pip install torch safetensors && python tests/data/make_torch_resnet.py

Narrow networks (width 4) with torchvision's architecture and names; random weights and statistics.
"""

import pathlib

import numpy as np
import safetensors.torch
import torch
from torch import nn

HERE = pathlib.Path(__file__).parent
WIDTH, CLASSES, SIZE = 4, 7, 64


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

  def __init__(self, block: type, depths: tuple[int, ...]):
    super().__init__()
    self.conv1, self.bn1 = nn.Conv2d(3, WIDTH, 7, 2, 3, bias=False), nn.BatchNorm2d(WIDTH)
    self.maxpool = nn.MaxPool2d(3, 2, 1)
    cin = WIDTH
    for i, depth in enumerate(depths):
      planes = WIDTH * 2**i
      blocks = []
      for j in range(depth):
        blocks.append(block(cin, planes, 2 if i > 0 and j == 0 else 1))
        cin = planes * block.expansion
      setattr(self, f'layer{i + 1}', nn.Sequential(*blocks))
    self.fc = nn.Linear(cin, CLASSES)

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


def main() -> None:
  torch.manual_seed(0)
  arrays = {}
  images = torch.randn(2, 3, SIZE, SIZE)
  arrays['images'] = images.permute(0, 2, 3, 1).numpy()
  for name, block, depths in (('resnet18', Basic, (2, 2, 2, 2)), ('resnet50', Bottleneck, (3, 4, 6, 3))):
    model = ResNet(block, depths)
    randomize(model)
    if name == 'resnet18':
      torch.save(model.state_dict(), HERE / f'{name}.pth')
    else:
      safetensors.torch.save_file(model.state_dict(), HERE / f'{name}.safetensors')
    model.eval()
    with torch.no_grad():
      for key, value in model(images).items():
        arrays[f'{name}/{key}'] = (value.permute(0, 2, 3, 1) if value.ndim == 4 else value).numpy()
  np.savez_compressed(HERE / 'resnet_outputs.npz', **arrays)


if __name__ == '__main__':
  main()
