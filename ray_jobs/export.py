"""Export an adapter: merged into its base, or as one file; and what vLLM takes of it.

python ray_jobs/export.py --adapter out/demo/best --merge --output_dir out/demo/merged
python ray_jobs/export.py --adapter out/demo/best --state_dict --output_dir out/demo/export
"""

import sys

from vlmtune.console import configure_console, say
from vlmtune.errors import plain_user_errors


def main() -> None:
    configure_console()  # before the libraries are imported
    with plain_user_errors():
        from vlmtune.evaluation.export import export

        for line in export(sys.argv[1:], __doc__ or ""):
            say(line)


if __name__ == "__main__":
    main()
