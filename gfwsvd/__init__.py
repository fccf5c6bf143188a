"""Compress language models by generalized Fisher-weighted SVD."""

__version__ = "0.1.0"
