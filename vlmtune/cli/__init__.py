"""The commands: parse arguments, call one function, print its result."""

from vlmtune.cli.main import main

__all__ = ["main"]
