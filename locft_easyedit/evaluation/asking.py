"""Questions put to a model by hand: its greedy answers, plain and in chat, written to their end."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenization import Asked, asked_ids
from ..errors import RequestError
from ..hparams_rules import CHAT, PLAIN
from ..modeling.devices import context_length
from .decoding import decode_, end_tokens
from .wrappers import wrappers_for

_NO_ANSWER = "(no answer: the logits are NaN or infinite)"


def forms_of(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, Asked]:
    """Returns a prompt as it is asked: plain, and in the chat template where there is one.

    Args:
        tokenizer: The model's tokenizer.
        prompt: A question, or the beginning of a sentence.
    """
    in_chat = {wrapper.name: wrapper.ask(prompt, "") for wrapper in wrappers_for(tokenizer, [CHAT])}
    return {PLAIN: Asked(prompt, ""), **in_chat}


def answers_to(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int
) -> dict[str, str]:
    """Returns a model's greedy answers to one prompt, by the form that it is asked in.

    An answer ends at an end token, and the plain one at the end of its line: what a model writes
    after it is another text.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompt: A question, or the beginning of a sentence.
        n_tokens: Tokens of an answer at most; one that is cut off there ends in "...".

    Raises:
        RequestError: The prompt has no tokens, or none are left for the answer.
    """
    return {
        form: _answer(model, tokenizer, asked, n_tokens, one_line=form == PLAIN)
        for form, asked in forms_of(tokenizer, prompt).items()
    }


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    n_tokens: int,
    *,
    one_line: bool,
) -> str:
    [prompt] = asked_ids(tokenizer, [asked])
    context = context_length(model)
    if not prompt or (context is not None and len(prompt) + n_tokens > context):
        raise RequestError(
            f"The prompt has {len(prompt)} tokens, and an answer up to {n_tokens}; the model takes "
            f"1 to {context} in all. Ask something else, or lower `tokens`."
        )
    ends = {*end_tokens(model, tokenizer), asked.end}
    written: list[int] = []

    def text() -> str:
        return str(tokenizer.decode(written, skip_special_tokens=True)).lstrip()

    def done(_: int, grown: list[int]) -> bool:
        written[:] = grown[len(prompt) :]
        ended = written[-1] < 0 or written[-1] in ends or len(written) >= n_tokens
        return ended or (one_line and "\n" in text())

    # One prompt at a time: what is asked beside it cannot play a part.
    decode_(
        model,
        np.array([len(prompt)]),
        lambda _: list(prompt),
        lambda *_: None,
        pick=_best,
        done=done,
        batch_size=1,
        description="answer",
    )
    if written[-1] < 0:
        return _NO_ANSWER
    answer = text().partition("\n")[0] if one_line else text()
    cut = written[-1] not in ends and not (one_line and "\n" in text())
    return answer.strip() + "..." * cut


def _best(logits: torch.Tensor, *_: object) -> torch.Tensor:
    """Returns the first choices, [B], from logits [B, V]; -1 where there is none."""
    best = logits.max(dim=-1)
    return torch.where(torch.isfinite(best.values), best.indices, -1)
