"""Makes docs/contact_sheet.png: 60 test digits of the demo, as files in folders, with a network's predictions.

    python main.py --config=configs/digits.py:finetune && python docs/make_contact_sheet.py
"""

import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import PIL.Image

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ft_jax.data import open_set  # noqa: E402


def main() -> None:
  """Writes the files, predicts, and keeps the upper part of the sheet."""
  source = open_set('digits:target', 'test')
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for i in sorted(np.random.default_rng(0).permutation(len(source))[:60].tolist()):
      example = source[i]
      path = folder / 'digits' / source.class_names[example.label] / f'{example.id.replace("/", "_")}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      PIL.Image.fromarray(example.image).save(path)
    (folder / 'runs').symlink_to(ROOT / 'runs')  # the sheet names both folders as they are given
    subprocess.run([sys.executable, str(ROOT / 'main.py'), f'--config={ROOT / "configs" / "predict.py"}',
                    '--config.workdir=runs/digits-finetune', '--config.predict.images=digits', '--workdir=out'],
                   check=True, cwd=folder)
    sheet = PIL.Image.open(folder / 'out' / 'contact_sheet.png').convert('RGB')
    upper = sheet.crop((0, 0, sheet.width, round(0.54 * sheet.height)))
    upper.resize((1100, round(1100 * upper.height / upper.width)), PIL.Image.Resampling.LANCZOS).quantize(64).save(
        ROOT / 'docs' / 'contact_sheet.png', optimize=True)


if __name__ == '__main__':
  main()
