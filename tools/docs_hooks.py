"""For mkdocs: puts the help of every command in the place of `COMMANDS` in docs/reference/command-line.md."""

import argparse
import os
from typing import Any

import vlrt
from vlrt import arguments, cli

PLACE = "COMMANDS"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page's text with the help in it."""
    if page.file.src_uri != "reference/command-line.md":
        return markdown
    os.environ["COLUMNS"] = "100"  # argparse breaks lines there
    return markdown.replace(PLACE, "\n".join(_sections("vlrt", arguments.parser(cli.COMMANDS, vlrt.__version__))))


def _sections(name: str, parser: argparse.ArgumentParser) -> list[str]:
    lines = [f"## {name}", "```text", parser.format_help().rstrip(), "```"]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, sub in action.choices.items():
                lines += _sections(f"{name} {verb}", sub)
    return lines
