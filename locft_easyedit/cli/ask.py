"""`locft ask`: the same question before and after an edit, plain and in chat, side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Optional

from ..delta.delta import Delta
from ..errors import HyperParamsError, RequestError
from ..evaluation.asking import answers_to
from ..hparams_rules import PLAIN
from ..modeling.loading import load_causal_lm
from ..utils.hashing import dtype_name
from ..utils.output import show
from ..utils.tables import Row, one_line, terminal_table
from .arguments import read_arguments


@dataclass(kw_only=True)
class AskConfig:
    """The arguments of `locft ask`."""

    model: str
    delta: Optional[str] = None  # noqa: UP045
    original: Optional[str] = None  # noqa: UP045
    prompt: Optional[str] = None  # noqa: UP045
    tokens: int = 48
    device: Optional[str] = None  # noqa: UP045
    dtype: Optional[str] = None  # noqa: UP045
    model_parallel: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class _Asked:
    """A model that is asked: its heading in the table, itself, and what puts an edit into it."""

    heading: str
    model: Any
    tokenizer: Any
    edited: Callable[[], AbstractContextManager[None]] = nullcontext


def main(arguments: Sequence[str]) -> int:
    """Runs `locft ask`; returns the exit status.

    Raises:
        LocFTError: The arguments, the edit, a model or the prompt cannot be used.
    """
    config = read_arguments(AskConfig, arguments, command="ask", positional=("model",))
    if config.delta is not None and config.original is not None:
        raise HyperParamsError("`delta` is asked against MODEL itself. Leave `original` out.")
    if config.tokens < 1:
        raise HyperParamsError(f"`tokens={config.tokens}` must be 1 or more.")
    models = _models(config)
    if config.prompt is not None:
        _show_answers(models, config.prompt, config.tokens)
        return 0
    for prompt in _typed():
        try:
            _show_answers(models, prompt, config.tokens)
        except RequestError as error:  # of this prompt alone
            sys.stderr.write(f"locft ask: {error}\n")
    return 0


def _models(config: AskConfig) -> list[_Asked]:
    delta = None if config.delta is None else Delta.load(config.delta)
    dtype = config.dtype or ("float32" if delta is None else dtype_name(delta.dtype))

    def load(name: str) -> tuple[Any, Any]:
        return load_causal_lm(
            name,
            device=config.device,
            dtype=dtype,
            model_parallel=config.model_parallel,
            trust_remote_code=config.trust_remote_code,
        )

    former = [] if config.original is None else [_Asked("before", *load(config.original))]
    model, tokenizer = load(config.model)
    if delta is None:
        return [*former, _Asked("after" if former else "answer", model, tokenizer)]
    if delta.verify(model).state == "applied":
        delta.revert_(model)
        sys.stdout.write(f"{config.model} has the edit; it is taken out for the answers before.\n")
    with delta.applied(model):  # says here what does not fit, not after the first answers
        pass
    return [
        _Asked("before", model, tokenizer),
        _Asked("after", model, tokenizer, lambda: delta.applied(model)),
    ]


def _show_answers(models: Sequence[_Asked], prompt: str, n_tokens: int) -> None:
    """Prints a table of the answers: a row for each form, a column for each model."""
    found: dict[str, Mapping[str, str]] = {}
    for one in models:
        with one.edited():
            found[one.heading] = answers_to(one.model, one.tokenizer, prompt, n_tokens)
    forms = dict.fromkeys(form for answers in found.values() for form in answers)
    rows = [
        Row([form, *(one_line(a.get(form, "-")) or "(nothing)" for a in found.values())])
        for form in forms
    ]
    show(
        terminal_table(
            ["asked", *found],
            rows,
            title=one_line(prompt),
            caption="The tokenizer has no chat template." if [*forms] == [PLAIN] else None,
            text_columns=1 + len(found),
        )
    )


def _typed() -> Iterator[str]:
    """Yields the lines that a user types, or that a pipe gives, until an empty one."""
    typing = sys.stdin.isatty()
    if typing:
        sys.stdout.write("Type a question, or the beginning of a sentence; an empty line ends.\n")
    while True:
        try:
            line = input("> " if typing else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line
