"""Generalization as a choice may see it: rewordings by template, answered token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.requests import Edit
from ..data.tokenization import TokenizedTexts, tokenize_edits
from ..evaluation.predictions import ArgmaxPredictor, EvalConfig
from ..modeling.devices import context_length

# Begin so in the middle of a sentence; anything else may be a name.
_SMALL_WORDS = (
    "a an the in on at of by for from what which who whom whose where when why how was is are were "
    "do does did can could has have had to it its"
)
_QUESTION_FRAMES = (
    "Question: {prompt} Answer:",
    "Nobody in the room could tell me {lower} In the end somebody said:",
    "The train was late again. {prompt}",
    "I have a short question. {prompt} The answer is",
)
_STATEMENT_FRAMES = (
    "Complete the sentence. {prompt}",
    "As far as I know, {lower}",
    "The train was late again. {prompt}",
    "It rained all day and we stayed inside. Somebody said that {lower}",
)


class HeldOut:
    """The rewordings of edits, ready to be asked of the model.

    Nothing of the edits but prompt and target is used. With `append_eos` an end-of-sequence token
    belongs to a target.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        *,
        append_eos: bool = True,
    ) -> None:
        self.model = model
        self.texts: TokenizedTexts = tokenize_edits(
            tokenizer,
            [replace(edit, prompt=prompt) for edit in edits for prompt in reword(edit.prompt)],
            append_eos=append_eos,
            max_positions=context_length(model),
        )

    def predictor(self, how: EvalConfig) -> ArgmaxPredictor:
        """Returns what predicts the rewordings' targets, as often as wanted."""
        return ArgmaxPredictor(self.model, self.texts, how)

    def measure(self, asked: ArgmaxPredictor) -> float:
        """Returns the share of rewordings of whose target every token is the model's first choice.

        That is what greedy decoding would answer; `asked` is of `predictor`. NaN if the model's
        logits are no finite numbers.
        """
        choices = asked.take("rewordings")
        if asked.not_finite:
            return float("nan")
        return float(np.mean([choices[i] == self.texts.target(i) for i in range(len(self.texts))]))


def reword(prompt: str) -> list[str]:
    """Returns other wordings of a question or of a statement's beginning, always the same."""
    plain = prompt.strip()
    frames = _QUESTION_FRAMES if plain.endswith("?") else _STATEMENT_FRAMES
    first = plain.split(" ", 1)[0]
    within = plain[:1].lower() + plain[1:] if first.lower() in _SMALL_WORDS.split() else plain
    return [frame.format(prompt=plain, lower=within) for frame in frames]
