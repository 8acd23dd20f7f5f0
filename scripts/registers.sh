#!/usr/bin/env bash
# What the compiler makes of the kernels of a program: registers a unit, spilled bytes, shared memory. No GPU is needed: the
# program runs on a driver that computes nothing, so its answers are garbage and it may say so; its kernels are compiled
# all the same, for compute capability 9.0.
# usage: CUDA_PATH=… registers.sh [-k PATTERN] COMMAND…   CUDA_PATH has lib/libnvrtc.so (or lib64), include and bin/ptxas;
#   PATTERN, of awk, names the kernels to show. Prints tab-separated lines, as `report add --table` reads them.
set -uo pipefail
pattern=.
if [ "${1:-}" = -k ]; then
    pattern=$2
    shift 2
fi
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/driver" "$folder/ptx"
cc -shared -fPIC -O1 -w -o "$folder/driver/libcuda.so" "$(dirname "$0")/registers/driver.c" || exit 1
REGISTERS=$folder/ptx LD_LIBRARY_PATH=$folder/driver:$CUDA_PATH/lib64:$CUDA_PATH/lib:${LD_LIBRARY_PATH:-} \
    "$@" >"$folder/output.log" 2>&1 || { echo "the program ended with $?, its last line:" && tail -1 "$folder/output.log"; } >&2
touch "$folder/ptx/launches.txt"
if [ ! -e "$folder/ptx/0.ptx" ]; then
    echo "error: no kernel was compiled" >&2
    exit 1
fi
"$CUDA_PATH/bin/ptxas" --version | tail -2 | head -1 >&2
printf 'kernel\tunits\tregisters\tspilled bytes\tshared memory\n'
sort -n "$folder/ptx/launches.txt" | while read -r number entry units shared; do
    name=${entry%_*}
    awk -v name="$name" -v pattern="$pattern" 'BEGIN { exit name !~ pattern }' || continue
    "$CUDA_PATH/bin/ptxas" -arch=sm_90a -v "$folder/ptx/$number.ptx" -o /dev/null 2>&1 |
        awk -v name="$name" -v units="$units" -v shared="$shared" '
            { for (i = 1; i <= NF; i++) {
                if ($i == "spill") spilled += $(i - 2)
                if ($i ~ /^registers/) registers = $(i - 1)
            } }
            END { printf "%s\t%d\t%d\t%d\t%d\n", name, units, registers, spilled, shared }'
done
