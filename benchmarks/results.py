"""The measurements of configs/results.py: runs those that are missing, and prints their tables.

    python benchmarks/results.py                                  # the tables, from docs/results/*.json; nothing is run
    python benchmarks/results.py --only main                      # one of them
    python benchmarks/results.py --run --data_dir=DATA --hours=2  # resumes where it was stopped; see configs/results.py

Each experiment is job compare of configs/results.py in a folder of --folder; its compare.json is copied to
docs/results/ when all of its cells are finished. With --workers=N cells run in N processes, one core each on two cores.
"""

import argparse
from collections.abc import Iterable, Mapping
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from configs import results

ROOT = pathlib.Path(__file__).parents[1]
RAW = ROOT / 'docs' / 'results'

TARGETS = ('caltech101-5', 'cub50-10', 'pets-5', 'caltech101-15', 'cub50-30', 'caltech101-30')
STARTS = ('moco', 'supervised', 'byol', 'random')
# The most important first: a stopped run has these.
ORDER = (
    *(f'main/{start}/{target}' for target in TARGETS[:3] for start in STARTS[:2]),
    'controls/moco/caltech101-5', 'size/moco/caltech101-5',
    *(f'main/{start}/{target}' for target in TARGETS[:3] for start in STARTS[2:]),
    *(f'noise{percent}/supervised/caltech101-30' for percent in (20, 40, 60, 80)),
    'controls/supervised/caltech101-5',
    *(f'main/{start}/{target}' for target in TARGETS[3:] for start in STARTS),
    *(f'main/imagenet/{target}' for target in TARGETS[:3]),
    *(f'{curve}/moco/caltech101-5' for curve in ('lambda', 'mu', 'images', 'steps')))


def main() -> None:
  """Runs what is missing if that is asked for, and prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--run', action='store_true', help='run the experiments that are not in docs/results')
  parser.add_argument('--data_dir', default='', help='folder of tiny_imagenet, caltech101, cub50 and pets')
  parser.add_argument('--weights', default='', help='ImageNet\'s first three stages, a .safetensors file')
  parser.add_argument('--folder', default=results.FOLDER, help='of the workdirs')
  parser.add_argument('--hours', type=float, default=0.0, help='begin no experiment after so many hours; 0: no limit')
  parser.add_argument('--workers', type=int, default=2, help='processes for the cells of an experiment')
  parser.add_argument('--only', default='', help='experiments whose names begin so, such as main/moco')
  arguments = parser.parse_args()
  if arguments.run:
    run_missing(arguments)
  print(tables(name for name in ORDER if name.startswith(arguments.only)))


def run_missing(arguments: argparse.Namespace) -> None:
  """Runs pre-trainings and experiments, in order, until the time is over."""
  began = time.monotonic()
  needed = [name for name in ORDER if name.startswith(arguments.only) and not raw_file(name).exists()]
  starts = dict.fromkeys(name.split('/')[1] for name in needed)
  for name in (*(start for start in starts if start in results.PRETRAININGS), *needed):
    if arguments.hours and time.monotonic() - began > 3600 * arguments.hours:
      break
    workdir = pathlib.Path(arguments.folder) / name
    command = [sys.executable, str(ROOT / 'main.py'), f'--config={ROOT}/configs/results.py:{name}',
               f'--workdir={workdir}', f'--config.data_dir={arguments.data_dir}', *weights_flag(name, arguments)]
    if name not in results.PRETRAININGS:
      command.append(f'--workers={arguments.workers}')
    print(f'== {name}', flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
      print(f'{name} failed; continuing with the next', flush=True)
    elif name not in results.PRETRAININGS:
      keep(name, workdir / 'compare.json')


def weights_flag(name: str, arguments: argparse.Namespace) -> list[str]:
  """The flag that says where the weights of an experiment are."""
  if name in results.PRETRAININGS or 'random' in name.split('/'):
    return []
  start = name.split('/')[1]
  path = arguments.weights if start == 'imagenet' else pathlib.Path(arguments.folder) / start
  return [f'--config.model.weights={path}']


def keep(name: str, compare_json: pathlib.Path) -> None:
  """Copies the results of a finished experiment, without spaces that make it large."""
  RAW.mkdir(exist_ok=True)
  raw_file(name).write_text(json.dumps(json.loads(compare_json.read_text()), separators=(',', ':')) + '\n')


def raw_file(name: str) -> pathlib.Path:
  """Where the results of an experiment are kept in the repository."""
  return RAW / f'{name.replace("/", "-")}.json'


def tables(names: Iterable[str]) -> str:
  """All tables as Markdown, of the experiments that have results."""
  found = {name: json.loads(raw_file(name).read_text()) for name in names if raw_file(name).exists()}
  main_ones = {name: comparison for name, comparison in found.items() if name.startswith('main/')}
  parts = [main_table(main_ones)] if main_ones else []
  parts += [variants_table(name, comparison) for name, comparison in found.items() if name not in main_ones]
  return '\n\n'.join(parts)


def main_table(found: Mapping[str, Mapping[str, Any]]) -> str:
  """One line for each start and target: accuracies, and the three differences that the question is about."""
  lines = ['### Main table', '',
           '| start | target | plain | plain, equal compute | random | uot | uot - plain '
           '| uot - plain at equal compute | uot - random |', '|---|---|---|---|---|---|---|---|---|']
  for name, comparison in found.items():
    _, start, target = name.split('/')
    by_name = {variant['name']: variant['summary'] for variant in comparison['variants']}
    longer = next((name for name in by_name if name.startswith('plain,')), '')
    differences = by_name['uot']['differences']
    cells = [percent(by_name.get(column)) for column in ('plain', longer, 'random', 'uot')]
    cells += [difference(differences.get(kind)) for kind in ('baseline', 'equal_compute', 'random')]
    lines.append(f'| {start} | {target} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def variants_table(name: str, comparison: Mapping[str, Any]) -> str:
  """One line for each variant of an experiment."""
  lines = [f'### {name}', '', f'{comparison["advice"]}', '',
           f'| variant | {comparison["split"]} top-1, % | minus plain | minus plain at equal compute | minus random |',
           '|---|---|---|---|---|']
  for variant in comparison['variants']:
    differences = variant['summary']['differences']
    cells = [difference(differences.get(kind)) for kind in ('baseline', 'equal_compute', 'random')]
    lines.append(f'| {variant["name"]} | {percent(variant["summary"])} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def percent(summary: Mapping[str, Any] | None) -> str:
  """A mean with its interval, in percent."""
  if not summary or not summary['top1']:
    return ''
  low, high = summary['top1']['interval']
  return f'{100 * summary["top1"]["mean"]:.1f} ({100 * low:.1f} to {100 * high:.1f})'


def difference(found: Mapping[str, Any] | None) -> str:
  """A difference in points with its interval; bold where it is seen after Holm's correction."""
  if not found:
    return ''
  low, high = found['interval']
  text = f'{100 * found["mean"]:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})'
  return f'**{text}**' if found['p_holm'] is not None and found['p_holm'] < 0.05 else text


if __name__ == '__main__':
  main()
