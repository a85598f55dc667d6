"""The argument parser of commands whose options are not those of `Settings`."""

import argparse
import re
from typing import NoReturn

from vlmtune.errors import ConfigError


class CommandParser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations, keeps the help's line breaks, and raises ConfigError.

    Args:
        description: what the command does and how it is called.
        prog: the command as its user calls it.
    """

    def __init__(self, description: str, prog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError that begins with the option at fault."""
        raise ConfigError(re.sub(r"^argument (--\w+)\S*", r"\1:", message).replace("::", ":"))
