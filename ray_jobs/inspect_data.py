"""Look at the data before training: what is in it, what is wrong with it, how long its rows are.

python ray_jobs/inspect_data.py --config configs/demo.yaml [--output_dir DIR]
python ray_jobs/inspect_data.py --data_path data.jsonl --model_name_or_path llava-hf/llava-1.5-7b-hf

Needs the model's processor and tokenizer, no weights and no GPU. The rows that it prepares are kept for
training. Leaves with exit code
2 where training cannot work. --output_dir is where preflight.json and preflight.html go, by default
OUTPUT_DIR-preflight.
"""

import argparse
import sys

from vlmtune.console import configure_console, labelled, say
from vlmtune.errors import plain_user_errors


def main() -> None:
    configure_console()  # before the libraries are imported
    from vlmtune.config.parse import parse
    from vlmtune.preflight.console_report import console_report
    from vlmtune.preflight.inspection import inspect_data

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--output_dir", "--output-dir")
    given, others = own.parse_known_args()
    with plain_user_errors():
        summary, folder = inspect_data(parse(others, description=__doc__), given.output_dir)
        say(console_report(summary, colour=sys.stdout.isatty()))
        say(labelled("Report", f"{folder}/preflight.html and preflight.json"))
    sys.exit(0 if summary.ready else 2)


if __name__ == "__main__":
    main()
