"""vLLM's server, by the real OpenAI client over HTTP: what it says is what the checkpoint says in transformers."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import openai
import pytest
from transformers import AutoTokenizer

from served_models import greedy

TOKENS = 24
TEXT = "A compiler is a program that"
CHAT = [{"role": "user", "content": "What is a list in Python?"}]


@pytest.fixture(scope="module")
def folder(served):
    return served("smollm2")


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    """A client of a server in a process of its own, which is told nothing but the folder, and that in float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    # The build for CPUs is installed under another name than vllm, without which the command `vllm serve` stops.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"]  # to be up sooner
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
    try:
        for _ in range(900):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        else:
            pytest.fail(f"the server did not come up: {log.read_text()}")
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_a_completion_and_a_streamed_one_are_what_transformers_says(client, folder, tokenizer):
    expected = tokenizer.decode(greedy(folder, tokenizer(TEXT).input_ids, TOKENS))
    options = {"model": str(folder), "prompt": TEXT, "max_tokens": TOKENS, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True, "skip_special_tokens": False}
    assert len(set(expected.split())) > 5
    assert client.completions.create(**options).choices[0].text == expected
    parts = [part.choices[0].text for part in client.completions.create(**options, stream=True)]
    assert len(parts) > TOKENS // 2
    assert "".join(parts) == expected


def test_a_chat_is_what_transformers_says(client, folder, tokenizer):
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True).input_ids
    expected = tokenizer.decode(greedy(folder, ids, TOKENS))
    options = {"ignore_eos": True, "skip_special_tokens": False}
    answer = client.chat.completions.create(
        model=str(folder), messages=CHAT, max_tokens=TOKENS, temperature=0, extra_body=options
    )
    assert answer.choices[0].message.content == expected
