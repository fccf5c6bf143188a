"""The benchmark of sentence encoders: its pairs, its figures, its rows, and what it shows on the real encoder."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of the installed packages

import gfwsvd
from benchmarks import encoder, record
from benchmarks.pairs import load_pairs
from tiny_models import VOCABULARY, tiny_model, word_tokenizer

# ------------------------------------------------------------------------------------------------------------- pairs


def _rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_come_without_the_frame_that_all_rows_share(tmp_path):
    rows = [{"ask": f"Answer this.\n\nAsked: {word}?\n\nAnswer:\n", "say": f"a {word}."} for word in ("sun", "sea")]
    file = _rows_file(tmp_path / "rows.jsonl", rows)
    assert load_pairs(f"{file}:ask:say") == [("Asked: sun?", "a sun."), ("Asked: sea?", "a sea.")], "only whole lines"


def test_each_text_has_one_partner(tmp_path):
    texts = [("one", "first"), ("two", "second"), ("one", "third"), ("four", "second"), ("", "none"), ("same", "same")]
    file = _rows_file(tmp_path / "rows.jsonl", [{"a": first, "b": second} for first, second in texts])
    assert load_pairs(f"{file}:a:b") == texts[:2]


def test_pairs_of_a_text_are_its_neighbouring_paragraphs(tmp_path):
    long = [f"The {word} paragraph has\n  more than one line, and more than sixty characters." for word in "abcde"]
    (tmp_path / "text.txt").write_text("\n\n".join(["A heading", *long[:3], "short", long[0], *long[3:]]))
    words = [" ".join(paragraph.split()) for paragraph in long]
    assert load_pairs(str(tmp_path / "text.txt")) == [(words[0], words[1]), (words[2], words[3])]
    assert len(load_pairs("pydoc")) >= 650, "what the benchmark takes by default"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.jsonl:a:b", r"no pairs missing\.jsonl:a:b: expected a file and two of its fields"),
        ("{folder}/rows.jsonl", r"expected a file and two of its fields, FILE\.jsonl:FIELD:FIELD"),
        ("{folder}/rows.jsonl:a", r"expected a file and two of its fields"),
        ("{folder}/rows.jsonl:a:c", r"row 1: expected text in a and c"),
        ("{folder}/cut.jsonl:a:b", r"line 2: not JSON"),
        ("{folder}/rows.jsonl:a:b", r"has 1 pairs of texts that differ, expected at least two"),
        ("nowhere.txt", r"there is no text nowhere\.txt"),
    ],
)
def test_a_source_without_pairs_says_what_is_wrong(tmp_path, spec, message):
    row = json.dumps({"a": "one", "b": "two"})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n{row}\n")
    (tmp_path / "cut.jsonl").write_text(f"{row}\n{row[:9]}\n")
    with pytest.raises(gfwsvd.GfwsvdError, match=message):
        load_pairs(spec.format(folder=tmp_path))


# ----------------------------------------------------------------------------------------------------------- figures


def test_retrieval_counts_the_partners_that_come_before_the_right_one():
    queries = torch.eye(4)[[0, 1, 2]]
    partners = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0, 0.9], [0, 0.6, 0, 0.8]])  # the second query prefers the third
    embedded = torch.stack([queries, partners], 1).flatten(0, 1)
    found = encoder.retrieval(embedded, embedded)
    assert found["recall_at_1"] == pytest.approx(1 / 3)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3), "the third query sees three partners alike"
    assert encoder.retrieval(embedded * torch.nan, embedded)["recall_at_1"] == 0, "a broken model finds nothing"


# -------------------------------------------------------------------------------------------------------------- rows


@pytest.fixture
def options(tmp_path):
    """Of a run on a tiny encoder and random words."""
    BertModel(tiny_model("bert").config).save_pretrained(tmp_path / "model")
    tokenizer = word_tokenizer()
    tokenizer.pad_token = "w0"
    tokenizer.save_pretrained(tmp_path / "model")
    words = [f"w{number}" for number in torch.randint(VOCABULARY, (24 * 9,)).tolist()]
    texts = [" ".join(words[9 * row : 9 * row + 2 + row % 7]) for row in range(24)]
    rows = [{"ask": f"{row} {text}", "say": f"{text} {row}"} for row, text in enumerate(texts)]
    file = _rows_file(tmp_path / "rows.jsonl", rows)
    sizes = ["--calibration-pairs", 16, "--heldout-pairs", 8, "--batch-pairs", 4]
    places = ["--stats", tmp_path / "stats", "--results", tmp_path / "results.jsonl"]
    return ["--model", tmp_path / "model", "--pairs", f"{file}:ask:say", *sizes, *places, "--keep", 0.8]


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["encoder.py", *map(str, arguments)])
    encoder.main()


def test_the_benchmark_adds_the_missing_rows_only(options, tmp_path, monkeypatch, capsys):
    results, picture, table = (tmp_path / name for name in ("results.jsonl", "picture.png", "table.md"))
    _run(monkeypatch, *options, "--methods", "svd", "gfwsvd")
    first = results.read_text()
    rows = record.read(results)
    assert [(row["method"], row.get("ranks")) for row in rows] == [
        ("dense", None),
        ("svd", "uniform"),
        ("gfwsvd", "global"),
    ]
    assert rows[0]["cosine"] == pytest.approx(1) and all(0.7 < row["kept"] <= 0.8 for row in rows[1:])
    assert all(row["pairs"] == "rows.jsonl:ask:say" and row["machine"] for row in rows)
    _run(monkeypatch, *options, "--plot", picture, "--markdown", table)
    assert results.read_text().startswith(first) and len(record.read(results)) == 1 + len(gfwsvd.METHODS)
    assert picture.stat().st_size > 1000
    assert [line.split(" | ")[0] for line in table.read_text().splitlines()[2:]] == [
        f"| {name}, {'global' if method.predicts_loss else 'uniform'}" for name, method in gfwsvd.METHODS.items()
    ]
    assert table.read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is not of this text"):
        _run(monkeypatch, *options, "--max-tokens", 4)
    with pytest.raises(SystemExit, match="has 24 pairs, 116 were asked for"):
        _run(monkeypatch, *options, "--heldout-pairs", 100)


# -------------------------------------------------------------------------------------------------- the real encoder


def test_a_real_encoder_compressed_for_its_own_loss_still_finds_partners_where_svd_loses_some(minilm):
    """By reciprocal ranks, which every rank moves: of these hard pairs the dense model itself puts 16 of 100 first."""
    model, tokenizer, _ = gfwsvd.load_model(str(minilm))
    pairs = load_pairs("pydoc")
    sizes = {"batch_pairs": 16, "max_tokens": 24}
    heldout = encoder.pair_batches(pairs[100:200], tokenizer, **sizes)
    reference = encoder.embed(model, heldout)
    found = {"dense": encoder.retrieval(reference, reference)}
    batches = encoder.pair_batches(pairs[:48], tokenizer, **sizes)
    for method in ("svd", "gfwsvd"):
        small = copy.deepcopy(model)
        report = gfwsvd.compress(
            small, batches, method=method, keep=0.4, loss=encoder.contrastive_loss, exclude=["pooler"]
        )
        assert 0.39 < report.kept <= 0.4
        found[method] = encoder.retrieval(encoder.embed(small, heldout), reference)
    assert found["gfwsvd"]["mrr"] > 0.9 * found["dense"]["mrr"] > found["svd"]["mrr"], found
    assert found["gfwsvd"]["recall_at_1"] > found["dense"]["recall_at_1"] - 0.05, found
    assert found["gfwsvd"]["cosine"] > found["svd"]["cosine"] + 0.25, found
