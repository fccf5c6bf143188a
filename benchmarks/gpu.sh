#!/usr/bin/env bash
# Everything that needs a GPU, in parts that are held under eight minutes together by time limits: all tests, memory and
# race checks, the benchmarks of the kernels with the predictions beside them and tables, generation and compression at
# the size of a 7B model. It needs no network and installs nothing. Results go to $OUT, or else to benchmarks/results.
# docs/gpu.md says more.
#   PYTHON=python3 OUT=folder benchmarks/gpu.sh [tests|checks|kernels|models ...]     # default: all parts
#   benchmarks/gpu.sh --dry-run [...]      # each kind of step once, tiny, on a CPU: proves that they run, measures nothing
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
out=${OUT:-$root/benchmarks/results}
last_benchmark=280 # seconds after which no benchmark of a kernel is begun
deadline=470       # seconds after which nothing runs any more: what a step may take is cut to what is left
export PYTHONPATH="$root:$root/kernels" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 # no step waits for a network
unset TRITON_INTERPRET
dry=
parts=
for argument in "$@"; do
    case "$argument" in
        --dry-run) dry=1 deadline=$((5 * deadline)) ;; # who shares a CPU may take longer
        tests | checks | kernels | models) parts+=" $argument" ;;
        *) echo "unknown argument $argument; it takes --dry-run, tests, checks, kernels, models" >&2; exit 2 ;;
    esac
done
parts=${parts:-tests checks kernels models}
wants() { [[ " $parts " == *" $1 "* ]]; }

found=$("$python" - "$dry" <<'CHECK'
import sys

try:
    import hypothesis, pytest, safetensors, torch, triton
    from benchmarks.record import file_name
    from benchmarks.registry import OPS
except ImportError as error:
    sys.exit(f"{error}: {sys.executable} lacks what the GPU runs need; name another: make gpu PYTHON=/path/to/python")
if not sys.argv[1] and not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} of {sys.executable} sees no GPU: check nvidia-smi and the build of torch")
print(file_name("kernels"), *(op for op in OPS if not op.startswith("lowrank")))
CHECK
) || exit 2
read -r results ops <<<"$found"
mkdir -p "$out"
has() { "$python" -c "import $1" 2>/dev/null; }

failed=()
# step NAME SECONDS LOG COMMAND...: runs on after a failure, and remembers it
step() {
    local name=$1 limit=$2 log=$out/$3
    shift 3
    [ ! "$dry" ] || limit=$((5 * limit))
    [ "$limit" -le $((deadline - SECONDS)) ] || limit=$((deadline - SECONDS))
    echo "== $name (at most $limit s; $SECONDS s so far)"
    [ "$limit" -gt 0 ] || { failed+=("$name: no time left"); return; }
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || failed+=("$name: exit status $status")
}
for part in $parts; do rm -f "$out/$part.log"; done

# What to run, and how small a dry run is
pytest=("$python" -m pytest -q -p no:cacheprovider)
cases=(--keep 0.8 0.5)
timing=(--seconds 0.3)
predicted=("${cases[@]}")
generation=(--shape llama-3.1-8b --dtype bfloat16 --device cuda --compile --engines dense naive fused --new 24 --rounds 2)
compression=(--layers 1 --no-guard)
interpreter=()
if [ "$dry" ]; then
    pytest+=(--collect-only -q)
    cases=(--shapes tiny --keep 0.1 --tokens 4 --seq-len 4 --device cpu) # few ranks: the interpreter is slow
    timing=(--seconds 0 --sets 1)
    predicted=(--shapes tiny --keep 0.1 --tokens 4 --op lowrank_linear)
    generation=(--shape tiny --batch 1 --prompt 4 --new 2 --rounds 1 --engines dense naive fused)
    compression=(--shape tiny --layers 1 --sequences 4 --seq-len 16 --dtype float32)
    interpreter=(env TRITON_INTERPRET=1 TORCH_COMPILE_DISABLE=1)
elif has xdist; then
    pytest+=(-n "$(nproc)") # compiling the kernels is what takes the time
fi

if wants tests; then
    step "tests on the GPU" 120 tests.log \
        "${interpreter[@]}" "${pytest[@]}" tests/kernels/test_cuda.py tests/test_gpu.py tests/test_factorize.py
    # A dry run collects nothing that the suite does not
    [ "$dry" ] || step "tests of every kernel" 80 tests.log "${pytest[@]}" tests/kernels \
        --ignore=tests/kernels/test_cuda.py --ignore=tests/kernels/test_aot.py
fi

# The kernels of this project, not those of torch
wants checks && mapfile -t names < <("$python" -m benchmarks.kernel_names)
! wants checks || [ ${#names[@]} -gt 0 ] || failed+=("names of the kernels: none found")
ways=(ours ours_matmuls)
groups=(lowrank_group lowrank_group_pivoted lowrank_group_int8)
read -ra others <<<"$ops"
small=(-m benchmarks.run --gate-only --shapes tiny --keep 0.8)
tokens=(--tokens 200 --seq-len 90)
few=(--tokens 1 2)
many=(--tokens 5 40 200)
if [ "$dry" ]; then
    small+=(--device cpu)
    tokens=(--tokens 4 --seq-len 3)
    few=(--tokens 1 --keep 0.1)
    many=(--tokens 3 --keep 0.1)
    ways=(ours) # the benchmarks run the others
fi
# check TOOL SECONDS: the tool over kernels at small sizes
check() {
    local tool=("${interpreter[@]}") name
    if [ ! "$dry" ]; then
        # memory that torch keeps for itself would hide accesses beyond a tensor
        tool=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1)
        for name in "${names[@]}"; do tool+=(--kernel-name "kernel_substring=$name"); done
    fi
    step "$1" "$2" checks.log "${tool[@]}" "$python" "${small[@]}" --op "${others[@]}" --providers ours "${tokens[@]}"
    step "$1 of groups" "$2" checks.log "${tool[@]}" "$python" "${small[@]}" --op "${groups[@]}" --providers ours "${few[@]}"
    [ "$dry" ] || step "$1 of groups on tensor cores" "$2" checks.log "${tool[@]}" "$python" "${small[@]}" \
        --op lowrank_group lowrank_group_pivoted --providers ours_few --tokens 5
    # More tokens are products of the BLAS as well, at whose kernels racecheck itself stops with an illegal access
    [ "$1" == racecheck ] || step "$1 of groups of many tokens" "$2" checks.log \
        "${tool[@]}" "$python" "${small[@]}" --op "${groups[@]}" --providers "${ways[@]}" "${many[@]}"
}
if ! wants checks; then
    :
elif [ "$dry" ] || command -v compute-sanitizer >/dev/null; then
    check memcheck 35
    [ "$dry" ] || check racecheck 20 # the same commands; what memcheck ran is compiled by now
else
    echo "== compute-sanitizer is not on the PATH: no memory and race checks" | tee -a "$out/checks.log"
fi

if wants kernels; then
    limit=$((last_benchmark - SECONDS))
    [ "$limit" -ge 30 ] || limit=30
    step benchmarks $((limit + 30)) kernels.log "${interpreter[@]}" "$python" -m benchmarks.run \
        "${cases[@]}" "${timing[@]}" --limit "$limit" --results "$out/$results"
    step predictions 45 kernels.log "$python" -m benchmarks.model "${predicted[@]}" --results "$out/$results"
    picture=()
    if has matplotlib; then
        picture=(--roofline "$out/roofline.png")
    else
        echo "== no matplotlib: draw later with python -m benchmarks.tables $results --roofline roofline.png"
    fi
    step tables 25 kernels.log \
        "$python" -m benchmarks.tables "$out/$results" --markdown "$out/kernels.md" "${picture[@]}"
fi

if wants models; then
    models=$out/${results/kernels/models}
    step generation 100 models.log "$python" -m benchmarks.serve "${generation[@]}" --results "$models"
    step compression 40 models.log "$python" -m benchmarks.scale "${compression[@]}" --results "$models"
fi

echo "== $SECONDS s; results in $out"
[ ${#failed[@]} -eq 0 ] || { printf 'FAILED: %s\n' "${failed[@]}" >&2; exit 1; }
