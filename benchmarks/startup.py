"""How long `python main.py --help` and `import selection` take, as whole processes, and what the import leaves out.

    python benchmarks/startup.py
"""

import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
HEAVY = ('tensorflow', 'tensorflow_datasets', 'flax', 'absl', 'ott', 'matplotlib')


def seconds(*arguments: str) -> float:
  """The median wall time of five runs after one."""
  times = []
  for _ in range(6):
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)
    times.append(time.perf_counter() - start)
  return statistics.median(times[1:])


def main() -> None:
  print(f'python main.py --help   {seconds("main.py", "--help"):.2f} s')
  print(f'import selection        {seconds("-c", "import selection"):.2f} s')
  print(f'import jax alone        {seconds("-c", "import jax"):.2f} s')
  code = f'import selection, sys; print([name for name in {HEAVY} if name in sys.modules])'
  loaded = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout.strip()
  print(f'import selection loads of {", ".join(HEAVY)}: {loaded}')


if __name__ == '__main__':
  main()
