"""`vlmtune chat`: ask an adapter questions about an image, in the terminal or in the browser."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vlmtune.cli.adapter_options import AdapterParser
from vlmtune.cli.commands import LOADING, check_adapter
from vlmtune.console import configure_console, say
from vlmtune.errors import ConfigError, UserError, plain_user_errors
from vlmtune.evaluation.options import ModelOverrides, check_new_tokens
from vlmtune.shown_text import shown_name

CHAT_HELP = """Ask an adapter about an image, in the terminal or in the browser.

{prog} --adapter out/demo/best --image photo.jpg --question "How many people are there?"
{prog} --adapter out/demo/best
{prog} --adapter out/demo/best --ui

--ui serves a page on this machine alone; its address with a token is printed.

Without --question it asks for questions, and without --image for an image first. A line with another image's
path changes the image; an empty line ends.
"""
SETTINGS = tuple(name for name in ModelOverrides.__annotations__ if name != "overwrite")


def chat(argv: Sequence[str] | None = None, prog: str = "vlmtune chat") -> None:
    """The command `chat`. Arguments as in `commands.tune`."""
    configure_console()
    with plain_user_errors():
        parser = AdapterParser(CHAT_HELP.format(prog=prog), prog)
        parser.add_argument("--image", metavar="FILE", help="The image to ask about.")
        parser.add_argument(
            "--question", metavar="TEXT", help="One question; its answer is printed, and no more."
        )
        parser.add_switch(parser, "ui", "Ask in a page in the browser, of this machine alone.")
        parser.add_argument("--port", type=int, default=0, help="Port of the page; 0 takes a free one. (0)")
        parser.add_new_tokens()
        parser.add_settings(*SETTINGS)
        options, overrides = parser.parse(argv, needs_output=False)
        check_new_tokens(options.max_new_tokens)
        check_adapter(options.adapter)
        if options.ui and (options.question is not None or options.image is not None):
            raise ConfigError("--ui: its page asks for image and question; leave --image and --question out")
        if options.question is not None and options.image is None:
            raise ConfigError("--image is missing: give the image that the question is about")
        from vlmtune.evaluation.chat import Chat, one_image

        image = None if options.image is None else one_image(options.image)
        say(LOADING)
        model = Chat.load(options.adapter, options.max_new_tokens, **overrides)
        if options.ui:
            from vlmtune.ui.chat_page import serve_chat

            base = shown_name(str(model.settings.model.base_model))
            serve_chat(model.ask, Path(options.adapter).absolute().name, base, options.port)
            return
        if options.question is not None and image is not None:
            say(model.ask(image, options.question))
            return
        talk(model.ask, image, lambda text: input(text) if sys.stdin.isatty() else read_line())


def read_line() -> str:
    """A line from stdin if it is a pipe; empty at the pipe's end."""
    return sys.stdin.readline().rstrip("\n")


def talk(ask: Callable[[str, str], str], image: str | None, read: Callable[[str], str]) -> None:
    """Read images and questions until an empty line, and print the answers.

    Args:
        ask: returns the answer to (image, question).
        image: the image to begin with; None to ask for one.
        read: prints a prompt and returns the user's line.
    """
    from vlmtune.evaluation.chat import one_image

    while True:
        try:
            line = read("image: " if image is None else "question: ").strip()
        except EOFError:
            return
        if not line:
            return
        try:
            if image is None:
                image = one_image(line)
            elif " " not in line and line.lower().endswith((".jpg", ".jpeg", ".png", ".webp")):
                image = one_image(line)
                say(f"the image is now {image}")
            else:
                say(ask(image, line))
        except UserError as error:  # a mistyped path does not end the talk
            say(str(error))
