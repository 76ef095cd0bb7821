"""What commands leave: folders, JSON files, pictures, and tables on the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError
from .files import output_errors, replacing, text_output
from .json_fields import encoded

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


# Of `metrics.json`: its sections, and the entries of each.
_STREAMED_LEVELS = 2


def show(*tables: RenderableType) -> None:
    """Prints tables to the terminal."""
    from rich.console import Console  # here for the reason given in `tables`

    console = Console()
    for table in tables:
        console.print(table)


def prepare_folder(folder: str | Path) -> Path:
    """Returns the folder, made if need be.

    Raises:
        OutputError: It cannot be made or written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"`output={folder}` cannot be made: {error}. Choose another.") from error
    if not os.access(path, os.W_OK):
        raise OutputError(f"`output={folder}` is not writable. Choose another.")
    return path


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON; NaN, which JSON does not have, becomes null.

    A sequence in `value`, such as the records of `metrics.json`, is turned into text entry by
    entry.

    Raises:
        OutputError: The file cannot be written.
    """
    with text_output(path) as file:
        file.writelines(_json(value, _STREAMED_LEVELS))
        file.write("\n")


def _json(value: Any, levels: int, newline: str = "\n") -> Iterator[str]:
    """Yields indented JSON in parts: the outer `levels` of `value` entry by entry."""
    if isinstance(value, str) or not (levels and isinstance(value, (Mapping, Sequence)) and value):
        values = encoded(value, lambda _: None)
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
        yield text.replace("\n", newline)  # line ends within a text are escaped
        return
    opening, closing = "[]"
    entries: Iterable[tuple[str, Any]] = (("", entry) for entry in value)
    if isinstance(value, Mapping):
        opening, closing = "{}"
        texts = {str(key): entry for key, entry in value.items()}
        entries = ((f"{json.dumps(k, ensure_ascii=False)}: ", v) for k, v in texts.items())
    inner = newline + "  "
    for i, (key, entry) in enumerate(entries):
        yield ("," if i else opening) + inner + key
        yield from _json(entry, levels - 1, inner)
    yield newline + closing


def write_picture(path: str | Path, figure: Figure) -> None:
    """Writes a figure of matplotlib as PNG.

    Raises:
        OutputError: The file cannot be written.
    """
    with output_errors(path), replacing(path) as temporary:
        figure.savefig(temporary, format="png")
