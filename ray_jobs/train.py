"""Train one LoRA adapter.

    python ray_jobs/train.py --config configs/llava-1.5-7b.yaml [--any_flag value]
    ray job submit --working-dir . -- python ray_jobs/train.py --config configs/llava-1.5-7b.yaml --output_dir /shared/out
"""

from vlmtune.config import parse
from vlmtune.console import say
from vlmtune.errors import plain_user_errors


def main() -> None:
    with plain_user_errors():
        settings = parse(description=__doc__)
        from vlmtune.training.run import train_adapter

        folder = train_adapter(settings)
        say(f"Adapter   {folder}")
        say(f"Curves    tensorboard --logdir {folder}/runs")


if __name__ == "__main__":
    main()
