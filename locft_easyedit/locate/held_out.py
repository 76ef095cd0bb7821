"""Generalization as a choice may see it: rewordings by template, answered token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..devices import context_length, input_device
from ..evaluate.choices import FirstChoices, HowToRun
from ..requests import Edit
from ..tokens import TokenizedTexts, tokenize_edits
from .rewordings import reword


class HeldOut:
    """The rewordings of edits, ready to be asked of the model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        edits: The edits; nothing of them but prompt and target is used.
        append_eos: Whether an end-of-sequence token belongs to a target.
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

    def ready(self, how: HowToRun) -> FirstChoices:
        """Returns what asks the model, as often as wanted.

        Args:
            how: How texts are run.
        """
        return FirstChoices(self.model, self.texts, how, alone=self._alone)

    def measure(self, asked: FirstChoices) -> float:
        """Returns the share of rewordings of whose target every token is the model's first choice.

        That is what greedy decoding would answer. NaN if the model's logits are no finite numbers.

        Args:
            asked: What asks the model (see `ready`).
        """
        choices = asked.take("rewordings")
        if asked.not_finite:
            return float("nan")
        return float(np.mean([choices[i] == self.texts.target(i) for i in range(len(self.texts))]))

    def _alone(self, i: int) -> list[int]:
        """Returns text i's first choices from a plain forward pass of its own."""
        ids = torch.from_numpy(self.texts.ids[self.texts.offsets[i] : self.texts.offsets[i + 1]])
        ids = ids[None, :-1].to(input_device(self.model))
        logits = self.model(input_ids=ids, use_cache=False).logits[0]
        choices: list[int] = logits[int(self.texts.target_start[i]) - 1 :].argmax(-1).tolist()
        return choices
