"""Search for the best LoRA adapter.

    python ray_jobs/tune.py --config configs/demo.yaml [--any_flag value]
    ray job submit --working-dir . -- python ray_jobs/tune.py --config configs/llava-1.5-7b.yaml --output_dir /shared/out
"""

from vlmtune.config import parse
from vlmtune.console import say
from vlmtune.errors import plain_user_errors


def main() -> None:
    with plain_user_errors():
        settings = parse(description=__doc__)
        from vlmtune.search.run import search_adapter

        say(search_adapter(settings))


if __name__ == "__main__":
    main()
