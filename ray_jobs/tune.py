"""Search for the best LoRA adapter.

python ray_jobs/tune.py --config configs/demo.yaml [--any_flag value]
ray job submit --working-dir . -- \\
    python ray_jobs/tune.py --config configs/llava-1.5-7b.yaml --data_path /shared/data \\
    --output_dir /shared/out
"""

from vlmtune.cli.commands import tune

if __name__ == "__main__":
    tune()
