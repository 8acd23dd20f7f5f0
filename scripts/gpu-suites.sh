#!/usr/bin/env bash
# Runs suites that were built elsewhere with `--features cuda` on a machine with a GPU and no Rust: every test in a
# process of its own, side by side (most of a test's time is the compilation of its kernels), then the failures and a
# line a suite. Where there are several GPUs, each takes its part.
# usage: gpu-suites.sh FOLDER [SUITE…]   FOLDER holds ops.xz, support.xz, nn.xz: stripped test binaries, compressed.
# FILTER, if set, is a pattern of test names that are left out.
set -uo pipefail
folder=$(realpath "$1")
shift
[ $# -gt 0 ] || set -- ops support nn
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda}
logs=$(mktemp -d)
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
one() {
    local suite=$1 test=$2 log=$3/$1-${2//:/_}
    (cd tests && CUDA_VISIBLE_DEVICES=$((SLOT % gpus)) timeout 400 "$folder/$suite" --exact "$test" --test-threads=1 >"$log.txt" 2>&1)
    local code=$?
    [ $code -eq 0 ] || { echo "$suite $test ($code)" >>"$3/failed"; }
}
gpus=$(nvidia-smi -L | wc -l)
# Where the suites find what cargo would tell them.
export CARGO_MANIFEST_DIR=$PWD/tests
export -f one
export folder gpus
for suite in "$@"; do
    [ -x "$folder/$suite" ] || { xz -dkf "$folder/$suite.xz" && chmod +x "$folder/$suite"; }
    (cd tests && "$folder/$suite" --list 2>/dev/null) | sed -n 's/: test$//p' | grep -vE "${FILTER:-^$}" | sed "s/^/$suite /" >>"$logs/all"
done
touch "$logs/failed" "$logs/all"
# Those that take longest first.
long='golden|kernels_give|every_.*size|packed|few_heads|many_heads|abc_is|value_heads|normalised'
{ grep -E "$long" "$logs/all"; grep -vE "$long" "$logs/all"; } >"$logs/ordered"
xargs -P $((12 * gpus)) --process-slot-var=SLOT -L 1 bash -c 'one "$1" "$2" "$0"' "$logs" <"$logs/ordered"
while read -r suite test code; do
    echo "== $suite $test $code"
    grep -vE '^ +[0-9]+: |^ +at |^stack backtrace|^note:|^running|^$' "$logs/$suite-${test//:/_}.txt" | cut -c1-400 | head -n 25
done <"$logs/failed"
for suite in "$@"; do
    # A binary that lists nothing has not passed.
    grep -q "^$suite " "$logs/all" || echo "$suite lists no test" >>"$logs/failed"
    echo "$suite: $(grep -c "^$suite " "$logs/all") tests, $(grep -c "^$suite " "$logs/failed") failed"
done
[ ! -s "$logs/failed" ]
