#!/usr/bin/env bash
# The long form of the fault tests: 200 kills at random moments, and ten minutes of anything at all as input to each parser.
# CI runs ten kills and a few hundred inputs each.
#
#   scripts/faults.sh [MINUTES]     minutes a parser (10)
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-10}

cargo test --release -p burn-fla-tests --no-default-features --features flex --test train -- \
    --ignored --nocapture two_hundred_kills
for parser in recipes overrides configs weights json_lines token_shards parquet_files token_caches; do
    end=$(($(date +%s) + 60 * minutes))
    inputs=0
    while [ "$(date +%s)" -lt "$end" ]; do
        PROPTEST_CASES=20000 cargo test --release -q -p burn-fla-tests --no-default-features --features flex --test train -- \
            --exact "fuzz::$parser" >/dev/null
        inputs=$((inputs + 20000))
    done
    echo "$parser: $inputs inputs, no panic"
done
