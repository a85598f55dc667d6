"""Search for the best LoRA adapter.

python ray_jobs/tune.py --config configs/demo.yaml [--any_flag value]
ray job submit --working-dir . -- python ray_jobs/tune.py --config configs/llava-1.5-7b.yaml --output_dir
/shared/out
"""

from vlmtune.console import configure_console, say
from vlmtune.errors import plain_user_errors


def main() -> None:
    configure_console()  # before the libraries are imported
    from vlmtune.config.parse import parse
    from vlmtune.search.run import search_adapter

    with plain_user_errors():
        say(search_adapter(parse(description=__doc__)))


if __name__ == "__main__":
    main()
