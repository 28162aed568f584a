"""Fine-tune a pre-trained network together with the part of its pre-training data that helps.

    run = ft_jax.finetune(target='folder:photos', source='folder:imagenet', weights='timm:resnet18.tv_in1k',
                          workdir='runs/photos', selection={'size': 50}, train={'epochs': 20})
    run.test.top1, run.predict('new_photos'), ft_jax.load('runs/photos')

`finetune` and `pretrain` return a `Run`, and `load` opens one from its workdir. An `ImageSet` has images of a folder,
of files, arrays or TFDS. Importing this package is fast: jax is imported when one of these functions is first used.
"""

from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
  from ft_jax.api import finetune, load, pretrain, Run
  from ft_jax.data.image_set import ImageSet

__all__ = ['ImageSet', 'Run', 'finetune', 'load', 'pretrain']


def __getattr__(name: str) -> Any:
  if name == 'ImageSet':
    from ft_jax.data.image_set import ImageSet
    return ImageSet
  if name in __all__:
    from ft_jax import api
    return vars(api)[name]
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
