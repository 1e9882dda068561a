#!/usr/bin/env bash
# HAE on a CUDA GPU, in one go: correctness, speed, memory.
#
#   cargo build --release --features cuda --bin hae --example full_model --bench kv
#   cargo test --release --features cuda --test suite --no-run
#   benches/cuda.sh PROGRAMS OUT [PART...]
#
# PROGRAMS is a folder with hae, suite, full_model and kv. PART: parity, sanitizer, speed, lookups, memory;
# all of them without one. Results: OUT/*.jsonl (one line a test), OUT/*.txt. On a CPU it runs too, only slower.
set -u
programs=$(realpath "$1") out=$2
shift 2
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(parity sanitizer speed lookups memory)
rounds=${ROUNDS:-3} models=${MODELS:-/tmp/full} depths=${DEPTHS:-1024,4096,16384,65536}
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$out" "$models"
out=$(realpath "$out")
hae=$programs/hae

say() { echo "== $(date +%T) $*"; }

model() { # TYPE
    local file=$models/phi-3.5-random-${1^^}.gguf
    [ -f "$file" ] || "$programs/full_model" --type "$1" --out "$models" >/dev/null
    echo "$file"
}

bench() { # FILE ARGUMENTS...
    local file=$1
    shift
    say "$file: $*"
    "$hae" bench -r "$rounds" -o jsonl -v "$@" 2>"$out/$file.log" >"$out/$file.jsonl" ||
        tail -n 2 "$out/$file.log"
}

# The tests that compare with PyTorch, numpy, masks, an uncompacted twin, on the GPU.
# Left out: kv_graphs, which makes main memory look like a device's, kv_memory, which watches main memory,
# and a test that reads a graph's tensors where they lie.
parity() {
    say parity
    "$programs/suite" --test-threads "${JOBS:-4}" parity:: masked:: taps:: early:: holes:: recall:: session:: \
        stock:: rope:: kv_ taps_ two_questions:: lookup passes:: sequences:: together:: --skip kv_graphs:: --skip kv_memory:: \
        --skip taps_oracle::scores_of_deep_layers \
        >"$out/parity.txt" 2>&1
    grep -E '^test result|FAILED|panicked' "$out/parity.txt" | sort | uniq | tail -n 40
}

sanitizer() {
    say sanitizer
    timeout 150 compute-sanitizer --tool memcheck --error-exitcode 9 "$hae" run --image models/demo.png \
        -p "Where is the red triangle?" --kv-policy hae --kv-budget 0.5 --bin-size 4 --temp 0 -n 24 \
        >"$out/sanitizer.txt" 2>&1
    echo "exit code $?"
    grep -E 'ERROR SUMMARY|Invalid|Row' "$out/sanitizer.txt" | tail -n 5
    # The kernels of lookups, every type and shape; what they read and write, not which calls returned an error.
    local tool
    for tool in memcheck racecheck; do
        timeout 300 compute-sanitizer --tool $tool --report-api-errors no "$programs/suite" --test-threads 1 \
            lookup_shapes:: >"$out/sanitizer-lookups-$tool.txt" 2>&1
        grep -E 'SUMMARY|Invalid|test result' "$out/sanitizer-lookups-$tool.txt" | tail -n 5
    done
}

# Looked up against attended to in full, by turns.
lookups() {
    local q4 type
    q4=$(model q4_0)
    for type in f16 q8_0 q4_0; do
        bench "lookups-$type" -m "$q4" -ngl 99 -t 4 -p 0 -n 64 -d 4864,16384,65536 --depth-copies -fa on \
            -ctk $type -ctv $type --kv-policy full,full --attend 0.15 --attend-text 0.25
    done
}

speed() {
    local q4 f16
    q4=$(model q4_k_m)
    bench depth-q4_k_m -m "$q4" -p 0 -n 64 -d "$depths" --kv-policy full,hae --no-dap --kv-budget 0.4 --score-layers 16
    bench taps-q4_k_m -m "$q4" -p 0 -n 31 -d "$depths" --kv-policy full,hae --no-dap --kv-budget 1.0 --bin-size 64 \
        --score-layers 0
    for n in 512 2048; do
        bench "story-$n-q4_k_m" -m "$q4" --workload "benches/workloads/story-$n.json" \
            --kv-policy full,hae --dap-mode early --dap-keep 0.3 --kv-budget 0.3 --score-layers 2
    done
    bench prefill-q4_k_m -m "$q4" -p 64 -n 0 --images 5 --image-tokens 2509 --kv-policy full,hae \
        --dap-mode early --dap-keep 0.4 --no-ddes --score-layers 2 -ctk f16 -ctv f16
    f16=$(model f16)
    bench depth-f16 -m "$f16" -p 0 -n 64 -d 4096,16384 --kv-policy full,hae --no-dap --kv-budget 0.4 --score-layers 16
    bench story-512-f16 -m "$f16" --workload benches/workloads/story-512.json --kv-policy full,hae \
        --dap-mode early --dap-keep 0.3 --kv-budget 0.3 --score-layers 2
    say kv
    "$programs/kv" 2>&1 | tee "$out/kv.txt"
}

# What the driver says that is taken, over the story workload.
memory() {
    local q4 policy pid
    q4=$(model q4_k_m)
    for policy in full hae; do
        nvidia-smi --query-gpu=timestamp,memory.used --format=csv,noheader,nounits -lms 20 \
            >"$out/memory-$policy.csv" 2>/dev/null &
        pid=$!
        local settings=()
        [ "$policy" = full ] || settings=(--dap-mode early --dap-keep 0.3 --kv-budget 0.3 --score-layers 2)
        rounds=1 bench "memory-$policy" -m "$q4" --workload benches/workloads/story-2048.json \
            --no-warmup --kv-policy "$policy" "${settings[@]}"
        kill $pid
        awk -F, -v p=$policy '{if ($2 > m) m = $2; l[NR] = $2} END {print p ": at most " m " MiB, " NR " samples"}' \
            "$out/memory-$policy.csv"
    done
}

for part in "${parts[@]}"; do
    case $part in
        parity | sanitizer | speed | lookups | memory) "$part" ;;
        *)
            echo "$part: expected parity, sanitizer, speed, lookups or memory" >&2
            exit 2
            ;;
    esac
done
python3 - "$out" <<'PYTHON'
"""A table of every line: medians, and the ratio to llama.cpp's cache."""
import json, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.jsonl")):
    for line in path.read_text().splitlines():
        r = json.loads(line)
        f = lambda k, d=1: "-" if r.get(k) is None else f"{r[k] / d:.2f}"
        print(f"{path.stem:18} {r['test']:22} {r['kv_policy']:5} ttft {f('ttft_ms_median')} probe {f('probe_ms_median')} "
              f"tpot {f('tpot_ms_median')} MiB {f('kv_bytes_allocated', 2**20)} peak {f('kv_bytes_allocated_peak', 2**20)} "
              f"ratio {f('ttft_ratio_median')} {f('tpot_ratio_median')} {f('total_ratio_median')}")
PYTHON
