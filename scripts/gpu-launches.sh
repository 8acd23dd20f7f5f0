#!/usr/bin/env bash
# Counts kernel launches of a GLA layer on a GPU, as differences between runs of the quickstart: of a forward pass (one
# more validation batch), of forward and backward (one more micro-batch), of a whole step (one more step).
# usage: gpu-launches.sh FOLDER   FOLDER holds burn-fla.xz and sources.tar.xz, see gpu-quickstart.sh
set -uo pipefail
folder=$1
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda} CARGO_HOME=/tmp/sources
mkdir -p "$CARGO_HOME"
xz -dkf "$folder/burn-fla.xz" && chmod +x "$folder/burn-fla"
tar -C "$CARGO_HOME" -xJf "$folder/sources.tar.xz"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

count() { # layers, steps, validation batches, micro-batches, dtype
    rm -rf /tmp/launches.log /tmp/launches
    CUBECL_DEBUG_OPTION=profile CUBECL_DEBUG_LOG=/tmp/launches.log "$folder/burn-fla" train recipes/quickstart.toml \
        --set device.backend=cuda --set "device.compute_dtype=$5" --set job.dump_folder=/tmp/launches --set data.cache_folder=/tmp/cache \
        --set metrics.terminal=plain --set "model.overrides.num_hidden_layers=$1" --set "training.steps=$2" \
        --set lr_scheduler.warmup_steps=1 --set validation.freq=1000 --set "validation.steps=$3" --set validation.samples=[] \
        --set "training.gradient_accumulation_steps=$4" >/tmp/launches.out 2>&1 || tail -2 /tmp/launches.out >&2
    grep -c '^| ' /tmp/launches.log
}
for dtype in float32 bfloat16; do
    declare -A per
    for layers in 2 3; do
        base=$(count $layers 2 1 1 $dtype)
        per[forward$layers]=$(($(count $layers 2 2 1 $dtype) - base))
        per[batch$layers]=$((($(count $layers 2 1 2 $dtype) - base) / 2))
        per[step$layers]=$(($(count $layers 3 1 1 $dtype) - base))
    done
    for what in forward batch step; do
        echo "$dtype, $what: model of 2 layers ${per[${what}2]}, a layer $((per[${what}3] - per[${what}2]))"
    done
done
