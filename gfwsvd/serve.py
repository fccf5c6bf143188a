"""An OpenAI-compatible server for a compressed model: `transformers serve`, which gfwsvd teaches the format."""

import os
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import inspect
from .errors import GfwsvdError


def check_serving(directory: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint to serve.

    Raises:
        GfwsvdError: when it is none, it has no tokenizer, or a package that the server needs is missing.
    """
    from transformers.utils.import_utils import is_serve_available

    folder = Path(directory).expanduser()
    inspect(folder)
    if not (folder / "tokenizer_config.json").exists():
        raise GfwsvdError(f"{folder} has no tokenizer, which a server needs: save the checkpoint with its tokenizer")
    if not is_serve_available():
        raise GfwsvdError("serving needs packages that are not installed: pip install 'gfwsvd[serve]'")
    return folder


def serve(directory: str | os.PathLike[str], arguments: Sequence[str] = ()) -> None:
    """Serves a checkpoint until it is interrupted; requests name the model as `directory` is written here.

    Args:
        arguments: further options of `transformers serve`, such as `["--port", "8001", "--device", "cuda:0"]`.

    Raises:
        GfwsvdError: as `check_serving`.
    """
    check_serving(directory)
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.cli.transformers import app

    import gfwsvd.hf  # noqa: F401 - the format

    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # the server lists the models in it
    app(args=["serve", os.fspath(directory), *arguments], prog_name="gfwsvd")
