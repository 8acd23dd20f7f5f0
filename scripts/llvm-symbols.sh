#!/usr/bin/env bash
# Writes crates/llvm-stubs/src/symbols.in: the LLVM symbols that a CUDA build refers to.
# Run it after an upgrade of CubeCL that ends in undefined LLVM symbols at link time.
set -euo pipefail
cd "$(dirname "$0")/.."
out=crates/llvm-stubs/src/symbols.in
log=$(mktemp)
trap 'rm -f "$log"' EXIT
printf 'stubs! {\n}\n' >"$out"
# Without stubs the link fails and names every symbol.
cargo rustc --release -p burn-fla --bin burn-fla --features cuda -- -C link-arg=-Wl,--error-limit=0 >"$log" 2>&1 || true
symbols=$(grep -oE "undefined (symbol: |reference to .)(LLVM|cubecl_)[A-Za-z0-9_]*" "$log" | grep -oE '(LLVM|cubecl_)[A-Za-z0-9_]*$' | LC_ALL=C sort -u || true)
{
    echo 'stubs! {'
    # shellcheck disable=SC2001
    [ -z "$symbols" ] || echo "$symbols" | sed 's/^/    /'
    echo '}'
} >"$out"
echo "$(grep -c '^    ' "$out" || true) symbols"
