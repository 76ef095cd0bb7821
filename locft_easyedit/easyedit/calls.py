"""How EasyEdit's editor methods are called: columns or requests, and keywords that are known."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from ..data.record_forms import as_requests
from ..data.requests import make_requests, with_subject
from ..errors import RequestError, one_message
from ..utils.parsing import did_you_mean

Request = Mapping[str, Any]
Returned = tuple[Any, Any, dict[str, torch.Tensor]]

# What EasyEdit's editors read from their `**kwargs`; those of other methods change nothing here.
KEYWORDS = frozenset(
    [
        "requests",
        "subject",
        "loc_prompts",
        "test_generation",
        "eval_metric",
        "pre_edit",
        "pre_file",
        "metric_kwargs",
        "train_ds",
        "keep_original_weight",
    ]
)


def takes_columns(method: Callable[..., Returned]) -> Callable[..., Returned]:
    """Gives a method EasyEdit's arguments; it gets the requests that they mean."""

    def with_columns(
        self: Any,
        prompts: str | list[str],
        target_new: str | list[str],
        ground_truth: str | list[str] | None = None,
        target_neg: str | list[str] | None = None,
        rephrase_prompts: str | list[str] | None = None,
        locality_inputs: dict[str, Any] | None = None,
        portability_inputs: dict[str, Any] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> Returned:
        check_keywords(method.__name__, kwargs, inspect.signature(with_columns).parameters)
        requests = kwargs.pop("requests", None)
        if requests is None:
            requests = make_requests(
                prompts,
                target_new,
                ground_truth,
                target_neg,
                rephrase_prompts,
                locality_inputs,
                portability_inputs,
                subject=kwargs.get("subject"),
                loc_prompts=kwargs.get("loc_prompts"),
            )
        return method(self, usable(requests), sequential_edit, verbose, **kwargs)

    with_columns.__name__, with_columns.__doc__ = method.__name__, method.__doc__
    return with_columns


def usable(requests: Any) -> Any:
    """Returns what a caller gives as requests, data set objects included, as requests."""
    requests = as_requests(requests)
    if not isinstance(requests, Sequence) or isinstance(requests, (str, bytes)):
        return requests  # refused where requests are checked
    return [with_subject(request) for request in requests]


def check_keywords(method: str, given: Collection[str], parameters: Collection[str]) -> None:
    """Checks that a method's further keywords mean something.

    Args:
        method: Its name, for the message.
        given: The keywords that are no parameters of it.
        parameters: The names of its parameters.

    Raises:
        RequestError: Lists those that nobody knows, each with the nearest name.
    """
    known = sorted(KEYWORDS | (set(parameters) - {"self", "kwargs"}))
    problems = []
    for name in given:
        if name not in KEYWORDS:
            hint = did_you_mean(name, known, f"Known: {', '.join(known)}.")
            problems.append(f"`{name}`. {hint}")
    if problems:
        raise RequestError(one_message(f"`{method}` does not know these keywords:", problems))
