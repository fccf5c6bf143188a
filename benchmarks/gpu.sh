#!/usr/bin/env bash
# Everything that needs a GPU, held under eight minutes by time limits: the tests of the kernels, memory and race checks, all
# benchmarks, the predictions beside them. Installs nothing. Results go to $OUT, or else to benchmarks/results.
#   PYTHON=python3 OUT=folder benchmarks/gpu.sh
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
out=${OUT:-$root/benchmarks/results}
budget=370 # seconds after which no further benchmark is begun; with the limits of all steps 470 at most
export PYTHONPATH="$root:$root/kernels" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

"$python" - <<'CHECK' || exit 2
import sys

try:
    import hypothesis, pytest, safetensors, torch, triton
except ImportError as error:
    sys.exit(f"{error}: {sys.executable} lacks what the GPU runs need; name another: make gpu PYTHON=/path/to/python")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} of {sys.executable} sees no GPU: check nvidia-smi and the build of torch")
CHECK
mkdir -p "$out"

failed=()
# step NAME SECONDS LOG COMMAND...: runs on after a failure, and remembers it
step() {
    local name=$1 limit=$2 log=$out/$3
    shift 3
    echo "== $name (at most $limit s; $SECONDS s so far)"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$name")
}
rm -f "$out"/{tests,checks,kernels,model}.log

step "tests on the GPU" 120 tests.log "$python" -m pytest -q -p no:cacheprovider tests/kernels/test_cuda.py
step "tests of every kernel" 100 tests.log "$python" -m pytest -q -p no:cacheprovider tests/kernels \
    --ignore=tests/kernels/test_cuda.py --ignore=tests/kernels/test_aot.py

if command -v compute-sanitizer >/dev/null; then
    mapfile -t names < <(grep -rhoE '^def [a-z_0-9]+_kernel\(' kernels/gfwsvd_kernels | sed -E 's/def |\(//g')
    only=() # the kernels of this project, not those of torch
    for name in "${names[@]}"; do only+=(--kernel-name "kernel_substring=$name"); done
    small=(-m benchmarks.run --gate-only --providers ours --shapes tiny --tokens 200 --seq-len 90 --keep 0.8)
    for tool in memcheck racecheck; do
        # memory that torch keeps for itself would hide accesses beyond a tensor
        step "$tool" 60 checks.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 1 "${only[@]}" "$python" "${small[@]}"
    done
else
    echo "== compute-sanitizer is not on the PATH: no memory and race checks" | tee -a "$out/checks.log"
fi

limit=$((budget - SECONDS))
step benchmarks $((limit + 40)) kernels.log "$python" -m benchmarks.run --limit "$limit" --results "$out/kernels.jsonl"
step predictions 30 model.log "$python" -m benchmarks.model --results "$out/kernels.jsonl"
picture=()
if "$python" -c 'import matplotlib' 2>/dev/null; then
    picture=(--roofline "$out/roofline.png")
else
    echo "== no matplotlib: draw later with python -m benchmarks.tables kernels.jsonl --roofline roofline.png"
fi
step table 30 kernels.log "$python" -m benchmarks.tables "$out/kernels.jsonl" --markdown "$out/kernels.md" "${picture[@]}"

echo "== $SECONDS s; results in $out"
[ ${#failed[@]} -eq 0 ] || { printf 'FAILED: %s\n' "${failed[@]}" >&2; exit 1; }
