"""Train one LoRA adapter.

python ray_jobs/train.py --config configs/llava-1.5-7b.yaml --data_path DIR [--any_flag value]
ray job submit --working-dir . -- \\
    python ray_jobs/train.py --config configs/llava-1.5-7b.yaml --data_path /shared/data \\
    --output_dir /shared/out
"""

from vlmtune.cli.commands import train

if __name__ == "__main__":
    train()
