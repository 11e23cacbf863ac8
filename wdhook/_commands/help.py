"""Help texts fitted to the terminal: paragraphs and lists wrap, calls stay whole."""

from __future__ import annotations

import argparse
import re
from textwrap import wrap

_DEEP = 20  # spaces before a line that continues the right column of a list
_ITEM = re.compile(r"(?P<left> {2}\S.*?)  +(?P<right>\S.*)")
_CALL = ("  python -m wdhook ", "  wdhook ")  # in one line, to be copied
_NARROW = 30  # characters: narrower right columns go below the left one


class HelpFormatter(argparse.HelpFormatter):
    """Keeps the lines of descriptions and examples, as far as the width allows."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # What argparse.RawDescriptionHelpFormatter overrides to keep lines as they are.
        return "\n".join(indent + line for line in reflowed(text, width))


def reflowed(text: str, width: int) -> list[str]:
    """Break a help text into lines of at most `width` characters, where words allow.

    A text without lines that are too wide stays as it is.
    """
    lines = text.splitlines()
    if not lines or max(map(len, lines)) <= width:
        return lines
    found: list[str] = []
    for block in _blocks(lines):
        found += _wrapped(block, width)
    return found


def _blocks(lines: list[str]) -> list[str]:
    """Join each paragraph and each item of a list into a single line."""
    blocks: list[str] = []
    for line in lines:
        if blocks and _continues(blocks[-1], line):
            between = "  " if blocks[-1].startswith(_CALL) else " "
            blocks[-1] += between + line.strip()
        else:
            blocks.append(line)
    return blocks


def _continues(block: str, line: str) -> bool:
    """A line goes on with a paragraph, or with the right column of an item."""
    if not block or not line:
        return False
    if line.startswith(" " * _DEEP):
        return block.startswith("  ")
    return not line.startswith(" ") and not block.startswith(" ")


def _wrapped(block: str, width: int) -> list[str]:
    if len(block) <= width:
        return [block]
    is_call = block.startswith(_CALL)
    item = _ITEM.fullmatch(block)
    if item is None:
        return [block] if is_call else _narrowed(block, width, "")
    right = item.start("right")
    if width - right >= _NARROW and not is_call:
        return _narrowed(block, width, " " * right)
    return [item["left"].rstrip(), *_narrowed(f"      {item['right']}", width, "      ")]


def _narrowed(text: str, width: int, later: str) -> list[str]:
    return wrap(
        text,
        width,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
