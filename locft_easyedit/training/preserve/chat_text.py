"""Conversations that the model writes itself, for `preserve` to measure on.

Given the beginning of its own chat template, an instruction-tuned model goes on with a question
of the kind that it was trained to answer (Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...data.forms import ChatTemplate
from ...data.tokenization import ids_of
from ...errors import ModelError
from ...modeling.sampling import TextKind, TextSampler
from ...utils.progress import progress_bar
from .moment_cache import cache_errors

# Most by itself; the others ask for facts, as edits do.
_BEGINNINGS = ("", "", "", "What", "Who", "Which", "Where", "When")
_BATCH = 32
_QUESTION_TOKENS, _ANSWER_TOKENS = 40, 6
_FEWEST_WORDS = 3  # a shorter question asks for nothing
_MOST_ROUNDS = 40


def chat_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    n_tokens: int,
    *,
    cache: Path | None,
    seed: int = 0,
    progress: bool,
) -> list[list[int]]:
    """Returns conversations as tokens: the template, a question, and how its answer begins.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        template: Its chat template.
        n_tokens: Tokens of all conversations together, at least.
        cache: A folder where each round of the sampling is kept; `None` keeps nothing.
        seed: Seed of the sampling.
        progress: Show a progress bar.

    Raises:
        ModelError: The model hardly asks anything.
        OutputError: A round cannot be kept.
    """
    before = template.before_question()
    begun = ids_of(tokenizer, [before + word for word in _BEGINNINGS], special_tokens=False)
    # What decoding makes of the template, special tokens left out.
    head = str(tokenizer.decode(begun[0], skip_special_tokens=True))
    found: dict[str, list[int]] = {}
    passes = count(1)
    with progress_bar(
        desc="sampling chats, once per model", total=n_tokens, unit="token", show=progress
    ) as bar:

        def step() -> None:  # a round takes many forward passes: it moves with each
            bar.set_postfix_str(f"pass {next(passes)}")

        sampled = partial(
            TextSampler, model, tokenizer, cache=cache, seed=seed, cache_errors=cache_errors,
            on_step=step if progress else None,
        )  # fmt: skip
        questions = sampled([TextKind("chat questions", begun, _BATCH, _QUESTION_TOKENS)])
        for number in range(_MOST_ROUNDS):
            [texts] = questions.round(number).values()
            asked = [text.removeprefix(head).strip().split("\n")[0].strip() for text in texts]
            asked = [text for text in asked if len(text.split()) >= _FEWEST_WORDS]
            new = list(dict.fromkeys(text for text in asked if text not in found))
            if new:
                rendered = [template.ask(question) + template.lead for question in new]
                kind = TextKind(
                    "chat answers",
                    ids_of(tokenizer, rendered, special_tokens=False),
                    len(rendered),
                    _ANSWER_TOKENS,
                )
                [whole] = sampled([kind]).round(0).values()
                alone = tokenizer.batch_decode(list(kind.beginnings), skip_special_tokens=True)
                complete = [
                    text + answered.removeprefix(own)
                    for text, answered, own in zip(rendered, whole, alone, strict=True)
                ]
                ids = ids_of(tokenizer, complete, special_tokens=False)
                found.update(zip(new, ids, strict=True))
            n_found = sum(map(len, found.values()))
            bar.update(min(n_found, n_tokens) - bar.n)
            if n_found >= n_tokens:
                return list(found.values())
    raise ModelError(
        f"The model hardly asks anything in its chat template: {len(found)} questions in "
        f"{_MOST_ROUNDS * _BATCH} tries. Leave `chat` out of `forms`, or `sampled` out of "
        "`preserve`."
    )
