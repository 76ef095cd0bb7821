"""Editing data from files, in the published forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..utils.parsing import ParseError, is_file, json_of, text_of
from .record_forms import requests_in
from .request_parts import Request


def read_requests(path: str | Path, n: int | None = None) -> list[Request]:
    """Returns the requests that a JSON (a list of records) or JSON-lines file holds.

    The form of each record is told by its fields: ZsRE (`src`, `alt` or `ans`), WikiBigEdit
    (`update`, `ans`), CounterFact and MQuAKE as published (`requested_rewrite`: one edit or a
    list), WikiBio (`text`, `labels`), question and answer (`question`, `answer`), and flat,
    KnowEdit, CKnowEdit or QAEdit records (`prompt`, and `target_new`, `target` or `answer`).
    Records with an empty target are left out, as EasyEdit's datasets do, and so are locality and
    portability prompts without an answer; a warning counts and names them. A field that is NaN
    counts as missing. A prompt with `{}` gets its `subject` (see `filled_in`).

    A record of MQuAKE is several requests; the last one has its multi-hop questions, which hold
    when all of them are in, as portability.

    Where a file gives several answers, EasyEdit's keys hold the first and keys that EasyEdit does
    not look at hold all of them, the first one in front: `target_aliases`, `ground_truth_aliases`
    (the former answers) and, beside the `prompt` and `ground_truth` of a locality or portability
    entry, `aliases` (a list of texts for each prompt). They are absent where there is only one.
    A nested list such as `[["a", "b"], ["c"]]` holds two answers, the first of which has two
    names; any of the three counts. Blank texts and repeated ones are left out.

    Args:
        path: The file.
        n: How many requests to read from its beginning; all if `None`.

    Raises:
        DataError: The file is missing or does not parse, a record's form is unknown or lacks
            fields, or there are fewer than `n` requests.
    """
    path = Path(path)
    if n is not None and n < 1:
        raise DataError(f"`n={n}` must be 1 or more, or null for all records.")
    records = _read_records(path)
    requests, n_empty = requests_in(records, str(path), n)
    if not requests:
        why = f": all {len(records)} records have an empty target" if records else ""
        raise DataError(f"{path} holds no edits{why}. Give a file with at least one.")
    if n is not None and len(requests) < n:
        besides = f", besides {n_empty} with an empty target" if n_empty else ""
        raise DataError(f"`n={n}`, but {path} holds {len(requests)} edits{besides}. Lower `n`.")
    return requests


def _read_records(path: Path) -> list[Any]:
    if not is_file(path):
        raise DataError(f"`data={path}` is not a file. Give the path of a JSON file.")
    text = text_of(path, DataError)
    if path.suffix == ".jsonl":
        return [
            _parse(line, path, number)
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    records = _parse(text, path, 1)
    if not isinstance(records, list):
        kind = "null" if records is None else f"a JSON {type(records).__name__}"
        raise DataError(f"{path} holds {kind}; it must be a list of records. Give such a file.")
    return records


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json_of(text)
    except ParseError as error:
        raise DataError(f"{path}, from line {first_line}: {error}. Correct the JSON.") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}, line {line}, column {error.colno}: {error.msg}. Correct the JSON."
        ) from error
