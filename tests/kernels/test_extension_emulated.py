"""The kernels of csrc/ as they are, run on the CPU by an emulator of the GPU's primitives, against float64.

Fibers stand for GPU threads, and a seed is one schedule of them; copies of the copy engine land late and in any order;
shared memory starts as NaN, and is lost when its block ends. Two warps compute where the GPU has eight.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from group_cases import GROUPS, by_torch, factors, oracle
from kernel_cases import assert_as_good_as

from gfwsvd_kernels import LowRankGroup, extension

sys.path.insert(0, str(Path(__file__).with_name("emulator")))
import build_emulated as emulator  # noqa: E402

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="the emulator needs Linux and g++"
)

HALVES = (torch.bfloat16, torch.float16)
# D_IN is a multiple of 8 for these kernels
CASES = {name: (-(-d_in // 8) * 8, parts, activation) for name, (d_in, parts, activation) in GROUPS.items()}
CASES["wide"] = (296, [(70, 1500, False, True), (19, 1030, True, False)], None)
CASES["many_ranks"] = (48, [(600, 72, False, True)], None)
TOKENS = {"decode": (1, 8), "persistent": (2, 17, 64)}
KERNELS = [(kernel, arch, cluster) for kernel in TOKENS for arch, cluster in ((80, 1), (90, 1), (90, 2), (90, 4))]


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    found = {}
    for arch, path in emulator.modules(tmp_path_factory.mktemp("emulated")).items():
        spec = importlib.util.spec_from_file_location(f"_emulated{arch}", path)
        found[arch] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[arch])
    return found


def group_of(name: str, dtype: torch.dtype):
    d_in, parts, activation = CASES[name]
    projections = [factors(d_in, *part, dtype=dtype, device="cpu") for part in parts]
    return projections, activation, LowRankGroup(projections, activation=activation)


def call(module, kernel: str, group: LowRankGroup, x: torch.Tensor, *, num_sms: int = 4, seed: int = 0, **options):
    """y, which was NaN before; sums and counters are zero afterwards."""
    y = x.new_full((x.shape[0], group.layout.out_width), float("nan"))
    module.emulate(num_sms=num_sms, seed=seed)
    getattr(module, kernel)(**extension.arguments(x, group.operands, group.layout, y), device=0, stream=0, **options)
    assert not group.workspace[: group.layout.z_start].any()
    return y


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel, arch, cluster", KERNELS)
def test_a_kernel_is_as_good_as_torch_in_the_same_dtype(modules, name, kernel, arch, cluster):
    for dtype in HALVES:
        projections, activation, group = group_of(name, dtype)
        for num_tokens in TOKENS[kernel]:
            x = torch.randn(num_tokens, CASES[name][0]).to(dtype)
            y = call(modules[arch], kernel, group, x, cluster=cluster)
            assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))


@pytest.mark.parametrize("kernel", TOKENS)
@pytest.mark.parametrize("num_sms, cluster, stages", [(1, 1, 2), (3, 1, 3), (8, 8, 5), (16, 4, 16), (48, 2, 2)])
def test_any_number_of_multiprocessors_and_stages_will_do(modules, kernel, num_sms, cluster, stages):
    projections, activation, group = group_of("pivoted_qkv", torch.bfloat16)
    x = torch.randn(5, CASES["pivoted_qkv"][0]).bfloat16()
    y = call(modules[90], kernel, group, x, num_sms=num_sms, cluster=cluster, stages=stages)
    assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))


def test_calls_of_both_kernels_and_all_token_counts_can_follow_one_another(modules):
    projections, activation, group = group_of("pivoted_gate_up", torch.bfloat16)
    for seed, (kernel, num_tokens) in enumerate([("decode", 8), ("persistent", 33), ("decode", 1), ("persistent", 2)]):
        x = torch.randn(num_tokens, CASES["pivoted_gate_up"][0]).bfloat16()
        y = call(modules[90], kernel, group, x, cluster=2, seed=seed)
        assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))


@pytest.mark.parametrize("name", ["wide", "gate_up", "pivoted_gate_up"])
def test_persistent_gives_the_same_bits_in_every_schedule(modules, name):
    _, _, group = group_of(name, torch.float16)
    x = torch.randn(9, CASES[name][0]).half()
    first, *others = (call(modules[90], "persistent", group, x, cluster=2, num_sms=6, seed=i) for i in range(8))
    assert all(torch.equal(first, other) for other in others)


def test_decode_is_right_in_every_schedule(modules):
    projections, activation, group = group_of("wide", torch.bfloat16)
    x = torch.randn(3, CASES["wide"][0]).bfloat16()
    for seed in range(8):
        y = call(modules[90], "decode", group, x, cluster=2, num_sms=6, seed=seed)
        assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))


@pytest.mark.parametrize("kernel", TOKENS)
def test_rows_of_x_may_lie_apart_and_nothing_around_y_is_written(modules, kernel):
    projections, activation, group = group_of("several_blocks", torch.bfloat16)
    d_in, width = CASES["several_blocks"][0], group.layout.out_width
    x = torch.full((3, 2 * d_in), float("nan")).bfloat16()[:, :d_in].copy_(torch.randn(3, d_in))
    zone = torch.full((5, width // 8 * 8 + 8), 7.0).bfloat16().flatten()
    y = zone[1024 : 1024 + 3 * width].view(3, width)
    modules[90].emulate(num_sms=4)
    getattr(modules[90], kernel)(**extension.arguments(x, group.operands, group.layout, y), device=0, stream=0)
    assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))
    assert (zone[:1024] == 7).all() and (zone[1024 + 3 * width :] == 7).all()


@pytest.mark.parametrize("kernel", TOKENS)
def test_a_nan_stays_with_its_token_and_is_gone_at_the_next_call(modules, kernel):
    projections, activation, group = group_of("qkv", torch.bfloat16)
    x = torch.randn(4, CASES["qkv"][0]).bfloat16()
    spoilt = x.clone()
    spoilt[2, 5] = float("nan")
    y = call(modules[90], kernel, group, spoilt)
    assert torch.equal(y.isnan().any(1), torch.tensor([False, False, True, False]))
    assert_as_good_as(by_torch(x, projections, None), call(modules[90], kernel, group, x), oracle(x, projections, None))


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    try:
        return emulator.programs(tmp_path_factory.mktemp("races"), emulator.SANITIZERS)
    except emulator.build.BuildError as error:
        if "-fsanitize" in str(error) or "cannot find" in str(error):
            pytest.skip("the compiler has no sanitizers")
        raise


def outcome(program: Path) -> subprocess.CompletedProcess:
    environment = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    result = subprocess.run([program], env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's layout of memory")
    return result


@pytest.mark.parametrize("sanitizer", emulator.SANITIZERS)
def test_the_kernels_have_no_races_and_stay_within_bounds(programs, sanitizer):
    result = outcome(programs[sanitizer])
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_missing_barrier_would_have_been_found(programs, tmp_path):
    source = shutil.copytree(emulator.SOURCE, tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    ring = source / "ring.cuh"
    whole = ring.read_text()
    barrier = "        sync_warp();  // all lanes have read\n"
    assert whole.count(barrier) == 1
    ring.write_text(whole.replace(barrier, ""))
    result = outcome(emulator.programs(tmp_path / "races", ["thread"], source)["thread"])
    assert result.returncode != 0 and "data race" in result.stderr
