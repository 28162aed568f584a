"""The folder of a run: what lies where, and how it is written. Every file is written whole or not at all."""

from collections.abc import Mapping
import json
from typing import Any

from etils import epath
import tensorboardX

from ft_jax import parallel

# Fields that may change between two starts of one run. What they do to its images, the checkpoints notice.
FREE = ('config.data.cache ', 'config.data.on_error ', 'config.data.timeout ', 'config.train.nonfinite_steps ',
        'config.train.skip_diverged ', 'config.pretrain.nonfinite_steps ', 'config.pretrain.skip_diverged ')


class Workdir:
  """config.json, selection.json, embeddings/, metrics.jsonl, tensorboard/, checkpoints/<step>/, results.json, report.html."""

  def __init__(self, path: epath.PathLike, config: Mapping[str, Any]):
    """Makes the folder, or takes up the run that is there.

    A run that has no checkpoint yet has nothing to lose: it takes the new config, and selects again.

    Raises:
      ValueError: it belongs to a run with another config, and names the fields that differ; or to something else.
    """
    self.path = epath.Path(path)
    wanted = json.loads(json.dumps(config))
    before = read_config(self.path)
    if before is None:
      if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
        raise ValueError(f'workdir {self.path} is not empty and holds no run (no config.json of one); give another --workdir')
      self.path.mkdir(parents=True, exist_ok=True)
    else:
      every = _differences(before, wanted)
      if not every:
        return
      differing = [line for line in every if not line.startswith(FREE)]
      if differing and (self.results_json.exists() or self.has_checkpoint()):
        raise ValueError(f'workdir {self.path} belongs to a run with another config ({"; ".join(differing[:5])}); '
                         'give another --workdir, or remove that one')
      if differing:
        self.selection_json.unlink(missing_ok=True)
    write_text(self.config_json, json.dumps(wanted, indent=2) + '\n')

  config_json = property(lambda self: self.path / 'config.json')
  selection_json = property(lambda self: self.path / 'selection.json')
  metrics_jsonl = property(lambda self: self.path / 'metrics.jsonl')
  results_json = property(lambda self: self.path / 'results.json')
  report_html = property(lambda self: self.path / 'report.html')
  embeddings = property(lambda self: self.path / 'embeddings')

  def has_checkpoint(self) -> bool:
    """Whether there is a state to go on from."""
    folder = self.path / 'checkpoints'
    return folder.exists() and any(step.name.isdigit() for step in folder.iterdir())

  def results(self) -> dict[str, Any] | None:
    """What results.json holds, or None where the run has not come to its end."""
    return json.loads(self.results_json.read_text()) if self.results_json.exists() else None

  def metrics(self) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    if not self.metrics_jsonl.exists():
      return []
    return [json.loads(line) for line in self.metrics_jsonl.read_text().splitlines()]


def read_config(path: epath.PathLike) -> dict[str, Any] | None:
  """The config of the run in a folder, or None where there is no run; other programs have files of that name too."""
  try:
    config = json.loads((epath.Path(path) / 'config.json').read_text())
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return None
  return config if isinstance(config, dict) and {'job', 'seed', 'train'} <= set(config) else None


class MetricsWriter:
  """metrics.jsonl, one JSON object a line with its `step`, and the same as TensorBoard events; process 0 writes."""

  def __init__(self, workdir: Workdir, start: int):
    """Takes up at `start`: lines of later steps, which are about to be run again, go."""
    self._path = workdir.metrics_jsonl
    self._begun: dict[str, float] = {}
    if not parallel.is_main():
      self._events = None
      return
    text = self._path.read_text() if self._path.exists() else ''
    # A line that was cut short has no newline at its end.
    whole = [line for line in text.splitlines(keepends=True) if line.endswith('\n')]
    lines = [line for line in whole if json.loads(line)['step'] <= start]
    write_text(self._path, ''.join(lines))
    if lines and (last := json.loads(lines[-1]))['step'] == start:
      self._begun = last
    self._events = tensorboardX.SummaryWriter(str(workdir.path / 'tensorboard'), purge_step=start + 1)

  def write(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    """Adds the metrics of one step, to those that it has where it is the one to go on from; returns them all."""
    before = self._begun if self._begun.get('step') == step else {}
    line = {'step': step, **before, **metrics}
    if self._events is None:
      return line
    if before:
      write_text(self._path, ''.join(self._path.read_text().splitlines(keepends=True)[:-1]) + json.dumps(line) + '\n')
    else:
      with self._path.open('a') as stream:
        stream.write(json.dumps(line) + '\n')
    for key, value in metrics.items():
      self._events.add_scalar(key, value, step)
    return line

  def close(self) -> None:
    """Writes what is buffered."""
    if self._events is not None:
      self._events.close()


def write_results(workdir: Workdir, results: Mapping[str, Any]) -> None:
  """Writes results.json, which also says that the run is finished."""
  write_text(workdir.results_json, json.dumps(results, indent=1, allow_nan=False) + '\n')


def write_text(path: epath.Path, text: str) -> None:
  """Writes a file whole or not at all; of several processes, the first one writes.

  Bytes of a file name that are no UTF-8 are spelt out, as `caf\\udce9.jpg`: pages and JSON files have to be UTF-8.
  """
  write_bytes(path, text.encode(errors='backslashreplace'))


def write_bytes(path: epath.Path, data: bytes) -> None:
  """Likewise."""
  if parallel.is_main():
    temporary = path.parent / f'.{path.name}.tmp'
    temporary.write_bytes(data)
    temporary.replace(path)


def _differences(before: Any, now: Any, name: str = 'config') -> list[str]:
  """The fields that differ, as `config.seed is 0 there and 1 here`."""
  if isinstance(before, dict) and isinstance(now, dict):
    return [line for key in sorted({*before, *now})
            for line in _differences(before.get(key, 'not set'), now.get(key, 'not set'), f'{name}.{key}')]
  return [] if before == now else [f'{name} is {before!r} there and {now!r} here']
