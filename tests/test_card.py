"""The model card: front matter that parses, and the numbers of the report."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from gfwsvd.card import licence_of, model_card
from gfwsvd.compress import compress
from gfwsvd.hf import save_pretrained
from gfwsvd.outcome import CompressionReport
from tiny_models import random_tokens, tiny_model

transformers = pytest.importorskip("transformers")


def parts(card: str) -> tuple[dict, dict[str, str]]:
    """The front matter, and the tables as one."""
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), dict(re.findall(r"^\| (.+?) \| (.+?) \|$", body, re.MULTILINE))


@pytest.fixture
def compressed() -> tuple[torch.nn.Module, CompressionReport]:
    model = tiny_model("llama")
    batches = [{"input_ids": random_tokens(4, 16)}]
    report = compress(model, batches, keep=0.7, rank_multiple=4)
    report.provenance |= {"model": "some-one/tiny_llama", "text": "train.txt", "tokens": 64}
    return model, report


def test_a_saved_model_has_a_card_with_the_numbers_of_its_report(tmp_path, compressed):
    model, report = compressed
    save_pretrained(model, tmp_path / "out", report=report)
    header, table = parts((tmp_path / "out" / "README.md").read_text())
    assert header["base_model"] == "some-one/tiny_llama" and header["library_name"] == "transformers"
    assert "gfwsvd" in header["tags"] and "license" not in header
    assert float(table["keep"]) == 0.7 and table["method"] == "gfwsvd" and table["text"] == "train.txt"
    assert table["tokens"] == "64" and table["unit"] == report.provenance["settings"]["unit"]
    assert float(table["share of the linear layers' weights kept"]) == report.kept
    assert int(table["numbers stored for these layers"]) == report.stored
    assert int(table["numbers in them before"]) == report.dense
    assert int(table["numbers of the whole model"]) == report.model_stored
    assert int(table["numbers of the whole model before"]) == report.model_dense
    predicted = float(table["predicted increase of the loss, nats per token"])
    assert predicted == sum(layer.predicted_loss for layer in report.layers) > 0


def test_the_loading_code_of_the_card_loads_the_model(tmp_path, compressed):
    model, report = compressed
    save_pretrained(model, tmp_path / "out", report=report)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(code.replace("PATH OR NAME OF THIS MODEL", str(tmp_path / "out")), names)
    tokens = random_tokens(1, 9)
    assert torch.equal(names["model"](tokens).logits, model(tokens).logits)


def test_the_licence_is_that_of_the_card_beside_the_original(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nlicense: other\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    save_pretrained(model, tmp_path / "out", report=compress(model, method="svd", rank_multiple=4))
    text = (tmp_path / "out" / "README.md").read_text()
    header, table = parts(text)
    assert header["license"] == "apache-2.0" and "base_model" not in header
    assert "licence is that of the original" not in text and not any("predicted" in key for key in table)
    assert str(tmp_path) not in text


def test_a_licence_is_found_in_the_front_matter_only():
    assert licence_of("---\nlicense: 'mit'\n---\n") == "mit"
    for card in ("", "license: mit", "---\ntags: [x]\n---\nlicense: mit\n", "---\nlicense: [a, b]\n---\n"):
        assert licence_of(card) is None


@pytest.mark.parametrize(
    "model", ["a\n---\nlicense: mit", "x/y\nlicense: mit", 'q"/: {}', "a/b # c", "[x](y)", "~", "a|b"]
)
def test_names_from_outside_stay_text(compressed, model):
    report = compressed[1].to_json()
    report["provenance"] |= {"model": model, "text": "| a\n\n# b |"}
    card = model_card(report, auto_class="AutoModel", base_card="")
    header, _ = parts(card)
    assert header.keys() == {"library_name", "tags"} and "\n# b" not in card


def test_the_card_is_replaced_with_the_folder(tmp_path: Path, compressed):
    model, report = compressed
    save_pretrained(model, tmp_path / "out", report=report)
    (tmp_path / "out" / "README.md").write_text("mine")
    save_pretrained(model, tmp_path / "out", report=report, overwrite=True)
    assert parts((tmp_path / "out" / "README.md").read_text())[0]["base_model"] == "some-one/tiny_llama"
