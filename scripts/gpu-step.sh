#!/usr/bin/env bash
# One training step of GLA 340M (recipes/gla-340M.toml, 8 x 2048 tokens, bf16) on a machine with a GPU and no Rust: tokens a
# second, where its milliseconds go, peak memory, and its kernels by time.
# usage: gpu-step.sh FOLDER [OVERRIDE…]   FOLDER holds burn-fla.xz and sources.tar.xz, see gpu-quickstart.sh; overrides are
#   section.key=value. Text is read as bytes, so that no tokenizer is needed: the shapes are those of the recipe all the same.
set -uo pipefail
folder=$1
shift
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda} CARGO_HOME=/tmp/sources
mkdir -p "$CARGO_HOME"
xz -dkf "$folder/burn-fla.xz" && chmod +x "$folder/burn-fla"
tar -C "$CARGO_HOME" -xJf "$folder/sources.tar.xz"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

# The shape of the 340M recipe over the quickstart's text, which is all that sources.tar.xz has.
recipe=/tmp/gpu-step.toml
cat >"$recipe" <<TOML
extends = "$PWD/recipes/quickstart.toml"
TOML
common=(device.backend=cuda model.config=configs/gla_340M.json training.batch_size=8 training.seq_len=2048
    optimizer.lr=3e-4 data.cache_folder=/tmp/cache metrics.terminal=plain validation.freq=0 validation.steps=1
    validation.samples=[] checkpoint.interval=100000 "$@")

run() { # overrides
    local args=()
    for x in "${common[@]}" "$@"; do args+=(--set "$x"); done
    rm -rf /tmp/step
    "$folder/burn-fla" train "$recipe" --set job.dump_folder=/tmp/step "${args[@]}"
}

echo "== 60 steps: tokens a second from log line to log line; peak memory as nvidia-smi sees it"
(while sleep 0.5; do nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits; done >/tmp/memory.log) &
watcher=$!
run training.steps=60 lr_scheduler.warmup_steps=10 metrics.log_freq=10 2>&1 | grep -v '^---'
kill "$watcher"
sort -n /tmp/memory.log | tail -1 | sed 's/$/ MiB at most; every second:/'
awk 'NR % 2 == 1 { printf "%s ", $1 } END { print "" }' /tmp/memory.log

echo "== 21 steps, every second one measured"
run training.steps=21 lr_scheduler.warmup_steps=10 metrics.log_freq=100 profiling.enable=true profiling.freq=2 2>&1 |
    sed -n '/^profile: /,$p'

log() { # steps: the launches of a run, one a line
    CUBECL_DEBUG_OPTION=profile CUBECL_DEBUG_LOG="/tmp/launches.$1.log" run "training.steps=$1" lr_scheduler.warmup_steps=1 \
        >/tmp/launches.out 2>&1 || tail -2 /tmp/launches.out >&2
}
rm -f /tmp/launches.*.log
log 2
log 12
echo "== milliseconds and launches of a step by kernel, one at a time, a tenth of the difference of 2 and 12 steps"
awk -F'|' 'function ms(text) {
        if (text ~ /ns$/) return text / 1e6
        if (text ~ /µs$/) return text / 1e3
        if (text ~ /ms$/) return text + 0
        return text * 1e3
    }
    FNR == 1 { file++ }
    $2 ~ /^ *[0-9.]+(ns|µs|ms|s) *$/ {
        name = $3; gsub(/^ +| +$/, "", name); sub(/_[0-9a-f]*$/, "", name)
        time = $2; gsub(/ /, "", time)
        sign = file == 2 ? 0.1 : -0.1
        count[name] += sign; took[name] += sign * ms(time); all += sign; total += sign * ms(time)
    }
    END {
        printf "%9.2f %6.0f in all\n", total, all
        for (name in count) if (count[name] > 0) printf "%9.2f %6.0f %s\n", took[name], count[name], name
    }' /tmp/launches.2.log /tmp/launches.12.log | sort -rn | cut -c1-150
