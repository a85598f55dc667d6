#!/usr/bin/env bash
# The tests that need a GPU machine, a training run of Qwen2.5-VL, and the model layer on CUDA builds of torch
# and bitsandbytes. Run it from the repository's root, with the project's packages on the path.
set -euo pipefail
set -- -W default "$@"  # the versions of the libraries there are not those in constraints.txt
python3 -m pytest -q tests/data/test_tokenize.py tests/data/test_collate.py tests/data/test_order.py \
    tests/demo tests/model "$@"
# In a process of their own: torch 2.11 to 2.13 give no memory back after a failed graph capture, and one in
# tests/model fails on purpose.
python3 -m pytest -q tests/training/test_out_of_memory.py tests/packed/test_packed_model.py \
    tests/packed/test_row_features.py -k gpu "$@"
out=$(mktemp -d)
python3 -m vlmtune.demo --output_dir "$out" --family qwen2_5_vl
python3 -m vlmtune.demo --output_dir "$out" --family mllama
for run in "qwen2_5_vl nf4" "mllama int8"; do
    set -- $run
    echo "$1 in $2 on $(nvidia-smi -L | head -1 | cut -d'(' -f1)"
    python3 ray_jobs/train.py --model_name_or_path "$out/$1" --data_path "$out/mall" \
        --quantization "$2" --num_workers 0 --learning_rate 1e-2 --num_train_epochs 3 \
        --per_device_train_batch_size 8 --output_dir "$out/run-$1"
done
