"""Text of others (names, reasons, answers) made safe for one line and for Markdown."""

from __future__ import annotations

import re

# Control sequences of a terminal, as a worker's last words may hold them.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
# An underscore inside a word is no emphasis: rewrite_acc stays readable.
_MARKDOWN = re.compile(r"[\\`*\[\]<>#|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def one_line(text: str) -> str:
    """Returns `text` without line breaks and control characters."""
    return " ".join(_CONTROL.sub(" ", _ANSI.sub("", text)).split())


def markdown_text(text: str) -> str:
    """Returns `text` in one line, with nothing in it that Markdown or a table takes for its own."""
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text))


def markdown_code(text: str) -> str:
    """Returns `text` as a code span, fenced by more backticks than it holds in a row."""
    text = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"
