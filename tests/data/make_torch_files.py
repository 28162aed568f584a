"""Writes moco.pth.tar, kinds.pth and kinds_legacy.pth beside itself: files of torch for test_torch_files.py and test_pretrained.py.

    pip install torch && python tests/data/make_torch_files.py

moco.pth.tar is laid out as MoCo-v2's published checkpoint, in torch's format of before 1.6: a ResNet-18 of width 1, cut out of
resnet18.pth, as query and key encoder with their projection heads, the queue, and an optimizer with its momentum.
kinds*.pth hold a tensor of each kind that a state dict may hold, in both formats.
"""

from collections import OrderedDict
import pathlib

import torch

HERE = pathlib.Path(__file__).parent


def narrow(tensor: torch.Tensor) -> torch.Tensor:
  """A quarter of the channels; three are the colours."""
  for axis in range(min(tensor.ndim, 2)):
    if tensor.shape[axis] != 3:
      tensor = tensor.narrow(axis, 0, tensor.shape[axis] // 4)
  return tensor.clone()


def moco() -> dict:
  network = {name: narrow(value) for name, value in torch.load(HERE / 'resnet18.pth').items() if not name.startswith('fc.')}
  network |= {'fc.0.weight': torch.arange(64.0).reshape(8, 8) / 64 - 0.5, 'fc.0.bias': torch.arange(8.0) / 8 - 0.4,
              'fc.2.weight': torch.arange(32.0).reshape(4, 8) / 32 - 0.5, 'fc.2.bias': torch.arange(4.0)}
  state = OrderedDict((f'module.encoder_q.{name}', value) for name, value in network.items())
  state.update((f'module.encoder_k.{name}', value + 1) for name, value in network.items())
  state.update({'module.queue': torch.ones(4, 16), 'module.queue_ptr': torch.zeros(1, dtype=torch.long)})
  parameters = [torch.nn.Parameter(value.clone()) for value in list(network.values())[:3]]
  optimizer = torch.optim.SGD(parameters, 0.03, momentum=0.9, weight_decay=1e-4)
  sum(p.sum() for p in parameters).backward()
  optimizer.step()
  return {'epoch': 800, 'arch': 'resnet18', 'state_dict': state, 'optimizer': optimizer.state_dict()}


def kinds() -> OrderedDict:
  base = torch.arange(24.0)
  hooked = torch.nn.Parameter(torch.arange(3.0))
  hooked._backward_hooks = OrderedDict()
  return OrderedDict({
      'float32': base.reshape(4, 6), 'part': base.reshape(4, 6)[1:3, ::2], 'transposed': base.reshape(4, 6).T,
      'float16': base[:5].half(), 'bfloat16': base[:5].bfloat16(), 'float64': base[:5].double(), 'int64': torch.tensor(7),
      'int32': base[:3].int(), 'int16': base[:3].short(), 'int8': base[:3].char(), 'uint8': base[:3].byte(),
      'bool': torch.tensor([True, False]), 'parameter': hooked, 'empty': torch.zeros(0, 3)})


def main() -> None:
  torch.save(moco(), HERE / 'moco.pth.tar', _use_new_zipfile_serialization=False)
  torch.save(kinds(), HERE / 'kinds.pth')
  torch.save(kinds(), HERE / 'kinds_legacy.pth', _use_new_zipfile_serialization=False)


if __name__ == '__main__':
  main()
