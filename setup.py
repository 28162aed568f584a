"""The packages. Everything else is in pyproject.toml, which has no way to install configs/ as ft_jax/configs."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=['ft_jax*', 'selection*'], exclude=['*.__pycache__']),
        'ft_jax.configs',
    ],
    package_dir={'ft_jax.configs': 'configs'},
)
