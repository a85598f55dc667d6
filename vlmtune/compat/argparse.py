"""argparse of Python 3.11 and 3.12: a parser's options have no public list."""

import argparse


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options of a parser, in the order in which they were added. Private: `ArgumentParser._actions`."""
    return parser._actions
