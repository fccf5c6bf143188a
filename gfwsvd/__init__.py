"""Compress language models by generalized Fisher-weighted SVD."""

from . import registration

__version__ = "0.1.0"

registration.install()
