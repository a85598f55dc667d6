"""Answer a question about every image of a folder, or the rows of a data file.

python ray_jobs/predict.py --adapter out/demo/best --data_path FOLDER --question "How many people are there?"
--output_dir out/answers
python ray_jobs/predict.py --adapter DIR --data_path rows.jsonl --output_dir DIR [--format parquet]

A run that was ended goes on when the same command is given again.
"""

import sys

from vlmtune.console import configure_console, say
from vlmtune.errors import plain_user_errors


def main() -> None:
    configure_console()  # before the libraries are imported
    with plain_user_errors("The same command goes on with it."):
        from vlmtune.evaluation.predict import predict

        for line in predict(sys.argv[1:], __doc__ or ""):
            say(line)


if __name__ == "__main__":
    main()
