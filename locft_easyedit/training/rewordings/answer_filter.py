"""Whether a model takes a rewording for the same question: it must answer both alike.

What is compared is the model before the edit with itself, over the first tokens of its own answer
to the prompt: where a rewording asks for something else, it expects other ones. No rephrase prompt
of the data takes part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.batching import in_batches, length_sorted_batches
from ...data.forms import Forms
from ...data.tokenization import GrowingTexts, TokenizedTexts, unended_ids
from ...hparams import LocFTBFHyperParams
from ...hparams_rules import QUESTION_ANSWER
from ...modeling.devices import context_length, input_device
from ...modeling.modes import evaluation_mode
from ...modeling.sampling import padded_left, seeded
from ...prefix.runner import TextRunner
from ...prefix.shortcuts import can_pack
from .instruction import is_question

# Nats a token; half of the sum of the KL divergences in both directions. Of 30 ZsRE prompts and
# SmolLM2-135M-Instruct it keeps about two thirds of true rephrases, and an eighth of other
# questions about their subjects.
MOST_NATS = 0.3
# After a plain question most models begin a new line, whatever was asked: the first token alone
# tells other questions about a subject from rewordings hardly better than chance.
ANSWER_TOKENS = 5


class AnswerFilter:
    """Compares what a model answers to a prompt and to rewordings of it.

    A question is asked as "Question: ... Answer:", where the answer is what comes next.

    Args:
        model: The model, before the edit.
        tokenizer: Its tokenizer.
        hparams: `eval_batch_size`, `row_tokens`, `packing`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        hparams: LocFTBFHyperParams,
    ) -> None:
        self._model, self._tokenizer, self._hparams = model, tokenizer, hparams
        self._forms = Forms(tokenizer, [QUESTION_ANSWER])
        self._packed: bool | None = None if hparams.packing else False

    def divergences(self, groups: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Returns how far each rewording is from its prompt, in nats a token.

        At each of the first tokens of the answer that the model gives to the prompt: half of the
        sum of the KL divergences in both directions between what it expects there after the prompt,
        and after the rewording. The mean over the tokens; infinite where a text has no token, or
        more than the model's context.

        Args:
            groups: Prompts, each with its rewordings.
        """
        found = [[math.inf] * len(texts) for _, texts in groups]
        ids = [self._ids([prompt, *texts]) if texts else [] for prompt, texts in groups]
        usable = [i for i, one in enumerate(ids) if one and self._fits(one[0])]
        answers = self._answers([ids[i][0] for i in usable])
        growing, batches = GrowingTexts(), []
        n_texts = 0
        for i, answer in zip(usable, answers, strict=True):
            fitting = [k for k, one in enumerate(ids[i]) if self._fits(one)]  # its prompt first
            for k in fitting:
                growing.add([*ids[i][k], *answer], len(ids[i][k]))
            batches.append((i, fitting[1:], n_texts))
            n_texts += len(fitting)
        if not batches:
            return found
        runner = self._runner(growing.finished())
        with evaluation_mode(self._model), torch.no_grad(), runner.running():
            for i, fitting, first in batches:
                others = np.arange(first + 1, first + 1 + len(fitting))
                far = self._far(runner, first, others)
                for k, value in zip(fitting, far, strict=True):
                    found[i][k - 1] = value
        return found

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        asked = [self._forms.ask(1, text, "").text if is_question(text) else text for text in texts]
        return unended_ids(self._tokenizer, asked)

    def _fits(self, ids: Sequence[int]) -> bool:
        most = context_length(self._model) or math.inf
        return 0 < len(ids) <= most - ANSWER_TOKENS

    def _answers(self, begun: Sequence[list[int]]) -> list[list[int]]:
        """Returns the first tokens of the likeliest answer to each text."""
        answers: list[list[int]] = [[]] * len(begun)
        device = input_device(self._model)

        def run(batch: np.ndarray) -> None:
            # What fills up is masked: any token will do.
            ids, mask = padded_left([begun[i] for i in batch], begun[batch[0]][0])
            with seeded(self._model, 0):
                output = self._model.generate(  # type: ignore[operator]
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    do_sample=False,
                    max_new_tokens=ANSWER_TOKENS,
                    pad_token_id=begun[batch[0]][0],
                )
            for i, row in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                answers[i] = row

        lengths = np.array([len(ids) for ids in begun], np.int64)
        batches = length_sorted_batches(lengths, self._hparams.eval_batch_size)
        in_batches(batches, run, description="answering")
        return answers

    def _runner(self, texts: TokenizedTexts) -> TextRunner:
        if self._packed is None:
            with evaluation_mode(self._model), torch.no_grad():
                self._packed = can_pack(self._model, texts)
        return TextRunner(
            self._model,
            texts,
            row_tokens=self._hparams.row_tokens,
            packed=self._packed,
            prefix=None,
        )

    def _far(self, runner: TextRunner, prompt: int, others: np.ndarray) -> Iterator[float]:
        """Yields the divergence of each of the texts `others` from the text `prompt`."""
        size = self._hparams.eval_batch_size
        for start in range(0, len(others), size):
            logits, _ = runner.logits(np.array([prompt, *others[start : start + size]]))
            own, *rest = logits.float().log_softmax(-1).split(ANSWER_TOKENS)  # each [K, V]
            for one in rest:
                yield _symmetric(own, one)


def _symmetric(own: torch.Tensor, other: torch.Tensor) -> float:
    """Returns half of KL(own, other) + KL(other, own) of log-probabilities [K, V], a row."""
    apart = own != other  # a token that is impossible in both would give 0 * (inf - inf)
    p, q = own[apart], other[apart]
    return float(((p.exp() - q.exp()) * (p - q)).sum() / (2 * len(own)))
