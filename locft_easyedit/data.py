"""Editing data from files: ZsRE, CounterFact, KnowEdit, WikiBigEdit and plain request lists."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import DataError, one_message

Record = Mapping[str, Any]
Request = dict[str, Any]


def read_requests(path: str | Path, n: int | None = None) -> list[Request]:
    """Returns the requests that a JSON (a list of records) or JSON-lines file holds.

    The form of each record is told by its fields: ZsRE (`src`, `alt` or `ans`), WikiBigEdit
    (`update`, `ans`), CounterFact as published (`requested_rewrite`), WikiBio (`text`, `labels`),
    and flat or KnowEdit records (`prompt`, `target_new`). Records with an empty target are left
    out, as EasyEdit's datasets do.

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
    requests: list[Request] = []
    problems = []
    for i, record in enumerate(records):
        if n is not None and len(requests) == n:
            break
        try:
            request = _to_request(record)
        except KeyError as missing:
            problems.append(f"record {i} ({_fields(record)}) lacks {missing}. Add the field.")
            continue
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            problems.append(f"record {i} ({_fields(record)}) is not of its form: {error}.")
            continue
        if request is None:
            problems.append(
                f"record {i} ({_fields(record)}) is of no known form. It needs `prompt` and "
                "`target_new`, or the fields of ZsRE, CounterFact, KnowEdit or WikiBigEdit."
            )
        elif request["target_new"] not in ("", None):
            requests.append(request)
    if problems:
        raise DataError(one_message(f"{path}:", problems))
    if not requests:
        raise DataError(f"{path} holds no edits. Give a file with at least one record.")
    if n is not None and len(requests) < n:
        raise DataError(f"`n={n}`, but {path} holds {len(requests)} edits. Lower `n`.")
    return requests


def _read_records(path: Path) -> list[Any]:
    if not path.is_file():
        raise DataError(f"`data={path}` is not a file. Give the path of a JSON file.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Convert it.") from error
    if path.suffix == ".jsonl":
        return [
            _parse(line, path, number)
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    records = _parse(text, path, 1)
    if not isinstance(records, list):
        raise DataError(f"{path} holds {type(records).__name__}; it must be a list of records.")
    return records


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}, line {line}, column {error.colno}: {error.msg}. Correct the JSON."
        ) from error


def _fields(record: Any) -> str:
    if not isinstance(record, Mapping):
        return f"a {type(record).__name__}"
    return "fields " + (", ".join(map(str, record)) or "none")


def _to_request(record: Any) -> Request | None:
    """Returns the record as a request, or `None` if its form is unknown."""
    if not isinstance(record, Mapping):
        return None
    for field, convert in _FORMS:
        if field in record:
            return convert(record)
    return None


def _zsre(record: Record) -> Request:
    request = _request(
        record["src"],
        record["alt"] if "alt" in record else record["ans"],
        record.get("answers") or record.get("pred"),
        record.get("rephrase"),
        record.get("subject"),
    )
    _add(request, "locality", "neighborhood", record.get("loc"), record.get("loc_ans"))
    hop = record.get("portability") or {}
    _add(request, "portability", "one_hop", hop.get("New Question"), hop.get("New Answer"))
    return request


def _wikibigedit(record: Record) -> Request:
    request = _request(
        record["update"], record["ans"], None, record.get("rephrase"), record.get("subject")
    )
    _add(request, "locality", "neighborhood", record.get("loc"), record.get("loc_ans"))
    _add(request, "portability", "personas", record.get("personas"), record["ans"])
    _add(request, "portability", "mhop", record.get("mhop"), record.get("mhop_ans"))
    return request


def _counterfact_published(record: Record) -> Request:
    rewrite = record["requested_rewrite"]
    true = rewrite["target_true"]["str"]
    paraphrases = record.get("paraphrase_prompts") or [None]
    request = _request(
        rewrite["prompt"].format(rewrite["subject"]),
        rewrite["target_new"]["str"],
        true,
        paraphrases[0],
        rewrite["subject"],
    )
    neighbours = record.get("neighborhood_prompts") or []
    _add(request, "locality", "neighborhood", neighbours, [true] * len(neighbours))
    return request


def _wikibio(record: Record) -> Request:
    return _with_parts(
        _request(record["text"], record["labels"], None, None, record["concept"]), record
    )


def _flat(record: Record) -> Request:
    request = _request(
        record["prompt"],
        record["target_new"],
        record.get("ground_truth"),
        record.get("rephrase_prompt"),
        record.get("subject"),
    )
    for part, name in (("locality", "neighborhood"), ("portability", "one_hop")):
        _add(request, part, name, record.get(f"{part}_prompt"), record.get(f"{part}_ground_truth"))
    if "neighborhood_prompts" in record:
        prompts, answers = record["neighborhood_prompts"], record["neighborhood_answers"]
        _add(request, "locality", "neighborhood", prompts, answers)
    return _with_parts(request, record)


_FORMS: tuple[tuple[str, Callable[[Record], Request]], ...] = (
    ("src", _zsre),
    ("update", _wikibigedit),
    ("requested_rewrite", _counterfact_published),
    ("text", _wikibio),
    ("prompt", _flat),
)


def _request(prompt: Any, target: Any, truth: Any, rephrase: Any, subject: Any) -> Request:
    request: Request = {
        "prompt": prompt,
        "target_new": _first(target),
        "ground_truth": None if truth is None else _first(truth),
        "locality": {},
        "portability": {},
    }
    if rephrase:
        request["rephrase_prompt"] = rephrase
    if subject is not None:
        request["subject"] = subject
    return request


def _with_parts(request: Request, record: Record) -> Request:
    """Adds `locality` and `portability`, in KnowEdit's form or already in EasyEdit's."""
    for part in ("locality", "portability"):
        for name, entries in (record.get(part) or {}).items():
            if isinstance(entries, Mapping):
                _add(request, part, name, entries["prompt"], entries["ground_truth"])
            else:
                prompts = [entry["prompt"] for entry in entries]
                answers = [_first(entry["ground_truth"]) for entry in entries]
                _add(request, part, name, prompts, answers)
    return request


def _add(request: Request, part: str, name: str, prompts: Any, answers: Any) -> None:
    """Adds prompts whose answer is not blank; EasyEdit's scripts leave out the others too."""
    if not prompts or answers is None:
        return
    prompt_list = [prompts] if isinstance(prompts, str) else list(prompts)
    answer_list = [answers] if isinstance(answers, str) else list(answers)
    pairs = [
        (prompt, _first(answer))
        for prompt, answer in zip(prompt_list, answer_list, strict=True)
        if _first(answer) is not None and str(_first(answer)).strip()
    ]
    if pairs:
        request[part][name] = {
            "prompt": [prompt for prompt, _ in pairs],
            "ground_truth": [answer for _, answer in pairs],
        }


def _first(value: Any) -> Any:
    """Returns the first of nested lists of aliases; EasyEdit counts only that one."""
    while isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    return value
