#!/usr/bin/env bash
# The long form of the fault tests: 200 kills at random moments, and ten minutes of anything at all as input to each parser.
# CI runs ten kills and a few hundred inputs each. What fails is kept in tests/tests/train/fuzz.proptest-regressions, and tried first from then on.
#
#   scripts/faults.sh [MINUTES] [JOBS]     minutes a parser (10), parsers side by side (2)
#
# TRAIN_TESTS names a test binary that is built already.
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-10}
jobs=${2:-2}
parsers=(recipes overrides configs weights json_lines token_shards parquet_files token_caches)

binary=${TRAIN_TESTS:-}
if [ -z "$binary" ]; then
    binary=$(cargo test --release -p burn-fla-tests --no-default-features --features flex --test train --no-run \
        --message-format=json | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
fi
cd tests # where cargo runs it, and where it keeps what has failed

"$binary" --ignored --nocapture two_hundred_kills 2>/dev/null | grep -E 'kills in|test result'

fuzz() {
    local end inputs=0
    end=$(($(date +%s) + 60 * minutes))
    while [ "$(date +%s)" -lt "$end" ]; do
        if ! output=$(PROPTEST_CASES=2000 "$binary" --exact "fuzz::$1" 2>&1); then
            printf '%s\nFAILED %s after %s inputs\n' "$output" "$1" "$inputs"
            return 1
        fi
        inputs=$((inputs + 2000))
    done
    echo "$1: $inputs inputs in $minutes minutes, no panic"
}

failed=0
for ((at = 0; at < ${#parsers[@]}; at += jobs)); do
    running=()
    for parser in "${parsers[@]:at:jobs}"; do
        fuzz "$parser" &
        running+=($!)
    done
    for job in "${running[@]}"; do
        wait "$job" || failed=1
    done
done
exit "$failed"
