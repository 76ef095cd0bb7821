"""The file of what writers have written: JSON lines that a user can read, correct and pass on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import PreserveError, RewordingsError, one_message
from ...hparams import LocFTBFHyperParams
from ...utils.files import output_errors
from ...utils.hashing import json_sha256
from ...utils.parsing import encodable, json_of, shown, text_of
from ..preserve.filters import cache_folder

_NAME = "rewordings.jsonl"
_CHECKSUM_LENGTH = 12

Key = tuple[str, str | None, str]


@dataclass(frozen=True)
class Line:
    """What a writer has made of a prompt.

    Attributes:
        prompt: The prompt.
        subject: Its subject; `None` where it is not known.
        writer: Who has written.
        rewordings: What was kept.
        dropped: The other texts, each with `text` and `reason`.
        judged_by: Fingerprint of the model whose answers were compared.
        checksum: Of the rewordings as they were written here: one that does not match tells that
            a user has changed them.
    """

    prompt: str
    subject: str | None
    writer: str
    rewordings: Sequence[str]
    dropped: Sequence[Mapping[str, str]] = ()
    judged_by: str = ""
    checksum: str = ""

    @classmethod
    def of(
        cls,
        key: Key,
        rewordings: Sequence[str],
        dropped: Sequence[Mapping[str, str]],
        judged_by: str,
    ) -> Line:
        """Returns a line with its checksum."""
        return cls(*key, list(rewordings), list(dropped), judged_by, _checksum(rewordings))

    @property
    def key(self) -> Key:
        """What the line is found by."""
        return self.prompt, self.subject, self.writer

    @property
    def by_hand(self) -> bool:
        """Whether a user has changed the rewordings."""
        return self.checksum != _checksum(self.rewordings)


class RewordingCache:
    """The lines of a file, and those that are added to it.

    Lines are only ever added, so that what a user or another run writes meanwhile stays; of several
    lines with one key the last one counts.

    Args:
        path: The file; it need not be there.

    Raises:
        RewordingsError: It cannot be read, or a line of it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[Key, Line] = {}
        if not os.path.lexists(path):
            return
        problems = []
        for number, text in enumerate(text_of(path, RewordingsError).split("\n"), start=1):
            if text.strip():
                try:
                    line = _line_of(text)
                    self._lines[line.key] = line
                except ValueError as error:
                    problems.append(f"line {number}: {error}. Correct it, or remove the line.")
        if problems:
            raise RewordingsError(
                one_message(f"`augment_cache`, {path}, cannot be used:", problems)
            )

    def find(self, key: Key) -> Line | None:
        """Returns the line of a prompt, its subject and a writer; `None` if there is none."""
        return self._lines.get(key)

    def add(self, lines: Sequence[Line]) -> None:
        """Adds lines to the file.

        Raises:
            OutputError: They cannot be written.
        """
        if not lines:
            return
        self._lines.update((line.key, line) for line in lines)
        content = "".join(f"{_text_of(line)}\n" for line in lines)
        with output_errors(self.path, "set `augment_cache` to a file that you may write to"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                # An editor may have left the last line without its end.
                if file.tell() and _last_byte(file) != b"\n":
                    content = f"\n{content}"
                file.write(content.encode())
                file.flush()
                os.fsync(file.fileno())


def cache_file(hparams: LocFTBFHyperParams) -> Path:
    """Returns where rewordings are kept: `augment_cache`, or a file in the user's cache folder.

    Raises:
        RewordingsError: There is no such folder, or the path is no file's.
    """
    if hparams.augment_cache is not None:
        path = Path(os.path.expanduser(hparams.augment_cache))
    else:
        try:
            path = cache_folder(None) / _NAME
        except PreserveError as error:
            raise RewordingsError(
                "What `augment_model` writes is kept in the user's cache folder, which there is "
                "not. Set `augment_cache` to a file."
            ) from error
    if path.is_dir():
        raise RewordingsError(f"`augment_cache`, {path}, is a folder. Give the path of a file.")
    return path


def _text_of(line: Line) -> str:
    text = json.dumps(asdict(line), ensure_ascii=False)
    return text if encodable(text) else json.dumps(asdict(line))  # half a character in a subject


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    last: bytes = file.read(1)
    return last


def _checksum(rewordings: Sequence[str]) -> str:
    return json_sha256(list(rewordings))[:_CHECKSUM_LENGTH]


def _line_of(text: str) -> Line:
    """Returns what a line holds.

    Raises:
        ValueError: It is no JSON, lacks something, or holds something of another type.
    """
    values = json_of(text)
    if not isinstance(values, dict):
        raise ValueError(f"{shown(values, 60)} is no object")
    for key in ("prompt", "writer", "rewordings"):
        if key not in values:
            raise ValueError(f"`{key}` is missing")
    others: dict[str, Any] = {"subject": None, "dropped": [], "judged_by": "", "checksum": ""}
    values = others | values
    for key in ("prompt", "writer", "judged_by", "checksum"):
        if not isinstance(values[key], str):
            raise ValueError(f"`{key}={shown(values[key], 60)}` is no text")
    if not isinstance(values["subject"], (str, type(None))):
        raise ValueError(f"`subject={shown(values['subject'], 60)}` is no text and not null")
    if not isinstance(values["rewordings"], list):
        raise ValueError(f"`rewordings={shown(values['rewordings'], 60)}` is no list")
    for one in values["rewordings"]:
        if not isinstance(one, str) or not one.strip() or not encodable(one):
            raise ValueError(f"`rewordings` has {shown(one, 60)}, which is no text or blank")
    if not isinstance(values["dropped"], list) or not all(map(_is_dropped, values["dropped"])):
        raise ValueError("`dropped` must be a list of objects with `text` and `reason`")
    return Line(**{name: values[name] for name in Line.__dataclass_fields__})


def _is_dropped(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("text", "reason")
    )
