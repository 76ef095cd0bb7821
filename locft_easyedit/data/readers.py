"""Editing data from files: ZsRE, CounterFact, KnowEdit, WikiBigEdit and plain request lists."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError, one_message
from ..utils.parsing import ParseError, is_file, json_of, text_of

Record = Mapping[str, Any]
Request = dict[str, Any]
_MOST_SHOWN = 500  # characters of a record in a message
_MOST_NAMED = 10  # records in a message
_LEFT_OUT = "left out"  # key of what a request lacks of its record, until it is told

logger = logging.getLogger(__name__)


def read_requests(path: str | Path, n: int | None = None) -> list[Request]:
    """Returns the requests that a JSON (a list of records) or JSON-lines file holds.

    The form of each record is told by its fields: ZsRE (`src`, `alt` or `ans`), WikiBigEdit
    (`update`, `ans`), CounterFact as published (`requested_rewrite`), WikiBio (`text`, `labels`),
    and flat or KnowEdit records (`prompt`, `target_new`). Records with an empty target are left
    out, as EasyEdit's datasets do, and so are locality and portability prompts without an answer; a
    warning counts and names them. A field that is NaN counts as missing.

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
    requests: list[Request] = []
    problems = []
    left_out: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        if n is not None and len(requests) == n:
            break
        try:
            request = _to_request(record)
        except KeyError as missing:
            nan = missing.args[0] in record
            lacks = f"has no text as {missing}: NaN" if nan else f"lacks {missing}. Add the field"
            problems.append(f"record {i} ({_fields(record)}) {lacks}.")
            continue
        except (TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
            problems.append(
                f"record {i} ({_fields(record)}) is not of its form: {str(error)[:_MOST_SHOWN]}."
            )
            continue
        if request is None:
            problems.append(
                f"record {i} ({_fields(record)}) is of no known form. It needs `prompt` and "
                "`target_new`, or the fields of ZsRE, CounterFact, KnowEdit or WikiBigEdit."
            )
            continue
        for what in request.pop(_LEFT_OUT, ()):
            left_out.setdefault(what, []).append(i)
        if request["target_new"] in ("", None):
            left_out.setdefault("edits with an empty target", []).append(i)
        else:
            requests.append(request)
    if problems:
        raise DataError(one_message(f"{path}:", problems))
    for what, numbers in left_out.items():
        logger.warning("%s: %d %s are left out (%s).", path, len(numbers), what, _named(numbers))
    if not requests:
        why = f": all {len(records)} records have an empty target" if records else ""
        raise DataError(f"{path} holds no edits{why}. Give a file with at least one.")
    if n is not None and len(requests) < n:
        empty = len(left_out.get("edits with an empty target", ()))
        besides = f", besides {empty} with an empty target" if empty else ""
        raise DataError(f"`n={n}`, but {path} holds {len(requests)} edits{besides}. Lower `n`.")
    return requests


def _named(numbers: list[int]) -> str:
    """Returns the records of these numbers, each once, for a message."""
    distinct = list(dict.fromkeys(numbers))
    more = len(distinct) - _MOST_NAMED
    names = ", ".join(map(str, distinct[:_MOST_NAMED]))
    return f"record{'s' * (len(distinct) > 1)} {names}{f' and {more} more' if more > 0 else ''}"


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


def _fields(record: Any) -> str:
    if not isinstance(record, Mapping):
        return f"a {type(record).__name__}"
    names = ", ".join(map(str, record)) or "none"
    return "fields " + (names if len(names) <= _MOST_SHOWN else names[:_MOST_SHOWN] + "...")


def _to_request(record: Any) -> Request | None:
    """Returns the record as a request, or `None` if its form is unknown."""
    if not isinstance(record, Mapping):
        return None
    # Tables that pandas has written mark what is missing with NaN, which equals nothing.
    record = {key: value for key, value in record.items() if value == value}
    for field, convert in _FORMS:
        if field in record:
            request = convert(record)
            if record.get("rewordings"):
                request["rewordings"] = record["rewordings"]  # trained beside the prompt
            return request
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
        record["update"],
        record["ans"],
        record.get("ground_truth"),
        record.get("rephrase"),
        record.get("subject"),
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
        # No `str.format`: what a file says is never evaluated.
        rewrite["prompt"].replace("{}", rewrite["subject"]),
        rewrite["target_new"]["str"],
        true,
        paraphrases[0],
        rewrite["subject"],
    )
    neighbours = record.get("neighborhood_prompts") or []
    _add(request, "locality", "neighborhood", neighbours, [true] * len(neighbours))
    return request


def _wikibio(record: Record) -> Request:
    truth = record.get("ground_truth")
    request = _request(record["text"], record["labels"], truth, None, record["concept"])
    return _with_parts(request, record)


def _flat(record: Record) -> Request:
    request = _request(
        record["prompt"],
        _with_aliases(record["target_new"], record.get("target_aliases")),
        _with_aliases(record.get("ground_truth"), record.get("ground_truth_aliases")),
        record.get("rephrase_prompt") or record.get("rephrase"),
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
    ("prompt", _flat),
    ("text", _wikibio),
)


def _request(prompt: Any, target: Any, truth: Any, rephrase: Any, subject: Any) -> Request:
    request: Request = {
        "prompt": prompt,
        "target_new": _first(target),
        "ground_truth": None if truth is None else _first(truth),
        "locality": {},
        "portability": {},
    }
    for key, value in (("target_aliases", target), ("ground_truth_aliases", truth)):
        accepted = _accepted(value)
        if len(accepted) > 1:
            request[key] = accepted
    if rephrase:
        request["rephrase_prompt"] = rephrase
    if subject is not None:
        request["subject"] = subject
    return request


def _with_parts(request: Request, record: Record) -> Request:
    """Adds `locality` and `portability`, in KnowEdit's form or already in EasyEdit's."""
    for part in ("locality", "portability"):
        for name, entries in (record.get(part) or {}).items():
            if entries is None:
                continue
            if isinstance(entries, Mapping):
                prompts, answers = entries["prompt"], entries["ground_truth"]
                if "aliases" in entries:
                    truths = [answers] if isinstance(answers, str) else answers
                    pairs = zip(truths, entries["aliases"], strict=True)
                    answers = [_with_aliases(*pair) for pair in pairs]
            else:
                prompts = [entry["prompt"] for entry in entries]
                answers = [entry["ground_truth"] for entry in entries]
            _add(request, part, name, prompts, answers)
    return request


def _add(request: Request, part: str, name: str, prompts: Any, answers: Any) -> None:
    """Adds prompts whose first answer is not blank; EasyEdit's scripts leave out the others too.

    Args:
        request: The request.
        part: `locality` or `portability`.
        name: The entry's name.
        prompts: A text, or a list of N.
        answers: All answers to the one prompt, or a list of N with the answers to each.
    """
    if not prompts or answers is None:
        return
    one = isinstance(prompts, str)
    prompt_list = [prompts] if one else list(prompts)
    answer_list = [answers] if one or isinstance(answers, str) else list(answers)
    if len(prompt_list) != len(answer_list):
        raise ValueError(
            f"`{name}` of its {part} has {len(prompt_list)} prompts, but {len(answer_list)} answers"
        )
    pairs = [
        (prompt, answer)
        for prompt, answer in zip(prompt_list, answer_list, strict=True)
        if _first(answer) is not None and str(_first(answer)).strip()
    ]
    lacking = len(prompt_list) - len(pairs)
    if lacking:
        request.setdefault(_LEFT_OUT, []).extend([f"{part} prompts without an answer"] * lacking)
    if not pairs:
        return
    entry = {
        "prompt": [prompt for prompt, _ in pairs],
        "ground_truth": [_first(answer) for _, answer in pairs],
    }
    aliases = [_accepted(answer) for _, answer in pairs]
    if any(len(accepted) > 1 for accepted in aliases):
        entry["aliases"] = aliases
    request[part][name] = entry


def _first(value: Any) -> Any:
    """Returns the first of nested lists of aliases; EasyEdit counts only that one."""
    while isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    return value


def _accepted(value: Any) -> list[str]:
    """Returns the distinct texts of nested lists of aliases, without blank ones."""
    distinct: dict[str, str] = {}
    for text in _texts(value):
        if text.strip():
            distinct.setdefault(text.strip(), text)
    return list(distinct.values())


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)
    elif value is not None and value == value:  # NaN is no answer
        yield str(value)


def _with_aliases(value: Any, aliases: Any) -> Any:
    """Returns an answer with the aliases that an earlier reading put beside it."""
    return value if aliases is None else [value, aliases]
