"""Taking facts out: their prompts go back to what the base model says to them.

What the base says is found by asking it: its matrices are kept, and everything below them is as it
was. It is more than the first token. The base answers with words of its own, and a model that is
brought back at the tokens of the *target* alone need not write those. So each prompt is brought
back with the base's own greedy answer, at every token of it: first in closed form (see `removal`),
then, where that does not suffice, by training towards the base's distribution (KL divergence). That
a fact is out is checked where it shows: the model's first choices are the base's, token by token,
and its distributions there are close to the base's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenization import TokenizedTexts
from ..distributed.world import World
from ..evaluation.decoding import decode_, end_tokens, stop_tokens
from ..evaluation.generated import MAX_NEW_TOKENS
from ..evaluation.greedy_decoder import decode_streamed_
from ..evaluation.predictions import EvalConfig
from .dealing import whole_batches
from .runner import LedgerRunner

# Mean divergence from the base, in nats a token, below which a prompt counts as back. On
# SmolLM2-135M the base's answers were back at 0.1 to 0.4; what an edit moves on other prompts of
# the kind is a few nats. A limit of 0.05 took three times as many texts.
MOST_DIVERGENCE = 0.25
# Log-probabilities of the base, in nats, between which it counts as undecided: it holds the token
# at least half as likely as its own. To ask for more would be to ask for more than is true of
# prompts that nothing was done to: with 100 facts in, 2 of 50 others get the base's very words in a
# chat.
NEAR = math.log(2)


@dataclass(frozen=True, eq=False)
class Returned:
    """Texts that are to be as in the base model.

    Attributes:
        texts: The prompts, each with the base's answer.
        asked: Which of them are checked, and not only trained, [A].
    """

    texts: TokenizedTexts
    asked: np.ndarray


def texts_to_return(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: TokenizedTexts,
    checked: Sequence[bool],
    *,
    how: EvalConfig,
    max_positions: int | None,
    world: World,
) -> Returned:
    """Returns the texts that bring prompts back to the base model.

    Args:
        model: The model with the base's matrices.
        tokenizer: Its tokenizer.
        texts: The prompts with their targets.
        checked: Whether each is checked, and not only trained.
        how: How they are run; with the stream, if frozen layers are on disk.
        max_positions: The model's context in tokens.
        world: The processes, each of which asks some of the prompts.

    Raises:
        RankError: Another process has failed.
    """
    prompts = [
        texts.ids[texts.offsets[i] : texts.offsets[i] + texts.target_start[i]].tolist()
        for i in range(len(texts))
    ]
    own = whole_batches(world, np.array([*map(len, prompts)]), how.batch_size)
    with world.sharing_errors():
        found = base_answers(
            model, tokenizer, [prompts[i] for i in own], how=how, max_positions=max_positions
        )
    answer_of = {
        i: answer
        for numbers, answers in world.all_gather((own.tolist(), found))
        for i, answer in zip(numbers, answers, strict=True)
    }
    answers = [answer_of[i] for i in range(len(prompts))]
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    returned = TokenizedTexts.from_lists(whole, [*map(len, prompts)])
    return Returned(returned, np.flatnonzero(checked))


def base_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    how: EvalConfig,
    max_positions: int | None,
) -> list[list[int]]:
    """Returns the model's greedy answer to each prompt, as tokens with the one that ends it.

    An answer ends as those of `evaluation.generated` do: at the end of sequence, a full stop or a
    line end, or after so many tokens. Frozen layers that are on disk are read once a token, for all
    prompts together. Arguments are those of `texts_to_return`.
    """
    last = {*end_tokens(model, tokenizer), *stop_tokens(tokenizer)}
    found: list[list[int]] = [[] for _ in prompts]
    room = [
        min(MAX_NEW_TOKENS, (max_positions or len(p) + MAX_NEW_TOKENS) - len(p)) for p in prompts
    ]

    def pick(logits: torch.Tensor, texts: np.ndarray, grown: list[list[int]]) -> torch.Tensor:
        return logits.argmax(-1)

    def done(i: int, ids: list[int]) -> bool:
        answer = ids[len(prompts[i]) :]
        return answer[-1] in last or answer[-1] < 0 or len(answer) >= room[i]

    description = "the base's answers"
    if how.stream is not None:
        sequences = [[*ids] for ids in prompts]
        decode_streamed_(model, sequences, done, how, description)
        # Where logits were no finite numbers there is no first choice: any token stands for it.
        return [
            [max(token, 0) for token in ids[len(prompt) :]]
            for ids, prompt in zip(sequences, prompts, strict=True)
        ]

    def end(i: int, ids: list[int]) -> None:
        found[i] = ids[len(prompts[i]) :]

    decode_(
        model,
        np.array([*map(len, prompts)]),
        lambda i: list(prompts[i]),
        end,
        pick=pick,
        done=done,
        batch_size=how.batch_size,
        description=description,
        progress=how.progress,
    )
    return found


def not_back(runner: LedgerRunner, asked: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns those of these texts to which the model does not answer as the base does, ascending.

    Args:
        runner: What runs the texts, with the base's outputs.
        asked: The texts with the base's answers, [A].
        batch_size: Texts a forward pass.
    """
    wrong, divergence = runner.away(asked, batch_size, NEAR)
    found: np.ndarray = asked[wrong | (divergence > MOST_DIVERGENCE)]
    return found
