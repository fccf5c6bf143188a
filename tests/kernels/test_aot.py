"""The gate before a GPU: what is shipped compiles for three architectures, without spills, for their tensor cores."""

import json
import os
import subprocess
import sys

import pytest

from gfwsvd_kernels import tiles

# Shared memory that a block may have: 8.6 and 8.9 run the tiles of 8.0 and have the least.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# They multiply a few tokens: tiles as small as those of the first tensor cores
SMALL = ("few_down_kernel", "few_up_kernel", "few_silu_mul_kernel")
KERNELS = (
    "gram_kernel",
    "quadratic_form_kernel",
    "scale_rows_kernel",
    "scores_kernel",
    "linear_kernel",
    "down_kernel",
    "up_kernel",
)
# They move what others have multiplied, or multiply too little for the tensor cores
PLAIN = ("finish_kernel", "scale_rows_kernel", "prepare_kernel", "row_powers_kernel", "down_kernel", "up_kernel")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """Every shipped launch with what the compiler made of it, in a process without the interpreter, nothing cached."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "gfwsvd_kernels.testing", *map(str, INSTRUCTION)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kernel_is_compiled_for_every_architecture_and_dtype(compiled):
    found = {(row["kernel"], row["arch"], row["pointers"].split()[1]) for row in compiled}
    for arch in INSTRUCTION:
        for kernel in KERNELS:
            for dtype in ("*fp32", "*fp16", "*bf16"):
                assert (kernel, arch, dtype) in found
        assert ("apply_kernel", arch, "*fp32") in found
        assert all((kernel, arch, "*bf16") in found for kernel in SMALL)


def test_nothing_spills(compiled):
    assert [row for row in compiled if row["stack_bytes"] or row["registers"] > 255] == []


def test_products_run_on_the_tensor_cores_of_the_architecture(compiled):
    for row in compiled:
        if row["kernel"] in PLAIN:
            assert not row["tensor_core"]
        else:
            assert INSTRUCTION[80 if row["kernel"] in SMALL else row["arch"]] in row["tensor_core"], row


def test_a_block_fits_the_shared_memory(compiled):
    assert [row for row in compiled if row["shared_bytes"] > SHARED_BYTES[row["arch"]]] == []


def test_an_sm_holds_the_programs_that_a_persistent_grid_counts_on(compiled):
    for row in compiled:
        if row["kernel"] == "gram_kernel":
            assert row["grid"][0] <= row["blocks_per_sm"] * tiles.H200.num_sms, row
