#!/usr/bin/env bash
# Times operators beside flash-linear-attention, and matrix products beside PyTorch's cuBLAS, on a machine with a GPU and no
# Rust.
# usage: bench-hopper.sh FOLDER operators OPERATOR,… BxTxHxKxV,… | bench-hopper.sh FOLDER step OPERATOR,… BxTxHxKxV,…
#      | bench-hopper.sh FOLDER linear[:mma|:burn] TOKENS,… NxK,… | bench-hopper.sh FOLDER support [OPERATOR,…]
#   OPERATOR is one of tests/src/operators (with :mma on the kernels for any NVIDIA GPU since Ampere), or all.
#   FOLDER holds bench-hopper.xz: `cargo build --release -p burn-fla-tests --features cuda --bin bench-hopper`, stripped.
#   Lines of JSON go to the standard output, for `report add --operators` and `--steps`.
set -uo pipefail
folder=$1
shift
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >&2
[ -x "$folder/bench-hopper" ] || { xz -dkf "$folder/bench-hopper.xz" && chmod +x "$folder/bench-hopper"; }
if [ "$1" = operators ]; then
    # Compiled and checked side by side, timed one after the other.
    [ "$2" != all ] || set -- "$1" "$("$folder/bench-hopper" list | paste -sd,)" "$3"
    found=$(mktemp -d)
    export folder found
    tr ',' '\n' <<<"$2" | xargs -P 8 -I OPERATOR sh -c \
        '"$folder/bench-hopper" operators "$0" "$1" "$found/lock" >"$found/$0.json" 2>"$found/$0.log"' OPERATOR "$3"
    right=$?
    cat "$found"/*.log >&2
    cat "$found"/*.json
    [ $right -eq 0 ] || exit 1
else
    "$folder/bench-hopper" "$@" || exit 1
fi
if [ "$1" = support ]; then
    # The copy that the speeds are to be compared with.
    python3 - <<'PYTHON'
import statistics, time, torch
x = torch.randn(8, 4096, 4096, device="cuda").bfloat16()
y = torch.empty_like(x)
times = []
for _ in range(50):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        y.copy_(x)
    torch.cuda.synchronize()
    times.append((time.perf_counter() - start) / 20)
print(f"copy of 256 MiB: {2 * x.numel() * 2 / statistics.median(times) / 1e12:.2f} TB/s")
PYTHON
elif [ "${1%%:*}" = linear ]; then
    python3 scripts/cublas.py "$2" "$3"
elif [ "$1" = operators ]; then
    if python3 -c 'import fla' 2>/dev/null; then
        python3 scripts/peer.py "${2//:mma/},attention" "$3"
    else
        echo "flash-linear-attention is not installed here: nothing to compare with" >&2
    fi
fi
