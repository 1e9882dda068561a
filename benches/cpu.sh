#!/usr/bin/env bash
# Figures such as those of docs/performance.md, which names the flags of each, on two CPU cores:
# policies by turns in one process.
#
#   cargo xtask model full && cargo build --release --benches --bin hae
#   benches/cpu.sh target/release/hae models/full/phi-3.5-random-Q4_0.gguf OUT [PART...]
#
# PART: taps, early, story, chat, quantized, tower, busy; all but busy without one. One JSON line a test
# in OUT/PART.jsonl. The part tower takes vision files and a text model of one layer from MODEL's folder:
# cargo xtask model full --layers 1. The part busy keeps two processors busy, CPUS (0,1), which should be
# two cores' own.
# Wants a quiet machine and, for all parts, about an hour.
set -u
hae=$(realpath "$1") model=$(realpath "$2") out=$(realpath -m "$3")
shift 3
cd "$(dirname "$0")/.." || exit 2
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(taps early story chat quantized tower)
rounds=${ROUNDS:-3} threads=${THREADS:-2} fa=${FA:-auto}
mkdir -p "$out"

bench() { # PART NAME ARGUMENTS...
    local part=$1 name=$2
    shift 2
    echo "$(date +%T) $part: $name" >&2
    "$hae" bench -m "$model" -t "$threads" -r "$rounds" -fa "$fa" -o jsonl -v "$@" 2>"$out/$part-$name.log" \
        >>"$out/$part.jsonl" || tail -n 3 "$out/$part-$name.log" >&2
}

# Nothing leaves the cache before 32 tokens are decoded: what differs is the taps.
taps() {
    for layers in 0 16 12-19 all; do
        bench taps "decode-$layers" -p 0 -n 24 -d 1024,4096 --kv-policy full,hae --no-dap \
            --kv-budget 1.0 --bin-size 64 --score-layers "$layers"
    done
    for queries in last all; do
        bench taps "prefill-$queries" -p 64 -n 0 --images 1 --image-tokens 757 --kv-policy full,hae \
            --no-ddes --dap-keep 1.0 --score-layers 0 --score-queries "$queries" -ctk f16 -ctv f16
    done
}

# A picture of 2,509 tokens and a question, 60 % of the visual tokens pruned before they go in or
# behind the first layers.
early() {
    for mode in early midway; do
        for layers in 0 1 2 4 7; do
            bench early "$mode-$layers" -p 64 -n 0 --images 1 --image-tokens 2509 --kv-policy full,hae \
                --dap-mode "$mode" --dap-keep 0.4 --no-ddes --score-layers "$layers" -ctk f16 -ctv f16
        done
    done
}

# Five pictures and a story about them; the same about one; the first again, pruned after the prompt.
story() {
    for name in story-512 story-2048 story-one-picture; do
        bench story "$name" --workload "benches/workloads/$name.json" --kv-policy full,hae \
            --dap-mode midway --dap-keep 0.3 --kv-budget 0.3 --score-layers 2
    done
    bench story exact --workload benches/workloads/story-512.json --kv-policy full,hae \
        --dap-keep 0.3 --kv-budget 0.3 --score-layers 2
}

chat() {
    bench chat chat --workload benches/workloads/chat.json --kv-policy full,hae --dap-mode midway \
        --kv-budget 0.4 --score-layers 2
}

# A quantized cache on top of eviction, against llama.cpp's F16.
quantized() {
    for kind in f16 q8_0; do
        bench quantized "$kind" --workload benches/workloads/story-512.json --kv-policy full,hae \
            --dap-mode midway --dap-keep 0.4 --kv-budget 0.4 --score-layers 2 -ctk "$kind" -ctv "$kind"
    done
}

# Encoding a picture: llama.cpp's LLaVA, which takes one crop, and ours with a global view and 1, 4 and
# 16 crops, by turns. The tower is the same; what a crop costs is encode_ms / crops, the view counted.
tower() {
    local folder one
    folder=$(dirname "$model")
    one=$folder/phi-3.5-random-1-layers-Q4_0.gguf
    for ((round = 1; round <= rounds; round++)); do
        for crops in llava 1 4 16; do
            local file=phi-3.5 cut=(--num-crops "$crops")
            [ "$crops" != llava ] || file=llava cut=()
            model=$one rounds=1 bench tower "$crops" --no-warmup -p 1 -n 0 --images 1 \
                --image-size 1344x1344 --kv-policy full --mmproj "$folder/mmproj-$file-random-F16.gguf" "${cut[@]}"
        done
    done
}

# How threads wait for each other: alone on two processors, and beside loops that keep the same two busy.
# In a shell of its own, whose children inherit its processors.
busy() (
    taskset -cp "${CPUS:-0,1}" "$BASHPID" >/dev/null
    for loops in 0 2 4 8; do
        others=()
        for ((i = 0; i < loops; i++)); do
            (while :; do :; done) &
            others+=($!)
        done
        for spins in 0 300 1000 3000 10000 30000 300000; do
            GOMP_SPINCOUNT=$spins bench busy "$loops-$spins" --no-warmup -p 0 -n 0 -pg 64,16 --kv-policy full
        done
        [ "$loops" = 0 ] || kill "${others[@]}"
    done
)

for part in "${parts[@]}"; do
    case $part in
        taps | early | story | chat | quantized | tower | busy) "$part" ;;
        *)
            echo "$part: expected taps, early, story, chat, quantized, tower or busy" >&2
            exit 2
            ;;
    esac
done
