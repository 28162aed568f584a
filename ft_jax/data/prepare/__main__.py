"""Runs `python -m ft_jax.data.prepare`."""

from ft_jax.data.prepare import main

main()
