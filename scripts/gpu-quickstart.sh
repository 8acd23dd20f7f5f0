#!/usr/bin/env bash
# The quickstart on a machine with a GPU and no Rust: verify, time to the first step, training in f32 and bf16,
# generation, resume, kernel launches.
# usage: gpu-quickstart.sh FOLDER OUT   FOLDER holds burn-fla.xz (built with `--features cuda`, stripped) and
# sources.tar.xz (`registry/src/*/…` of the recipe's crates); OUT receives the logs and metrics.
set -uo pipefail
folder=$1 out=$2
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda} CARGO_HOME=/tmp/sources
mkdir -p "$CARGO_HOME" "$out"
xz -dkf "$folder/burn-fla.xz" && chmod +x "$folder/burn-fla"
tar -C "$CARGO_HOME" -xJf "$folder/sources.tar.xz"
fla=$PWD/$folder/burn-fla
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

train() { # run folder, then overrides
    local run=$1
    shift
    local args=()
    for x in "$@"; do args+=(--set "$x"); done
    "$fla" train recipes/quickstart.toml --set device.backend=cuda --set "job.dump_folder=$run" \
        --set data.cache_folder=/tmp/cache --set metrics.terminal=plain "${args[@]}"
}
seconds() { local start=$EPOCHREALTIME; "$@" >/tmp/seconds.log 2>&1 || tail -3 /tmp/seconds.log; awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f s\n", b - a }'; }

echo "== process start to the end of one step (f32), first with the text still to be tokenised, then not"
short=(training.steps=1 lr_scheduler.warmup_steps=0 validation.steps=1 validation.samples=[])
seconds train /tmp/first "${short[@]}"
seconds train /tmp/second "${short[@]}"

for dtype in float32 bfloat16; do
    echo "== quickstart, $dtype"
    timeout 190 bash -c "$(declare -f train); fla='$fla'; train /tmp/run_$dtype device.compute_dtype=$dtype" >"$out/train_$dtype.log" 2>&1 || echo "stopped: $?"
    tail -25 "$out/train_$dtype.log"
    cp "/tmp/run_$dtype/metrics.jsonl" "$out/metrics_$dtype.jsonl"
done

echo "== generate"
"$fla" generate /tmp/run_float32 --prompt 'pub fn ' --max-new-tokens 120 --seed 1 --device cuda

echo "== resume: 20 steps; 10, kill -9, resume, 10"
tiny=(training.steps=20 lr_scheduler.warmup_steps=2 checkpoint.interval=10 metrics.log_freq=1 validation.freq=1000 validation.steps=1 validation.samples=[])
train /tmp/whole "${tiny[@]}" >/dev/null 2>&1
train /tmp/cut "${tiny[@]}" >/dev/null 2>&1 &
until ls -d /tmp/cut/checkpoints/step_*10/DONE >/dev/null 2>&1; do sleep 0.02; done
pkill -9 -x burn-fla
wait
train /tmp/cut "${tiny[@]}" 2>&1 | grep -i resum
for run in whole cut; do grep -o '"loss":[0-9.e-]*' "/tmp/$run/metrics.jsonl" >"/tmp/$run.loss"; done
cmp /tmp/whole.loss /tmp/cut.loss && echo "losses of $(wc -l </tmp/cut.loss) steps are equal to the last digit"

echo "== kernel launches a step"
for layers in 2 3; do
    for steps in 2 4; do
        CUBECL_DEBUG_OPTION=profile CUBECL_DEBUG_LOG=/tmp/launches.log train "/tmp/l$layers$steps" "model.overrides.num_hidden_layers=$layers" \
            training.steps=$steps lr_scheduler.warmup_steps=1 validation.freq=1000 validation.steps=1 validation.samples=[] >/dev/null 2>&1
        echo "$layers layers, $steps steps: $(grep -c '^| ' /tmp/launches.log) launches"
        [ "$layers$steps" = 34 ] && grep '^| ' /tmp/launches.log | sed 's/.*| //; s/_[0-9a-f]*$//' | sort | uniq -c | sort -rn | head -40 >"$out/kernels.txt"
        rm -f /tmp/launches.log
    done
done
head -20 "$out/kernels.txt"

echo "== verify"
for dtype in f32 bf16; do
    timeout 60 "$fla" verify tests/fixtures/golden/* --device cuda --dtype $dtype >"$out/verify_$dtype.txt" 2>&1
    echo "exit $?"
    tail -60 "$out/verify_$dtype.txt"
done
