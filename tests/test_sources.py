"""Models from folders and GGUF files, texts from files and from Python itself, and the tokens drawn from them."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gfwsvd.compress import compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.hf import save_pretrained
from gfwsvd.layers import LowRankLinear
from gfwsvd.sources import load_model, load_text, token_batches, windows
from tiny_models import VOCABULARY, random_tokens, tiny_model

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens(2, 17)).logits


# ------------------------------------------------------------------------------------------------------------- models


def write_gguf(file: Path, model: nn.Module, *, tokenizer: bool) -> None:
    """A tiny Llama as a float32 GGUF file, with a tokenizer of letters and one pair, or with none."""
    config = model.config
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        tokens = [f"<{number}>" if number < 33 else chr(number) for number in range(VOCABULARY)]
        tokens[3] = "th"
        writer.add_token_list(tokens)
        writer.add_token_merges(["t h"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    state = model.state_dict()
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    for ours, theirs in names.items():
        weight = state[f"{ours}.weight"].numpy()
        if theirs.endswith(("attn_q", "attn_k")):  # the format interleaves the two halves of every head's rotation
            count = heads if theirs.endswith("attn_q") else key_value_heads
            weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_float32_model_and_its_tokenizer(tmp_path):
    model = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer=True)
    loaded, tokenizer, name = load_model(str(tmp_path / "tiny.gguf"))
    assert name == "tiny.gguf" and not loaded.training
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer("Azth")["input_ids"] == [ord("A"), ord("z"), 3]
    assert load_model(str(tmp_path / "tiny.gguf"), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_gguf_model_is_compressed_and_saved_like_any_other(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), tokenizer=True)
    model, tokenizer, _ = load_model(str(tmp_path / "tiny.gguf"))
    report = compress(model, method="svd", keep=0.5, ranks="uniform", rank_multiple=4)
    save_pretrained(model, tmp_path / "out", report=report, tokenizer=tokenizer)
    reloaded, reloaded_tokenizer, name = load_model(str(tmp_path / "out"))
    assert name == "out" and any(isinstance(module, LowRankLinear) for module in reloaded.modules())
    assert torch.equal(logits(reloaded), logits(model))
    assert reloaded_tokenizer("Azth")["input_ids"] == [ord("A"), ord("z"), 3]


def test_a_gguf_file_without_a_tokenizer_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), tokenizer=False)
    with pytest.raises(GfwsvdError, match=r"tiny\.gguf has no tokenizer in its metadata"):
        load_model(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("size", [0, 3, 100, 3000, -1000])
def test_a_gguf_file_cut_short_is_refused(tmp_path, size):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_model("llama"), tokenizer=True)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(GfwsvdError, match=r"tiny\.gguf is not a whole GGUF file"):
        load_model(str(file))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_folder_gives_the_class_and_type_it_was_saved_with(tmp_path, kind):
    model = tiny_model(kind).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    loaded, tokenizer, name = load_model(str(tmp_path / "dense"))
    assert type(loaded) is type(model) and loaded.dtype == torch.bfloat16 and not loaded.training
    assert tokenizer is None and name == "dense"
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert load_model(str(tmp_path / "dense"), dtype="float32", device="cpu")[0].dtype == torch.float32


def test_another_class_can_be_asked_for(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path), auto_class="AutoModel")[0]) is transformers.LlamaModel
    with pytest.raises(GfwsvdError, match="transformers has no class AutoModelForNothing"):
        load_model(str(tmp_path), auto_class="AutoModelForNothing")


def test_a_model_is_never_filled_up_with_random_weights(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    with pytest.raises(GfwsvdError, match="lacks tensors that BertForSequenceClassification needs"):
        load_model(str(tmp_path), auto_class="AutoModelForSequenceClassification")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GfwsvdError, match=r"among them bert\.encoder\.layer\.0\.attention\.self\.query\.weight"):
        load_model(str(tmp_path))


def test_pickled_weights_are_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    tiny_model("llama").config.save_pretrained(tmp_path)
    torch.save({"model.norm.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(GfwsvdError, match="no safetensors file"):
        load_model(str(tmp_path))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere/at/all", "no model: expected a folder, a .gguf file or a name on the hub"),
        ("nowhere.gguf", "there is no file"),
        (
            "nobody/nothing",
            "cannot load the model nobody/nothing .no file or folder here; taken for a name on the hub.:",
        ),
        ("EMPTY", r"no config\.json"),
        ("FILE", "no model: expected"),
    ],
)
def test_where_no_model_is_the_message_says_what_was_expected(tmp_path, spec, message):
    (tmp_path / "file.txt").write_text("")
    spec = {"EMPTY": str(tmp_path), "FILE": str(tmp_path / "file.txt")}.get(spec, spec)
    with pytest.raises(GfwsvdError, match=message):
        load_model(spec)


@pytest.mark.parametrize("damage", ["weights", "config"])
def test_a_damaged_folder_is_refused(tmp_path, damage):
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / {"weights": "model.safetensors", "config": "config.json"}[damage]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(GfwsvdError, match="cannot load the model"):
        load_model(str(tmp_path))


def test_the_settings_of_transformers_are_as_before(tmp_path):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(GfwsvdError):
        load_model(str(tmp_path))
    tiny_model("llama").save_pretrained(tmp_path)
    load_model(str(tmp_path))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# -------------------------------------------------------------------------------------------------------------- texts


def test_a_text_file_is_taken_as_it_is(tmp_path):
    text = " \n = Title = \n \n Ünïcode , and more \n"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert load_text(str(tmp_path / "text.txt")) == text


def test_a_raw_file_gives_the_text_of_wikitexts_rows_on_the_hub(tmp_path):
    rows = ["", " = Title = \n", "", " Ünïcode , and more \n"]  # as the hub has them
    (tmp_path / "wiki.raw").write_text("".join(row or " \n" for row in rows), encoding="utf-8")
    assert load_text(str(tmp_path / "wiki.raw")) == "\n\n".join(rows)


ROWS = [{"id": 1, "title": "t", "text": "one\ntwo"}, {"id": 2, "title": "u", "text": "three"}]
PAIRS = [{"prompt": "why?", "response": "so."}, {"prompt": "what?", "response": "that."}]


def rows_file(folder: Path, suffix: str, rows: list[dict[str, object]]) -> str:
    file = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(file)
    return str(file)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_give_their_text_or_the_field_asked_for(tmp_path, suffix):
    assert load_text(rows_file(tmp_path, suffix, ROWS)) == "one\ntwo\n\nthree"
    assert load_text(rows_file(tmp_path, suffix, ROWS) + ":title") == "t\n\nu"
    assert load_text(rows_file(tmp_path, suffix, PAIRS)) == "why?\nso.\n\nwhat?\nthat."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"other": "b"}', "row 2: expected text in text"),
        ("x.jsonl", b'{"text": 3}', "row 1: expected text in text"),
        ("x.jsonl", b'{"story": "a"}', "which of the fields story is the text"),
        ("x.jsonl:title", b'{"text": "a"}', "row 1: expected text in title"),
        ("x.jsonl", b"[1]", "row 1: expected an object of fields, got list"),
        ("x.jsonl", b"\xff\xfe", "not UTF-8"),
        ("x.jsonl", b"", "is empty"),
        ("x.parquet", b"PAR1 but not really", "cannot read .*x.parquet"),
        ("x.txt", b"\xff\xfe", "not UTF-8"),
        ("x.txt", b" \n", "is empty"),
        ("x.txt:field", b"text", "cannot take a text from"),
        ("x.pdf", b"text", "cannot take a text from"),
    ],
)
def test_a_bad_text_file_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name.partition(":")[0]).write_bytes(content)
    with pytest.raises(GfwsvdError, match=message):
        load_text(str(tmp_path / name))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.txt", "there is no text nowhere.txt"),
        ("data/nowhere.jsonl:field", "there is no text data/nowhere.jsonl:field"),
        ("nobody/nothing:config:test", r"cannot read dataset nobody/nothing \(config config, split test\)"),
        ("pydoc:other", "parts calibration and heldout, got 'other'"),
    ],
)
def test_where_no_text_is_the_message_names_it(spec, message):
    with pytest.raises(GfwsvdError, match=message):
        load_text(spec)


def test_the_two_parts_of_pydoc_are_whole_topics_without_a_common_paragraph():
    from pydoc_data.topics import topics

    parts = {part: load_text(f"pydoc:{part}") for part in ("calibration", "heldout")}
    names = {part: {name for name, topic in topics.items() if topic in text} for part, text in parts.items()}
    for part, text in parts.items():
        assert sum(len(topics[name]) for name in names[part]) >= len(text) - 2 * len(topics)
    paragraphs = [
        {" ".join(block.split()) for block in text.split("\n\n") if len(" ".join(block.split())) >= 60}
        for text in parts.values()
    ]
    assert paragraphs[0].isdisjoint(paragraphs[1])
    whole = load_text("pydoc")
    assert len(whole) == len(parts["calibration"]) + len(parts["heldout"]) + 2
    assert 0.15 < len(parts["heldout"]) / len(whole) <= 0.25
    everything = {" ".join(block.split()) for topic in topics.values() for block in topic.split("\n\n")}
    assert {block for block in everything if len(block) >= 60} == paragraphs[0] | paragraphs[1]


# ------------------------------------------------------------------------------------------------------------- tokens


def numbers(text: str) -> dict[str, list[int]]:
    """A tokenizer of numbers: a token is its own place in the text of `counting`."""
    return {"input_ids": [int(word) for word in text.split()]}


def counting(length: int) -> str:
    return " ".join(map(str, range(length)))


@pytest.mark.parametrize(("length", "sequences", "seq_len"), [(1000, 7, 30), (210, 7, 30), (211, 7, 30), (5, 1, 1)])
def test_batches_are_runs_of_the_text_that_do_not_overlap(length, sequences, seq_len):
    batches = token_batches(counting(length), numbers, sequences=sequences, seq_len=seq_len, batch_size=3, seed=1)
    sizes = [len(batch["input_ids"]) for batch in batches]
    assert sum(sizes) == sequences and all(size == 3 for size in sizes[:-1])
    for batch in batches:
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
        assert torch.equal(batch["attention_mask"], torch.ones_like(batch["input_ids"]))
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert rows.shape == (sequences, seq_len) and bool((rows.diff(dim=1) == 1).all())
    assert len(rows.unique()) == rows.numel()


def test_batches_depend_on_the_seed_alone():
    options = {"sequences": 4, "seq_len": 8, "batch_size": 4}
    first, again, other = (
        token_batches(counting(500), numbers, **options, seed=seed)[0]["input_ids"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_placement_of_the_windows_is_equally_likely():
    runs = 3000  # 2 windows of 2 among 6 tokens: 6 placements, each in 2 orders
    found = collections.Counter(
        tuple(
            token_batches(counting(6), numbers, sequences=2, seq_len=2, batch_size=2, seed=seed)[0]["input_ids"][
                :, 0
            ].tolist()
        )
        for seed in range(runs)
    )
    assert {tuple(sorted(starts)) for starts in found} == {(0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4)}
    expected = runs / 12
    chi_square = sum((count - expected) ** 2 / expected for count in found.values())
    assert len(found) == 12 and chi_square < 31.3  # the 99.9 % point for 11 degrees of freedom


def test_windows_follow_one_another_from_the_start():
    assert torch.equal(windows(counting(107), numbers, window=10), torch.arange(100).view(10, 10))
    assert torch.equal(windows(counting(107), numbers, window=10, limit=3), torch.arange(30).view(3, 10))
    assert windows(counting(10), numbers, window=10, limit=3).shape == (1, 10)


def test_windows_of_a_stride_overlap_and_only_whole_ones_count():
    starts = torch.tensor([0, 4, 8, 12])[:, None]
    assert torch.equal(windows(counting(25), numbers, window=10, stride=4), starts + torch.arange(10))
    assert torch.equal(windows(counting(25), numbers, window=10, stride=4, limit=2), starts[:2] + torch.arange(10))
    assert torch.equal(windows(counting(25), numbers, window=10, stride=10), torch.arange(20).view(2, 10))
    for stride in (0, 11):
        with pytest.raises(GfwsvdError, match=f"stride must be from 1 to the window's 10 tokens, got {stride}"):
            windows(counting(25), numbers, window=10, stride=stride)


def test_a_text_too_short_is_refused_with_both_numbers():
    with pytest.raises(GfwsvdError, match="4 sequences of 30 tokens need 120 tokens, it has 119"):
        token_batches(counting(119), numbers, sequences=4, seq_len=30, batch_size=2, seed=0)
    with pytest.raises(GfwsvdError, match="one window of 10 tokens need 10 tokens, it has 9"):
        windows(counting(9), numbers, window=10)


@pytest.mark.parametrize("name", ["sequences", "seq_len", "batch_size"])
def test_a_count_below_one_is_refused(name):
    options = {"sequences": 2, "seq_len": 2, "batch_size": 2, name: 0}
    with pytest.raises(GfwsvdError, match=f"{name} must be at least 1, got 0"):
        token_batches(counting(9), numbers, **options, seed=0)
    with pytest.raises(GfwsvdError, match="limit must be at least 1, got 0"):
        windows(counting(9), numbers, window=2, limit=0)


def test_without_a_tokenizer_there_are_no_tokens():
    with pytest.raises(GfwsvdError, match="no tokenizer"):
        windows("text", None, window=1)
