"""Records of the published data sets, and of EasyEdit's data set objects, as requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import DataError, one_message
from .request_parts import (
    LEFT_OUT,
    Record,
    Request,
    add_entries,
    add_parts,
    add_prompts,
    first_text,
    request_of,
    with_aliases,
)

_MOST_SHOWN = 500  # characters of a record in a message
_MOST_NAMED = 10  # records in a message
_EMPTY = "edits with an empty target"

logger = logging.getLogger(__name__)


def as_requests(records: Any) -> Any:
    """Returns EasyEdit's requests for a data set object, or for records in a form that is read.

    Args:
        records: EasyEdit's requests, which are returned as they are; else a list, or anything with
            a length and items such as EasyEdit's `CounterFactDataset`, of records in one of the
            forms of `read_requests`, or of those that EasyEdit's data sets make of them.

    Raises:
        DataError: A record lacks fields.
    """
    if isinstance(records, (str, bytes, Mapping)) or not hasattr(records, "__getitem__"):
        return records  # whoever trains them says what they should be
    if not isinstance(records, Sequence):
        records = [records[i] for i in range(len(records))]
    raw = [isinstance(record, Mapping) and _is_raw(record) for record in records]
    if not any(raw):
        return records
    if all(raw):
        return requests_in(records, "The records")[0]
    found = [
        requests_in([record], f"Record {i}")[0] if is_raw else [record]
        for i, (record, is_raw) in enumerate(zip(records, raw, strict=True))
    ]
    return [request for requests in found for request in requests]


def _is_raw(record: Record) -> bool:
    """Returns whether a record is none of EasyEdit's requests, but in a form that is read."""
    if "prompt" not in record or not isinstance(record.get("target_new"), str):
        forms = {field for field, _ in _FORMS} - {"prompt"}
        return not set(record).isdisjoint({*_TARGETS, *forms})
    parts = [record.get(part) for part in ("locality", "portability")]
    if any(part is not None and not isinstance(part, Mapping) for part in parts):
        return True
    nested = [entry for part in parts for entry in (part or {}).values()]
    flat = any(key in record for key in (*_FLAT_PARTS, *_DATASET_PARTS, "rephrase"))
    return (flat and not nested) or any(not isinstance(entry, Mapping) for entry in nested)


def requests_in(
    records: Sequence[Any], source: str, n: int | None = None
) -> tuple[list[Request], int]:
    """Returns the requests of the records, at most `n`, and how many had an empty target.

    What is left out is counted and named in a warning.

    Args:
        records: The records.
        source: What they are called in messages.
        n: Requests that are wanted; all if `None`.

    Raises:
        DataError: Records are of no known form, or lack fields.
    """
    requests: list[Request] = []
    problems = []
    left_out: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        if n is not None and len(requests) >= n:
            break
        try:
            found = _to_requests(record)
        except KeyError as missing:
            value = record.get(missing.args[0])
            nan = value != value
            lacks = f"has no text as {missing}: NaN" if nan else f"lacks {missing}. Add the field"
            problems.append(f"record {i} ({_fields(record)}) {lacks}.")
            continue
        except (TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
            problems.append(
                f"record {i} ({_fields(record)}) is not of its form: {str(error)[:_MOST_SHOWN]}."
            )
            continue
        if found is None:
            problems.append(
                f"record {i} ({_fields(record)}) is of no known form. It needs `prompt` and "
                "`target_new`, `question` and `answer`, or the fields of ZsRE, CounterFact, "
                "MQuAKE, KnowEdit or WikiBigEdit."
            )
            continue
        for request in found:
            for what in request.pop(LEFT_OUT, ()):
                left_out.setdefault(what, []).append(i)
            if request["target_new"] in ("", None):
                left_out.setdefault(_EMPTY, []).append(i)
            else:
                requests.append(request)
    if problems:
        raise DataError(one_message(f"{source}:", problems))
    for what, numbers in left_out.items():
        logger.warning("%s: %d %s are left out (%s).", source, len(numbers), what, _named(numbers))
    n_empty = len(left_out.get(_EMPTY, ()))
    return (requests if n is None else requests[:n]), n_empty


def _named(numbers: list[int]) -> str:
    """Returns the records of these numbers, each once, for a message."""
    distinct = list(dict.fromkeys(numbers))
    more = len(distinct) - _MOST_NAMED
    names = ", ".join(map(str, distinct[:_MOST_NAMED]))
    return f"record{'s' * (len(distinct) > 1)} {names}{f' and {more} more' if more > 0 else ''}"


def _fields(record: Any) -> str:
    if not isinstance(record, Mapping):
        return f"a {type(record).__name__}"
    names = ", ".join(map(str, record)) or "none"
    return "fields " + (names if len(names) <= _MOST_SHOWN else names[:_MOST_SHOWN] + "...")


def _to_requests(record: Any) -> list[Request] | None:
    """Returns the record as requests, or `None` if its form is unknown."""
    if not isinstance(record, Mapping):
        return None
    # Tables that pandas has written mark what is missing with NaN, which equals nothing.
    record = {key: value for key, value in record.items() if value == value}
    for field, convert in _FORMS:
        if field in record:
            found = convert(record)
            requests = found if isinstance(found, list) else [found]
            if record.get("rewordings"):
                for request in requests:
                    request["rewordings"] = record["rewordings"]  # trained beside the prompt
            return requests
    return None


def _zsre(record: Record) -> Request:
    request = request_of(
        record["src"],
        record["alt"] if "alt" in record else record["ans"],
        record.get("answers") or record.get("pred"),
        record.get("rephrase"),
        record.get("subject"),
    )
    add_prompts(request, "locality", "neighborhood", record.get("loc"), record.get("loc_ans"))
    hop = record.get("portability") or {}
    add_prompts(request, "portability", "one_hop", hop.get("New Question"), hop.get("New Answer"))
    return request


def _wikibigedit(record: Record) -> Request:
    request = request_of(
        record["update"],
        record["ans"],
        record.get("ground_truth"),
        record.get("rephrase"),
        record.get("subject"),
    )
    add_prompts(request, "locality", "neighborhood", record.get("loc"), record.get("loc_ans"))
    add_prompts(request, "portability", "personas", record.get("personas"), record["ans"])
    add_prompts(request, "portability", "mhop", record.get("mhop"), record.get("mhop_ans"))
    return request


def _rewrites(record: Record) -> Request | list[Request]:
    """CounterFact has one `requested_rewrite` a record, MQuAKE a list of them."""
    rewrites = record["requested_rewrite"]
    if isinstance(rewrites, list):
        return _mquake(record, rewrites)
    request = _rewrite(rewrites, first_text(record.get("paraphrase_prompts")))
    neighbours = record.get("neighborhood_prompts") or []
    truths = [request["ground_truth"]] * len(neighbours)
    add_prompts(request, "locality", "neighborhood", neighbours, truths)
    return request


def _mquake(record: Record, rewrites: list[Record]) -> list[Request]:
    requests = [_rewrite(one, one.get("question")) for one in rewrites]
    if requests:
        hops = _list_of(record.get("questions"))
        answer = with_aliases(record.get("new_answer"), record.get("new_answer_alias"))
        add_prompts(requests[-1], "portability", "multi_hop", hops, [answer] * len(hops))
        add_prompts(
            requests[-1], "locality", "neighborhood", record.get("loc"), record.get("loc_ans")
        )
    return requests


def _rewrite(rewrite: Record, rephrase: Any) -> Request:
    true, new, subject = rewrite["target_true"], rewrite["target_new"], rewrite["subject"]
    return request_of(rewrite["prompt"].replace("{}", subject), new, true, rephrase, subject)


def _wikibio(record: Record) -> Request:
    truth = record.get("ground_truth")
    request = request_of(record["text"], record["labels"], truth, None, record["concept"])
    return add_parts(request, record)


def _flat(record: Record) -> Request:
    request = request_of(
        record["prompt"],
        with_aliases(_target(record), record.get("target_aliases")),
        with_aliases(_former(record), record.get("ground_truth_aliases")),
        record.get("rephrase_prompt") or record.get("rephrase"),
        record.get("subject"),
    )
    for key, (part, name, answers) in _FLAT_PARTS.items():
        if record.get(key):
            add_prompts(request, part, name, record[key], record[answers])
    for key, (part, name) in _DATASET_PARTS.items():
        add_entries(request, part, name, record.get(key))
    return add_parts(request, record)


def _question(record: Record) -> Request:
    if not set(_TARGETS) & set(record):
        raise KeyError("answer")
    return _flat({**record, "prompt": record["question"]})


def _target(record: Record) -> Any:
    """Returns the new answer, whatever the record calls it.

    Raises:
        KeyError: There is none.
    """
    return record[next((key for key in _TARGETS if key in record), _TARGETS[0])]


def _former(record: Record) -> Any:
    return next((record[key] for key in _FORMER if record.get(key) is not None), None)


_TARGETS = ("target_new", "target", "answer_new", "new_answer", "answer", "answers", "ans")
_FORMER = ("ground_truth", "target_old", "target_true", "answer_true")
# Prompts in a field of their own -> part, name, and the field of their answers.
_FLAT_PARTS = {
    "locality_prompt": ("locality", "neighborhood", "locality_ground_truth"),
    "portability_prompt": ("portability", "one_hop", "portability_ground_truth"),
    "neighborhood_prompts": ("locality", "neighborhood", "neighborhood_answers"),
    "loc": ("locality", "neighborhood", "loc_ans"),
    "portability_personas": ("portability", "personas", "target_new"),
    "portability_hop": ("portability", "mhop", "portability_hop_ans"),
}
# The names that EasyEdit's KnowEditDataset gives to what a file has under `locality` and so on.
_DATASET_PARTS = {
    "locality_rs": ("locality", "Relation_Specificity"),
    "locality_f": ("locality", "Forgetfulness"),
    "portability_r": ("portability", "Reasoning"),
    "portability_s": ("portability", "Subject_Aliasing"),
    "portability_l": ("portability", "Logical_Generalization"),
}

_FORMS: tuple[tuple[str, Callable[[Record], Request | list[Request]]], ...] = (
    ("src", _zsre),
    ("update", _wikibigedit),
    ("requested_rewrite", _rewrites),
    ("prompt", _flat),
    ("text", _wikibio),
    ("question", _question),
)


def _list_of(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
