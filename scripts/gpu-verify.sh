#!/usr/bin/env bash
# The expected cases on a machine with a GPU and no Rust, each in a process of its own, side by side; then one line a case.
# usage: gpu-verify.sh FOLDER OUT [TYPE]   FOLDER holds burn-fla.xz (built with `--features cuda`, stripped); OUT receives
# the reports; TYPE is f32 (default) or bf16.
set -uo pipefail
folder=$1 out=$2 dtype=${3:-f32}
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda}
mkdir -p "$out"
[ -x "$folder/burn-fla" ] || { xz -dkf "$folder/burn-fla.xz" && chmod +x "$folder/burn-fla"; }
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
for case in tests/fixtures/golden/*/; do
    name=$(basename "$case")
    timeout 200 "$folder/burn-fla" verify "$case" --device cuda --dtype "$dtype" >"/tmp/verify_${dtype}_$name.txt" 2>&1 &
done
wait
for case in tests/fixtures/golden/*/; do
    name=$(basename "$case")
    report=/tmp/verify_${dtype}_$name.txt
    logits=$(awk '($1 == "logits" || $1 == "y") && $2 + 0 > 0 { print $2; exit }' "$report")
    worst=$(grep '^grad\.' "$report" | awk '{ if ($2 + 0 > worst) { worst = $2 + 0; name = $1 } } END { printf "%.1e %s", worst, name }')
    echo "$name | logits $logits | worst gradient $worst | $(grep -E '^(passed|failed|error)' "$report" | tail -n 1 | cut -c1-150)"
done | tee "$out/verify_$dtype.txt"
cat /tmp/verify_"$dtype"_*.txt >"$out/reports_$dtype.txt"
