"""What is measured and what it takes: shapes, ranks, groups, operations and bytes, counted by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of the installed packages

from benchmarks.registry import OPS
from benchmarks.shapes import MODELS, Case, Grid, GroupCase, rank


# Counted by hand. The lower triangle of width 3 has 6 entries, of width 4 it has 10.
@pytest.mark.parametrize(
    ("op", "case", "flops", "num_bytes"),
    [
        ("gram_accumulate", Case(2, 3, 3), 2 * 2 * 6, 2 * 3 * 2 + 2 * 4 * 6),
        ("gram_accumulate_weighted", Case(2, 3, 3), 2 * 2 * 6, 2 * 3 * 2 + 2 * 4 + 2 * 4 * 6),
        ("gram_accumulate_two", Case(2, 3, 3), 2 * 2 * 6, 2 * (2 * 3 * 2) + 2 * 4 * 6),
        ("gram_accumulate_packed", Case(2, 3, 3), 2 * 2 * 6, 2 * 3 * 2 + 2 * 4 * 6),
        ("quadratic_form", Case(2, 3, 3), 2 * 2 * 6, 2 * 3 * 2 + 2 * 4 + 4 * 6),
        ("quadratic_form_scale", Case(2, 3, 3), 2 * 2 * 6, 2 * 3 * 2 + 2 * 4 + 4 * 6 + 2 * (2 * 3 * 2)),
        # xA, (xA) xᵀ, K g, tril(gᵀ e) for two sequences of two tokens
        (
            "sequence_unit_step",
            Case(4, 4, 3, seq_len=2),
            2 * 2 * (2 * 3 * 3 + 2 * 2 * 3 + 2 * 2 * 4 + 2 * 10),
            4 * (3 + 4) * 2 + 4 * 6 + 2 * 4 * 10,
        ),
        # eight tokens at once: G = gᵀ x, G A, tril((G A) Gᵀ) is less work
        (
            "sequence_unit_step",
            Case(8, 4, 3, seq_len=8),
            2 * (4 * 3 * 8 + 4 * 3 * 3 + 3 * 10),
            8 * (3 + 4) * 2 + 4 * 6 + 2 * 4 * 10,
        ),
        ("lowrank_linear", Case(1, 5, 3, rank=2), 2 * (2 * 3 + 5 * 2), 2 * (2 * 3 + 5 * 2 + 3 + 5)),
        # two tokens, factors of 2 x 3 + 5 x 2 and 1 x 3 + 4 x 1 entries, outputs side by side
        (
            "lowrank_group",
            GroupCase(2, "qkv", 3, (5, 4), (2, 1), pivoted=False, silu_mul=False),
            2 * 2 * (16 + 7),
            2 * (16 + 7 + 2 * 3 + 2 * 9),
        ),
        # factors of 2 x 3 + 5 x 2 and 1 x 3 + 5 x 1 entries, one output
        (
            "lowrank_group",
            GroupCase(2, "gate_up", 3, (5, 5), (2, 1), pivoted=False, silu_mul=True),
            2 * 2 * (16 + 8),
            2 * (16 + 8 + 2 * 3 + 2 * 5),
        ),
        # two of the five outputs and one of the four are entries of z: 3 x 2 and 3 x 1 entries of up are left
        (
            "lowrank_group_pivoted",
            GroupCase(2, "qkv", 3, (5, 4), (2, 1), pivoted=True, silu_mul=False),
            2 * 2 * (2 * 3 + 3 * 2 + 1 * 3 + 3 * 1),
            2 * (12 + 6 + 2 * 3 + 2 * 9),
        ),
        # a byte for each of 18 entries, two scales for each of three ranks
        (
            "lowrank_group_int8",
            GroupCase(2, "qkv", 3, (5, 4), (2, 1), pivoted=True, silu_mul=False),
            2 * 2 * (2 * 3 + 3 * 2 + 1 * 3 + 3 * 1),
            18 + 2 * (2 * 3 + 2 * 3 + 2 * 9),
        ),
    ],
)
def test_work_is_what_a_hand_counts(op, case, flops, num_bytes):
    assert (OPS[op].flops(case), OPS[op].bytes(case, 2)) == (flops, num_bytes)


def test_the_last_sequence_may_be_shorter():
    flops = OPS["sequence_unit_step"].flops
    assert flops(Case(5, 4, 3, seq_len=2)) == 2 * flops(Case(2, 4, 3, seq_len=2)) + flops(Case(1, 4, 3, seq_len=1))


def test_ranks_follow_the_uniform_rule_in_multiples_of_sixteen():
    assert rank(4096, 4096, 0.8) == 1632 and rank(14336, 4096, 0.5) == 1584
    for d_out, d_in in Grid(MODELS["qwen3-8b"], [1]).shapes():
        for keep in (0.8, 0.7, 0.5):
            found = rank(d_out, d_in, keep)
            assert found % 16 == 0 and 0 <= keep - found * (d_out + d_in) / (d_out * d_in) < 0.03


def test_the_rank_of_a_pivoted_layer_is_the_largest_of_its_stored_size():
    assert rank(4096, 4096, 0.8, pivoted=True) == 2256  # 4096 (1 - sqrt(0.2)) is 2264.2
    for d_out, d_in in Grid(MODELS["llama-3.1-8b"], [1]).shapes():
        for keep in (0.8, 0.7, 0.5):
            found, budget = rank(d_out, d_in, keep, pivoted=True), keep * d_in * d_out
            assert found % 16 == 0 and found > rank(d_out, d_in, keep)
            assert found * (d_in + d_out - found) <= budget < (found + 16) * (d_in + d_out - found - 16)


def test_groups_are_the_layers_that_read_one_input():
    layers = [layer for model in ("llama-3.1-8b", "qwen3-8b", "mistral-7b") for layer in MODELS[model]]
    assert Grid(layers, [1]).groups() == [
        ("qkv", 4096, (4096, 1024, 1024)),
        ("o", 4096, (4096,)),
        ("gate_up", 4096, (14336, 14336)),
        ("down", 14336, (4096,)),
        ("gate_up", 4096, (12288, 12288)),
        ("down", 12288, (4096,)),
    ]
