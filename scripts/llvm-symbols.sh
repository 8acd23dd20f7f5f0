#!/usr/bin/env bash
# Writes crates/llvm-stubs/src/symbols.in: the LLVM symbols that a CUDA build leaves undefined.
# Run it after an upgrade of CubeCL that ends in undefined LLVM symbols at link time.
set -euo pipefail
cd "$(dirname "$0")/.."
out=crates/llvm-stubs/src/symbols.in
printf 'stubs! {\n}\n' >"$out"
# The first link has no stubs: unresolved symbols are let through, bound lazily, and then listed.
RUSTFLAGS="-C relro-level=partial -C link-arg=-Wl,--unresolved-symbols=ignore-all -C link-arg=-Wl,-z,lazy" \
    cargo build --release --features cuda --target-dir target/llvm-symbols
{
    echo 'stubs! {'
    nm -u target/llvm-symbols/release/burn-fla | awk '{print $2}' | grep -E '^(LLVM|cubecl_)' | sed 's/@.*//; s/^/    /' | sort -u
    echo '}'
} >"$out"
grep -c '    ' "$out"
