#!/usr/bin/env bash
# Times operators beside flash-linear-attention, and matrix products beside PyTorch's cuBLAS, on a machine with a GPU and no
# Rust.
# usage: bench-hopper.sh FOLDER operators OPERATOR,… BxTxHxKxV,… | bench-hopper.sh FOLDER step OPERATOR,… BxTxHxKxV,…
#      | bench-hopper.sh FOLDER linear[:mma|:burn] TOKENS,… NxK,… | bench-hopper.sh FOLDER support [OPERATOR,…]
#   OPERATOR is one of tests/src/operators (with :mma on the kernels for any NVIDIA GPU since Ampere), or all.
#   FOLDER holds bench-hopper.xz: `cargo build --release -p burn-fla-tests --features cuda --bin bench-hopper`, stripped.
#   Several GPUs share the operators. PATIENCE: the seconds in which the peer may compile (600).
#   Lines of JSON go to the standard output, for `report add --operators`, `--engines` and `--steps`.
set -uo pipefail
folder=$1
shift
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >&2
[ -x "$folder/bench-hopper" ] || { xz -dkf "$folder/bench-hopper.xz" && chmod +x "$folder/bench-hopper"; }
peer=$(python3 -c 'import fla' 2>/dev/null && echo yes)
[ "$1" != operators ] || [ -n "$peer" ] || echo "flash-linear-attention is not installed here: nothing to compare with" >&2

# The operators and shapes of one GPU: $1 is its number, $2 and $3 as above.
on_gpu() {
    export CUDA_VISIBLE_DEVICES=$1 locks=$found/lock.$1
    local plain=${2//:mma/} right=0 count=$((cores / gpus)) i shape
    plain=$(tr ',' '\n' <<<"$plain" | sort -u | paste -sd,)
    # Both sides compile, and ours checks, side by side; who times waits until the host is free, on every GPU, and is alone
    # on its own.
    local held=()
    for ((i = 0; i < gpus; i++)); do
        held+=(flock -s "$found/lock.$i")
        [ "$i" = "$1" ] || locks+=,$found/lock.$i
    done
    if [ -n "$peer" ]; then
        for ((i = 0; i < count; i++)); do
            # Shorter sequences have the same kernels, and all these processes share one memory.
            "${held[@]}" timeout "$patience" python3 scripts/peer.py "--warm=$i/$count" "$plain" "$short" \
                >/dev/null 2>>"$found/warm.$1.log" &
        done
    fi
    tr ',' '\n' <<<"$2" | xargs -P 8 -I OPERATOR sh -c \
        '"$folder/bench-hopper" operators "$0" "$1" "$locks" >"$found/$0.json" 2>"$found/$0.log"' OPERATOR "$3" || right=1
    wait
    if [ -n "$peer" ]; then
        for shape in ${3//,/ }; do
            # Chooses among its variants, then times.
            flock "$found/lock.$1" python3 scripts/peer.py "$plain" "$shape" >>"$found/peer.$1.json" 2>>"$found/peer.$1.log"
        done
    fi
    return $right
}

if [ "$1" = operators ]; then
    [ "$2" != all ] || set -- "$1" "$("$folder/bench-hopper" list | paste -sd,)" "$3"
    found=$(mktemp -d) gpus=$(nvidia-smi -L | wc -l) cores=$(nproc --all) patience=${PATIENCE:-600}
    short=$(tr ',' '\n' <<<"$3" | awk -Fx -v OFS=x '{ $1 = $1 < 2 ? $1 : 2; $2 = $2 < 2048 ? $2 : 2048; print }' | sort -u | paste -sd,)
    export folder found
    # An operator and the peer's are timed on the same GPU, of which each takes some.
    right=0
    for ((gpu = 0; gpu < gpus; gpu++)); do
        some=$(tr ',' '\n' <<<"$2" | sed 's/:.*//' | sort -u | awk "NR % $gpus == $gpu")
        some=$(tr ',' '\n' <<<"$2" | grep -E "^($(paste -sd'|' <<<"$some"))(:.*)?$" | paste -sd,)
        [ -z "$some" ] || on_gpu "$gpu" "$some" "$3" &
        pids[gpu]=$!
    done
    for pid in "${pids[@]}"; do wait "$pid" || right=1; done
    cat "$found"/*.log | grep -v "OutOfResources" >&2
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
fi
