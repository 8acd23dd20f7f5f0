#!/usr/bin/env bash
# Multi-query associative recall (recipes/mqar) on a machine with a GPU and no Rust: every architecture for equal steps, side
# by side on one GPU, then the table of accuracies; and the expected cases on the GPU.
# usage: gpu-mqar.sh FOLDER OUT SECONDS [SECTION.KEY=VALUE …]   FOLDER holds burn-fla.xz (built with `--features cuda`,
# stripped); OUT receives the metrics; training is stopped after SECONDS.
set -uo pipefail
folder=$1 out=$2 limit=$3
shift 3
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda}
mkdir -p "$out"
xz -dkf "$folder/burn-fla.xz" && chmod +x "$folder/burn-fla"
fla=$PWD/$folder/burn-fla
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
overrides=()
for x in "$@"; do overrides+=(--set "$x"); done

for recipe in recipes/mqar/*.toml; do
    name=$(basename "$recipe" .toml)
    [ "$name" = base ] && continue
    timeout "$limit" "$fla" train "$recipe" --set device.backend=cuda --set "job.dump_folder=/tmp/mqar/$name" \
        --set metrics.terminal=plain "${overrides[@]}" >"$out/mqar_$name.log" 2>&1 &
done
wait
echo "== expected cases on the GPU, f32"
timeout 150 "$fla" architectures --device cuda --golden tests/fixtures/golden >"$out/architectures.md" 2>"$out/architectures.log"
echo "exit $?"
cat "$out/architectures.md"
tail -n 3 "$out/architectures.log"

echo "== accuracy by step"
python3 - "$out" <<'PY'
import json, pathlib, sys
rows = {}
for folder in sorted(pathlib.Path("/tmp/mqar").iterdir()):
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    rows[folder.name] = {l["step"]: l["validation_accuracy"] for l in lines if l.get("validation_accuracy") is not None}
    (pathlib.Path(sys.argv[1]) / f"mqar_{folder.name}.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
steps = sorted({s for r in rows.values() for s in r})
shown = [s for i, s in enumerate(steps) if i % max(1, len(steps) // 12) == 0 or s == steps[-1]]
print("| steps | " + " | ".join(str(s) for s in shown) + " |")
for name, r in rows.items():
    print(f"| {name} | " + " | ".join(f"{100 * r[s]:.1f}" if s in r else "" for s in shown) + " |")
PY
