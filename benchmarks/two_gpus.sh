#!/usr/bin/env bash
# The speed of two GPUs against one, and whether their workers agree, on models of true size
# (benchmarks/full_size.py):
#
#   bash benchmarks/two_gpus.sh LLAVA MLLAMA OUT [isolated packed search agree]
#
# Run it from the repository's root, with the project's packages on the path. Each part has a time limit of
# some minutes, and writes its figures and its log to OUT. MORE holds further options of every run, such as
# MORE="use_cpu=true" without a GPU.
set -uo pipefail
llava=$1 mllama=$2 out=$3
shift 3
mkdir -p "$out"
options=(torch_compile=true ${MORE:-})

isolated() {  # train.py's steps on two GPUs and on one
    timeout 450 python3 benchmarks/workers.py "$llava" --workers 1 2 --rows "${ROWS:-900}" \
        --json "$out/isolated.jsonl" --set "${options[@]}"
}
packed() {  # the same by engines that sum their gradients
    timeout 450 python3 benchmarks/workers.py "$llava" --workers 1 2 --rows "${ROWS:-900}" \
        --json "$out/packed.jsonl" --set trial_runner=packed "${options[@]}"
}
search() {  # 16 trials over an engine on each GPU, and on the first alone
    for gpus in 0,1 0; do
        CUDA_VISIBLE_DEVICES=$gpus timeout 280 python3 benchmarks/search.py "$llava" whole \
            --trials 16 --batch 2 --json "$out/search.jsonl" --set "${options[@]}"
    done
}
agree() {  # Llama-3.2-Vision in 8 bits, rows with images and without, its shipped config
    rows=$(mktemp -d)
    python3 benchmarks/data.py rows "$rows/mixed" >/dev/null
    timeout 280 python3 benchmarks/gpu_check.py "$mllama" "$rows/mixed/rows.jsonl" --workers 2 \
        --config configs/llama-3.2-11b-vision.yaml --learning_rate 1e-4 --max_steps 20 \
        --output_dir "$rows/out" ${CHECK:-}
}

for part in "${@:-isolated packed search agree}"; do
    for name in $part; do
        echo "$name"
        "$name" 2>"$out/$name.log" || { echo "$name: not ended"; tail -n 3 "$out/$name.log"; }
    done
done
