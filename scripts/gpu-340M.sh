#!/usr/bin/env bash
# recipes/gla-340M.toml on a machine with a GPU and no Rust: its 500 steps in bf16, and the first 200 of the same schedule in
# f32, so that their losses can be compared; both runs' metrics.
# usage: gpu-340M.sh FOLDER OUT [bf16|f32]   FOLDER holds burn-fla.xz (built with `--features cuda`, stripped), sources-340M.tar.xz
# (`registry/src/*/…` of the recipe's crates) and tokenizer.json (what `burn-fla tokenizer train` made); OUT receives
# bf16.jsonl and f32.jsonl.
set -uo pipefail
folder=$(realpath "$1") out=$2 only=${3:-}
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda} CARGO_HOME=/tmp/sources-340M
mkdir -p "$CARGO_HOME" "$out" runs/gla-340M-tokenizer
xz -dkf "$folder/burn-fla.xz" && chmod +x "$folder/burn-fla"
tar -C "$CARGO_HOME" -xJf "$folder/sources-340M.tar.xz"
cp "$folder/tokenizer.json" runs/gla-340M-tokenizer/
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
train() { # run folder, then overrides
    local run=$1
    shift
    "$folder/burn-fla" train recipes/gla-340M.toml --set "job.dump_folder=$run" --set data.cache_folder=/tmp/cache-340M \
        --set metrics.terminal=plain --set checkpoint.interval=100000 "$@"
}
if [ "$only" != f32 ]; then
    echo "== bf16, 500 steps"
    rm -rf /tmp/bf16
    train /tmp/bf16 2>&1 | grep -v '^$' | tee "$out/bf16.log" | cut -c1-160
    cp /tmp/bf16/metrics.jsonl "$out/bf16.jsonl"
fi
if [ "$only" != bf16 ]; then
    echo "== f32, stopped after step 200"
    rm -rf /tmp/f32
    train /tmp/f32 --set device.compute_dtype=float32 --set validation.freq=0 >"$out/f32.log" 2>&1 &
    while kill -0 $! 2>/dev/null && ! grep -q '^step 200/' "$out/f32.log"; do sleep 1; done
    # A process that a script runs in the background ignores the signal unless it asks for it, as burn-fla does; its shell
    # does not.
    pkill -INT -f job.dump_folder=/tmp/f32
    wait $!
    grep -E '^step' "$out/f32.log" | cut -c1-110
    cp /tmp/f32/metrics.jsonl "$out/f32.jsonl"
fi
