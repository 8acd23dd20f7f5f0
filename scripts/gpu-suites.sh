#!/usr/bin/env bash
# Runs suites that were built elsewhere with `--features cuda` on a machine with a GPU and no Rust.
# usage: gpu-suites.sh FOLDER [SUITE…]   FOLDER holds ops.xz, support.xz, nn.xz: stripped test binaries, compressed.
set -uo pipefail
folder=$1
shift
[ $# -gt 0 ] || set -- ops support nn
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
failed=0
for suite in "$@"; do
    xz -dkf "$folder/$suite.xz" && chmod +x "$folder/$suite"
    echo "== $suite"
    # One thread a GPU: kernels of several threads would wait for each other.
    (cd tests && timeout 500 "../$folder/$suite" --test-threads=1 2>&1 | grep -vE '^ +[0-9]+: |^stack backtrace|^note:') || failed=1
done
exit $failed
