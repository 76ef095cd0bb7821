"""Files that anybody may have written, read: what cannot be used is one typed error.

Nothing here runs what a file says: YAML tags make no objects, aliases (with which a few lines can
stand for gigabytes) are refused, and `${...}` is text to the one who calls.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import LocFTError

# What parsers raise besides their own errors: numbers of thousands of digits, dates that are none,
# a tag with a value that it does not suit, nesting deeper than the interpreter's stack.
_BAD_VALUES = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
_NO_SPACE = re.compile(r"\S")


class ParseError(ValueError):
    """A text is not what it should be; the message says where."""


def is_file(path: str | Path) -> bool:
    """Returns whether there is a regular file; a name that no file can have is none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long, not to be looked at, NUL or half a character in it
        return False


def text_of(path: str | Path, error: type[LocFTError], *, most: int | None = None) -> str:
    """Returns a file's text, of `most` bytes; a byte-order mark is no part of it.

    Raises:
        LocFTError: Of the kind `error`: it cannot be read, is too large or not UTF-8.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read() if most is None else file.read(most + 1)
    except (OSError, ValueError) as reason:
        why = getattr(reason, "strerror", None) or reason
        raise error(f"`{path}` cannot be read: {why}. Give a file that you may read.") from reason
    if most is not None and len(content) > most:
        raise error(f"`{path}` has more than {most} bytes; such a file is a few lines. Check it.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(
            f"`{path}` does not parse: it is not UTF-8 (byte {reason.start}). Convert it."
        ) from reason


def json_of(text: str, *, unique_keys: bool = False) -> Any:
    """Returns what a JSON text holds; without `unique_keys` the last one of a key counts.

    Raises:
        ParseError: It is no JSON, nested too deeply, holds a number too long to read, or gives a
            key twice that must be unique.
    """
    try:
        return json.loads(text, object_pairs_hook=_mapping_of if unique_keys else None)
    except json.JSONDecodeError:
        raise  # it says the line and the column
    except RecursionError as error:
        raise ParseError("it is nested too deeply") from error
    except ValueError as error:
        raise ParseError(str(error)) from error


def _mapping_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ParseError(f"the key {shown(key)} is given twice")
        found[key] = value
    return found


def yaml_of(text: str) -> Any:
    """Returns what a YAML text holds: plain values alone.

    Raises:
        ParseError: It is no such YAML, gives a key twice, or has aliases.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        raise ParseError(str(error)) from error
    except RecursionError as error:
        raise ParseError("it is nested too deeply") from error
    except _BAD_VALUES as error:
        raise ParseError(f"a value is not what its tag says ({error})") from error


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, and with every key once."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"aliases (*{event.anchor}) are not read: write the value out",
                event.start_mark,
            )  # fmt: skip
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key.value)} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def did_you_mean(name: str, known: Collection[str], otherwise: str) -> str:
    """Returns a question for the known name that is nearest, or `otherwise` if none is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean `{close[0]}`?" if close else otherwise


def shown(value: Any, limit: int = 200) -> str:
    """Returns a value for a message: its `repr`, shortened; never more than a line or two."""
    try:
        text = repr(value)
    except Exception as error:  # nested too deeply, or an object of any kind
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def pieces_of(text: str, limit: int) -> list[str]:
    """Returns pieces of `limit` characters at most, divided at spaces or line ends; none blank."""
    pieces, length, end = [], len(text.rstrip()), 0
    # By places in the text: what is left of megabytes is not copied for each piece.
    while begun := _NO_SPACE.search(text, end):
        start, end = begun.start(), length
        if length - start > limit:
            # A space or line end just behind the limit still divides there.
            window = start, start + limit + 1
            end = max(text.rfind("\n", *window), text.rfind(" ", *window))
            end = end if end > start else start + limit
        pieces.append(text[start:end].rstrip())
    return pieces


def texts_in(value: Any) -> Iterator[str]:
    """Yields the texts within a value, however deep lists and tuples in it are nested."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, (list, tuple)):
            waiting += one
        elif isinstance(one, str):
            yield one


def bad_text(value: Any) -> str | None:
    """Returns why the texts within `value` cannot be used as names or paths; `None` if they can."""
    for text in texts_in(value):
        if "\0" in text:
            return "holds a NUL character. Remove it"
        if not encodable(text):
            return "holds a lone surrogate. Clean the text"
    return None


def encodable(text: str) -> bool:
    """Returns whether a text can be written as UTF-8: no half of a surrogate pair is in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
