"""Train one LoRA adapter.

python ray_jobs/train.py --config configs/llava-1.5-7b.yaml [--any_flag value]
ray job submit --working-dir . -- python ray_jobs/train.py --config configs/llava-1.5-7b.yaml --output_dir
/shared/out
"""

from vlmtune.console import configure_console, labelled, say
from vlmtune.errors import plain_user_errors


def main() -> None:
    configure_console()  # before the libraries are imported
    from vlmtune.config.parse import parse
    from vlmtune.packed.packable import check_packable
    from vlmtune.packed.train_packed import run_packed
    from vlmtune.training.run import train_adapter

    with plain_user_errors("To go on: --resume with its --output_dir."):
        settings = parse(description=__doc__)
        if settings.search.trial_runner == "packed":
            check_packable(settings)
        folder = train_adapter(settings, {"packed": run_packed})
        say(labelled("Adapter", folder))
        say(labelled("Curves", f"tensorboard --logdir {folder}/runs"))


if __name__ == "__main__":
    main()
