"""EasyEdit's request dictionaries, checked, and turned into the edits to train."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import RequestError, one_message
from ..utils.parsing import encodable, shown
from ..utils.text import as_word

logger = logging.getLogger(__name__)

_PART_KEYS = ("prompt", "ground_truth")
# Arguments whose entries have another name in a request.
_KEYS = {"prompts": "prompt", "rephrase_prompts": "rephrase_prompt", "loc_prompts": "loc_prompt"}
_NAMED = 3  # edits that a message names


@dataclass(frozen=True, slots=True)
class Edit:
    """One prompt and the target to train for it.

    Attributes:
        prompt: The prompt.
        target: The target.
        request: Index of the request in the user's list.
        rewordings: Other prompts that ask the same, and are trained beside it.
    """

    prompt: str
    target: str
    request: int
    rewordings: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditSet:
    """The distinct edits of a list of requests.

    Attributes:
        edits: What is trained, in the order of the requests.
        n_requests: Requests that were given.
        n_merged: Requests that repeat another one's prompt and target.
        n_conflicts: Prompts that come with more than one target.
        n_replaced: Requests left out because `on_conflict="last"` keeps a later one.
        n_giving_away: Rewordings left out because they hold their target.
        edit_of_request: For each request the index of its edit, or `None` if it was left out.
    """

    edits: list[Edit]
    n_requests: int
    edit_of_request: list[int | None]
    n_merged: int = 0
    n_conflicts: int = 0
    n_replaced: int = 0
    n_giving_away: int = 0

    def indices_of(self, requests: Iterable[int] | None) -> list[int]:
        """Returns the indices of the edits of these requests, ascending; of all if `None`."""
        if requests is None:
            return list(range(len(self.edits)))
        found = {self.edit_of_request[i] for i in requests}
        return sorted(i for i in found if i is not None)

    def named(self, indices: Sequence[int]) -> str:
        """Returns the first of these edits, by request, as a text for a message."""
        found = [self.edits[i] for i in indices[:_NAMED]]
        text = "; ".join(f"request {e.request}: {e.prompt!r} -> {e.target!r}" for e in found)
        return f"{text}; and {len(indices) - _NAMED} more" if len(indices) > _NAMED else text


def make_requests(
    prompts: str | Sequence[str],
    target_new: str | Sequence[str],
    ground_truth: str | Sequence[str | None] | None = None,
    target_neg: str | Sequence[str] | None = None,
    rephrase_prompts: str | Sequence[str] | None = None,
    locality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
    portability_inputs: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    subject: str | Sequence[str] | None = None,
    loc_prompts: str | Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Returns EasyEdit's request dictionaries for N prompts and N targets.

    The same dictionaries as EasyEdit's `_prepare_requests`, except that a subject need not be in
    its prompt (LocFT-BF does not use it), that it is put in place of `{}` in a prompt, and that
    the arguments are left as they were.

    Args:
        prompts: N prompts, or one.
        target_new: N targets, or one.
        ground_truth: N former answers (or `None` for each).
        target_neg: N targets to move away from, kept for other methods.
        rephrase_prompts: N rewordings, for evaluation only.
        locality_inputs: Name -> `prompt` and `ground_truth`, each a list of N; an entry is a text,
            a list of texts, or `None`.
        portability_inputs: As `locality_inputs`.
        subject: N subjects.
        loc_prompts: Prompts that other methods regularise with; repeated up to N.

    Raises:
        RequestError: Lists of different lengths (all of them in one error).
    """
    given = {
        "prompts": prompts,
        "target_new": target_new,
        "ground_truth": ground_truth,
        "target_neg": target_neg,
        "subject": subject,
        "rephrase_prompts": rephrase_prompts,
        "loc_prompts": loc_prompts,
    }
    for part, inputs in (("locality", locality_inputs), ("portability", portability_inputs)):
        if inputs is not None and not isinstance(inputs, Mapping):
            raise RequestError(
                f"{part}_inputs is a {type(inputs).__name__}; it must be a dictionary: a name, and "
                "for it `prompt` and `ground_truth`, each a list."
            )
        for name, fields in (inputs or {}).items():
            for key in _PART_KEYS:
                value = fields.get(key) if isinstance(fields, Mapping) else None
                given[f"{part}_inputs[{name!r}][{key!r}]"] = value
    columns = _lists(given)
    n = len(columns["prompts"])
    if "loc_prompts" in columns:
        repeated = columns["loc_prompts"]
        columns["loc_prompts"] = (repeated * -(-n // max(len(repeated), 1)))[:n]
    columns.setdefault("ground_truth", [None] * n)
    problems = [f"{name}: {len(values)}" for name, values in columns.items() if len(values) != n]
    problems += [f"{name}: missing" for name in given if "_inputs[" in name and name not in columns]
    if problems:
        raise RequestError(
            one_message(f"{n} prompts, but lists of other lengths. Give one entry each:", problems)
        )

    requests: list[dict[str, Any]] = []
    for i in range(n):
        request: dict[str, Any] = {
            _KEYS.get(name, name): values[i]
            for name, values in columns.items()
            if "_inputs[" not in name
        }
        for part, inputs in (("locality", locality_inputs), ("portability", portability_inputs)):
            request[part] = {}
            for name in inputs or {}:
                prompt, truth = (columns[f"{part}_inputs[{name!r}][{k!r}]"][i] for k in _PART_KEYS)
                # EasyEdit's scripts leave an empty list where a record has no such prompt.
                if prompt not in (None, []):
                    request[part][name] = {"prompt": prompt, "ground_truth": truth}
        requests.append(request)
    return [with_subject(request) for request in requests]


def _lists(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns the arguments that are given as lists; a text is a list of one.

    Raises:
        RequestError: An argument is neither a text nor a sequence of entries.
    """
    lists: dict[str, list[Any]] = {}
    problems = []
    for name, value in given.items():
        if isinstance(value, str):
            lists[name] = [value]
        elif isinstance(value, Iterable) and not isinstance(value, (Mapping, bytes)):
            lists[name] = list(value)
        elif value is not None or name in ("prompts", "target_new"):
            kind = type(value).__name__
            problems.append(f"{name} is a {kind}. Give a text or a list of texts.")
    if problems:
        raise RequestError(one_message("The arguments cannot be read:", problems))
    return lists


def distinct_edits(
    requests: Sequence[Mapping[str, Any]], on_conflict: str | None = "train"
) -> EditSet:
    """Returns the edits to train: duplicates merged, conflicts treated as `on_conflict` says.

    Args:
        requests: Dictionaries with `prompt` (see `filled_in`) and `target_new`, and `rewordings` (a
            list of prompts that ask the same) where some are to be trained beside it; other keys
            are left to evaluation.
        on_conflict: `train` keeps all targets of a prompt, as published; `error` stops; `last`
            keeps the latest target of a prompt; `None` is `train` without a warning.

    Raises:
        RequestError: No requests, fields that are missing, blank or no text, or conflicts with
            `on_conflict="error"`.
    """
    if isinstance(requests, (str, bytes, Mapping)) or not isinstance(requests, Sequence):
        raise RequestError(
            f"requests is a {type(requests).__name__}; it must be a list of dictionaries with "
            "`prompt` and `target_new`. Make one with `make_requests(prompts, targets)`."
        )
    if not requests:
        raise RequestError("The list of requests is empty. Give at least one edit.")
    requests = [with_subject(request) for request in requests]
    problems = [p for i, request in enumerate(requests) for p in _request_problems(i, request)]
    if problems:
        raise RequestError(one_message("The requests cannot be trained:", problems))

    # "Paris" and " Paris" are one target: training puts the space there.
    pairs = [(r["prompt"], with_leading_space(r["target_new"])) for r in requests]
    edits: dict[tuple[str, str], Edit] = {}
    n_giving_away = 0
    for i, pair in enumerate(pairs):
        before = edits.get(pair)
        if on_conflict == "last":
            edits.pop(pair, None)  # the latest mention decides which target is the last
        given = requests[i].get("rewordings") or ()
        kept = [text for text in given if not gives_away(text, *pair)]
        n_giving_away += len(given) - len(kept)
        edit = before if before is not None and on_conflict != "last" else None
        edit = edit or Edit(pair[0], requests[i]["target_new"], request=i)
        former = () if before is None else before.rewordings
        texts = (text for text in (*former, *kept) if text != edit.prompt)
        edits[pair] = replace(edit, rewordings=tuple(dict.fromkeys(texts)))
    n_merged = len(requests) - len(edits)

    by_prompt: dict[str, list[Edit]] = {}
    for edit in edits.values():
        by_prompt.setdefault(edit.prompt, []).append(edit)
    conflicts = [group for group in by_prompt.values() if len(group) > 1]
    kept = list(edits.values())
    if conflicts and on_conflict == "error":
        raise RequestError(
            one_message(
                f"{len(conflicts)} prompts come with different targets. Keep one target each, or "
                "set `on_conflict` to `train` or `last`:",
                [_describe(group) for group in conflicts],
            )
        )
    if conflicts and on_conflict == "last":
        kept = sorted((g[-1] for g in by_prompt.values()), key=lambda edit: edit.request)
    elif conflicts and on_conflict == "train":
        logger.warning(
            "%d prompts come with different targets; all are trained, as published, and cannot "
            "all be learned. The first: %s. `on_conflict: last` keeps the latest of each.",
            len(conflicts),
            _describe(conflicts[0]),
        )
    if n_giving_away:
        logger.warning(
            "%d rewordings hold the target that they ask for, and are left out.", n_giving_away
        )
    if n_merged:
        logger.info("%d requests repeat another one and are trained once.", n_merged)
    index = {pairs[edit.request]: i for i, edit in enumerate(kept)}
    return EditSet(
        kept,
        len(requests),
        [index.get(pair) for pair in pairs],
        n_merged,
        len(conflicts),
        len(edits) - len(kept),
        n_giving_away,
    )


def filled_in(prompt: Any, subject: Any) -> Any:
    """Returns the prompt with the subject in place of `{}`, as ROME writes its prompts.

    A prompt that names its subject, and one with other braces than one `{}`, is left alone: the
    braces are its own.
    """
    if not isinstance(prompt, str) or not isinstance(subject, str) or not subject.strip():
        return prompt
    if prompt.count("{}") != 1 or subject in prompt:
        return prompt
    return prompt.replace("{}", subject)


def with_subject(request: Any) -> Any:
    """Returns a request with its prompts `filled_in`; one that needs nothing is the same object."""
    if not isinstance(request, Mapping) or not isinstance(request.get("subject"), str):
        return request
    changed = {
        key: prompt
        for key in ("prompt", "rephrase_prompt")
        if (prompt := filled_in(request.get(key), request.get("subject"))) != request.get(key)
    }
    return {**request, **changed} if changed else request


def gives_away(text: str, prompt: str, target: str) -> bool:
    """Returns whether a rewording holds the target, as whole words, and the prompt does not."""
    target = target.strip().casefold()
    if not target:
        return False
    word = re.compile(as_word(target))
    return bool(word.search(text.casefold())) and not word.search(prompt.casefold())


def with_leading_space(target: str) -> str:
    """Returns the target with one space before it, unless it begins with one."""
    return target if target.startswith(" ") else " " + target


def _request_problems(i: int, request: Any) -> list[str]:
    if not isinstance(request, Mapping):
        return [f"request {i} is a {type(request).__name__}, not a dictionary."]
    problems = []
    for key in ("prompt", "target_new"):
        value = request.get(key)
        if key not in request:
            problems.append(f"request {i} has no `{key}`. Add it.")
        elif not isinstance(value, str):
            problems.append(f"request {i}: `{key}={shown(value)}` is not a text. Give one text.")
        elif not value.strip():
            problems.append(
                f"request {i}: `{key}={shown(value)}` is blank. Fill it in or drop the request."
            )
        elif not encodable(value):
            problems.append(
                f"request {i}: `{key}={shown(value)}` holds a lone surrogate. Clean the text."
            )
    rewordings = request.get("rewordings")
    if rewordings is not None and not isinstance(rewordings, (list, tuple)):
        problems.append(
            f"request {i}: `rewordings={shown(rewordings)}` is not a list. Give a list of prompts."
        )
    elif rewordings:
        problems += [
            f"request {i}: `rewordings` has {shown(text)}. Each must be a text that is not blank."
            for text in rewordings
            if not isinstance(text, str) or not text.strip() or not encodable(text)
        ]
    return problems


def _describe(group: list[Edit]) -> str:
    targets = ", ".join(f"{shown(edit.target)} (request {edit.request})" for edit in group[:10])
    more = f" and {len(group) - 10} more" if len(group) > 10 else ""
    return f"{shown(group[0].prompt)} -> {targets}{more}"
