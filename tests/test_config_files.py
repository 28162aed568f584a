"""Config files are found by name, and import each other without a package named configs in the way."""

import pathlib
import sys
import types

import pytest

from ft_jax import config, config_files

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize('name,found', [
    ('pets', 'configs/pets.py'), ('pets:mocov2', 'configs/pets.py:mocov2'), ('configs/pets.py', 'configs/pets.py')])
def test_a_config_is_found_by_name_from_any_folder(name, found, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config_files.find(name) == str(ROOT / found)


def test_a_file_of_ones_own(tmp_path, monkeypatch):
  """It comes before a config of the same name."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'pets').write_text('')
  assert config_files.find('pets') == 'pets'


@pytest.mark.parametrize('name', ['cats', 'configs/cats.py', 'other/pets.py', 'pets.py', 'configs'])
def test_a_config_that_is_not_there(name):
  message = f'^there is no file {name}(; did you mean .*)?; known configs: aircraft, caltech101, '
  with pytest.raises(ValueError, match=message):
    config_files.find(name)


def test_load_gives_the_config():
  assert config_files.load('default').to_dict() == config.get_config().to_dict()
  assert config_files.load('pets:mocov2').model.name == 'resnet50'
  with pytest.raises(ValueError, match="^this config takes no argument after a colon"):
    config_files.load('export:x')


def test_a_package_of_that_name_is_left_alone(monkeypatch):
  """Other projects have a package named configs, too."""
  other = types.ModuleType('configs')
  monkeypatch.setitem(sys.modules, 'configs', other)
  for name in [name for name in sys.modules if name.startswith('configs.')]:  # of this project, from other tests
    monkeypatch.delitem(sys.modules, name)
  assert config_files.load('pets').target.name == 'tfds:oxford_iiit_pet'
  assert sys.modules['configs'] is other and 'configs.liu2022' not in sys.modules
