"""Evaluate an adapter: answers to held-out rows, and what they are worth.

python ray_jobs/eval.py --adapter out/demo/best --output_dir out/demo/eval [--compare_base | --base_only]
python ray_jobs/eval.py --adapter DIR --data_path DATA --output_dir DIR [--split test]

Without --data_path, on the test rows of the data that the adapter was trained with, which no training and no
search has seen. Writes
metrics.json, with intervals, and predictions.parquet.
"""

import sys

from vlmtune.console import configure_console, say
from vlmtune.errors import plain_user_errors


def main() -> None:
    configure_console()  # before the libraries are imported
    with plain_user_errors():
        from vlmtune.evaluation.evaluate import evaluate

        for line in evaluate(sys.argv[1:], __doc__ or ""):
            say(line)


if __name__ == "__main__":
    main()
