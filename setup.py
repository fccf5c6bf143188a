"""The place of the optional compiled extension; everything else is declared in pyproject.toml."""

from setuptools import setup

setup()
