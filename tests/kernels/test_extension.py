"""The compiled extension: its machine code and argument checks without a GPU, its results where there is one."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from group_cases import GROUPS, by_torch, factors, oracle
from kernel_cases import assert_as_good_as

from gfwsvd_kernels import Factors, LowRankGroup, extension, layout

sys.path.insert(0, str(Path(__file__).parents[2] / "csrc"))
import build_extension  # noqa: E402

ARCHS = ("80", "90a", "100a")
KERNELS = {f"decode_kernel<{dtype}>" for dtype in ("BFloat16", "Float16")} | {
    f"persistent_kernel<{dtype}, {tiles}>" for dtype in ("BFloat16", "Float16") for tiles in (2, 4, 8)
}
# Beginnings of instructions: copies to shared memory, tensor cores and their loads, arrivals; on Hopper the copy
# engine, barriers of the cluster, mbarriers, loads from another block's shared memory, vector additions.
EVERYWHERE = {"LDSM.16.M88.4", "LDSM.16.MT88.4", "HMMA.16816", "ATOMG"}
INSTRUCTIONS = {
    "80": EVERYWHERE | {"LDGSTS.E.BYPASS.128", "ARRIVES.LDGSTSBAR"},
    "90a": EVERYWHERE | {"UBLKCP", "UCGABAR_ARV", "UCGABAR_WAIT", "SYNCS", "LD.E.64"},
    "100a": EVERYWHERE | {"UBLKCP", "UCGABAR_ARV", "UCGABAR_WAIT", "SYNCS", "LD.E.64"},
}
ADDITION = {"80": "RED.E.ADD.F32", "90a": "REDG.E.ADD.F32x4", "100a": "REDG.E.ADD.F32x4"}
# One block of 288 threads a multiprocessor: 9 warps, 3 of them on one of its four quarters of 16384 registers.
MAX_REGISTERS = 168


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of a fresh build for all architectures."""
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    work = tmp_path_factory.mktemp("extension")
    build_extension.build(work, work, ",".join(ARCHS))
    return work


@pytest.fixture(scope="module")
def module(built):
    spec = importlib.util.spec_from_file_location("_C", built / build_extension.NAME)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_every_kernel_compiles_for_every_architecture_without_spills(built):
    found = build_extension.resources(built)
    assert {(row.kernel, row.arch) for row in found} == {(kernel, arch) for kernel in KERNELS for arch in ARCHS}
    assert [row for row in found if row.stack_bytes or row.spill_bytes or row.registers > MAX_REGISTERS] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_the_machine_code_holds_the_instructions_that_are_meant(built, arch):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "-sass", "-arch", f"sm_{arch}", str(built / build_extension.NAME)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = defaultdict(set)
    for function in text.split("Function : ")[1:]:
        name, code = function.split("\n", 1)
        if "_kernel" in name:
            found[build_extension.readable(name)] = set(re.findall(r"\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]+)", code))
    assert set(found) == KERNELS
    for kernel, instructions in found.items():
        wanted = INSTRUCTIONS[arch] | ({ADDITION[arch]} if kernel.startswith("decode") else set())
        missing = {begin for begin in wanted if not any(name.startswith(begin) for name in instructions)}
        assert not missing, (kernel, missing)
        assert not any(name.startswith(("LDL", "STL")) for name in instructions), kernel


def test_importing_touches_no_device_and_needs_no_cuda_library(built):
    linked = subprocess.run(["ldd", built / build_extension.NAME], check=True, capture_output=True, text=True).stdout
    assert "cudart" not in linked and "torch" not in linked
    script = "import _C; print(_C.OUT_BLOCK)"
    environment = {"PYTHONPATH": str(built), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.stdout == f"{layout.OUT_BLOCK}\n", result.stderr


def test_the_module_and_the_layout_agree_on_constants_and_places(module):
    for name in ("OUT_BLOCK", "ALIGN", "FEW_TOKENS", "SOME_TOKENS", "BARRIERS"):
        assert getattr(module, name) == getattr(layout, name)
    assert len(layout.FIELDS) == module.FIELDS
    for d_in, parts, activation in GROUPS.values():
        group = LowRankGroup(
            [factors(d_in, *p, dtype=torch.float32, device="cpu") for p in parts], activation=activation
        )
        sizes = group.layout
        places = module.sizes_of(num_tokens=1, d_in=64, sizes=sizes.sizes, silu_mul=sizes.silu_mul)
        assert places == (sizes.sync_start, sizes.z_start, group.table.numel(), sizes.workspace_numel)


def arguments(**changes) -> dict:
    """Of a call that passes all checks of sizes; its addresses are no memory."""
    sizes = layout.Layout((layout.Projection(20, 100, 104, 0, 4),), False)
    correct = {name: 4096 * i for i, name in enumerate(("x", "down", "up", "bias", "table", "workspace", "y"), 1)}
    correct |= {"num_tokens": 3, "d_in": 64, "stride_xt": 64, "dtype": "bfloat16", "sizes": sizes.sizes}
    correct |= {"silu_mul": False, "table_numel": 14, "workspace_numel": sizes.workspace_numel}
    return correct | {"device": 0, "stream": 0} | changes


WRONG = {
    "takes 1 to (8|64) tokens, got 0": {"num_tokens": 0},
    "takes 1 to (8|64) tokens, got 65": {"num_tokens": 65},
    "x must be an address, got 0": {"x": 0},
    "y must be an address": {"y": 0},
    "up must be at a multiple of 16 bytes, got 8, which is 8 past one": {"up": 8},
    "workspace must be at a multiple of 16 bytes": {"workspace": 4100},
    "dtype must be bfloat16 or float16, got float32": {"dtype": "float32"},
    "d_in must be a multiple of 8 below 2.23, got 60": {"d_in": 60},
    "d_in must be a multiple of 8 below 2.23, got 0": {"d_in": 0},
    "rows of x must begin a multiple of 8 elements apart, and d_in = 64 at least, got a stride of 68": {
        "stride_xt": 68
    },
    "at least, got a stride of 56": {"stride_xt": 56},
    "table of these sizes has 14 elements, got 13": {"table_numel": 13},
    "workspace of these sizes has [0-9]+ elements, got 100": {"workspace_numel": 100},
    "sizes must be 5 numbers .* for each projection, got 4": {"sizes": [20, 100, 104, 0]},
    "the rank of projection 0 must be from 1 to 2.23 - 1, got 0": {"sizes": [0, 100, 104, 0, 4]},
    "d_out of projection 0 must be from 1": {"sizes": [20, 0, 104, 0, 4]},
    "pitch of projection 0 must be a multiple of 8 from 100 to 104, got 100": {"sizes": [20, 100, 100, 0, 4]},
    "pitch of projection 0 must be a multiple of 8 from 100 to 104, got 112": {"sizes": [20, 100, 112, 0, 4]},
    "chunk of projection 0 must be from 1 to its rank 20, got 21": {"sizes": [20, 100, 104, 0, 21]},
    "pivoted of projection 0 must be 0 or 1, got 2": {"sizes": [20, 100, 104, 2, 4]},
    "at most as many ranks as outputs, got 120 and 100": {"sizes": [120, 100, 104, 1, 4]},
    "at most 8 projections, got 9": {"sizes": [20, 100, 104, 0, 4] * 9},
    "silu_mul takes two projections, got 1": {"silu_mul": True},
    "silu_mul takes projections of one d_out, got 100 and 90": {
        "silu_mul": True,
        "sizes": [20, 100, 104, 0, 4, 20, 90, 96, 0, 4],
    },
    "fewer than 2.31 elements of up": {"sizes": [60000, 60000, 60000, 0, 4]},
}


@pytest.mark.parametrize("kernel", ["decode", "persistent"])
@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named_with_what_came(module, kernel, message):
    with pytest.raises(ValueError, match=message):
        getattr(module, kernel)(**arguments(**WRONG[message]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_correct_arguments_without_a_gpu_are_an_error_of_cuda(module):
    with pytest.raises(RuntimeError, match="cudaDeviceGetAttribute.*: "):
        module.decode(**arguments())


PLANS = {
    "decode takes 1 to 8 tokens, got 9": ("decode", {"num_tokens": 9}),
    "decode takes 1 to 8 tokens, got 0": ("decode", {"num_tokens": 0}),
    "persistent takes 1 to 64 tokens, got 65": ("persistent", {"num_tokens": 65}),
    "compute capability 8.0 or later is needed, got 7.5": ("decode", {"arch": 75}),
    "clusters need compute capability 9.0 or later, got 8.0": ("decode", {"arch": 80, "cluster": 2}),
    "cluster must be 1, 2, 4 or 8, or 0 for the default, got 3": ("persistent", {"cluster": 3}),
    "needs [0-9]+ bytes of shared memory, the device has 50000": ("persistent", {"shared_bytes": 50000}),
    "at most 256 clusters, got 512": ("decode", {"sizes": [200000, 8, 8, 0, 4], "num_sms": 2, "cluster": 1}),
}


@pytest.mark.parametrize("message", PLANS)
def test_what_does_not_fit_a_device_is_an_error(module, message):
    kernel, changes = PLANS[message]
    sizes = {"num_tokens": 1, "d_in": 64, "sizes": [20, 100, 104, 0, 4], "silu_mul": False}
    with pytest.raises(ValueError, match=message):
        getattr(module, f"{kernel}_plan")(**sizes | changes)


# Llama-3.1-8B at keep 0.8: q, k and v; gate and up; down
LLAMA = {
    "qkv": (4096, [1638, 4096, 4096, 0, 20] + [655, 1024, 1024, 0, 20] * 2, False),
    "gate_up": (4096, [2548, 14336, 14336, 0, 20] * 2, True),
    "down": (14336, [2548, 4096, 4096, 0, 20], False),
}
DEVICES = {"A100": (80, 108, 163 * 1024), "H200": (90, 132, 227 * 1024), "B200": (100, 148, 227 * 1024)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", LLAMA)
def test_layers_of_a_large_model_fit_the_devices(module, device, group):
    d_in, sizes, silu_mul = LLAMA[group]
    limits = dict(zip(("arch", "num_sms", "shared_bytes"), DEVICES[device], strict=True))
    for kernel, num_tokens in (("decode", 1), ("decode", 8), ("persistent", 16), ("persistent", 64)):
        plan = getattr(module, f"{kernel}_plan")(
            num_tokens=num_tokens, d_in=d_in, sizes=sizes, silu_mul=silu_mul, **limits
        )
        assert plan["grid"] == limits["num_sms"] and plan["stages"] >= 3
        assert plan["shared_bytes"] <= limits["shared_bytes"]


def test_code_runs_where_its_architecture_says():
    archs = ",".join(ARCHS)
    assert all(extension.runs_on(capability, archs) for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0)])
    assert not any(extension.runs_on(capability, archs) for capability in [(7, 5), (10, 3), (12, 0)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_the_face_raises_where_there_is_no_gpu_or_no_extension(monkeypatch, module):
    group = LowRankGroup([factors(40, 5, 33, False, False, dtype=torch.bfloat16)])
    x, y = torch.randn(1, 40).bfloat16(), torch.empty(1, 33).bfloat16()
    assert not extension.available()
    monkeypatch.setattr(extension, "module", lambda: None)
    with pytest.raises(RuntimeError, match="was not built: `make extension`"):
        extension.decode(x, group.operands, group.layout, y)
    monkeypatch.setattr(extension, "module", lambda: module)
    with pytest.raises(ValueError, match="x must be on a CUDA device, got cpu"):
        extension.persistent(x, group.operands, group.layout, y)
    assert extension.plan("decode", 1, 40, group.layout)["cluster"] == 4


@pytest.fixture
def on_small_gpu(monkeypatch, module):
    """As if tensors of the CPU were on a GPU of compute capability 8.6, which has little shared memory."""
    limits = {"arch": 86, "num_sms": 84, "shared_bytes": 99 * 1024}
    plans = {"decode_plan": module.decode_plan, "persistent_plan": module.persistent_plan}
    monkeypatch.setattr(extension, "module", lambda: SimpleNamespace(limits=lambda device: limits, **plans))
    extension._has_plan.cache_clear()
    yield
    extension._has_plan.cache_clear()


def test_what_fits_is_known_before_a_call(on_small_gpu):
    sizes = LowRankGroup([factors(64, 5, 33, False, False, dtype=torch.bfloat16, device="cpu")]).layout
    x = torch.zeros(70, 64, dtype=torch.bfloat16)
    assert extension.fits("decode", x[:8], sizes) and extension.fits("persistent", x[:16], sizes)
    assert not extension.fits("decode", x[:9], sizes)
    assert not extension.fits("decode", x[:0], sizes)
    assert not extension.fits("persistent", x[:64], sizes)  # too little shared memory
    assert not extension.fits("decode", x[:8].float(), sizes)
    assert not extension.fits("decode", x[:8, :60].contiguous(), sizes)
    assert not extension.fits("decode", x[:8, 1:57], sizes)
    assert not extension.fits("decode", x[:8].mT.contiguous().mT, sizes)


def test_the_face_names_a_tensor_that_does_not_fit():
    group = LowRankGroup([factors(40, 5, 33, False, True, dtype=torch.bfloat16, device="cpu")])
    x, y = torch.randn(2, 40).bfloat16(), torch.empty(2, 33).bfloat16()
    right = {"x": x, "y": y, "operands": group.operands, "sizes": group.layout}
    extension.arguments(**right)
    wrong = {
        "x must be one of": {"x": x.float()},
        r"x must be \(T, D_IN\) with contiguous rows": {"x": torch.randn(40, 2).bfloat16().mT},
        "down must be torch.bfloat16": {"operands": group.operands._replace(down=group.down.half())},
        r"up must be \(200,\)": {"operands": group.operands._replace(up=group.up[8:])},
        r"y must be \(2, 33\)": {"y": y[:1]},
        r"bias must be \(33,\)": {"operands": group.operands._replace(bias=group.bias[1:])},
        "table must be torch.int32": {"operands": group.operands._replace(table=group.table.long())},
        r"workspace must be .* contiguous": {"operands": group.operands._replace(workspace=group.workspace[::2])},
    }
    for message, change in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            extension.arguments(**right | change)


@pytest.mark.parametrize("missing", ["nvcc", "ninja", "pybind11"])
def test_a_missing_tool_is_named(monkeypatch, missing, tmp_path):
    find, spec = shutil.which, importlib.util.find_spec
    monkeypatch.setattr(shutil, "which", lambda name, *a, **k: None if name == missing else find(name, *a, **k) or "x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if missing == "pybind11" else spec(name))
    with pytest.raises(build_extension.BuildError, match=f"needs {missing}, which was not found: install"):
        build_extension.build(tmp_path, tmp_path)


on_gpu = pytest.mark.skipif(not extension.available(), reason="needs a CUDA GPU and `make extension`")
TOKENS = {"decode": (1, 3, 8), "persistent": (1, 8, 17, 33, 64)}
# Both odd and large: more ranks than clusters hold at once, several tiles of columns, more than one wave of x
LARGE = {
    "large_qkv": (4096, [(1638, 4096, False, True), (655, 1024, False, True), (655, 1024, False, True)], None),
    "large_gate_up": (2048, [(1001, 7000, False, False), (1500, 7000, False, False)], "silu_mul"),
    "large_pivoted": (4096, [(1500, 4096, True, True)], None),
    "deep": (14336, [(2548, 4096, False, False)], None),
}
CASES = {name: (-(-d_in // 8) * 8, parts, activation) for name, (d_in, parts, activation) in (GROUPS | LARGE).items()}


def on_cuda(name: str, dtype: torch.dtype):
    d_in, parts, activation = CASES[name]
    projections = [factors(d_in, *part, dtype=dtype, device="cuda") for part in parts]
    return projections, activation, LowRankGroup(projections, activation=activation)


def run(kernel: str, group: LowRankGroup, x: torch.Tensor, **options) -> torch.Tensor:
    y = x.new_full((x.shape[0], group.layout.out_width), float("nan"))
    getattr(extension, kernel)(x, group.operands, group.layout, y, **options)
    return y


@on_gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", TOKENS)
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_kernel_on_a_gpu_agrees_with_float64(name, kernel, cluster, dtype):
    if cluster > 1 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    projections, activation, group = on_cuda(name, dtype)
    for num_tokens in TOKENS[kernel]:
        x = torch.randn(num_tokens, CASES[name][0], device="cuda").to(dtype)
        expected = oracle(x, projections, activation)
        for _ in range(3):  # a call leaves the workspace as it found it
            assert_as_good_as(by_torch(x, projections, activation), run(kernel, group, x, cluster=cluster), expected)
            assert not group.workspace[: group.layout.z_start].any()


@on_gpu
@pytest.mark.parametrize("kernel", TOKENS)
@pytest.mark.parametrize("name", ["large_qkv", "pivoted_gate_up"])
def test_a_captured_graph_computes_what_its_input_holds_at_each_replay(kernel, name):
    projections, activation, group = on_cuda(name, torch.bfloat16)
    x = torch.randn(4, CASES[name][0], device="cuda").bfloat16()
    run(kernel, group, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(kernel, group, x)
    for _ in range(20):
        x.normal_()
        y.fill_(float("nan"))
        graph.replay()
        assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))


@on_gpu
def test_persistent_repeats_bit_for_bit_on_a_gpu():
    for name in ("large_qkv", "large_gate_up", "large_pivoted"):
        _, _, group = on_cuda(name, torch.bfloat16)
        x = torch.randn(33, CASES[name][0], device="cuda").bfloat16()
        first = run("persistent", group, x)
        assert all(torch.equal(first, run("persistent", group, x)) for _ in range(50))


@on_gpu
def test_decode_loses_and_doubles_no_addition_in_many_calls():
    """Small integers: every order of additions gives the same bits."""
    down = torch.randint(-1, 2, (700, 512), device="cuda").bfloat16()
    up = torch.randint(-1, 2, (3000, 700), device="cuda").bfloat16()
    group = LowRankGroup([Factors(down, up)])
    x = torch.zeros(8, 512, device="cuda").bfloat16()
    x[:, ::64] = torch.randint(-2, 3, (8, 8), device="cuda").bfloat16()
    expected = (x.double() @ down.double().mT @ up.double().mT).bfloat16()
    assert all(torch.equal(run("decode", group, x), expected) for _ in range(500))
