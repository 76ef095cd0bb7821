"""What `preserve` names: words with a meaning of their own, and files of text or of prompts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError, one_message
from ...hparams_rules import NEIGHBOURS, SAMPLED
from ...utils.hashing import json_sha256
from ...utils.parsing import ParseError, bad_text, is_file, json_of, shown, text_of

TEXT, PROMPTS = "text", "prompts"

_KINDS = {".txt": TEXT, ".json": PROMPTS, ".jsonl": PROMPTS}
_CHOICES = f"`{SAMPLED}`, `{NEIGHBOURS}`, a .txt file of text, or a .json or .jsonl file of prompts"
_MOST_BYTES = 2**26
# Of one file: the others' problems are to be seen as well.
_MOST_PROBLEMS = 5


@dataclass(frozen=True)
class Source:
    """Something to leave as it is.

    Attributes:
        kind: `sampled`, `neighbours`, `text` or `prompts`.
        name: As the user wrote it.
        texts: Passages or prompts; empty for `sampled` and `neighbours`.
    """

    kind: str
    name: str
    texts: tuple[str, ...] = ()

    def digest(self) -> str:
        """Returns a hash of the kind and the texts, wherever they were read from."""
        return json_sha256([self.kind, list(self.texts)])


def read_sources(preserve: Sequence[str]) -> list[Source]:
    """Returns what `preserve` names, in its order, with every file read and checked.

    A .txt file is text, in passages that blank lines divide. A .json file is a list of prompts,
    each a text or an object with `prompt`; a .jsonl file has one such a line. UTF-8 throughout.

    Args:
        preserve: The words `sampled` and `neighbours`, and paths.

    Raises:
        DataError: A name is given twice or is no source; a file is missing, too large, not UTF-8,
            does not parse or holds nothing; a prompt is blank or no text. All such problems in
            one error.
    """
    sources, problems = [], []
    seen: set[str] = set()
    for name in preserve:
        if not isinstance(name, str) or not name.strip():
            problems.append(f"{shown(name)} is no name. Give {_CHOICES}.")
            continue
        same = name if name in (SAMPLED, NEIGHBOURS) else _identity(name)
        if same in seen:
            problems.append(f"`{name}` is given twice. Remove one.")
            continue
        seen.add(same)
        try:
            sources.append(_source(name))
        except _Unusable as error:
            problems += error.problems
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(one_message("`preserve` cannot be used:", problems))
    return sources


class _Unusable(Exception):
    """A file has problems, a line each; never leaves this module."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems


def _path_of(name: str) -> Path:
    """Returns a path, in which a ~ in front is a home folder; what is none stays as it is."""
    try:
        return Path(os.path.expanduser(name))
    except ValueError:  # NUL in it
        return Path(name)


def _identity(name: str) -> str:
    """Returns what two spellings of a path have in common."""
    try:
        return str(_path_of(name).resolve())
    except (OSError, ValueError, RuntimeError):  # NUL in it, or links in a circle
        return name


def kind_of(name: str) -> str:
    """Returns the kind of the source that `preserve` names so; no file is looked at.

    Raises:
        DataError: It is none.
    """
    kind = name if name in (SAMPLED, NEIGHBOURS) else _KINDS.get(Path(name).suffix.lower())
    if kind is None:
        raise DataError(f"`{name}` is no source. Give {_CHOICES}.")
    return kind


def _source(name: str) -> Source:
    kind, path = kind_of(name), _path_of(name)
    if kind in (SAMPLED, NEIGHBOURS):
        return Source(kind, name)
    if not is_file(path):
        raise _Unusable(f"`{name}` is not a file. Give the path of one that is there.")
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise _Unusable(
            f"`{name}` has {size / 2**20:.0f} MiB; at most {_MOST_BYTES / 2**20:.0f} are read. "
            "Give a part of it."
        )
    content = text_of(path, DataError)
    if kind == TEXT:
        passages = tuple(p.strip() for p in re.split(r"\n\s*\n", content) if p.strip())
        if not passages:
            raise _Unusable(f"`{name}` holds no text. Give a file with some.")
        return Source(TEXT, name, passages)
    return Source(PROMPTS, name, _prompts(name, content, path.suffix.lower() == ".jsonl"))


def _prompts(name: str, content: str, lines: bool) -> tuple[str, ...]:
    """Returns the prompts of a file.

    Raises:
        _Unusable: It does not parse, has none, or some cannot be used.
    """
    texts: list[str] = []
    problems: list[str] = []
    for where, record in _records(name, content, lines):
        if isinstance(record, _Unusable):
            problems += record.problems
            continue
        prompt = record.get("prompt") if isinstance(record, Mapping) else record
        if not isinstance(prompt, str):
            problems.append(
                f"`{name}`, {where}: {shown(record, 60)} is no prompt. Give a text, or an object "
                "with `prompt`."
            )
        elif not prompt.strip():
            problems.append(f"`{name}`, {where}: the prompt is blank. Remove it.")
        elif why := bad_text(prompt):
            problems.append(f"`{name}`, {where}: the prompt {why}.")
        else:
            texts.append(prompt)
    if len(problems) > _MOST_PROBLEMS:
        more = len(problems) - _MOST_PROBLEMS
        problems = [*problems[:_MOST_PROBLEMS], f"`{name}`: {more} more of its prompts."]
    if not texts and not problems:
        problems.append(f"`{name}` holds no prompts. Give a file with some.")
    if problems:
        raise _Unusable(*problems)
    return tuple(texts)


def _records(name: str, content: str, lines: bool) -> Iterator[tuple[str, Any]]:
    """Yields each record of a file, or why it does not parse, and where it is.

    Raises:
        _Unusable: The whole file does not parse, or is no list.
    """
    if lines:
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                try:
                    yield f"line {number}", _parsed(f"`{name}`, line {number}", line)
                except _Unusable as error:
                    yield f"line {number}", error
        return
    records = _parsed(f"`{name}`", content) if content.strip() else []
    if not isinstance(records, list):
        raise _Unusable(f"`{name}` holds a {type(records).__name__}; it must be a list of prompts.")
    for i, record in enumerate(records):
        yield f"record {i}", record


def _parsed(where: str, text: str) -> Any:
    try:
        return json_of(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise _Unusable(
            f"{where}: {place}column {error.colno}: {error.msg}. Correct it."
        ) from error
    except ParseError as error:
        raise _Unusable(f"{where}: {error}. Correct it.") from error
