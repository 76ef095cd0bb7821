"""The parts of a request, from what data sets hold: texts, lists of accepted answers, entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..utils.parsing import shown
from .requests import filled_in

Record = Mapping[str, Any]
Request = dict[str, Any]
LEFT_OUT = "left out"  # key of what a request lacks of its record, until it is told
# What a list of entries under `locality` or `portability` itself is called, as with CKnowEdit.
_LIST_NAMES = {"locality": "loc_hop", "portability": "por_hop"}


def request_of(prompt: Any, target: Any, truth: Any, rephrase: Any, subject: Any) -> Request:
    """Returns a request without locality and portability.

    Args:
        prompt: The prompt; `{}` in it is the subject's place.
        target: The new answer, or nested lists of its accepted texts.
        truth: The former answer, in the same forms, or `None`.
        rephrase: A rewording, or a list whose first counts, or `None`.
        subject: The subject, or a list whose first counts, or `None`.
    """
    subject = first_text(subject)
    rephrase = first_text(rephrase)
    request: Request = {
        "prompt": filled_in(prompt, subject),
        "target_new": first_text(target),
        "ground_truth": None if truth is None else first_text(truth),
        "locality": {},
        "portability": {},
    }
    for key, value in (("target_aliases", target), ("ground_truth_aliases", truth)):
        accepted = accepted_texts(value)
        if len(accepted) > 1:
            request[key] = accepted
    if rephrase:
        request["rephrase_prompt"] = filled_in(rephrase, subject)
    if subject is not None:
        request["subject"] = subject
    return request


def add_parts(request: Request, record: Record) -> Request:
    """Adds `locality` and `portability`, in KnowEdit's form or already in EasyEdit's."""
    for part in ("locality", "portability"):
        named = record.get(part) or {}
        if isinstance(named, list):
            # QAEdit's entries have ZsRE's fields.
            zsre = any("loc" in entry for entry in named)
            named = {"neighborhood" if zsre else _LIST_NAMES[part]: named}
        elif isinstance(named, str):  # WikiBigEditDataset's; its answer has a field of its own
            add_prompts(request, part, "neighborhood", named, record[f"{part}_ans"])
            continue
        elif not isinstance(named, Mapping):
            raise TypeError(f"`{part}={shown(named)}` is neither names with entries nor a list")
        for name, entries in named.items():
            add_entries(request, part, name, entries)
    return request


def add_entries(request: Request, part: str, name: str, entries: Any) -> None:
    """Adds entries: one with lists, as EasyEdit has them, or a list of prompts with answers."""
    if isinstance(entries, Mapping):
        prompts, answers = entries["prompt"], entries["ground_truth"]
        if "aliases" in entries:
            truths = [answers] if isinstance(answers, str) else answers
            pairs = zip(truths, entries["aliases"], strict=True)
            answers = [with_aliases(*pair) for pair in pairs]
        add_prompts(request, part, name, prompts, answers)
        return
    # CKnowEdit has empty entries where there is no prompt.
    found = [_prompt_and_answers(entry) for entry in entries or () if entry]
    prompts, answers = [prompt for prompt, _ in found], [answer for _, answer in found]
    add_prompts(request, part, name, prompts, answers)


def _prompt_and_answers(entry: Record) -> tuple[Any, Any]:
    """Returns an entry's prompt and answers; QAEdit calls them `loc` and `loc_ans`."""
    if "loc" in entry:
        return entry["loc"], entry["loc_ans"]
    return entry["prompt"], entry["answer" if "ground_truth" not in entry else "ground_truth"]


def add_prompts(request: Request, part: str, name: str, prompts: Any, answers: Any) -> None:
    """Adds prompts whose first answer is not blank; EasyEdit's scripts leave out the others too.

    Those are noted in the request under `LEFT_OUT`, for whoever reads the file to tell.

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
        if str(first_text(answer) or "").strip()
    ]
    lacking = len(prompt_list) - len(pairs)
    if lacking:
        request.setdefault(LEFT_OUT, []).extend([f"{part} prompts without an answer"] * lacking)
    if not pairs:
        return
    entry = {
        "prompt": [prompt for prompt, _ in pairs],
        "ground_truth": [first_text(answer) for _, answer in pairs],
    }
    aliases = [accepted_texts(answer) for _, answer in pairs]
    if any(len(accepted) > 1 for accepted in aliases):
        entry["aliases"] = aliases
    request[part][name] = entry


def first_text(value: Any) -> Any:
    """Returns the first of nested lists of aliases; EasyEdit counts only that one.

    An empty list has no answer, and the next one counts.
    """
    return next(_leaves(value), "")


def accepted_texts(value: Any) -> list[str]:
    """Returns the distinct texts of nested lists of aliases, without blank ones."""
    distinct: dict[str, str] = {}
    for leaf in _leaves(value):
        text = "" if leaf is None else str(leaf)
        if text.strip():
            distinct.setdefault(text.strip(), text)
    return list(distinct.values())


def _leaves(value: Any) -> Iterator[Any]:
    """Yields the answers in nested lists; ROME writes one as `{"str": answer}`."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    elif value is None or value == value:  # NaN is no answer
        yield value["str"] if isinstance(value, Mapping) else value


def with_aliases(value: Any, aliases: Any) -> Any:
    """Returns an answer with the aliases that an earlier reading put beside it."""
    return value if aliases is None else [value, aliases]
