"""The workdirs in tests/fixtures/workdirs.tar.xz: what an older version wrote, which every later one opens.

    python tests/old_workdirs.py FOLDER    # writes such workdirs, by this version, into an empty folder

They are never written again: where a later version has a new state to keep, it goes into an archive of its own. Images
  are in `images`, and
paths are relative, so that they work wherever the folder is the current directory. Written by commit 93caa4a with jax
0.10.2; left out is what is large and made again where it is missing (report.html), and tensorboard/.
"""

import os
import pathlib
import subprocess
import sys

import PIL.Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
ARCHIVE = pathlib.Path(__file__).resolve().parent / 'fixtures' / 'workdirs.tar.xz'

_TINY = {'data_dir': 'images', 'image_size': 32, 'augment.short_side': 32, 'model.name': 'resnet18', 'model.width': 1,
         'model.stem': '3x3',
         'source.name': 'folder:pool', 'train.steps': 4, 'train.eval_every': 2, 'train.batch_size': 8,
         'train.learning_rate': 0.001}
_FINETUNE = {**_TINY, 'target.name': 'folder:target', 'target.val_fraction': 0.25, 'selection.size': 2.0}
# By workdir: the fields that its command sets. The states: `pretrained` and `finished` came to their end; `interrupted`
# and `interrupted_random` have a checkpoint of step 2 of 4.
RUNS = {
    'pretrained': {**_TINY, 'job': 'pretrain', 'source.test': '', 'source.val_fraction': 0.25},
    'finished': {**_FINETUNE, 'model.weights': 'pretrained', 'model.source_head': 'pretrained'},
    'interrupted': {**_FINETUNE, 'model.weights': 'pretrained', 'methods.l2_sp.weight': 0.01, 'train.warmup': 0.5},
    'interrupted_random': {**_FINETUNE, 'selection.by': 'example', 'selection.size': 6.0},
}


def config(name: str):
  """What the command of a workdir gives to its job."""
  from configs import default

  settings = default.get_config()
  settings.update_from_flattened_dict(RUNS[name])
  return settings


def write_images(folder: pathlib.Path) -> None:
  """Three classes of a pool and of a target: 32 x 32 pixels of two photographs."""
  from sklearn import datasets

  photos = datasets.load_sample_images().images
  for split, classes, count in (('pool', 'abc', 4), ('target/train', 'xyz', 4), ('target/test', 'xyz', 2)):
    for k, name in enumerate(classes):
      (folder / split / name).mkdir(parents=True)
      for i in range(count):
        y, x = 40 * (i + 4 * (split == 'target/test')), 150 * k + 60 * (split != 'pool')
        PIL.Image.fromarray(photos[(k + (split == 'pool')) % 2][y:y + 64, x:x + 64]).resize((32, 32)).save(
            folder / split / name / f'{i}.jpg', quality=80)


def write(name: str) -> None:
  """Runs the job of a workdir; an interrupted one ends the process behind its first checkpoint."""
  from ft_jax.jobs import finetune, pretrain
  from ft_jax.training import checkpoints

  save = checkpoints.Checkpoints.save

  def save_and_die(self, *args) -> None:
    save(self, *args)
    self.wait()
    os._exit(0)

  if name.startswith('interrupted'):
    checkpoints.Checkpoints.save = save_and_die
  (pretrain if name == 'pretrained' else finetune).run(config(name), name)


def main(folder: str, name: str = '') -> None:
  """Writes the images and all workdirs, each in a process of its own; or that of `name` alone."""
  os.chdir(folder)
  if name:
    return write(name)
  write_images(pathlib.Path('images'))
  for name in RUNS:
    subprocess.run([sys.executable, pathlib.Path(__file__).resolve(), '.', name], check=True)


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT))
  import jax

  jax.config.update('jax_num_cpu_devices', 4)
  main(*sys.argv[1:])
