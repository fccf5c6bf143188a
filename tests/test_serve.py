"""The server, by the real OpenAI client over HTTP: what it says is what the checkpoint says in transformers."""

import concurrent.futures
import os
import resource
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gfwsvd import serve
from gfwsvd.calibration import calibrate
from gfwsvd.cli import app
from gfwsvd.compress import compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.hf import save_pretrained
from gfwsvd.sources import load_model
from tiny_models import random_tokens, tiny_model, word_tokenizer

openai = pytest.importorskip("openai", reason="the OpenAI client is not installed: pip install '.[serve]' brings it")

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}w7"
PROMPT, TOKENS = "w5 w9 w33", 12


def _save(folder, tokenizer):
    model = tiny_model("llama")
    report = compress(model, statistics=calibrate(model, [{"input_ids": random_tokens(4, 16)}]), keep=0.8)
    save_pretrained(model, folder, report=report, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    tokenizer = word_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token = TEMPLATE, "w2", "w0"
    return _save(tmp_path_factory.mktemp("served") / "model", tokenizer)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """The address of a server of the checkpoint, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    environment = {**os.environ, "HF_HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gfwsvd", "serve", str(checkpoint), *options],
            stdout=output, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        else:
            pytest.fail(f"the server did not come up: {log.read_text()}")
        yield address, process
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", timeout=60, max_retries=0)


@pytest.fixture(scope="module")
def expected(checkpoint):
    """What transformers says by itself, always the likeliest token."""
    model, tokenizer, _ = load_model(str(checkpoint))
    ids = tokenizer(PROMPT + " w7", return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def _ask(client, checkpoint, **options):
    return client.chat.completions.create(
        model=str(checkpoint),
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=TOKENS,
        temperature=0,
        **options,
    )


def _streamed(client, checkpoint):
    return "".join(
        part.choices[0].delta.content or "" for part in _ask(client, checkpoint, stream=True) if part.choices
    )


def test_an_answer_and_a_streamed_one_are_what_transformers_says(client, checkpoint, expected):
    assert len(expected.split()) >= 3
    assert _ask(client, checkpoint).choices[0].message.content.split() == expected.split()
    assert _streamed(client, checkpoint).split() == expected.split()


def test_requests_at_the_same_time_get_their_own_answers(client, checkpoint, expected):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: _streamed(client, checkpoint), range(6)))
    assert [answer.split() for answer in answers] == [expected.split()] * 6


def test_a_stream_that_its_client_leaves_does_not_hurt_the_next_request(client, checkpoint, expected):
    for _ in range(2):
        stream = _ask(client, checkpoint, stream=True)
        next(iter(stream))
        stream.close()
    assert _streamed(client, checkpoint).split() == expected.split()


def test_sixty_requests_leave_no_memory_and_no_open_files_behind(server, client, checkpoint, expected):
    folder, answers, memory, files = Path(f"/proc/{server[1].pid}"), [], [], []
    for _ in range(30):
        answers += [_streamed(client, checkpoint), _ask(client, checkpoint).choices[0].message.content]
        memory.append(int((folder / "statm").read_text().split()[1]) * resource.getpagesize())
        files.append(len(os.listdir(folder / "fd")))
    assert [answer.split() for answer in answers] == [expected.split()] * 60
    assert files[-1] <= files[0], files  # connections of tests before this one may close in the meantime
    grown = memory[-1] - memory[9]  # 0.2 MB where nothing stays; a model of this size takes that twice
    assert grown < 500_000, f"{grown / 40:.0f} bytes a request stay"


def test_a_folder_that_cannot_be_served_is_refused_before_the_server_starts(tmp_path, monkeypatch):
    assert "config.json" in _error(tmp_path / "nothing")
    bare = _save(tmp_path / "bare", None)
    assert "has no tokenizer" in _error(bare)
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    served = _save(tmp_path / "whole", word_tokenizer())
    with pytest.raises(GfwsvdError, match="pip install 'gfwsvd\\[serve\\]'"):
        serve.check_serving(served)


def _error(folder):
    result = CliRunner().invoke(app, ["serve", str(folder), "--port", "1"])
    assert result.exit_code == 1
    return result.stderr
