"""`vlmtune ui`: show a search in the browser, while it runs and afterwards."""

import sys
from collections.abc import Sequence

from vlmtune.cli.command_parser import CommandParser
from vlmtune.console import configure_console
from vlmtune.errors import plain_user_errors
from vlmtune.folder_owner import check_owner

UI_HELP = """Look at a search in the browser, while it runs and afterwards.

{prog} out/demo
{prog} --port 8080 out/demo

Serves a page on this machine alone; its address with a token is printed. The page stops a trial, or queues
values for the next one.
"""


def ui(argv: Sequence[str] | None = None, prog: str = "vlmtune ui") -> None:
    """The command `ui`. Arguments as in `commands.tune`."""
    configure_console()
    with plain_user_errors():
        parser = CommandParser(UI_HELP.format(prog=prog), prog)
        parser.add_argument("folder", metavar="OUTPUT_DIR", help="The output folder of a search.")
        parser.add_argument("--port", type=int, default=0, help="Port of the page; 0 takes a free one. (0)")
        parser.add_argument(
            "--trust_folder", action="store_true", help="Read the folder although another user owns it."
        )
        options = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
        check_owner(options.folder, "OUTPUT_DIR", trusted=options.trust_folder)
        from vlmtune.ui.server import serve

        serve(options.folder, options.port)
