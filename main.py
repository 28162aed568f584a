"""Runs one job: python main.py --config=configs/pets.py [--config.field=value ...] [--workdir=runs/pets].

The command itself is in ft_jax/main.py; the installed package has it as `ft-jax`.
"""

from ft_jax.main import command

if __name__ == '__main__':
  command()
